"""Calls captured in a CUDA graph that nothing serves from L2, with clock stamps around them."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from hashlib import sha256
from typing import Any

import torch

from fp4bench.devices import Device

Call = Callable[[], Any]

# Copies of operands together exceed the L2 this many times before a call meets the first again. Twice leaves some lines:
# replacement is not strictly least recently used.
L2_TIMES = 3
# More copies than this cost more to prepare than they are worth; then a write of twice the L2 before each call evicts instead.
MOST_COPIES = 32


# At least so many copies of operands up to so many bytes. Where one lies changes its time by percents, and the mean over
# several changes less. And a single copy near 1 GB is read in one of two times, 8 % apart (BF16 at m = 1, NVIDIA H200), as if
# address translation just held it or just did not; several are always beyond.
_PLACEMENTS = ((1 << 29, 4), (1 << 32, 2))


def copies_needed(bytes_touched: int, l2_bytes: int) -> int:
    """How many copies of a case's operands keep it cold by rotation; 1 if one call alone does, or if no rotation can."""
    if must_flush(bytes_touched, l2_bytes):
        return 1
    fewest = next((copies for limit, copies in _PLACEMENTS if bytes_touched <= limit), 1)
    return max(fewest, -(-L2_TIMES * l2_bytes // bytes_touched))


def must_flush(bytes_touched: int, l2_bytes: int) -> bool:
    """Whether a case is so small that only an overwritten L2 makes it cold."""
    return -(-L2_TIMES * l2_bytes // bytes_touched) > MOST_COPIES


@dataclass(frozen=True)
class Reading:
    """One replay: seconds, SM cycles (None without stamps) and seconds by CUDA events, each of one call.

    launches: seconds and SM cycles of a chain of tiny kernels in the same graph, where it has one: what a launch costs in it.
    """

    seconds: float
    cycles: float | None
    event_seconds: float
    launches: tuple[float, float] | None = None

    @property
    def sm_mhz(self) -> float | None:
        return None if self.cycles is None else self.cycles / self.seconds * 1e-6


class GraphMemory:
    """One memory pool for all graphs of a clock, reserved before the first: where their outputs lie does not depend on which
    graphs there were before. Graphs of one pool must not need each other's outputs. After a capture that failed there is none.
    """

    def __init__(self, size: int, device: str) -> None:
        self.handle: Any = torch.cuda.graph_pool_handle()
        # The pool lives as long as a graph that was captured in it.
        self._keeper = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self._keeper, pool=self.handle, capture_error_mode="thread_local"):
            block = torch.empty(size, dtype=torch.int8, device=device)
            # Up to 1 MiB the allocator takes from segments of 2 MiB, apart from larger ones.
            small = [torch.empty(1 << 20, dtype=torch.int8, device=device) for _ in range(_SMALL_BLOCKS)]
            small[0].zero_()  # an empty graph is warned of
        del block, small

    def abandon(self) -> None:
        """Let each graph have a pool of its own: torch takes one in which a capture failed for being captured still."""
        self.handle = None


_SMALL_BLOCKS = 64


class TimedGraph:
    """`rounds` rounds of all calls in one graph. `read` replays it once.

    With a flush, each call stands between its own stamps and the L2 is overwritten before it; otherwise one pair of stamps
    brackets all calls. `delay` seconds are spent inside the brackets, for drills; `delayed` tells whether they were. `chain`,
    tiny kernels that tell what launches cost, stands before all calls between stamps of its own.
    """

    def __init__(
        self,
        calls: Sequence[Call],
        rounds: int,
        device: Device,
        flush: torch.Tensor | None = None,
        delay: float = 0.0,
        memory: GraphMemory | None = None,
        chain: Call | None = None,
    ) -> None:
        assert device.sm_count is not None
        self.calls = len(calls) * rounds
        self._flush, self._chain = flush, chain
        self._brackets = self.calls if flush is not None else 1
        self._stamps = _stamps(self._brackets + (chain is not None), device)
        self._delay, self._told = delay, torch.zeros(1, dtype=torch.int64, device=device.torch_name) if delay else None
        self._graph = torch.cuda.CUDAGraph()
        self._events = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        with torch.cuda.graph(self._graph, pool=memory.handle if memory else None, capture_error_mode="thread_local"):
            self._capture(calls, rounds)
        torch.cuda.synchronize()

    def _capture(self, calls: Sequence[Call], rounds: int) -> None:
        # Each call's output lives until its copy is called again: outputs are as cold as operands.
        kept: list[Any] = [None] * len(calls)
        stamps, flush = self._stamps, self._flush
        if stamps and self._chain:
            stamps.start(self._brackets)
            self._chain()
            stamps.stop(self._brackets)
        if stamps and flush is None:
            stamps.start()
        for number in range(self.calls):
            if flush is not None:
                flush.zero_()
            if stamps and flush is not None:
                stamps.start(number)
            kept[number % len(calls)] = calls[number % len(calls)]()
            if number == self.calls - 1 and self._delay:
                from fp4bench.timing.stamps import spin

                spin(round(self._delay * 1e9), self._told)
            if stamps and flush is not None:
                stamps.stop(number)
        if stamps and flush is None:
            stamps.stop()

    def delayed(self) -> bool:
        """Whether the delay, where there is one, was spent in the last replay that was read."""
        return self._told is None or float(self._told) >= 0.999 * self._delay * 1e9

    def replay(self) -> None:
        """Queue one replay that is not read."""
        self._graph.replay()

    def read(self) -> Reading:
        """Replay once, wait, and read the clocks."""
        start, stop = self._events
        if self._stamps:
            self._stamps.clear()
        start.record()
        self._graph.replay()
        stop.record()
        if self._stamps:
            self._stamps.fetch()
        torch.cuda.synchronize()
        by_events = start.elapsed_time(stop) * 1e-3 / self.calls
        if not self._stamps:
            return Reading(by_events, None, by_events)
        elapsed = self._stamps.read()
        timed, chain = elapsed[: self._brackets], elapsed[self._brackets :]
        launches = (chain[0].seconds, chain[0].cycles) if chain else None
        seconds, cycles = (sum(values) / self.calls for values in zip(*((e.seconds, e.cycles) for e in timed), strict=True))
        return Reading(seconds, cycles, by_events, launches)


def stamps_available(device: Device) -> bool:
    """Whether clock stamps can run: they are Triton kernels."""
    return no_stamps(device) is None


@lru_cache
def no_stamps(device: Device) -> str | None:
    """Why clock stamps cannot run here, or None. Triton may be missing, or lack the C compiler that its launchers need."""
    try:
        from fp4bench.timing.stamps import Stamps

        assert device.sm_count is not None
        Stamps(1, device.sm_count, device.torch_name).start()
        torch.cuda.synchronize(device.torch_name)
    except Exception as error:  # whatever Triton raises
        return f"{type(error).__name__}: {error}".partition("\n")[0]
    return None


def _stamps(pairs: int, device: Device) -> Any:
    """Stamps, or None where they cannot run."""
    if not stamps_available(device):
        return None
    from fp4bench.timing.stamps import Stamps

    assert device.sm_count is not None
    return Stamps(pairs, device.sm_count, device.torch_name)


# A graph of more kernels than this is named by their number and a hash: eager code would fill a record with names.
_MOST_NAMES = 8
_SUMMARY = " kernels, sha256 "


def kernels_of(call: Call, memory: GraphMemory | None = None) -> tuple[str, ...] | None:
    """`name(grid)x(block)` of the kernels of one call, in the graph's order; None where the CUDA bindings are not installed."""
    try:
        from cuda.bindings import driver
    except ModuleNotFoundError:
        return None
    graph = torch.cuda.CUDAGraph(keep_graph=True)
    with torch.cuda.graph(graph, pool=memory.handle if memory else None, capture_error_mode="thread_local"):
        kept = call()
    del kept
    raw = driver.CUgraph(graph.raw_cuda_graph())
    _, _, count = driver.cuGraphGetNodes(raw)
    _, nodes, _ = driver.cuGraphGetNodes(raw, count)
    names = [name for name in (_kernel(driver, node) for node in nodes) if name]
    if len(names) <= _MOST_NAMES:
        return tuple(names)
    digest = sha256("\n".join(sorted(names)).encode()).hexdigest()[:12]
    return (f"{len(names)}{_SUMMARY}{digest}",)


def is_chain(kernels: tuple[str, ...] | None) -> bool:
    """Whether a call is so many kernels that `kernels_of` does not name them, or may be."""
    return kernels is None or any(_SUMMARY in kernel for kernel in kernels)


def _kernel(driver: Any, node: Any) -> str | None:
    error, kind = driver.cuGraphNodeGetType(node)
    if error or kind != driver.CUgraphNodeType.CU_GRAPH_NODE_TYPE_KERNEL:
        return None
    error, parameters = driver.cuGraphKernelNodeGetParams(node)
    if error:
        return None
    error, name = driver.cuFuncGetName(parameters.func) if parameters.func else driver.cuKernelGetName(parameters.kern)
    p = parameters
    grid, block = (p.gridDimX, p.gridDimY, p.gridDimZ), (p.blockDimX, p.blockDimY, p.blockDimZ)
    return None if error else f"{_short(name.decode())}{grid}x{block}".replace(" ", "")


def _short(name: str) -> str:
    """A mangled name's beginning and a hash of all of it, where it is long."""
    return name if len(name) <= 64 else f"{name[:52]}~{sha256(name.encode()).hexdigest()[:8]}"
