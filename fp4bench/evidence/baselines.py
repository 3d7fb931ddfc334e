"""Stored runs: read them, refuse what cannot be compared, and gather the accepted ones of a machine into its baseline."""

import json
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from math import isfinite
from pathlib import Path
from typing import Any

from fp4bench.evidence.record import COMPARABLE, FORMAT
from fp4bench.evidence.storage import stored_runs


class BaselineError(ValueError):
    """A stored run that cannot serve as a baseline. The message is one sentence: which file, what, what to do."""


@dataclass(frozen=True)
class Timing:
    """Seconds of one call of a case, over the samples of one run, and the record they belong to."""

    median: float
    fastest: float
    record: dict[str, Any]


@dataclass(frozen=True, eq=False)
class StoredRun:
    """One stored run: its file, when it was made and where, what fp4bench says of it as a whole, and its cases by id."""

    path: Path
    name: str
    datetime: str
    machine_info: dict[str, Any]
    info: dict[str, Any]
    cases: dict[str, Timing]

    @property
    def session(self) -> str:
        """The card and day of the run: runs of one day do not show how days differ."""
        return str(self.info["session"])

    @property
    def restarts(self) -> tuple[str, ...]:
        """Cases that had moved when this run was accepted: their history begins here, or at runs `alone` before it."""
        return tuple((self.info.get("accepted") or {}).get("restarts", ()))

    @property
    def alone(self) -> dict[str, str]:
        """Cases that had moved by this run alone when it was accepted, FASTER or REGRESSED: the next one has to confirm it."""
        return dict((self.info.get("accepted") or {}).get("alone", {}))

    @property
    def retired(self) -> tuple[str, ...]:
        """Cases that left the baseline when this run was accepted."""
        return tuple((self.info.get("accepted") or {}).get("retired", ()))


@dataclass(frozen=True, eq=False)
class Baseline:
    """Accepted runs of one machine, oldest first; at least one.

    card: the card whose run is to be compared (a CPU: the machine), None for any other than those of the runs.
    pace, warm: only timings at this pace, and with the L2 warm or not, are in `cases`; None: whatever they were.
    """

    runs: tuple[StoredRun, ...]
    card: str | None = None
    pace: str | None = None
    warm: bool | None = None

    @cached_property
    def cases(self) -> dict[str, tuple[tuple[str, Timing], ...]]:
        """Session and timing of each run that holds a case, oldest first, by case id.

        Only the newest runs that are comparable with the newest one: a case whose work or clock changed starts anew there, and
        so does one that had moved in two accepted runs, on all cards. What was retired is left out until a run holds it.
        """
        stretches = ((case_id, _newest_stretch(history)) for case_id, history in self._histories.items() if history)
        return {case_id: tuple((run.session, timing) for run, timing in stretch) for case_id, stretch in stretches}

    @cached_property
    def _histories(self) -> "dict[str, _History]":
        histories: defaultdict[str, _History] = defaultdict(list)
        for run in self.runs:
            for case_id in run.retired:
                histories.pop(case_id, None)
            for case_id in run.restarts:
                histories[case_id] = _begun_anew(case_id, histories[case_id], run.cases.get(case_id))
            for case_id, timing in run.cases.items():
                if self.holds(timing):
                    histories[case_id].append((run, timing))
        return histories

    @cached_property
    def unconfirmed(self) -> "dict[str, _History]":
        """The newest runs of a case that were `alone` with what they showed: in a noisy case that is luck as often as not."""
        ends = {case_id: _alone_at_the_end(case_id, history) for case_id, history in self._histories.items()}
        return {case_id: end for case_id, end in ends.items() if end}

    @property
    def confirmed(self) -> "Baseline":
        """The same runs without what is unconfirmed: whether a move is confirmed is asked of the baseline before it."""
        doubtful = {(run.path, case_id) for case_id, end in self.unconfirmed.items() for run, _ in end}
        runs = (
            replace(
                run, cases={case_id: timing for case_id, timing in run.cases.items() if (run.path, case_id) not in doubtful}
            )
            for run in self.runs
        )
        return replace(self, runs=tuple(runs))

    def holds(self, timing: Timing) -> bool:
        """Whether a timing was taken in the way that is to be compared."""
        pace, warm = way(timing)
        return self.pace in (None, pace) and (self.warm is None or warm in (None, self.warm))

    def on(self, card: str, pace: str | None = None, warm: bool | None = None) -> "Baseline":
        """The same runs, for a run of this card, timed in this way."""
        return Baseline(self.runs, card, pace, warm)

    def of_cards(self, names: Sequence[str]) -> "Baseline":
        """The runs of these cards alone, each named by how its UUID begins, with or without `GPU-`.

        Raises BaselineError for a name that is of no card, or of several.
        """
        wanted = {self._card_named(name) for name in names}
        return replace(self, runs=tuple(run for run in self.runs if card_of(run.session) in wanted))

    def _card_named(self, name: str) -> str:
        begins = name.removeprefix("GPU-")
        found = [card for card in self.cards if begins and card.removeprefix("GPU-").startswith(begins)]
        if len(found) == 1:
            return found[0]
        what = f"{', '.join(found)} all begin" if found else f"no accepted run of {self.label} is of a card whose UUID begins"
        raise BaselineError(f"{what} with {name!r}: the cards are {', '.join(self.cards)}")

    def newest(self, case_id: str) -> Timing:
        """The timing of the newest run that holds the case. Raises KeyError where none does."""
        return self.cases[case_id][-1][1]

    @property
    def cards(self) -> tuple[str, ...]:
        """The cards of the runs, each once, oldest first."""
        return tuple(dict.fromkeys(card_of(run.session) for run in self.runs))

    @property
    def label(self) -> str:
        """`0001_first..0006_night (6 runs, 3 cards)`, or the one run's name."""
        if len(self.runs) == 1:
            return self.runs[0].name
        cards = len(self.cards)
        spelled = f"{cards} card{'s' if cards > 1 else ''}"
        return f"{self.runs[0].name}..{self.runs[-1].name} ({len(self.runs)} runs, {spelled})"


def card_of(session: str) -> str:
    """The card (a CPU: the machine) of a session, which is named by card and date."""
    return session.rpartition(" ")[0]


def way(timing: Timing) -> tuple[str | None, bool | None]:
    """Its pace, and whether the L2 was warm, None for a clock that has no say in that: the wall clock."""
    record = timing.record
    return record.get("pace"), None if record.get("clock") == "perf_counter" else record.get("l2") == "warm"


def way_of(timings: Iterable[Timing]) -> tuple[str | None, bool | None]:
    """The pace and warmth of several timings; each None where they differ or do not say."""
    paces, warmths = (set(values) for values in zip(*map(way, timings), strict=True))
    warmths -= {None}
    return paces.pop() if len(paces) == 1 else None, warmths.pop() if len(warmths) == 1 else None


_History = list[tuple[StoredRun, Timing]]  # of a case, oldest first


def _begun_anew(case_id: str, history: _History, timing: Timing | None) -> _History:
    """What a case that moved keeps: a sustained run says nothing of paced ones, and what is confirmed counts from its start."""
    if timing is None:
        return []
    same_way = [entry for entry in history if way(entry[1]) == way(timing)]
    return [entry for entry in history if way(entry[1]) != way(timing)] + _alone_at_the_end(case_id, same_way)


def _alone_at_the_end(case_id: str, history: _History) -> _History:
    """The newest runs that showed one and the same move and were not confirmed when they were accepted."""
    start = len(history)
    moved = history[-1][0].alone.get(case_id) if history else None
    while start and moved and history[start - 1][0].alone.get(case_id) == moved:
        start -= 1
    return history[start:]


def _newest_stretch(history: _History) -> _History:
    newest = history[-1][1].record
    start = len(history)
    while start and not_comparable(history[start - 1][1].record, newest) is None:
        start -= 1
    return history[start:]


def not_comparable(before: dict[str, Any], after: dict[str, Any]) -> str | None:
    """Why two records of a case must not be compared: `clock was cuda_events, is cuda_graph_stamps`; None if they may be."""
    for key in COMPARABLE:
        if before.get(key) != after.get(key):
            return f"{key} was {before.get(key)}, is {after.get(key)}"
    return None


def stored_files(folder: Path) -> list[Path]:
    """The runs stored in a folder, by number, without files of raw samples. Empty without the folder."""
    runs = stored_runs(folder) if folder.is_dir() else []
    return [path for path in runs if not path.name.endswith(".samples.json")]


def accepted(folder: Path, machine: str) -> Baseline | None:
    """The baseline of a machine: every run stored in its folder. None where there is none.

    Raises BaselineError for the first run that cannot be read or does not belong there: no run is left out in silence.
    """
    files = stored_files(folder)
    return Baseline(tuple(load(path, machine) for path in files)) if files else None


def find(folders: Sequence[Path], wanted: str, machine: str) -> Baseline:
    """A baseline of one run: the file at the path `wanted`, or the newest stored run of a folder whose name starts with it.

    Raises BaselineError where there is none, where two folders hold one, for each numbers its runs itself, and as `load` does.
    """
    if Path(wanted).is_file():
        return Baseline((load(Path(wanted), machine),))
    stored = {folder: stored_files(folder) for folder in folders}
    matching = [[path for path in paths if path.name.startswith(wanted)] for paths in stored.values()]
    found = [paths[-1] for paths in matching if paths]
    if not found:
        holds = (f"{folder}, which holds {', '.join(p.stem for p in paths) or 'nothing'}" for folder, paths in stored.items())
        raise BaselineError(f"no stored run {wanted!r} in {', nor in '.join(holds)}")
    if len(found) > 1:
        raise BaselineError(f"{wanted!r} is {' and '.join(map(str, found))}: give the path of the one that is meant")
    return Baseline((load(found[0], machine),))


def load(path: Path, machine: str) -> StoredRun:
    """Read a stored run of this machine. Raises BaselineError for an unreadable file, another format, or another machine."""
    run = parse(read(path), path)
    if (recorded_on := run.machine_info["machine"]) != machine:
        raise BaselineError(f"the baseline {path} was recorded on {recorded_on}, and this machine is {machine}: not comparable")
    return run


def read(path: Path) -> Any:
    """The JSON of a file. Raises BaselineError where it cannot be read, is truncated or is not JSON."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise BaselineError(f"cannot read the baseline {path}: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise BaselineError(f"the baseline {path} is truncated or not JSON ({error}): restore or remove it") from error


def parse(stored: Any, path: Path) -> StoredRun:
    """The run that a file holds, of whatever machine. Raises BaselineError for another format and for what is not a run."""
    try:
        version = stored["fp4bench"]["format"]
        machine = stored["machine_info"]["machine"]
    except (KeyError, TypeError, IndexError) as error:
        raise BaselineError(f"the baseline {path} is not a run that fp4bench stored: it has no {_missing(error)}") from error
    if version != FORMAT:
        raise BaselineError(f"the baseline {path} has format {version}, and this fp4bench reads {FORMAT}: record it anew")
    try:
        info, made, benches = dict(stored["fp4bench"]), str(stored["datetime"]), list(stored["benchmarks"])
        _ = info["session"], str(machine)
        timings = [(str(bench["extra_info"]["case_id"]), _timing(bench)) for bench in benches]
    except (KeyError, TypeError, AttributeError, IndexError, ValueError) as error:
        raise BaselineError(f"the baseline {path} is not a run that fp4bench stored: it has no {_missing(error)}") from error
    cases = dict(timings)
    if len(cases) < len(timings):
        twice = next(case_id for i, (case_id, _) in enumerate(timings) if case_id in dict(timings[:i]))
        raise BaselineError(f"the baseline {path} holds {twice} twice: record it anew")
    return StoredRun(path, path.name.removesuffix(".json"), made, stored["machine_info"], info, cases)


def _missing(error: Exception) -> str:
    return str(error) if isinstance(error, KeyError | ValueError) else "such layout"


def _timing(bench: dict[str, Any]) -> Timing:
    stats, record = bench["stats"], bench["extra_info"]
    for name, value in (("median", stats["median"]), ("min", stats["min"]), ("cycles", record.get("cycles"))):
        if name == "cycles" and value is None:
            continue
        if isinstance(value, bool) or not isinstance(value, int | float) or not isfinite(value) or value <= 0:
            raise ValueError(f"positive {name} of {record['case_id']}")
    return Timing(stats["median"], stats["min"], record)
