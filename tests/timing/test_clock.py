"""The clocks, as far as logic goes: absolute speed is never tested on a CPU."""

import time

import pytest

from fp4bench.devices import find_device
from fp4bench.timing import clock
from fp4bench.timing.clock import CpuClock, clock_for


def test_the_cpu_clock_reads_the_time_of_one_call():
    measurement = CpuClock().measure([lambda: time.sleep(0.005)])
    assert all(0.005 <= seconds < 0.05 for seconds in measurement.seconds)


def test_short_calls_share_a_sample():
    measurement = CpuClock().measure([lambda: None])
    assert measurement.calls_per_sample > 100
    assert CpuClock.fewest < len(measurement.seconds) <= CpuClock.most


def test_a_slow_call_gets_the_fewest_samples_and_no_more():
    calls = []
    measurement = CpuClock().measure([lambda: (calls.append(1), time.sleep(0.05))])
    assert len(measurement.seconds) == CpuClock.fewest
    assert measurement.calls_per_sample == 1
    assert len(calls) == CpuClock.fewest + 2  # two to estimate


def test_samples_are_kept_in_time_order(monkeypatch):
    """By a time that passes in calls alone."""
    now, delays = [0.0], [0.02, 0.02] + [0.004 * i for i in range(1, 20)]
    rest = iter(delays)

    def call():
        now[0] += next(rest)

    monkeypatch.setattr(clock, "perf_counter", lambda: now[0])
    measurement = CpuClock().measure([call])
    assert measurement.seconds == pytest.approx(delays[2 : 2 + CpuClock.fewest])


def test_a_measurement_says_its_clock_and_cache_state():
    measurement = CpuClock().measure([lambda: None])
    assert (measurement.clock, measurement.l2) == ("perf_counter", "warm")


def test_the_device_decides_the_clock():
    assert isinstance(clock_for(find_device("cpu")), CpuClock)


def test_a_drill_idles_inside_of_what_is_timed():
    plain = CpuClock().measure([lambda: time.sleep(0.005)])
    slow = CpuClock().measure([lambda: time.sleep(0.005)], slowdown=0.5)
    assert min(slow.seconds) > 0.0075
    assert min(plain.seconds) < 0.0075


@pytest.fixture
def cuda_clock():
    return clock_for(find_device("cuda"))


def middle(values):
    return sorted(values)[len(values) // 2]


@pytest.mark.gpu
def test_the_stamped_clock_times_a_copy(cuda_clock):
    import torch

    x = torch.randn(1 << 28, device="cuda")
    y = torch.empty_like(x)
    measured = cuda_clock.measure([lambda: torch.neg(x, out=y)], 2 << 30)
    # 1 GiB read and 1 GiB written: between 100 GB/s and 20 TB/s on any GPU of this project.
    assert 1e-4 < middle(measured.seconds) < 2e-2
    assert (measured.clock, measured.l2, measured.pace) == ("cuda_graph_stamps", "cold", "paced")
    assert 300 < middle(measured.sm_mhz) < 4000
    # Events hold the launch of the graph too: some 20 us (H200) of at least 2 ms.
    assert middle(measured.event_seconds) == pytest.approx(middle(measured.seconds), rel=0.03)
    assert measured.kernels
    assert len(measured.kernels) == 1


@pytest.mark.gpu
def test_rotation_keeps_operands_out_of_the_l2(cuda_clock):
    import torch

    size = 12 << 20  # 24 MiB a copy and its source: warm in any L2 of a data center GPU
    made = [
        (torch.randn(size // 4, device="cuda"), torch.empty(size // 4, device="cuda"))
        for _ in range(cuda_clock.copies(2 * size))
    ]
    assert len(made) > 2
    calls = [lambda x=x, y=y: y.copy_(x) for x, y in made]
    cold = cuda_clock.measure(calls, 2 * size)
    warm = clock_for(find_device("cuda"), warm=True).measure(calls[:1], 2 * size)
    assert (cold.l2, warm.l2) == ("cold", "warm")
    assert middle(cold.seconds) > 1.2 * middle(warm.seconds)


@pytest.mark.gpu
def test_sustained_timing_rests_nowhere():
    import torch

    x = torch.randn(8192, 8192, dtype=torch.bfloat16, device="cuda")
    y = torch.empty_like(x)
    calls = [lambda: torch.mm(x, x, out=y)]
    paced, sustained = (clock_for(find_device("cuda"), pace).measure(calls, 3 * x.nbytes) for pace in ("paced", "sustained"))
    assert (paced.pace, sustained.pace, sustained.gap_seconds) == ("paced", "sustained", 0.0)
    # At the power limit it is slower, or there is none to reach.
    assert middle(sustained.seconds) > 0.98 * middle(paced.seconds)


@pytest.mark.gpu
@pytest.mark.parametrize("size", [1 << 12, 1 << 28])  # overwritten L2; large operands
@pytest.mark.parametrize("slowdown", [0.05, 0.5])
def test_a_drill_slows_down_by_what_it_says(cuda_clock, size, slowdown):
    import torch

    x = torch.randn(size, device="cuda")
    y = torch.empty_like(x)
    # Three graphs of each, in turn: one that was captured in a moment of cheap launches (`steadiness`) is faster, and stays so.
    asked = (0.0, slowdown) * 3
    found = [cuda_clock.measure([lambda: y.copy_(x)], 8 * size, of) for of in asked]
    seconds = [middle([middle(one.seconds) for one in found[first::2]]) for first in (0, 1)]
    cycles = [middle([middle(one.cycles) for one in found[first::2]]) for first in (0, 1)]
    assert seconds[1] / seconds[0] - 1 == pytest.approx(slowdown, rel=0.15)
    assert cycles[1] > cycles[0]


@pytest.mark.gpu
def test_what_cannot_be_captured_is_timed_by_events(cuda_clock):
    import torch

    x = torch.randn(1 << 20, device="cuda")
    measured = cuda_clock.measure([lambda: x.sum().item()], x.nbytes)  # waits for the device
    assert measured.clock == "cuda_events"
    assert measured.cycles is None
    # The device is as usable as before, and the stream is the one that it was.
    assert torch.cuda.current_stream() == torch.cuda.default_stream()
    assert cuda_clock.measure([lambda: x.sum()], x.nbytes).clock == "cuda_graph_stamps"


@pytest.mark.gpu
def test_an_error_of_the_call_is_not_taken_for_one_of_capturing(cuda_clock):
    with pytest.raises(ZeroDivisionError):
        cuda_clock.measure([lambda: 1 / 0], 8)


@pytest.mark.gpu
def test_a_failed_capture_leaves_a_shared_memory_usable():
    import torch

    from fp4bench.timing.graphs import GraphMemory

    device = find_device("cuda")
    clock = clock_for(device, memory=GraphMemory(1 << 28, device.torch_name))
    x = torch.randn(1 << 20, device="cuda")
    assert clock.measure([lambda: x.sum().item()], x.nbytes).clock == "cuda_events"
    assert clock.measure([lambda: x.sum()], x.nbytes).clock == "cuda_graph_stamps"


def test_a_cpu_has_no_other_way_to_launch():
    assert CpuClock().eager_seconds([lambda: None], 8) is None


@pytest.mark.gpu
def test_calls_without_a_graph_take_their_launches_or_their_work(cuda_clock):
    import torch

    small = [torch.randn(1 << 24, device="cuda") for _ in range(cuda_clock.copies(1 << 27))]
    tiny = torch.zeros(1, device="cuda")
    # Launches of 40 kernels of nothing: in a graph they cost the GPU a third of what they cost the host.
    calls = [lambda x=x: ([tiny.add_(1) for _ in range(40)], x.neg_()) for x in small]
    graph, eager = cuda_clock.measure(calls, 1 << 27), cuda_clock.eager_seconds(calls, 1 << 27, 0.01)
    assert eager > 1.2 * middle(graph.seconds)
    # Sixteen calls, so that the first launch and the wait at the end, some 20 us (H200), are little beside them.
    large = torch.randn(1 << 28, device="cuda")
    calls = [large.neg_] * 16
    graph, eager = cuda_clock.measure(calls, 2 << 30), cuda_clock.eager_seconds(calls, 2 << 30, 0.01)
    assert eager == pytest.approx(middle(graph.seconds), rel=0.03)
    assert cuda_clock.eager_seconds(calls, 1 << 10, 0.01) is None  # no rotation would keep so little cold
