"""`fp4bench do-bench`: cases of a stored run by triton's do_bench_cudagraph, each reading in a fresh process.

What it writes is for `fp4bench report --side-by-side ... --do-bench FILE`, which asks what a threshold on such readings flags.
"""

import argparse
from collections.abc import Iterable, Mapping, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

from fp4bench.cli.drill import slowdown
from fp4bench.cli.sessions import Report, count, ended_by_sigterm, say
from fp4bench.evidence.baselines import StoredRun, parse, read

FACTORY = "fp4bench.workers.do_bench:DoBench"
_TIMEOUT_SECONDS = 120.0  # of one case


def add_parser(commands: Any) -> None:
    parser = commands.add_parser(
        "do-bench",
        help="read a stored run's cases by triton's do_bench_cudagraph(rep=200), to set its readings beside the gate's",
        description="Each repeat is a fresh process that reads all cases once. Needs a CUDA GPU and Triton.",
    )
    parser.add_argument("run_file", type=Path, metavar="RUN.json", help="whose cases are read; its times are not used")
    parser.add_argument("--cases", type=count, metavar="N", help="so many of them, evenly spread (all)")
    parser.add_argument("--repeat", type=count, default=3, metavar="N", help="processes (3)")
    parser.add_argument(
        "--slowdown", type=slowdown, action="append", default=[], metavar="PERCENT", help="read each case slowed down too"
    )
    parser.add_argument("--device", default="auto", help="auto, cuda or cuda:<index>")
    parser.add_argument("--json", type=Path, required=True, metavar="FILE", help="a new file for the readings")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace, factory: str = FACTORY) -> int:
    """Read and write. 0, or 1 where a case failed; ValueError where the run or the device cannot serve."""
    from fp4bench.devices import find_device
    from fp4bench.timing.machine import card, machine_info
    from fp4bench.workers.process import StartFailed

    device = find_device(args.device)
    stored = parse(read(args.run_file), args.run_file)
    cases = spread_out(cases_of(stored, device), args.cases)
    readings = Readings(card(machine_info(device)), tuple(args.slowdown), Report(args.json))
    try:
        with ended_by_sigterm():
            read_all(cases, readings, args.repeat, device.torch_name, factory)
    except StartFailed as error:
        raise ValueError(str(error)) from error
    say(*readings.lines())
    return 1 if readings.failed else 0


class Readings:
    """Seconds by case, one a process; what is found is in the file at once. A case that failed is out for good."""

    def __init__(self, card: str, slowdowns: tuple[float, ...], report: Report) -> None:
        self.card, self.slowdowns, self._report = card, slowdowns, report
        self.seconds: dict[str, list[float]] = {}
        self.slowed: dict[float, dict[str, list[float]]] = {share: {} for share in slowdowns}
        self.failed: dict[str, str] = {}

    def add(self, case_id: str, seconds: Sequence[float]) -> None:
        """One process's readings of a case: as it is, then by slowdown."""
        self.seconds.setdefault(case_id, []).append(seconds[0])
        for share, value in zip(self.slowdowns, seconds[1:], strict=True):
            self.slowed[share].setdefault(case_id, []).append(value)
        self._write()

    def fail(self, case_id: str, why: str) -> None:
        self.failed[case_id] = why
        for table in (self.seconds, *self.slowed.values()):
            table.pop(case_id, None)
        self._write()

    def _write(self) -> None:
        slowed = {str(share): table for share, table in self.slowed.items()}
        self._report.write({"uuid": self.card, "seconds": self.seconds, "slowed": slowed, "failed": self.failed})

    def lines(self) -> list[str]:
        """How far the readings of a case lie apart, and what failed."""
        ranges = sorted(max(values) / min(values) - 1 for values in self.seconds.values())
        found = [f"{case_id} failed: {why}" for case_id, why in self.failed.items()]
        if not ranges:
            return [*found, "no case could be read"]
        middle, last = ranges[len(ranges) // 2], ranges[-1]
        return [*found, f"{len(ranges)} cases; the readings of a case lie {middle:.1%} apart (median), {last:.1%} at most"]


def read_all(cases: Mapping[str, Any], readings: Readings, repeat: int, device: str, factory: str = FACTORY) -> None:
    """Each case once in each of `repeat` processes. Raises `StartFailed` where no process can read anything."""
    from fp4bench.workers.do_bench import ReadCase
    from fp4bench.workers.process import StartFailed, Worker, WorkerError

    with closing(Worker(factory, device)) as worker:
        for number in range(repeat):
            if number:
                worker.restart()
            for case_id, case in cases.items():
                if case_id in readings.failed:
                    continue
                try:
                    readings.add(case_id, worker.ask(ReadCase(case, readings.slowdowns), _TIMEOUT_SECONDS))
                except StartFailed:
                    raise
                except WorkerError as error:
                    readings.fail(case_id, str(error))
            say(f"process {number + 1} of {repeat}: {len(readings.seconds)} cases read, {len(readings.failed)} failed")


def cases_of(run: StoredRun, device: Any) -> dict[str, Any]:
    """The run's cases, as its options select them today, in its order. Raises ValueError where one is no longer offered."""
    from fp4bench.cases import CASES, select

    selection = select(run.info.get("options") or {}, device)
    ops = dict.fromkeys(timing.record["op"] for timing in run.cases.values())
    offered = {str(case): case for op in ops for case in CASES[op](selection) if case.why_not(device) is None}
    if gone := run.cases.keys() - offered.keys():
        raise ValueError(f"{run.path} holds {min(gone)}, which its options do not select here: record it anew")
    return {case_id: offered[case_id] for case_id in run.cases}


def spread_out(cases: Mapping[str, Any], number: int | None) -> dict[str, Any]:
    """So many of the cases, evenly spread over their order; all without a number, or where there are no more."""
    ids = list(cases)
    chosen: Iterable[str] = ids
    if number is not None and number < len(ids):
        chosen = [ids[i * len(ids) // number] for i in range(number)]
    return {case_id: cases[case_id] for case_id in chosen}
