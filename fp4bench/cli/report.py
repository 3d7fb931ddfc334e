"""`fp4bench report`: a machine's accepted runs, how well they repeat, a run's verdicts, or rules side by side, as Markdown."""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fp4bench.cli.sessions import Report
from fp4bench.evidence import rivals
from fp4bench.evidence.baselines import Baseline, accepted, parse, read, stored_files
from fp4bench.evidence.report import accepted_runs, markdown, spread
from fp4bench.evidence.rivals import Sampled
from fp4bench.evidence.storage import samples_path

_BESIDE = ("against", "do_bench", "verdicts", "json")


def add_parser(commands: Any) -> None:
    parser = commands.add_parser(
        "report",
        help="the accepted runs of a machine, how well they repeat, a run's verdicts, or rules side by side, as Markdown",
        description="Without options: the accepted runs of each machine, as Markdown.",
    )
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--spread", action="store_true", help="how well accepted runs repeat, and which cases are blind")
    what.add_argument("--markdown", type=Path, metavar="FILE", help="a verdicts file (pytest --verdicts) as a summary for CI")
    what.add_argument(
        "--side-by-side",
        type=Path,
        nargs="+",
        metavar="RUN.json",
        help="what this gate and the rules of other tools flag and miss in stored runs",
    )
    beside = parser.add_argument_group("with --side-by-side")
    beside.add_argument(
        "--against", type=Path, nargs="+", metavar="RUN.json", help="runs that other tools compare with (the accepted ones)"
    )
    beside.add_argument(
        "--verdicts", type=Path, nargs="+", metavar="FILE", help="of these runs: pytest --verdicts, or drill --json"
    )
    beside.add_argument(
        "--do-bench",
        type=Path,
        nargs="+",
        metavar="FILE",
        help="readings of do_bench_cudagraph, a card a file: {uuid, seconds: {case id: [s, ...]}}",
    )
    beside.add_argument("--json", type=Path, metavar="FILE", help="write the counts, and the cases behind them, to a new file")
    parser.add_argument("--machine", help="a folder of baselines/ (all of them)")
    parser.add_argument("--folder", type=Path, default=Path("baselines"), help="of all baselines (baselines)")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Write the report to stdout. Raises ValueError with one sentence for what cannot be read."""
    if args.side_by_side:
        return _side_by_side(args)
    if unused := [name for name in _BESIDE if getattr(args, name)]:
        raise ValueError(f"--{unused[0].replace('_', '-')} goes with --side-by-side RUN.json")
    if args.markdown:
        sys.stdout.write(markdown(_json_of(args.markdown, "verdicts file")))
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


def _side_by_side(args: argparse.Namespace) -> int:
    runs = [_sampled(path) for path in args.side_by_side]
    _refuse_twice(runs)
    machine = runs[0].run.machine_info["machine"]
    baseline = accepted(args.folder / machine, machine)
    if baseline is None:
        raise ValueError(f"no accepted run in {args.folder / machine}: name the place of the baselines with --folder")
    against = [_sampled(path) for path in args.against or [run.path for run in baseline.runs]]
    for one in (*runs, *against):
        if (found := one.run.machine_info["machine"]) != machine:
            raise ValueError(f"{one.run.path} is of {found}, and {runs[0].run.path} of {machine}: compare runs of one machine")
    answers = rivals.compare(runs, against, baseline, _ends(args.verdicts or [], runs))
    slowdowns = sorted({answer.injected for answer in answers if answer.injected})
    answers += rivals.do_bench_answers([_json_of(path, "readings") for path in args.do_bench or []], slowdowns)
    counts = rivals.count(answers)
    notes = rivals.notes(runs, against, counts)
    if args.json:
        Report(args.json).write({"rules": rivals.as_json(counts), "notes": notes})
    sys.stdout.write("\n".join([*rivals.table(counts), "", *(f"- {note}" for note in notes)]) + "\n")
    return 0


def _sampled(path: Path) -> Sampled:
    run, beside = parse(read(path), path), samples_path(path)
    try:
        kept = [json.loads(line) for line in beside.read_text(encoding="utf-8").splitlines()]
        samples = {str(case["name"]): [float(s) for s in case["seconds"]] for case in kept}
        if not all(min(seconds) > 0 for seconds in samples.values()):
            raise ValueError("a case without positive samples")
        return Sampled(run, samples)
    except FileNotFoundError:
        return Sampled(run)
    except OSError as error:
        raise ValueError(f"cannot read the samples {beside}: {error.strerror}") from error
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"the samples {beside} are truncated or not a case a line: remove them, or restore them") from error


def _refuse_twice(runs: Sequence[Sampled]) -> None:
    known: dict[tuple[str, str], Path] = {}
    for one in runs:
        if before := known.get(one.identity):
            raise ValueError(f"{before} and {one.run.path} are the same run: give it once")
        known[one.identity] = one.run.path


def _ends(files: Sequence[Path], runs: Sequence[Sampled]) -> dict[tuple[str, str], dict[str, bool]]:
    """What the gate flagged in the end, by run, for the runs that these files tell of; runs that were not given are left."""
    found: dict[tuple[str, str], dict[str, bool]] = {}
    for file in files:
        told = [(run, end) for end in rivals.ends(_json_of(file, "verdicts file")) if (run := _named(end.run, file, runs))]
        if not told:
            raise ValueError(f"{file} tells of none of these runs: give the runs that it names too")
        found |= {one.identity: end.flags(one.run) for one, end in told}
    return found


def _named(name: str, file: Path, runs: Sequence[Sampled]) -> Sampled | None:
    """The run that a verdicts file means: a path from where pytest was started, which is here, or where the file is."""
    places = [Path(name).resolve(), (file.parent / name).resolve()]
    return next((one for place in places for one in runs if one.run.path.resolve() == place), None)


def _json_of(path: Path, what: str) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ValueError(f"cannot read the {what} {path}: {error.strerror}") from error
    except ValueError as error:
        raise ValueError(f"the {what} {path} is truncated or not JSON ({error})") from error
