"""How long one call takes: one interface, a clock for CPUs; those for CUDA are in cuda_clock.py."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from time import perf_counter
from typing import TYPE_CHECKING, Any, Protocol

from fp4bench.devices import Device

if TYPE_CHECKING:
    from fp4bench.timing.graphs import GraphMemory

Call = Callable[[], Any]


@dataclass(frozen=True)
class Measurement:
    """All samples in time order, and what makes them comparable.

    seconds: of one call, one value a sample; a sample times `calls_per_sample` calls in a row.
    clock: "cuda_graph_stamps", "cuda_graph_events", "cuda_events" or "perf_counter".
    l2: where the operands lie when a call starts: "cold" (they rotate), "cold_flush" (the cache was overwritten) or "warm".
    copies: of the operands.
    pace: "paced" or "sustained". gap_seconds: the rest before each sample.
    cycles, sm_mhz: SM cycles of one call and the SMs' mean clock, by sample; None without clock stamps.
    event_seconds: the same samples by CUDA events, a cross-check; they include the launch of the graph.
    kernels: names and grids of one call's kernels, where the graph tells them.
    retaken: how often all samples were taken anew until the device was in its usual state before and after them; None where
    nobody looked, or no usual state was found.
    """

    seconds: tuple[float, ...]
    calls_per_sample: int
    clock: str
    l2: str
    copies: int = 1
    pace: str = "paced"
    gap_seconds: float = 0.0
    cycles: tuple[float, ...] | None = None
    sm_mhz: tuple[float, ...] | None = None
    event_seconds: tuple[float, ...] | None = None
    kernels: tuple[str, ...] | None = None
    retaken: int | None = None


class Clock(Protocol):
    """Times calls that do the same work, each on a copy of the operands."""

    def copies(self, bytes_touched: int) -> int:
        """How many copies of operands of this size `measure` wants."""
        ...

    def measure(self, calls: Sequence[Call], bytes_touched: int, slowdown: float = 0.0) -> Measurement:
        """Warm up, then sample until enough is known, within bounds of time and count.

        slowdown: a share of the time that is spent idling in addition, inside of what is timed; for drills.
        """
        ...

    def eager_seconds(self, calls: Sequence[Call], bytes_touched: int, gap_seconds: float) -> float | None:
        """Seconds of a call that the host launches, one behind the other: its launches, where they take longer than its work.

        gap_seconds: the rest before a burst of calls, that of the measurement beside which this is to stand.
        None where `measure` times just that, or where such calls would find their operands in the L2.
        """
        ...


def clock_for(device: Device, pace: str = "paced", warm: bool = False, memory: GraphMemory | None = None) -> Clock:
    """The clock of a device. On a CPU there is one pace, and operands are as warm as repeated calls leave them.

    memory: of a GPU's graphs; None for a pool for each.
    """
    if not device.is_cuda:
        return CpuClock()
    from fp4bench.timing.cuda_clock import CudaClock
    from fp4bench.timing.pacing import PACES

    return CudaClock(device, PACES[pace], warm, memory)


class CpuClock:
    """Wall time on the host."""

    name = "perf_counter"

    # A sample of 2 ms is long beside the timer (50 ns). 0.15 s a case keeps the CPU set of about a hundred cases, set-up and
    # check included, within 90 s on 2 cores.
    sample_seconds = 2e-3
    budget_seconds = 0.15
    fewest, most = 7, 100

    def copies(self, bytes_touched: int) -> int:
        return 1

    def measure(self, calls: Sequence[Call], bytes_touched: int = 0, slowdown: float = 0.0) -> Measurement:
        (call,) = calls
        once = min(self._time(call, 1, slowdown), self._time(call, 1, slowdown))
        count = max(1, round(self.sample_seconds / once))
        samples = min(self.most, max(self.fewest, int(self.budget_seconds / (count * once))))
        seconds = tuple(self._time(call, count, slowdown) for _ in range(samples))
        return Measurement(seconds, count, self.name, "warm")

    def eager_seconds(self, calls: Sequence[Call], bytes_touched: int = 0, gap_seconds: float = 0.0) -> None:
        return None

    def _time(self, call: Call, calls: int, slowdown: float) -> float:
        start = perf_counter()
        for _ in range(calls):
            call()
        until = start + (perf_counter() - start) * (1 + slowdown)
        while slowdown and perf_counter() < until:
            pass
        return (perf_counter() - start) / calls
