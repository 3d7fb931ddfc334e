"""Taking finished runs into a machine's baseline: what is refused, and what is written."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import date
from fnmatch import fnmatchcase
from functools import cached_property
from pathlib import Path
from typing import Any

from fp4bench.evidence.baselines import Baseline, StoredRun, accepted, card_of, parse, read, way, way_of
from fp4bench.evidence.verdict import POLICIES, Outcome, judge

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")


class AcceptError(ValueError):
    """Runs that cannot be accepted. The message is one sentence: which file, why, what to do."""


@dataclass(frozen=True)
class Candidate:
    """A finished run: as it is stored, and as it is compared."""

    stored: dict[str, Any]
    run: StoredRun


@dataclass(frozen=True)
class Moves:
    """Cases of a run that moved beside the baseline: those that start anew with it, and FASTER or REGRESSED of those that wait.

    What waits counts beside the runs before it, so that the case is blind, until the next accepted run shows the same or not.
    """

    restarts: tuple[str, ...] = ()
    alone: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Candidates:
    """Runs of one machine that may be accepted together, the folder they go to, and what is there already."""

    runs: tuple[Candidate, ...]
    folder: Path
    baseline: Baseline | None

    @property
    def notes(self) -> list[str]:
        """What is allowed and worth saying: runs of other options than the newest in the baseline, or than each other."""
        before = self.baseline.runs[-1] if self.baseline else self.runs[0].run
        return [
            f"{candidate.run.path} ran with options {_options(candidate.run)}, and {before.name} with {_options(before)}"
            for candidate in self.runs
            if candidate.run.info.get("options", {}) != before.info.get("options", {})
        ]

    @cached_property
    def moves(self) -> "tuple[Moves, ...]":
        """Of each run, what moved beside the confirmed baseline as it was, and whether it is the second in a row to say so.

        One run is not enough: a case that is fast in one process of fifteen would be judged by that one ever after (an eager
        chain of 49 kernels, NVIDIA H200: 125 us, and 143 in all others). Nor would measuring it again there and then do: such a
        case was as fast again where it was measured with few others.
        """
        if self.baseline is None:
            return tuple(Moves() for _ in self.runs)
        known: dict[tuple[str, Any], str | None] = {}  # what the run before was alone to show; None once a case starts anew
        found = []
        for one in self.runs:
            baseline = self.baseline.on(card_of(one.run.session), *way_of(one.run.cases.values()))
            outcomes = _moved(baseline.confirmed, one.run)
            restarts, alone = [], {}
            for case_id, timing in one.run.cases.items():
                key, outcome = (case_id, way(timing)), outcomes.get(case_id, "")
                last = known.get(key, _alone_before(baseline, case_id))
                if last is None:
                    continue
                known[key] = outcome
                if outcome and outcome == last:
                    restarts.append(case_id)
                    known[key] = None
                elif outcome:
                    alone[case_id] = outcome
            found.append(Moves(tuple(restarts), alone))
        return tuple(found)

    @property
    def waiting(self) -> tuple[str, ...]:
        """Cases that moved in the last of these runs that holds them, and have not been confirmed."""
        last = {
            case_id: case_id in moves.alone
            for one, moves in zip(self.runs, self.moves, strict=True)
            for case_id in one.run.cases
        }
        return tuple(case_id for case_id, alone in last.items() if alone)

    def retired(self, globs: Sequence[str]) -> tuple[str, ...]:
        """Cases of the baseline that a glob matches, or that it names. Raises AcceptError for a glob without any."""
        known = self.baseline.cases if self.baseline else {}
        for glob in globs:
            if not any(_matches(case_id, glob) for case_id in known):
                raise AcceptError(f"--retire {glob!r} matches no case of the baseline in {self.folder}")
        return tuple(case_id for case_id in known if any(_matches(case_id, glob) for glob in globs))


def examine(paths: Sequence[Path], folder: Path, allow_dirty: bool = False) -> Candidates:
    """Read finished runs and check that they may become baselines in `folder/<machine>/`.

    Raises AcceptError or BaselineError for the first that may not; nothing has been written then.
    """
    if not paths:
        raise AcceptError("there is no run to accept: name the files of finished runs")
    candidates = [Candidate(stored := read(path), parse(stored, path)) for path in paths]
    machine = candidates[0].run.machine_info["machine"]
    for candidate in candidates:
        if (other := candidate.run.machine_info["machine"]) != machine:
            raise AcceptError(
                f"{candidate.run.path} is of {other}, and {paths[0]} of {machine}: accept them one machine at a time"
            )
        _refuse_unfit(candidate, allow_dirty)
    if Path(machine).name != machine or machine in ("", ".", ".."):
        raise AcceptError(f"{paths[0]} names its machine {machine!r}, which is no folder's name")
    place = folder / machine
    baseline = accepted(place, machine)
    known = {_identity(run): run.name for run in (baseline.runs if baseline else ())}
    for candidate in candidates:
        identity = _identity(candidate.run)
        if identity in known:
            raise AcceptError(f"{candidate.run.path} is accepted already: it is the run {known[identity]}")
        known[identity] = str(candidate.run.path)
    return Candidates(tuple(candidates), place, baseline)


def accept(candidates: Candidates, name: str, reason: str, today: date, retire: Sequence[str] = ()) -> list[Path]:
    """Write the runs into the baseline, in the order given; the paths of the new files.

    retire: globs or ids of cases that leave the baseline with the first run. Raw samples are left out: a baseline is made of
    medians. Raises AcceptError as `Candidates.retired` does, before anything is written, for a bad name, an empty reason, and
    for a file that cannot be written.
    """
    from fp4bench.evidence.storage import store

    retired = candidates.retired(retire)

    if not _NAME.fullmatch(name):
        raise AcceptError(f"the name {name!r} cannot be part of a file name: use up to 64 letters, digits, '.', '_' and '-'")
    if not (reason := " ".join(reason.split())):
        raise AcceptError("the reason is empty: say why these runs become the baseline")
    paths: list[Path] = []
    for candidate, moves in zip(candidates.runs, candidates.moves, strict=True):
        said = {"name": name, "reason": reason, "date": today.isoformat()}
        retiring = [] if paths else list(retired)
        changes = {"restarts": list(moves.restarts), "alone": dict(moves.alone), "retired": retiring}
        info = candidate.stored["fp4bench"] | {"accepted": said | {key: ids for key, ids in changes.items() if ids}}
        try:
            paths.append(store(candidate.stored | {"fp4bench": info}, candidates.folder, name))
        except OSError as error:
            done = f"; accepted before that: {', '.join(map(str, paths))}" if paths else ""
            raise AcceptError(f"{error}{done}") from error
    return paths


def _refuse_unfit(candidate: Candidate, allow_dirty: bool) -> None:
    run, info = candidate.run, candidate.run.info
    if reasons := info.get("invalid"):
        raise AcceptError(f"{run.path} is invalid ({'; '.join(map(str, reasons))}): record it anew")
    if failed := info.get("failed"):
        raise AcceptError(f"{run.path} has failed cases ({_some(failed)}): mend or deselect them, and record it anew")
    if info.get("complete") is not True:
        raise AcceptError(
            f"{run.path} is incomplete, cases that were selected are not in it: record it anew, or go on with --resume"
        )
    if not run.cases:
        raise AcceptError(f"{run.path} timed no case: there is nothing to accept")
    if injected := [case_id for case_id, timing in run.cases.items() if timing.record.get("injected") is not None]:
        raise AcceptError(
            f"{run.path} is a drill's, with cases that were slowed down on purpose ({_some(injected)}): never accept it"
        )
    commit = candidate.stored.get("commit_info") or {}
    if allow_dirty:
        return
    if commit.get("dirty"):
        raise AcceptError(f"{run.path} is from a tree with uncommitted changes: commit and record anew, or say --allow-dirty")
    if commit.get("id") in (None, "", "unversioned", "unknown"):
        raise AcceptError(f"{run.path} does not say of which commit it is: record it in a git checkout, or say --allow-dirty")


def _moved(baseline: Baseline, run: StoredRun) -> dict[str, str]:
    verdicts = judge(baseline, run.cases, POLICIES, run.info.get("floors") or {})
    return {c: found.outcome.value for c, found in verdicts.items() if found.outcome in (Outcome.FASTER, Outcome.REGRESSED)}


def _alone_before(baseline: Baseline, case_id: str) -> str:
    """What the newest accepted run of a case was alone to show."""
    end = baseline.unconfirmed.get(case_id)
    return end[-1][0].alone[case_id] if end else ""


def _matches(case_id: str, glob: str) -> bool:
    return case_id == glob or fnmatchcase(case_id, glob)


def _identity(run: StoredRun) -> tuple[str, Any]:
    return run.datetime, run.machine_info.get("uuid")


def _options(run: StoredRun) -> str:
    options = run.info.get("options") or {}
    return " ".join(f"--{axis} {' '.join(map(str, values))}" for axis, values in options.items()) or "of the default set"


def _some(case_ids: Sequence[str]) -> str:
    more = f", and {len(case_ids) - 3} more" if len(case_ids) > 3 else ""
    return ", ".join(case_ids[:3]) + more
