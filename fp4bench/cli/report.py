"""`fp4bench report`: a machine's accepted runs, how well they repeat, or a run's verdicts as Markdown."""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from fp4bench.evidence.baselines import Baseline, accepted, stored_files
from fp4bench.evidence.report import accepted_runs, markdown, spread


def add_parser(commands: Any) -> None:
    parser = commands.add_parser(
        "report",
        help="the accepted runs of a machine, how well they repeat, or a run's verdicts as Markdown",
        description="Without options: the accepted runs of each machine, as Markdown.",
    )
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--spread", action="store_true", help="how well accepted runs repeat, and which cases are blind")
    what.add_argument("--markdown", type=Path, metavar="FILE", help="a verdicts file (pytest --verdicts) as a summary for CI")
    parser.add_argument("--machine", help="a folder of baselines/ (all of them)")
    parser.add_argument("--folder", type=Path, default=Path("baselines"), help="of all baselines (baselines)")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Write the report to stdout. Raises ValueError with one sentence for what cannot be read."""
    if args.markdown:
        sys.stdout.write(markdown(_verdicts(args.markdown)))
        return 0
    show = spread if args.spread else accepted_runs
    parts = [[f"### {baseline.runs[-1].machine_info['machine']}", "", *show(baseline)] for baseline in _baselines(args)]
    sys.stdout.write("\n\n".join("\n".join(part) for part in parts) + "\n")
    return 0


def _baselines(args: argparse.Namespace) -> list[Baseline]:
    folders = [args.folder / args.machine] if args.machine else sorted(f for f in args.folder.glob("*") if stored_files(f))
    found = [baseline for folder in folders if (baseline := accepted(folder, folder.name))]
    if not found:
        where = args.folder / args.machine if args.machine else args.folder
        raise ValueError(f"no accepted run in {where}: take one in with fp4bench accept, or name its place with --folder")
    return found


def _verdicts(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ValueError(f"cannot read the verdicts file {path}: {error.strerror}") from error
    except ValueError as error:
        raise ValueError(f"the verdicts file {path} is truncated or not JSON ({error})") from error
