"""`fp4bench ab`: two git refs timed against each other, for changes smaller than a stored baseline can see.

Each ref is checked out as a worktree, and its sessions alternate with the other's (ABBA BAAB ...), each in a fresh process.
"""

import argparse
import contextlib
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from fp4bench.cli.sessions import (
    COMMAND,
    EXPECTED,
    RETRIES,
    Report,
    count,
    ended_by_sigterm,
    run_session,
    say,
    stopped,
    takes_pytest_args,
)
from fp4bench.evidence.pairs import FEWEST_PAIRS, Comparison, Finding, Pair, SideRun, compare, gaps, order, read
from fp4bench.evidence.power import percent
from fp4bench.evidence.report import duration

PRESENT_TREE = (".", "WORKTREE")


def add_parser(commands: Any) -> None:
    parser = commands.add_parser(
        "ab",
        help="time two git refs against each other",
        description="Times two git refs in turn, in worktrees and fresh processes of this Python environment. A ref '.' or "
        "'WORKTREE' is the present tree as it is. Exits with 1 where a case of REF_B is slower beyond the floor.",
        usage="fp4bench ab REF_A REF_B [options] [-- PYTEST OPTIONS]",
    )
    parser.add_argument("ref_a", metavar="REF_A")
    parser.add_argument("ref_b", metavar="REF_B")
    parser.add_argument("--pairs", type=count, default=5, metavar="N", help="runs of each ref, 2 or more (5)")
    parser.add_argument("--floor", type=_floor, default=0.01, metavar="PERCENT", help="smaller changes count as none (1)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write every run's medians and the comparison to a new file")
    parser.set_defaults(run=run)
    takes_pytest_args(parser)


def run(args: argparse.Namespace, command: Sequence[str] = COMMAND) -> int:
    """0, or 1 where a case is SLOWER. Raises ValueError for a ref that is none, and where a session crashed."""
    if args.pairs < FEWEST_PAIRS:
        raise ValueError(f"--pairs {args.pairs} has no variance to judge by: ask for {FEWEST_PAIRS} or more")
    commits = [_commit(ref) for ref in (args.ref_a, args.ref_b)]
    report = Report(args.json) if args.json else None
    with ended_by_sigterm(), _trees(commits) as (a, b):
        sides = {"A": Side("A", args.ref_a, commits[0], a), "B": Side("B", args.ref_b, commits[1], b)}
        for side in sides.values():
            _check_import(side)
            say(f"{side.name}: {side.ref} ({side.commit or 'the present tree as it is'})")
        say(
            f"Both run in the environment of {sys.executable}: only fp4bench and perf are of the refs, not what they depend on."
        )
        trial = Trial(sides, [*command, *args.pytest_args], args.pairs, args.floor, report)
        try:
            trial.go()
        finally:
            say(*trial.summary())
    return 1 if trial.slower else 0


@dataclass(frozen=True)
class Side:
    """One of the two: its ref, its commit (None for the present tree) and the folder its sessions run in."""

    name: str
    ref: str
    commit: str | None
    folder: Path

    @property
    def environment(self) -> dict[str, str]:
        """Ours, with this side's fp4bench before any that is installed."""
        paths = [str(self.folder), *filter(None, [os.environ.get("PYTHONPATH")])]
        return os.environ | {"PYTHONPATH": os.pathsep.join(paths)}


@dataclass(frozen=True)
class Measured:
    """A valid run of one side."""

    pair: int
    side: str
    run: SideRun
    seconds: float


@dataclass
class Trial:
    """The runs so far, and what they say."""

    sides: Mapping[str, Side]
    command: Sequence[str]
    pairs: int
    floor: float
    report: Report | None
    measured: list[Measured] = field(default_factory=list)
    invalid: list[str] = field(default_factory=list)

    @property
    def complete_pairs(self) -> list[Pair]:
        runs = {(measured.pair, measured.side): measured.run for measured in self.measured}
        both = [pair for pair in range(self.pairs) if (pair, "A") in runs and (pair, "B") in runs]
        return [Pair(runs[pair, "A"], runs[pair, "B"]) for pair in both]

    @property
    def comparisons(self) -> dict[str, Comparison]:
        return compare(self.complete_pairs, self.floor)

    @property
    def slower(self) -> list[str]:
        return [case_id for case_id, comparison in self.comparisons.items() if comparison.outcome is Finding.SLOWER]

    def go(self) -> None:
        self.write()
        for pair, sides in enumerate(order(self.pairs)):
            for side in sides:
                measured = self._measure(pair, self.sides[side])
                self.measured.append(measured)
                self.write()
                say(
                    f"run {len(self.measured)} of {2 * self.pairs}: {side}, {len(measured.run.cases)} cases, "
                    f"{len(measured.run.failed)} failed, {measured.seconds:.0f} s"
                )

    def _measure(self, pair: int, side: Side) -> Measured:
        """One valid run, INVALID ones repeated. Raises ValueError where they stay INVALID."""
        for _ in range(1 + RETRIES):
            start = time.monotonic()
            stored = measure_once(self.command, side)
            seconds = time.monotonic() - start
            reasons = stored.get("fp4bench", {}).get("invalid")
            if not reasons:
                return Measured(pair, side.name, read(stored), seconds)
            self.invalid.append(f"{side.name} in pair {pair + 1}: {'; '.join(reasons)}")
            self.write()
            say(f"INVALID, not counted: {self.invalid[-1]}")
        raise ValueError(
            f"{1 + RETRIES} runs in a row were INVALID, the last because {'; '.join(reasons)}: compare on a quiet GPU"
        )

    def summary(self) -> list[str]:
        """The table, the slowest case first, and every case that is not in it or has fewer pairs."""
        comparisons, left_out = self.comparisons, gaps(self.complete_pairs)
        lines = [
            "",
            *(_table(comparisons, self.floor) if comparisons else ["Fewer than two pairs measured any case on both sides."]),
        ]
        for case_id, gap in left_out.items():
            judged = comparisons.get(case_id)
            lines.append(f"{f'judged by {judged.pairs} pairs' if judged else 'NOT COMPARED'}: {case_id} ({gap})")
        lines += [f"INVALID, not counted: {reason}" for reason in self.invalid]
        counts = {o.value: sum(c.outcome is o for c in comparisons.values()) for o in Finding}
        counted = ", ".join(f"{count} {outcome}" for outcome, count in counts.items() if count) or "nothing compared"
        not_compared = len(left_out.keys() - comparisons.keys())
        return [*lines, f"{counted}{f', {not_compared} NOT COMPARED' if not_compared else ''}; floor {percent(self.floor)}"]

    def write(self) -> None:
        """Everything so far to the report's file, where one was asked for."""
        if not self.report:
            return
        sides = {side.name: {"ref": side.ref, "commit": side.commit} for side in self.sides.values()}
        runs = [
            {"pair": m.pair, "side": m.side, "wall_s": m.seconds, "failed": m.run.failed, "cases": _readings(m.run)}
            for m in self.measured
        ]
        compared = {case_id: asdict(c) | {"outcome": c.outcome.value} for case_id, c in self.comparisons.items()}
        asked = {"command": list(self.command), "sides": sides, "pairs": self.pairs, "floor": self.floor}
        results = {"complete": len(self.complete_pairs) == self.pairs, "runs": runs, "invalid": self.invalid}
        self.report.write(asked | results | {"comparisons": compared, "gaps": gaps(self.complete_pairs)})


def measure_once(command: Sequence[str], side: Side) -> dict[str, Any]:
    """The stored run of one session. Raises ValueError where it crashed or timed nothing."""
    with tempfile.TemporaryDirectory(prefix="fp4bench-ab-") as folder:
        path = Path(folder, "run.json")
        options = ["-p", "no:cacheprovider", "--gate=off", f"--benchmark-json={path}"]
        code, output = run_session([*command, *options], side.folder, side.environment)
        try:
            stored: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise ValueError(f"{side.name} ({side.ref}): {stopped(code, output, 'stored no run')}") from error
    if code not in EXPECTED:
        raise ValueError(f"{side.name} ({side.ref}): {stopped(code, output)}")
    return stored


@contextlib.contextmanager
def _trees(commits: Sequence[str | None]) -> Iterator[list[Path]]:
    """A folder for each commit: a worktree in a temporary place, removed in the end, or the present one."""
    # Also from a folder inside the repository: the same folder of each worktree.
    inside = _git("rev-parse", "--show-prefix") if any(commits) else ""
    with tempfile.TemporaryDirectory(prefix="fp4bench-ab-") as temporary:
        worktrees = [Path(temporary, name) if commit else None for name, commit in zip("AB", commits, strict=True)]
        try:
            for path, commit in zip(worktrees, commits, strict=True):
                if path and commit:
                    _git("worktree", "add", "--detach", str(path), commit)
            yield [path / inside if path else Path.cwd() for path in worktrees]
        finally:
            for path in filter(None, worktrees):
                subprocess.run(["git", "worktree", "remove", "--force", "--force", str(path)], capture_output=True, check=False)


def _commit(ref: str) -> str | None:
    """The commit that a ref names, None for the present tree. Raises ValueError where there is none."""
    if ref in PRESENT_TREE:
        return None
    try:
        return _git("rev-parse", "--verify", "--quiet", f"{ref}^{{commit}}")
    except ValueError as error:
        inside = subprocess.run(["git", "rev-parse", "--git-dir"], capture_output=True, check=False).returncode == 0
        reason = "this repository has no such commit" if inside else "this folder is in no git repository"
        raise ValueError(f"cannot compare {ref!r}: {reason}; give a branch, a tag, a commit, or '.'") from error


def _git(*words: str) -> str:
    done = subprocess.run(["git", *words], capture_output=True, text=True, check=False)
    if done.returncode:
        raise ValueError(f"git {' '.join(words)} failed: {done.stderr.strip() or f'exit code {done.returncode}'}")
    return done.stdout.strip()


def _check_import(side: Side) -> None:
    """Raise ValueError unless sessions of this side import this side's fp4bench."""
    code = "import fp4bench; print(fp4bench.__file__)"
    status, output = run_session([sys.executable, "-c", code], side.folder, side.environment)
    if status:
        raise ValueError(f"{side.name} ({side.ref}) has no fp4bench that can be imported: {output.strip().splitlines()[-1]}")
    found = Path(output.strip().splitlines()[-1]).resolve()
    if not found.is_relative_to(side.folder.resolve()):
        raise ValueError(f"{side.name} ({side.ref}) would be timed with the fp4bench of {found.parent}, not with its own")


def _floor(text: str) -> float:
    """A floor in percent, 0 or more."""
    value = float(text) / 100
    if not 0 <= value < float("inf"):
        raise argparse.ArgumentTypeError(f"{text} is not a floor in percent, 0 or above")
    return value


def _readings(run: SideRun) -> dict[str, Any]:
    return {case_id: {"seconds": reading.seconds, "cycles": reading.cycles} for case_id, reading in run.cases.items()}


def _table(comparisons: Mapping[str, Comparison], floor: float) -> list[str]:
    width = max(map(len, comparisons))
    lines = [f"{'case':<{width}}  {'A':>10}  {'B':>10}  {'change':>8}  {'95 % interval':>18}  {'cycles':>8}  outcome"]
    for case_id, c in comparisons.items():
        cycles = "" if c.cycles_change is None else f"{c.cycles_change:+.2%}"
        lines.append(
            f"{case_id:<{width}}  {duration(c.seconds_a):>10}  {duration(c.seconds_b):>10}  {c.change:>+8.2%}  "
            f"{f'{c.low:+.2%} to {c.high:+.2%}':>18}  {cycles:>8}  {c.outcome.value}{_why_cycles(c, floor)}"
        )
    return lines


def _why_cycles(comparison: Comparison, floor: float) -> str:
    """What the second witness has to say where it contradicts the first."""
    cycles = comparison.cycles_change
    if comparison.outcome is Finding.SLOWER and cycles is not None and cycles <= floor:
        return " (not in cycles: the GPU's clock was lower)"
    return ""
