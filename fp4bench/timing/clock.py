"""How long one call takes: a clock for CPUs and one for CUDA, with one interface."""

from collections.abc import Callable
from dataclasses import dataclass
from time import perf_counter
from typing import Any, Protocol

import torch

from fp4bench.devices import Device

Call = Callable[[], Any]


@dataclass(frozen=True)
class Measurement:
    """All samples in time order, and what makes them comparable.

    seconds: of one call, one value a sample; a sample times `calls_per_sample` calls in a row.
    clock: "perf_counter" or "cuda_events". l2: "cold" or "warm", where the operands lie when a call starts.
    """

    seconds: tuple[float, ...]
    calls_per_sample: int
    clock: str
    l2: str


class Clock(Protocol):
    """Times a call. `name` and `l2` are those of its measurements."""

    name: str
    l2: str

    def measure(self, call: Call) -> Measurement:
        """Warm up, then sample until enough is known, within bounds of time and count."""
        ...


def clock_for(device: Device) -> Clock:
    return CudaEventClock(device) if device.is_cuda else CpuClock()


class CpuClock:
    """Wall time on the host, operands as warm as repeated calls leave them."""

    name = "perf_counter"
    l2 = "warm"

    # A sample of 2 ms is long beside the timer (50 ns). 0.15 s a case keeps the CPU set of about a hundred cases, set-up and
    # check included, within 90 s on 2 cores.
    sample_seconds = 2e-3
    budget_seconds = 0.15
    fewest, most = 7, 100

    def measure(self, call: Call) -> Measurement:
        once = min(self._time(call, 1), self._time(call, 1))
        calls = max(1, round(self.sample_seconds / once))
        count = min(self.most, max(self.fewest, int(self.budget_seconds / (calls * once))))
        return Measurement(tuple(self._time(call, calls) for _ in range(count)), calls, self.name, self.l2)

    def _time(self, call: Call, calls: int) -> float:
        start = perf_counter()
        for _ in range(calls):
            call()
        return (perf_counter() - start) / calls


class CudaEventClock:
    """Device time between two events around one call, after the L2 was overwritten.

    Writing a buffer of twice the L2 before each call evicts the operands, and gives the host about 30 us (H200) to queue the
    call behind it. Longer launches show: those of calls with many kernels, and some 10 us of a single one.
    """

    name = "cuda_events"
    l2 = "cold"

    budget_seconds = 0.2
    fewest, most = 10, 200

    def __init__(self, device: Device) -> None:
        assert device.l2_bytes is not None
        self._flush = torch.empty(2 * device.l2_bytes, dtype=torch.int8, device=device.torch_name)
        self._device = device.torch_name

    def measure(self, call: Call) -> Measurement:
        once = min(self._time(call, 3))
        count = min(self.most, max(self.fewest, int(self.budget_seconds / once)))
        return Measurement(self._time(call, count), 1, self.name, self.l2)

    def _time(self, call: Call, count: int) -> tuple[float, ...]:
        with torch.cuda.device(self._device):
            events = [(torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in range(count)]
            for start, end in events:
                self._flush.zero_()
                start.record()
                call()
                end.record()
            torch.cuda.synchronize()
        return tuple(start.elapsed_time(end) * 1e-3 for start, end in events)
