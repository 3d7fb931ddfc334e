"""The clock of CUDA GPUs: calls in a CUDA graph between clock stamps, paced; CUDA events where that cannot be."""

from collections.abc import Sequence
from dataclasses import replace
from functools import cached_property
from statistics import median
from time import perf_counter, sleep

import torch

from fp4bench.devices import Device
from fp4bench.timing.clock import Call, Measurement
from fp4bench.timing.graphs import (
    GraphMemory,
    Reading,
    TimedGraph,
    copies_needed,
    is_chain,
    kernels_of,
    must_flush,
    stamps_available,
)
from fp4bench.timing.pacing import Pace, take
from fp4bench.timing.steadiness import Steadiness

# Calls without a graph are timed in so many bursts: a host's times vary by percents, and a median of fewer says less.
_EAGER_BURSTS = 9

# More nodes than this make capture and instantiation slower than what is measured: 10,000 launches take some 0.1 s.
_MOST_CALLS = 1000

# Tiny kernels in each graph of a chain: 24 us beside the 2 ms of a sample (H200).
_LAUNCHES = 20


class CudaClock:
    """Device time of calls that are captured in a CUDA graph.

    Several calls fill a sample. They work on copies of the operands that exceed the L2 together, or, where they are too small
    for that, the L2 is overwritten before each call. A warm clock does neither. Paced samples of a chain of kernels are taken
    anew where launches cost something else than usual in their graph (`steadiness`).

    memory: the pool that its graphs share, or None for one of their own.
    """

    def __init__(self, device: Device, pace: Pace, warm: bool = False, memory: GraphMemory | None = None) -> None:
        assert device.l2_bytes is not None
        self._memory = memory
        self._device, self._l2_bytes, self._pace, self._warm = device, device.l2_bytes, pace, warm
        self._flush = torch.empty(0 if warm else 2 * device.l2_bytes, dtype=torch.int8, device=device.torch_name)
        self._launches = _launches(device)
        # A rest before samples are taken anew would end the state that a sustained pace is to measure.
        self._steadiness = self._steady() if pace.gap_seconds and stamps_available(device) else None

    def _steady(self) -> Steadiness:
        # As cold as in the graphs of cases: there a launch costs 2870 cycles, and 2310 where the L2 holds the chain (H200).
        flush = None if self._warm else self._flush
        with torch.cuda.device(self._device.torch_name):
            alone = TimedGraph([self._launches], 1, self._device, flush, chain=self._launches)
            return Steadiness(_launch_cost([alone.read() for _ in range(5)]))

    def copies(self, bytes_touched: int) -> int:
        return 1 if self._warm else copies_needed(bytes_touched, self._l2_bytes)

    def measure(self, calls: Sequence[Call], bytes_touched: int, slowdown: float = 0.0) -> Measurement:
        with torch.cuda.device(self._device.torch_name):
            calls[0]()  # what a library sets up at its first call cannot be captured
            flush = self._flush if not self._warm and must_flush(bytes_touched, self._l2_bytes) else None
            stream = torch.cuda.current_stream()
            try:
                once = TimedGraph(calls, 1, self._device, flush, memory=self._memory)
            except RuntimeError as error:
                if not _not_capturable(error):
                    raise
                torch.cuda.set_stream(stream)  # a capture that failed leaves its own behind
                if self._memory:
                    self._memory.abandon()
                return self._measure_eagerly(calls[0], slowdown)
            return self._measure_graphs(once, calls, flush, slowdown)

    def eager_seconds(self, calls: Sequence[Call], bytes_touched: int, gap_seconds: float) -> float | None:
        """The median over bursts of calls without a graph, by the host's clock from the first launch to the last result."""
        if not self._warm and must_flush(bytes_touched, self._l2_bytes):
            return None
        with torch.cuda.device(self._device.torch_name):
            self._burst(calls, 1)
            rounds = max(1, round(self._pace.burst_seconds / len(calls) / self._burst(calls, 1)))
            return median(self._burst(calls, rounds, gap_seconds) for _ in range(_EAGER_BURSTS))

    def _burst(self, calls: Sequence[Call], rounds: int, gap_seconds: float = 0.0) -> float:
        """Seconds of one call, after a rest."""
        torch.cuda.synchronize()
        sleep(gap_seconds)
        start = perf_counter()
        for _ in range(rounds):
            for call in calls:
                call()
        torch.cuda.synchronize()
        return (perf_counter() - start) / (rounds * len(calls))

    def _measure_graphs(
        self, once: TimedGraph, calls: Sequence[Call], flush: torch.Tensor | None, slowdown: float
    ) -> Measurement:
        once.read()
        seconds = once.read().seconds
        rounds = max(1, min(round(self._pace.burst_seconds / seconds), _MOST_CALLS) // len(calls))
        delay = max(0.0, slowdown * seconds * rounds * len(calls) - self._spin_overhead) if slowdown else 0.0

        kernels = kernels_of(calls[0], self._memory)
        guard = self._steadiness if is_chain(kernels) else None

        def sampled() -> tuple[list[Reading], float, int]:
            alone = rounds == 1 and not slowdown and not guard
            chain = self._launches if guard else None
            graph = once if alone else TimedGraph(calls, rounds, self._device, flush, delay, self._memory, chain)
            readings, gap = take(graph.read, self._pace)
            if not graph.delayed():
                raise RuntimeError(f"a delay of {delay * 1e6:.1f} us was asked for, and less was spent: this drills nothing")
            return readings, gap, graph.calls

        (readings, gap, timed), retaken = (
            guard.under(sampled, lambda taken: _launch_cost(taken[0])) if guard else (sampled(), None)
        )
        l2 = "warm" if self._warm else "cold" if flush is None else "cold_flush"
        found = self._measurement(readings, timed, l2)
        return replace(found, copies=len(calls), gap_seconds=gap, kernels=kernels, retaken=retaken)

    def _measurement(self, readings: Sequence[Reading], calls: int, l2: str) -> Measurement:
        stamped = stamps_available(self._device)
        flushed = l2 == "cold_flush"  # events around the graph then hold the flushes too
        return Measurement(
            seconds=tuple(r.seconds for r in readings),
            calls_per_sample=calls,
            clock="cuda_graph_stamps" if stamped else "cuda_graph_events",
            l2=l2,
            pace=self._pace.name,
            cycles=tuple(r.cycles or 0.0 for r in readings) if stamped else None,
            sm_mhz=tuple(r.sm_mhz or 0.0 for r in readings) if stamped else None,
            event_seconds=None if flushed else tuple(r.event_seconds for r in readings),
        )

    @cached_property
    def _spin_overhead(self) -> float:
        """Seconds that a delay of no length takes in a graph: its launch."""
        from fp4bench.timing.stamps import spin

        told = torch.zeros(1, dtype=torch.int64, device=self._device.torch_name)
        spin(0, told)
        many = TimedGraph([lambda: spin(0, told)], 200, self._device)
        few = TimedGraph([lambda: spin(0, told)], 100, self._device)
        many.read(), few.read()
        return (many.read().seconds * 200 - few.read().seconds * 100) / 100

    def _measure_eagerly(self, call: Call, slowdown: float) -> Measurement:
        """By events around each call, for calls that cannot be captured.

        Overwriting the L2 gives the host about 30 us (H200) to queue the call behind it. Longer launches show.
        """

        def read() -> Reading:
            start, stop = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            if not self._warm:
                self._flush.zero_()
            start.record()
            call()
            if delay:
                from fp4bench.timing.stamps import spin

                spin(delay)
            stop.record()
            stop.synchronize()
            seconds = start.elapsed_time(stop) * 1e-3
            return Reading(seconds, None, seconds)

        delay = 0
        delay = round(1e9 * slowdown * min(read().seconds for _ in range(3)))
        readings, gap = take(read, self._pace)
        l2 = "warm" if self._warm else "cold_flush"
        seconds = tuple(r.seconds for r in readings)
        return Measurement(seconds, 1, "cuda_events", l2, pace=self._pace.name, gap_seconds=gap)


def _launches(device: Device) -> Call:
    """A chain of tiny kernels, ready to be captured."""
    x = torch.zeros(256, device=device.torch_name)

    def chain() -> None:
        for _ in range(_LAUNCHES):
            x.add_(1.0)

    with torch.cuda.device(device.torch_name):
        chain()
    return chain


def _launch_cost(readings: Sequence[Reading]) -> tuple[float, float]:
    """Medians of the seconds and SM cycles that a graph's chain of tiny kernels took."""
    seconds, cycles = zip(*(reading.launches for reading in readings if reading.launches), strict=True)
    return median(seconds), median(cycles)


def _not_capturable(error: RuntimeError) -> bool:
    """Whether a capture failed because of what a call does, such as waiting for the device."""
    return "captur" in str(error)
