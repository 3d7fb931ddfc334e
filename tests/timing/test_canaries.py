"""The canaries: work that is not ours, its rates, and how a reading looks. On the CPU, and on a GPU where there is one."""

from dataclasses import replace
from types import SimpleNamespace

import pytest

from fp4bench.devices import find_device
from fp4bench.timing.canaries import Canary, Ceilings, canaries, canary_clock, ceilings, read
from fp4bench.timing.clock import CpuClock, Measurement

CPU = find_device("cpu")
HOPPER = replace(CPU, capability=(9, 0))


class Made:
    """A clock that reads what it was given."""

    def __init__(self, **measured):
        self.measured = measured

    def measure(self, calls, bytes_touched, slowdown=0.0):
        assert len(calls) == 1
        assert slowdown == 0.0
        calls[0]()
        return Measurement(calls_per_sample=1, clock="cuda_graph_stamps", l2="warm", **self.measured)


def test_a_reading_is_the_medians_of_its_samples():
    canary = Canary("copy", lambda: None, bytes=8)
    clock = Made(seconds=(3.0, 1.0, 2.0), cycles=(30.0, 10.0, 20.0), sm_mhz=(1.0, 9.0, 2.0))
    assert read(canary, clock) == {"name": "copy", "seconds": 2.0, "cycles": 20.0, "sm_mhz": 2.0}


def test_a_clock_without_stamps_reads_seconds_alone():
    reading = read(Canary("copy", lambda: None), Made(seconds=(3.0, 1.0, 2.0)))
    assert reading == {"name": "copy", "seconds": 2.0, "cycles": None, "sm_mhz": None}


def test_ceilings_are_rates_of_the_work_over_its_time():
    made = (Canary("bf16", int, flops=6 * 10**12), Canary("copy", int, bytes=4 * 10**9), Canary("launches", int))
    seconds = {"bf16": 0.5, "copy": 2.0}
    assert ceilings(made, seconds.__getitem__) == Ceilings(copy_gbps=2.0, bf16_tflops=12.0, fp8_tflops=None)
    made += (Canary("fp8", int, flops=10**12),)
    assert ceilings(made, (seconds | {"fp8": 0.25}).__getitem__).fp8_tflops == 4.0


def test_the_canaries_of_a_cpu_do_the_work_that_they_count():
    made = {canary.name: canary for canary in canaries(CPU)}
    assert list(made) == ["bf16", "copy"]
    product = made["bf16"].call()
    assert made["bf16"].flops == 2 * product.shape[0] * product.shape[1] * product.shape[0]
    assert made["copy"].bytes == 2 * made["copy"].call().nbytes


def test_a_canary_is_the_same_work_in_each_call():
    copy = canaries(CPU)[1]
    first = copy.call()
    before = first.clone()
    assert copy.call().data_ptr() == first.data_ptr()
    assert before.equal(first)


@pytest.fixture
def fp8(monkeypatch):
    """An FP8 product that a CPU can do. The others of a GPU are of its size: 3 s and 2.5 GiB on a CPU."""
    made = SimpleNamespace(name="fp8", call=lambda: None)
    monkeypatch.setattr("fp4bench.timing.canaries._fp8_product", lambda side, device: made)
    monkeypatch.setattr("fp4bench.timing.canaries._product", lambda name, side, device: SimpleNamespace(name=name))
    monkeypatch.setattr("fp4bench.timing.canaries._copy", lambda size, device: SimpleNamespace(name="copy"))
    return made


def test_only_devices_with_fp8_have_its_canary(fp8):
    assert [canary.name for canary in canaries(CPU)] == ["bf16", "copy"]
    assert [canary.name for canary in canaries(HOPPER)] == ["bf16", "copy", "launches", "fp8"]


def test_a_canary_that_this_torch_cannot_run_is_left_out(fp8):
    def call():
        raise RuntimeError("row-wise scaling is not built for this GPU")

    fp8.call = call
    assert [canary.name for canary in canaries(HOPPER)] == ["bf16", "copy", "launches"]


def test_the_clock_of_canaries_is_brief_and_leaves_that_of_cases_alone():
    clock = canary_clock(CPU)
    assert isinstance(clock, CpuClock)
    assert clock.budget_seconds < CpuClock.budget_seconds == CpuClock().budget_seconds


@pytest.mark.gpu
def test_canaries_on_a_gpu_have_cycles_and_plausible_rates():
    device = find_device("cuda")
    made = canaries(device)
    clock = canary_clock(device)
    readings = {canary.name: read(canary, clock) for canary in made}
    assert all(reading["cycles"] for reading in readings.values())
    found = ceilings(made, lambda name: readings[name]["seconds"])
    assert 100 < found.copy_gbps < 20_000
    assert 10 < found.bf16_tflops < 10_000
    assert (found.fp8_tflops is None) == (not device.has_fp8)
