"""One case from its inputs to its record, in a process of its own: prepare, check, time."""

import gc
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from statistics import median
from time import perf_counter
from typing import Any

import torch

from fp4bench.cases import Case
from fp4bench.checking import Agreement, checker
from fp4bench.devices import find_device
from fp4bench.evidence.record import make_record
from fp4bench.problems import GemmProblem, MoeProblem
from fp4bench.timing.canaries import Canary, canaries, canary_clock, ceilings, read
from fp4bench.timing.clock import Call, Measurement, clock_for
from fp4bench.timing.graphs import GraphMemory, no_stamps
from fp4bench.timing.telemetry import Telemetry


@dataclass(frozen=True)
class TimeCase:
    """Check a case, then time it. `slowdown` is a drill's: a share of its time that it idles in addition."""

    case: Case
    slowdown: float = 0.0


@dataclass(frozen=True)
class CheckCase:
    """Check a case and time nothing."""

    case: Case


@dataclass(frozen=True)
class ReadCanaries:
    """Time the canaries and look at the machine."""


Request = TimeCase | CheckCase | ReadCanaries


@dataclass(frozen=True)
class TimedCase:
    """The record of a case, with the samples it stands on: seconds of one call, in time order."""

    record: dict[str, Any]
    seconds: tuple[float, ...]
    calls_per_sample: int


@dataclass(frozen=True)
class Moment:
    """What the machine was like at one moment: the canaries' readings, the ceilings, and the telemetry's snapshot.

    idle: the snapshot before this process had a context on the GPU. no_stamps: why there are no clock stamps, if so.
    """

    canaries: tuple[dict[str, Any], ...]
    ceilings: dict[str, float | None]
    snapshot: dict[str, Any]
    idle: dict[str, Any]
    no_stamps: str | None = None


class Measurer:
    """Serves requests on one device.

    Where operands lie in memory changes times by percents (FP8 at m = 1 by 6 %, NVIDIA H200). So that a case meets the same
    places in every process, whatever ran before it, all operands come from one arena, and what graphs allocate from another;
    what stays for good is allocated first, and every case finds the rest empty. A case that does not fit beside them ends that.
    """

    def __init__(self, device: str, pace: str = "paced", warm: bool = False, nvtx: bool = False) -> None:
        self._device = find_device(device)
        self._nvtx = nvtx and self._device.is_cuda
        # Before this process has a context on the GPU, so that whoever is there is someone else.
        self._telemetry = Telemetry.open(self._device)
        memory, self._kept = _reserve(self._device.torch_name) if self._device.is_cuda else (None, [])
        self._clock = clock_for(self._device, pace, warm, memory)
        self._canary_clock = canary_clock(self._device, memory)
        self._inputs: tuple[Any, list[Any]] = (None, [])
        self._canaries: tuple[Canary, ...] = canaries(self._device)
        if self._device.is_cuda:
            _make_workspaces(self._device.torch_name, self._canaries)

    def __call__(self, request: Request) -> Any:
        try:
            if isinstance(request, ReadCanaries):
                return self._read_canaries()
            return self._serve_somewhere(request)
        finally:
            with suppress(RuntimeError):  # of a lost context, which is told by what lost it
                self._free()

    def usable(self) -> bool:
        """Whether the device still answers: after an illegal access every call of this process fails."""
        try:
            if self._device.is_cuda:
                torch.cuda.synchronize()
        except RuntimeError:
            return False
        return True

    def _serve_somewhere(self, request: TimeCase | CheckCase) -> TimedCase | Agreement:
        """In the arena, or, where a case does not fit, without one: from then on operands lie where the driver finds room."""
        if self._kept:
            with suppress(torch.cuda.OutOfMemoryError):
                return self._serve(request)
            self._kept.clear()
            self._inputs = (None, [])
            gc.collect()
            torch.cuda.empty_cache()
        return self._serve(request)

    def _serve(self, request: TimeCase | CheckCase) -> TimedCase | Agreement:
        with self._range(str(request.case)):
            return self._serve_case(request)

    def _serve_case(self, request: TimeCase | CheckCase) -> TimedCase | Agreement:
        case = request.case
        # Memory holds all copies at once, and with --benchmark-disable one is enough.
        copies = self._clock.copies(case.problem.bytes) if isinstance(request, TimeCase) else 1
        with self._range("prepare"):
            inputs = self._inputs_of(case, copies)
            calls = [case.provider.prepare(case.problem, one) for one in inputs]
        with self._range("check"):
            agreement = self._check(case, inputs, calls)
        if isinstance(request, CheckCase):
            return agreement
        with self._range("time"):
            measured = self._clock.measure(calls, case.problem.bytes, request.slowdown)
        launched = self._time_launches(case, calls, measured) if isinstance(case.problem, MoeProblem) else {}
        return self._timed(case, agreement, measured, request.slowdown, launched)

    @contextmanager
    def _range(self, name: str) -> Iterator[None]:
        """An NVTX range, where they are asked for."""
        if self._nvtx:
            torch.cuda.nvtx.range_push(name)
        try:
            yield
        finally:
            if self._nvtx:
                torch.cuda.nvtx.range_pop()

    def _inputs_of(self, case: Case, copies: int) -> list[Any]:
        """The case's inputs, several times. On a CPU, where drawing takes long, cases of one shape share them."""
        dtype = case.problem.mode.dtype if isinstance(case.problem, GemmProblem) else None
        key = (case.problem.op, case.problem.shape, dtype)
        if self._inputs[0] != key or self._device.is_cuda:
            self._inputs = (None, [])  # frees the old ones first
            self._inputs = (key, [case.problem.inputs(self._device.torch_name)])
        made = self._inputs[1]
        made.extend(case.problem.copy(made[0], number) for number in range(len(made), copies))
        return made[:copies]

    def _check(self, case: Case, inputs: Sequence[Any], calls: Sequence[Call]) -> Agreement:
        """Compare the output of every copy with the reference. The worst error counts."""
        accumulation, agree = case.accumulation(self._device), case.problem.copies_agree
        distinct = 1 if agree else len(inputs)
        compare = None
        found = []
        for one, call in zip(inputs, calls, strict=True):
            if compare is None or not agree:
                compare = checker(case.problem, one, case.rule, accumulation, distinct)
            found.append(compare(call()))
        return Agreement(max(f.error for f in found), all(f.exact for f in found), found[0].rows)

    def _time_launches(self, case: Case, calls: Sequence[Any], measured: Measurement) -> dict[str, Any]:
        """The case without a graph, and each phase of its runners by itself, where they have phases."""
        eager = self._clock.eager_seconds(calls, case.problem.bytes, measured.gap_seconds)
        return {
            "eager_seconds": eager,
            "launch_seconds": eager and eager - median(measured.seconds),
            "phases": self._phases(case, calls) if measured.clock != "cuda_events" else None,
        }

    def _phases(self, case: Case, calls: Sequence[Any]) -> dict[str, float] | None:
        """Median seconds by phase, with weights as cold as for the whole; what one leaves to the next may be in the L2."""
        if not hasattr(calls[0], "phases"):
            return None
        found = {}
        for name in calls[0].phases:
            parts = [call.phases[name] for call in calls]
            found[name] = median(self._clock.measure(parts, case.problem.bytes).seconds)
        if self._nvtx:
            for name, part in calls[0].phases.items():
                with self._range(name):
                    part()
                    torch.cuda.synchronize()
        return found

    def _timed(
        self, case: Case, agreement: Agreement, measured: Measurement, slowdown: float, launched: dict[str, Any]
    ) -> TimedCase:
        snapshot = self._telemetry.snapshot()
        facts = (
            case.facts()
            | launched
            | {
                "clock": measured.clock,
                "l2": measured.l2,
                "copies": measured.copies,
                "placement": "arena" if self._kept else None,
                "pace": measured.pace,
                "gap_s": measured.gap_seconds,
                "calls_per_sample": measured.calls_per_sample,
                "retaken": measured.retaken,
                "kernels": list(measured.kernels) if measured.kernels is not None else None,
                "error": agreement.error,
                "exact": agreement.exact,
                "throttle_reasons": list(snapshot.throttle) if snapshot.throttle is not None else None,
                "power_w": snapshot.power_w,
                "temperature_c": snapshot.temperature_c,
                "injected": slowdown or None,
            }
        )
        record = make_record(
            facts, measured.seconds, cycles=measured.cycles, sm_mhz=measured.sm_mhz, event_seconds=measured.event_seconds
        )
        return TimedCase(record, measured.seconds, measured.calls_per_sample)

    def _read_canaries(self) -> Moment:
        start = perf_counter()
        readings = tuple(read(canary, self._canary_clock) | {"in_s": perf_counter() - start} for canary in self._canaries)
        seconds = {reading["name"]: reading["seconds"] for reading in readings}
        now, idle = vars(self._telemetry.snapshot()), vars(self._telemetry.at_open)
        why = no_stamps(self._device) if self._device.is_cuda else "a CPU has none"
        return Moment(readings, vars(ceilings(self._canaries, seconds.__getitem__)), now, idle, why)

    def _free(self) -> None:
        if not self._device.is_cuda:
            return
        self._inputs = (None, [])
        total = torch.cuda.get_device_properties(self._device.torch_name).total_memory
        # Graphs keep memory pools of their own, which only this gives back to others. It leaves the arena, where canaries are.
        if torch.cuda.memory_reserved(self._device.torch_name) > 0.8 * total:
            gc.collect()
            torch.cuda.empty_cache()


def _reserve(device: str) -> tuple[GraphMemory, list[torch.Tensor]]:
    """Let torch's allocator hold a block of half the free memory, of which it then gives parts, and graphs one of a sixth.

    Also tensors that have to live as long: when a graph is captured, torch gives back all memory of which nothing is in use.
    The first 35 accepted runs of H200s lost such a block to that, and products of libraries spread by up to 3 % on one card.
    """

    def take(size: int) -> torch.Tensor:
        return torch.empty(size, dtype=torch.int8, device=device)

    free, _ = torch.cuda.mem_get_info(device)
    take(free // 2)  # its memory stays with the allocator
    kept = [take(2 << 20)]
    # Up to 1 MiB it gives from segments of 2 MiB: enough of them that no case adds one. Two that leave room for two small ones.
    small = [take((1 << 20) - 512) for _ in range(64)]
    kept += [take(512) for _ in small]
    del small
    return GraphMemory(free // 6, device), kept


def _make_workspaces(device: str, canaries: Sequence[Canary]) -> None:
    """Have the libraries allocate now what they keep, which is at the first call of a kind, and would split the arena there."""
    for canary in canaries:
        canary.call()
    for dtype in (torch.float16, torch.float32, torch.float64):
        x = torch.ones(64, 64, dtype=dtype, device=device)
        torch.mm(x, x)
    torch.cuda.synchronize(device)
