"""The clocks, as far as logic goes: absolute speed is never tested on a CPU."""

import time

import pytest

from fp4bench.devices import find_device
from fp4bench.timing.clock import CpuClock, CudaEventClock, clock_for


def test_the_cpu_clock_reads_the_time_of_one_call():
    measurement = CpuClock().measure(lambda: time.sleep(0.005))
    assert all(0.005 <= seconds < 0.05 for seconds in measurement.seconds)


def test_short_calls_share_a_sample():
    measurement = CpuClock().measure(lambda: None)
    assert measurement.calls_per_sample > 100
    assert CpuClock.fewest < len(measurement.seconds) <= CpuClock.most


def test_a_slow_call_gets_the_fewest_samples_and_no_more():
    calls = []
    measurement = CpuClock().measure(lambda: (calls.append(1), time.sleep(0.05)))
    assert len(measurement.seconds) == CpuClock.fewest
    assert measurement.calls_per_sample == 1
    assert len(calls) == CpuClock.fewest + 2  # two to estimate


def test_samples_are_kept_in_time_order():
    delays = iter([0.02, 0.02] + [0.004 * i for i in range(1, 20)])
    measurement = CpuClock().measure(lambda: time.sleep(next(delays)))
    assert list(measurement.seconds) == sorted(measurement.seconds)


def test_a_measurement_says_its_clock_and_cache_state():
    measurement = CpuClock().measure(lambda: None)
    assert (measurement.clock, measurement.l2) == ("perf_counter", "warm")


def test_the_device_decides_the_clock():
    assert isinstance(clock_for(find_device("cpu")), CpuClock)


@pytest.mark.gpu
def test_the_event_clock_times_a_copy_cold():
    import torch

    device = find_device("cuda")
    x = torch.randn(1 << 28, device=device.torch_name)
    y = torch.empty_like(x)
    measurement = CudaEventClock(device).measure(lambda: y.copy_(x))
    # 1 GiB read and 1 GiB written: between 100 GB/s and 20 TB/s on any GPU of this project.
    assert 1e-4 < sorted(measurement.seconds)[len(measurement.seconds) // 2] < 2e-2
    assert measurement.l2 == "cold"
