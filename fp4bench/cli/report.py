"""`fp4bench report`: accepted runs and how they repeat, verdicts, rules side by side, and what stored runs say of providers."""

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from fp4bench.cli.sessions import Report, count
from fp4bench.evidence import comparison, frontier, plots, repeats, rivals, standing, throughput
from fp4bench.evidence.baselines import Baseline, accepted, parse, read, stored_files
from fp4bench.evidence.report import accepted_runs, markdown
from fp4bench.evidence.results import Choice, Results, join
from fp4bench.evidence.rivals import Sampled
from fp4bench.evidence.storage import samples_path
from fp4bench.evidence.unfinished import as_run

_CHOICE = ("formats", "modes", "batch_sizes")
# Which options go with which report.
_BESIDE = {
    "spread": ("cards",),
    "side_by_side": ("against", "do_bench", "verdicts", "json"),
    "throughput": ("plots", "csv", *_CHOICE),
    "frontier": ("json", *_CHOICE),
    "kernels": ("provider", *_CHOICE),
    "compare": ("phases", *_CHOICE),
}


def add_parser(commands: Any) -> None:
    parser = commands.add_parser(
        "report",
        help="accepted runs, how well they repeat, and what stored runs say of providers, as Markdown",
        description="Without options: the accepted runs of each machine, as Markdown.",
    )
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--spread", action="store_true", help="how well accepted runs repeat, and which cases are blind")
    what.add_argument("--markdown", type=Path, metavar="FILE", help="a verdicts file (pytest --verdicts) as a summary for CI")
    for name, help_ in (
        ("--side-by-side", "what this gate and the rules of other tools flag and miss in stored runs"),
        ("--throughput", "TFLOP/s of each provider over batch sizes, for each format, layer and Hadamard size"),
        ("--frontier", "the fastest right provider of each layer and batch size, and its lead"),
        ("--compare", "times of all providers over batch sizes, with and without a CUDA graph, the fastest marked"),
        ("--kernels", "one provider beside BF16, the measured roof and the best of the others"),
    ):
        what.add_argument(name, type=Path, nargs="+", metavar="RUN.json", help=help_)
    _add_side_by_side(parser)
    _add_providers(parser)
    parser.add_argument("--json", type=Path, metavar="FILE", help="a new file for what --side-by-side or --frontier found")
    parser.add_argument("--machine", help="a folder of baselines/ (all of them)")
    parser.add_argument(
        "--cards", nargs="+", metavar="UUID", help="--spread: runs of these cards alone, by how their UUIDs begin (all)"
    )
    parser.add_argument("--folder", type=Path, default=Path("baselines"), help="of all baselines (baselines)")
    parser.set_defaults(run=run)


def _add_side_by_side(parser: argparse.ArgumentParser) -> None:
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


def _add_providers(parser: argparse.ArgumentParser) -> None:
    beside = parser.add_argument_group(
        "with --throughput, --frontier, --kernels and --compare",
        "Runs of one machine are joined; a case of several takes the median of their medians. BF16 and FP16 always stay in. "
        "For a run that was cut off its journal (.jsonl) may stand.",
    )
    beside.add_argument("--formats", nargs="+", metavar="FORMAT", help="only these formats (all)")
    beside.add_argument("--modes", nargs="+", metavar="MODE", help="only these modes (all)")
    beside.add_argument("--batch-sizes", nargs="+", type=count, metavar="M", help="only these batch sizes (all)")
    beside.add_argument("--provider", metavar="NAME", help="--kernels: whose kernels (triton)")
    beside.add_argument("--phases", action="store_true", help="--compare: what each part of a MoE layer takes too")
    beside.add_argument("--csv", type=Path, metavar="FILE", help="--throughput: a new file for every result")
    beside.add_argument(
        "--plots", type=Path, metavar="FOLDER", help="--throughput: draw bench_<format>_res_n<N>_k<K>.png there (matplotlib)"
    )


def run(args: argparse.Namespace) -> int:
    """Write the report to stdout. Raises ValueError with one sentence for what cannot be read or written."""
    _refuse_strays(args)
    sys.stdout.write("".join(f"{line}\n" for line in lines(args)))
    return 0


def lines(args: argparse.Namespace) -> list[str]:
    """The report that was asked for, and its files written. Raises ValueError as `run` does."""
    reports: dict[str, Callable[[argparse.Namespace], list[str]]] = {
        "side_by_side": _side_by_side,
        "throughput": _throughput,
        "frontier": _frontier,
        "kernels": _kernels,
        "compare": _compare,
        "markdown": _markdown,
    }
    asked = next((make for name, make in reports.items() if getattr(args, name)), _machines)
    return asked(args)


def _refuse_strays(args: argparse.Namespace) -> None:
    """Options that belong to another report than the one that was asked for."""
    allowed = next((names for report, names in _BESIDE.items() if getattr(args, report)), ())
    for stray in dict.fromkeys(name for names in _BESIDE.values() for name in names):
        if getattr(args, stray) and stray not in allowed:
            theirs = " or ".join(_asked_by(report) for report, names in _BESIDE.items() if stray in names)
            raise ValueError(f"{_option(stray)} goes with {theirs}")


def _option(name: str) -> str:
    return f"--{name.replace('_', '-')}"


def _asked_by(report: str) -> str:
    return _option(report) if report == "spread" else f"{_option(report)} RUN.json"


def _machines(args: argparse.Namespace) -> list[str]:
    show = _spread if args.spread else accepted_runs
    found: list[str] = []
    for baseline in baselines(args):
        found += [*([""] * 2 if found else []), f"### {baseline.runs[-1].machine_info['machine']}", "", *show(baseline)]
    return found


def _spread(baseline: Baseline) -> list[str]:
    cards = repeats.by_card(baseline)
    return [*repeats.spread(baseline), *([""] if cards else []), *cards]


def _markdown(args: argparse.Namespace) -> list[str]:
    return markdown(_json_of(args.markdown, "verdicts file")).splitlines()


def _throughput(args: argparse.Namespace) -> list[str]:
    results = _joined(args, args.throughput)
    found = throughput.lines(results)
    if args.csv:
        throughput.write_csv(results, args.csv)
        found += ["", f"Every result: {args.csv}"]
    if args.plots:
        found += ["", *(f"Plot: {path}" for path in plots.plot(results, args.plots))]
    return found


def _frontier(args: argparse.Namespace) -> list[str]:
    results = _joined(args, args.frontier)
    found = frontier.lines(results)
    if args.json:
        Report(args.json).write(frontier.as_json(results))
        found += ["", f"As a dispatch table: {args.json}"]
    return found


def _kernels(args: argparse.Namespace) -> list[str]:
    return standing.lines(_joined(args, args.kernels), args.provider or "triton")


def _compare(args: argparse.Namespace) -> list[str]:
    return comparison.lines(_joined(args, args.compare), phases=args.phases)


def _joined(args: argparse.Namespace, paths: Sequence[Path]) -> Results:
    choice = Choice(*(tuple(getattr(args, axis) or ()) for axis in _CHOICE))
    return join([parse(as_run(path) if path.suffix == ".jsonl" else read(path), path) for path in paths], choice)


def baselines(args: argparse.Namespace) -> list[Baseline]:
    """Those of the machines and cards that were asked for. Raises ValueError where there are none."""
    folders = [args.folder / args.machine] if args.machine else sorted(f for f in args.folder.glob("*") if stored_files(f))
    found = [baseline for folder in folders if (baseline := accepted(folder, folder.name))]
    if not found:
        where = args.folder / args.machine if args.machine else args.folder
        raise ValueError(f"no accepted run in {where}: take one in with fp4bench accept, or name its place with --folder")
    return [baseline.of_cards(args.cards) for baseline in found] if args.cards else found


def _side_by_side(args: argparse.Namespace) -> list[str]:
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
    return [*rivals.table(counts), "", *(f"- {note}" for note in notes)]


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
