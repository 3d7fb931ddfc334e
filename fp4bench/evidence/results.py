"""Cases of one or several stored runs of a machine as one set of results: what tables and plots of providers stand on.

Works of one shape are one work, whatever layers have it: they have the same inputs. A work that was timed more than once takes
the median of its medians. Cards of one model differ by percents, so a ratio of two works is taken within each run that holds
both, and the median of those counts; only where no run holds both it is that of the medians, and is shown with a `~`.
"""

from collections import defaultdict
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from statistics import median
from typing import Any

from fp4bench.evidence.baselines import StoredRun, Timing, card_of, not_comparable, way


class ResultsError(ValueError):
    """Runs that cannot be joined. The message is one sentence: which, why, what to do."""


@dataclass(frozen=True, order=True)
class Shape:
    """Sizes of the weights of a product, as in Y[m, n] = X[m, k] @ W[n, k]^T; of a quantization k alone.

    experts: how many there are and how many a token has, of a MoE layer, whose n is the intermediate size and k the hidden one.
    """

    n: int | None
    k: int
    experts: tuple[int, int] | tuple[()] = ()

    def __str__(self) -> str:
        if self.experts:
            return f"{self.experts[1]} of {self.experts[0]} experts, intermediate = {self.n}, hidden = {self.k}"
        return f"k = {self.k}" if self.n is None else f"n = {self.n}, k = {self.k}"


@dataclass(frozen=True)
class Answer:
    """What is computed, apart from sizes: providers of one answer may stand in for each other, those of two may not.

    mode: of a quantization its scale rule. format: the mode again where there is no FP4. hadamard: None without rotation.
    scaling, routing: of a MoE layer, where they are not the usual ones, by tensor and uniform.
    """

    op: str
    format: str
    mode: str
    hadamard: int | None = None
    scaling: str = ""
    routing: str = ""

    def __str__(self) -> str:
        parts = [] if self.plain else [self.format]
        parts += [self.mode, *([f"had{self.hadamard}"] if self.hadamard else [])]
        parts += [part for part in (self.scaling, self.routing) if part]
        return " ".join(parts if self.op == "gemm" else [self.op, *parts])

    @property
    def plain(self) -> bool:
        """Whether it has no FP4: a yardstick."""
        return self.format == self.mode

    @property
    def yardstick(self) -> str:
        """The mode without quantization that answers in the same type: "bf16", or "fp16"."""
        return "fp16" if self.mode.endswith("fp16") else "bf16"


@dataclass(frozen=True)
class Work:
    """One answer by one provider at one size."""

    answer: Answer
    provider: str
    shape: Shape
    m: int


@dataclass(frozen=True, eq=False)
class Result:
    """What was measured of a work: run and timing of each reading, at least one."""

    work: Work
    readings: tuple[tuple[StoredRun, Timing], ...]

    @property
    def record(self) -> Mapping[str, Any]:
        """The newest reading's record."""
        return self.readings[-1][1].record

    @cached_property
    def seconds(self) -> float:
        """Of one call: the median of the readings' medians."""
        return median(timing.median for _, timing in self.readings)

    def value(self, key: str) -> float | None:
        """The median over the readings of a number of their records; None where none has it."""
        found = [timing.record[key] for _, timing in self.readings if timing.record.get(key) is not None]
        return median(found) if found else None

    def in_run(self, run: StoredRun) -> float | None:
        """Seconds in one run; None if it does not hold the work."""
        found = [timing.median for one, timing in self.readings if one is run]
        return median(found) if found else None


@dataclass(frozen=True)
class Ratio:
    """How many times as long one result takes as another, and whether both were timed in one run."""

    value: float
    same_run: bool

    def __str__(self) -> str:
        return f"{'' if self.same_run else '~'}{self.value:.2f}x"


def ratio(slower: Result, faster: Result) -> Ratio:
    """Seconds of `slower` over those of `faster`."""
    both = [(slower.in_run(run), faster.in_run(run)) for run in dict.fromkeys(run for run, _ in faster.readings)]
    within = [theirs / ours for theirs, ours in both if theirs is not None and ours is not None]
    return Ratio(median(within), True) if within else Ratio(slower.seconds / faster.seconds, False)


@dataclass(frozen=True)
class Choice:
    """Which results are wanted; an empty axis wants all. BF16 and FP16 stay in any case: everything is measured by them."""

    formats: Collection[str] = ()
    modes: Collection[str] = ()
    batch_sizes: Collection[int] = ()

    def holds(self, work: Work) -> bool:
        answer = work.answer
        if self.batch_sizes and work.m not in self.batch_sizes:
            return False
        if answer.mode == answer.yardstick:
            return True
        of_format = answer.plain or not self.formats or answer.format in self.formats
        return of_format and (not self.modes or answer.mode in self.modes)


@dataclass(frozen=True, eq=False)
class Results:
    """Joined runs of one machine, oldest first: results by work, in the order of the runs, and the layers of each shape."""

    runs: tuple[StoredRun, ...]
    by_work: Mapping[Work, Result]
    layers: Mapping[Shape, tuple[str, ...]] = field(default_factory=dict)

    @property
    def machine(self) -> Mapping[str, Any]:
        """The machine's facts in the newest run."""
        return self.runs[-1].machine_info

    @property
    def gpu(self) -> str:
        return str(self.machine.get("gpu") or self.machine["machine"])

    @cached_property
    def ceilings(self) -> dict[str, float | None]:
        """copy_gbps, bf16_tflops and fp8_tflops: the median of the runs that measured them, None where none did."""
        found: dict[str, float | None] = {}
        for name in ("copy_gbps", "bf16_tflops", "fp8_tflops"):
            told = [(run.info.get("ceilings") or {}).get(name) for run in self.runs]
            values = [value for value in told if value is not None]
            found[name] = median(values) if values else None
        return found

    @property
    def answers(self) -> tuple[Answer, ...]:
        """Each once: those without FP4 first, then in the order of the runs."""
        return tuple(sorted(dict.fromkeys(work.answer for work in self.by_work), key=lambda answer: not answer.plain))

    @property
    def providers(self) -> tuple[str, ...]:
        """Each once, by name."""
        return tuple(sorted({work.provider for work in self.by_work}))

    def where(self, **wanted: Any) -> list[Result]:
        """Results whose work has these values of `answer`, `provider`, `shape` or `m`."""
        return [result for work, result in self.by_work.items() if all(getattr(work, axis) == v for axis, v in wanted.items())]

    def speedup(self, result: Result) -> float | None:
        """Over the fastest yardstick of its answer's type at the same size in the same run; None where there is none."""
        work, yardstick = result.work, result.work.answer.yardstick
        if yardstick == "bf16":
            return result.value("speedup_vs_bf16")
        answer = Answer(work.answer.op, yardstick, yardstick)
        found = [ratio(other, result) for other in self.where(answer=answer, shape=work.shape, m=work.m)]
        return min((one.value for one in found if one.same_run), default=None)

    def of(self, *ops: str) -> "Results":
        """Those of some operations. Raises ResultsError where there is none."""
        found = {work: result for work, result in self.by_work.items() if work.answer.op in ops}
        if not found:
            raise ResultsError(f"{_names(self.runs)}: there is no {' and no '.join(ops)} in what was asked for")
        return Results(self.runs, found, self.layers)

    def named(self, shape: Shape) -> str:
        """Its layers: `llama3.3-70b.qkv.tp1`."""
        return ", ".join(self.layers[shape])

    def label(self, shape: Shape) -> str:
        """Layers and sizes, for a cell: `llama3.3-70b.qkv.tp1 10240x8192`, and of a quantization `... k 8192`."""
        return f"{self.named(shape)} {f'k {shape.k}' if shape.n is None else f'{shape.n}x{shape.k}'}"

    def caption(self) -> str:
        """Machine, day, runs, and how they were timed, in a line."""
        days = sorted({run.datetime[:10] for run in self.runs})
        day = days[0] if len(days) == 1 else f"{days[0]} to {days[-1]}"
        return f"{self.gpu}, {day}, {_names(self.runs)} ({self._how})"

    @property
    def timing(self) -> dict[str, str | None]:
        """pace: "paced" or "sustained"; l2: "cold" or "warm", None for a clock that has no say in it."""
        pace, warm = _way(self.runs)
        return {"pace": pace, "l2": None if warm is None else "warm" if warm else "cold"}

    @property
    def _how(self) -> str:
        told = self.timing
        return ", ".join(part for part in (told["pace"], told["l2"] and f"{told['l2']} L2") if part) or "by an unknown clock"

    def notes(self) -> list[str]:
        """What must be known to read the numbers: cards, cases that are not there, clocks that include launches."""
        cards = {card_of(run.session) for run in self.runs}
        found = [f"the runs are of {len(cards)} cards, and cards differ by percents"] if len(cards) > 1 else []
        for run in self.runs:
            if run.info.get("complete") is not True:
                found.append(f"{run.name} is incomplete: not all that was selected is in it")
            if failed := run.info.get("failed"):
                found.append(f"{run.name} has {len(failed)} failed case{'s' if len(failed) > 1 else ''}, which are not here")
        events = {work.provider for work, result in self.by_work.items() if result.record.get("clock") == "cuda_events"}
        if events:
            found.append(f"timed by CUDA events, launches included, in some cases: {', '.join(sorted(events))}")
        return found


EVERYTHING = Choice()


def join(runs: Sequence[StoredRun], choice: Choice = EVERYTHING) -> Results:
    """The chosen results of runs of one machine, timed in one way.

    Raises ResultsError for runs that cannot stand in one table, and for a choice of what they do not hold.
    """
    runs = sorted(runs, key=lambda run: run.datetime)
    _refuse_unfit(runs)
    everything = [(*_read(run, case_id, timing.record), run, timing) for run in runs for case_id, timing in run.cases.items()]
    _refuse_absent(choice, [work for work, *_ in everything], runs)
    readings: defaultdict[Work, list[tuple[StoredRun, Timing]]] = defaultdict(list)
    layers: defaultdict[Shape, dict[str, None]] = defaultdict(dict)
    for work, layer, run, timing in everything:
        if choice.holds(work):
            readings[work].append((run, timing))
            layers[work.shape][layer] = None
    for found in readings.values():
        _refuse_unlike(found)
    by_work = {work: Result(work, tuple(found)) for work, found in readings.items()}
    return Results(tuple(runs), by_work, {shape: tuple(names) for shape, names in layers.items()})


def _read(run: StoredRun, case_id: str, record: Mapping[str, Any]) -> tuple[Work, str]:
    """The work that a record tells of, and its layer."""
    try:
        answer = Answer(record["op"], record["format"], record["mode"], record["hadamard"], *_variant(record))
        sizes = [record["m"], record["k"], *([record["n"]] if record["n"] is not None else [])]
        if any(isinstance(size, bool) or not isinstance(size, int) or size < 1 for size in sizes):
            raise ResultsError(f"{run.path} has sizes of {case_id} that are none ({sizes}): record it anew")
        layer = f"{record['model']}.{record['layer']}.tp{record['tp']}"
        experts = (record["experts"], record["topk"]) if record["op"] == "moe" else ()
        return Work(answer, record["provider"], Shape(record["n"], record["k"], experts), record["m"]), layer
    except KeyError as error:
        raise ResultsError(f"{run.path} does not say the {error} of {case_id}: record it anew") from error


def _variant(record: Mapping[str, Any]) -> tuple[str, str]:
    """The scaling and the routing of an `Answer`."""
    if record["op"] != "moe":
        return "", ""
    scaling, routing = record["fp8_scaling"] or "tensor", record["routing"]
    return "" if scaling == "tensor" else scaling, "" if routing == "uniform" else routing


def _refuse_unfit(runs: Sequence[StoredRun]) -> None:
    if not runs:
        raise ResultsError("there is no run: name the files of finished runs")
    known: dict[tuple[str, str], StoredRun] = {}
    for run in runs:
        if (machine := run.machine_info["machine"]) != runs[0].machine_info["machine"]:
            told = f"{run.path} is of {machine}, and {runs[0].path} of {runs[0].machine_info['machine']}"
            raise ResultsError(f"{told}: report one machine at a time")
        if before := known.get((run.session, run.datetime)):
            raise ResultsError(f"{before.path} and {run.path} are the same run: give it once")
        known[run.session, run.datetime] = run
        if reasons := run.info.get("invalid"):
            raise ResultsError(f"{run.path} is invalid ({'; '.join(map(str, reasons))}): record it anew")
        if slowed := [case_id for case_id, timing in run.cases.items() if timing.record.get("injected") is not None]:
            raise ResultsError(f"{run.path} is a drill's, with cases slowed down on purpose ({slowed[0]}): give another")
    _way(runs)


def _way(runs: Iterable[StoredRun]) -> tuple[str | None, bool | None]:
    """The pace of all timings, and whether the L2 was warm; None where no clock says. ResultsError where they differ."""
    seen: list[dict[Any, StoredRun]] = [{}, {}]
    for run in runs:
        for timing in run.cases.values():
            for axis, value in zip(seen, way(timing), strict=True):
                axis.setdefault(value, run)
    for axis, words in zip(seen, ({}, {True: "with a warm L2", False: "with a cold one"}), strict=True):
        axis.pop(None, None)
        if len(axis) > 1:
            told = [f"{run.path} has cases timed {words.get(value, value)}" for value, run in axis.items()]
            raise ResultsError(f"{' and '.join(told)}: report one way of timing at a time")
    pace, warm = (next(iter(axis), None) for axis in seen)
    return pace, warm


def _refuse_unlike(found: Sequence[tuple[StoredRun, Timing]]) -> None:
    run, first = found[0]
    for other, timing in found[1:]:
        if why := not_comparable(first.record, timing.record):
            case_id = timing.record["case_id"]
            raise ResultsError(f"{run.path} and {other.path} did not do the same for {case_id}: {why}; give one of them")


def _refuse_absent(choice: Choice, works: Sequence[Work], runs: Sequence[StoredRun]) -> None:
    there: dict[str, tuple[Collection[Any], list[Any]]] = {
        "format": (choice.formats, [work.answer.format for work in works if not work.answer.plain]),
        "mode": (choice.modes, [work.answer.mode for work in works]),
        "batch size": (choice.batch_sizes, [work.m for work in works]),
    }
    for what, (wanted, known) in there.items():
        if absent := [value for value in wanted if value not in known]:
            listed = ", ".join(map(str, dict.fromkeys(known))) or "none at all"
            raise ResultsError(f"{_names(runs)}: there is no {what} {absent[0]}, there are {listed}")


def _names(runs: Iterable[StoredRun]) -> str:
    return ", ".join(run.name for run in runs)
