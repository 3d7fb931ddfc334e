"""`fp4bench machine`: the key and identity of a device, its driver's facts, who is fastest, which baselines there are."""

import argparse
import json
import sys
from collections.abc import Iterable, Mapping
from contextlib import closing
from dataclasses import asdict
from pathlib import Path
from typing import Any

from fp4bench.evidence.baselines import BaselineError, parse, read, stored_files
from fp4bench.evidence.fastest import Fastest, fastest
from fp4bench.evidence.results import ResultsError, join


def add_parser(commands: Any) -> None:
    parser = commands.add_parser(
        "machine",
        help="which machine this is, what its GPU does now, and which baselines there are",
        description="The machine's key names the folder of its baselines; its identity is stored with each run.",
    )
    parser.add_argument("--device", default="auto", help="auto (a GPU where there is one), cpu, cuda or cuda:<index>")
    parser.add_argument("--folder", type=Path, default=Path("baselines"), help="of all baselines (baselines)")
    parser.add_argument("--json", action="store_true", help="as JSON")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Write the facts to stdout. Raises ValueError for a device that is not there."""
    found = facts(args.device, args.folder)
    sys.stdout.write(json.dumps(found, indent=2) + "\n" if args.json else "\n".join(lines(found, args.folder)) + "\n")
    return 0


def facts(device_name: str, folder: Path) -> dict[str, Any]:
    """What this machine is, does, and did.

    identity: as a run stores it. telemetry: now (None without, see `identity.nvml`). fastest: by file, then by format and mode,
    what its stored runs say of providers. baselines: files by machine.
    """
    # torch takes seconds to import, and the other commands do without.
    from fp4bench.devices import find_device
    from fp4bench.timing.machine import machine_info
    from fp4bench.timing.telemetry import Telemetry

    device = find_device(device_name)
    with closing(Telemetry.open(device)) as telemetry:
        # The look at opening: this process had no context on the GPU yet.
        now = None if telemetry.reason else asdict(telemetry.at_open)
    if now and now["processes"] is not None:
        now["processes"] = [process._asdict() for process in now["processes"]]
    identity = machine_info(device)
    own = folder / identity["machine"]
    return {"identity": identity, "telemetry": now, "fastest": measured(own), "baselines": baselines(folder)}


def measured(folder: Path) -> dict[str, dict[str, dict[str, Any]]]:
    """Who was fastest, by file: of the runs of kernels below a machine's folder, and of its newest accepted run.

    A file that holds no run, or none of FP4 beside BF16, is left out.
    """
    found = {}
    for path in (*sorted((folder / "kernels").glob("*.json")), *stored_files(folder)[-1:]):
        try:
            of_run = {each.answer: asdict(each) for each in fastest(join([parse(read(path), path)]).of("gemm", "moe"))}
        except (BaselineError, ResultsError):
            continue
        if of_run:
            found[str(path.relative_to(folder))] = of_run
    return found


def baselines(folder: Path) -> dict[str, list[str]]:
    """The names of the accepted runs by machine; a folder without any is left out."""
    if not folder.is_dir():
        return {}
    by_machine = {each.name: [path.name for path in stored_files(each)] for each in sorted(folder.iterdir()) if each.is_dir()}
    return {machine: names for machine, names in by_machine.items() if names}


def lines(found: Mapping[str, Any], folder: Path) -> list[str]:
    """The facts as text: a line a fact, `-` for what is not known."""
    identity, now = found["identity"], found["telemetry"]
    told = _aligned((key, _text(value)) for key, value in now.items()) if now else [f"  none: {identity['nvml']}"]
    return [
        identity["machine"],
        *_aligned((key, _text(value)) for key, value in identity.items() if key != "machine"),
        "",
        "now",
        *told,
        "",
        *_fastest_lines(found["fastest"]),
        *_baseline_lines(found["baselines"], identity["machine"], folder),
    ]


def _fastest_lines(by_file: Mapping[str, Mapping[str, Mapping[str, Any]]]) -> list[str]:
    return [
        line
        for name, by_answer in by_file.items()
        for line in (
            f"fastest in {name}",
            *_aligned((answer, str(Fastest(**facts))) for answer, facts in by_answer.items()),
            "",
        )
    ]


def _baseline_lines(there: Mapping[str, list[str]], machine: str, folder: Path) -> list[str]:
    own = there.get(machine)
    if own:
        first = [f"accepted runs of this machine, in {folder / machine}", *(f"  {name}" for name in own)]
    else:
        first = [f"no accepted run of this machine in {folder / machine}"]
    others = {name: f"{len(names)} accepted" for name, names in there.items() if name != machine}
    return [*first, *(["", "other machines", *_aligned(others.items())] if others else [])]


def _aligned(rows: Iterable[tuple[str, str]]) -> list[str]:
    rows = list(rows)
    width = max((len(key) for key, _ in rows), default=0)
    return [f"  {key:<{width}}  {value}" for key, value in rows]


def _text(value: Any) -> str:
    if value is None:
        return "-"
    if isinstance(value, (list, tuple)):
        return ", ".join(map(_item, value)) or "none"
    return f"{value:g}" if isinstance(value, float) else str(value)


def _item(value: Any) -> str:
    """A throttle reason, or a process of others."""
    if isinstance(value, str):
        return value
    size = "unknown memory" if value["used_bytes"] is None else f"{value['used_bytes'] / 2**20:.0f} MiB"
    return f"{value['pid']} ({size})"
