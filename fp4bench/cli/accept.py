"""`fp4bench accept`: take finished runs into the baseline of their machine."""

import argparse
import sys
from collections.abc import Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from fp4bench.evidence.acceptance import accept, examine
from fp4bench.evidence.report import before_after


def add_parser(commands: Any) -> None:
    parser = commands.add_parser(
        "accept",
        help="take finished runs into baselines/<machine>/, with a name and a reason",
        description="Shows what the baseline becomes, then writes the runs beside those that are accepted. Refuses runs that "
        "are invalid, incomplete, of a drill, of a tree with uncommitted changes, of different machines, or accepted already.",
    )
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN.json", help="files under .benchmarks/<machine>/")
    parser.add_argument("--name", required=True, help="becomes part of the files' names")
    parser.add_argument("--reason", required=True, help="why these runs become the baseline; stored with them")
    parser.add_argument(
        "--retire",
        action="append",
        default=[],
        metavar="ID-OR-GLOB",
        help="cases that leave the baseline, as those of a provider that is gone; may be repeated",
    )
    parser.add_argument(
        "--allow-dirty", action="store_true", help="take runs of a tree with uncommitted changes, or of no commit"
    )
    parser.add_argument("--folder", type=Path, default=Path("baselines"), help="of all baselines (baselines)")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Show the change and write the files. Raises ValueError with one sentence where a run is refused."""
    candidates = examine(args.runs, args.folder, args.allow_dirty)
    table = before_after(candidates.baseline, [candidate.run for candidate in candidates.runs])
    anew = [case_id for moves in candidates.moves for case_id in moves.restarts]
    waiting = _named("moved in one run", candidates.waiting)
    changes = [
        *_named("that moved start anew", anew),
        *(f"{line} (until the next run shows it too, both times count)" for line in waiting),
        *_named("leave the baseline", candidates.retired(args.retire)),
    ]
    sys.stdout.write("\n".join([*table, *changes, *(f"note: {note}" for note in candidates.notes)]) + "\n")
    for path in accept(candidates, args.name, args.reason, datetime.now(timezone.utc).date(), args.retire):
        sys.stdout.write(f"accepted: {path}\n")
    return 0


def _named(what: str, case_ids: Sequence[str]) -> list[str]:
    """`7 cases that moved start anew: <five of them>, ...`, or nothing."""
    names = ", ".join(case_ids[:5]) + (", ..." if len(case_ids) > 5 else "")
    return [f"{len(case_ids)} case{'s' if len(case_ids) > 1 else ''} {what}: {names}"] if case_ids else []
