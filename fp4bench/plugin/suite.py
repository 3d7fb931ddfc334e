"""One pytest session: which cases, timed by whom, compared with what, stored where.

What it knows of pytest-benchmark's insides (5.3): `benchmark._mode`, `benchmark._make_stats`, `benchmark.has_error`,
`config._benchmarksession` with `benchmarks`, `disabled`, `skip`, `save`, `autosave`, `quiet`, and what storing.py knows of it.
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from fp4bench.plugin import options
from fp4bench.plugin.progress import Progress
from fp4bench.plugin.storing import Storing
from fp4bench.plugin.tally import Tally, case_of

if TYPE_CHECKING:
    from fp4bench.cases import Case, Selection
    from fp4bench.devices import Device
    from fp4bench.plugin.gating import Gate
    from fp4bench.plugin.run import Run
    from fp4bench.workers.measure import TimedCase

INVALID_RUN = 6  # the exit code of a run whose conditions were bad; pytest's own end at 5


class Suite:
    """The session's hooks and what they share."""

    def __init__(self, config: pytest.Config) -> None:
        self.config = config
        self.baselines = config.rootpath / config.getini("fp4bench_baselines")
        self.gate: Gate | None = None
        self.asked: dict[str, list[str]] = {}
        self.ops: set[str] = set()
        self.tally = Tally()
        self.item_of: dict[str, pytest.Item] = {}  # of the selected cases
        self.notes: list[str] = []
        self.invalid: list[str] = []  # why this run says nothing, whatever it is compared with
        self.broken: ValueError | None = None
        self._started = time.monotonic()
        self._concluded = False
        self.storing = Storing(self)

    # Options

    def prepare_options(self) -> None:
        """Check options before anything runs, and keep pytest-benchmark from comparing on its own. Raises ValueError."""
        from pytest_benchmark.logger import PytestBenchmarkWarning

        option = self.config.option
        self._check_selection()
        options.check_numbers(option.case_timeout, option.confirm)
        self.slowdowns = options.slowdowns(option.inject)
        self.floors = options.floors_table(self.config.rootpath)
        keeps = option.benchmark_save or option.benchmark_autosave
        if (option.benchmark_compare or keeps) and self.config.getoption("dist", "no") != "no":
            raise ValueError("cases cannot be timed beside each other: leave out -n and --dist")
        if option.verdicts and not option.benchmark_compare:
            raise ValueError("--verdicts needs --benchmark-compare: without a comparison there are none")
        for path in (option.benchmark_json, option.verdicts):
            if isinstance(path, Path):
                # Both are written at the end of the session: without its folder the run would be lost.
                path.parent.mkdir(parents=True, exist_ok=True)
        # pytest-benchmark warns at the end of a session, outside of any test ("nothing to save"): as an error it would hide the
        # failures.
        warnings.filterwarnings("default", category=PytestBenchmarkWarning)
        wanted, option.benchmark_compare = option.benchmark_compare, None
        if option.collectonly or not wanted:
            return
        if isinstance(wanted, str) and options.is_test_path(wanted):
            raise ValueError(f"--benchmark-compare took the path {wanted!r} for its value: put the path first")
        from fp4bench.plugin.gating import Gate

        self.gate = Gate(self, wanted if isinstance(wanted, str) else None)

    def _check_selection(self) -> None:
        self.asked = options.asked(self.config)
        try:
            if self.asked or self.config.option.device != "auto":
                _ = self.selection
        except ValueError as error:
            raise ValueError(options.swallowed_path(self.asked) or error) from None

    @cached_property
    def device(self) -> Device:
        from fp4bench.devices import find_device

        return find_device(self.config.option.device)

    @cached_property
    def selection(self) -> Selection:
        from fp4bench.cases import select

        return select(self.asked, self.device)

    @cached_property
    def machine_info(self) -> dict[str, Any]:
        from fp4bench.timing.machine import machine_info

        return machine_info(self.device)

    @cached_property
    def runs(self) -> Path:
        """Where finished runs of this machine are stored."""
        storage = Path(str(self.config.option.benchmark_storage).removeprefix("file://"))
        return (self.config.invocation_params.dir / storage).resolve() / self.machine_info["machine"]

    @cached_property
    def run(self) -> Run:
        from fp4bench.plugin.run import HowToTime, Run

        option = self.config.option
        pace = "sustained" if option.sustained else "paced"
        how = HowToTime(self.device.torch_name, pace, option.warm, option.case_timeout, self.slowdowns, option.nvtx)
        return Run(how, self.runs / "unfinished", self._journal_header(pace), lambda: self.progress.show(), self._started)

    @cached_property
    def progress(self) -> Progress:
        return Progress(self.config, len(self.tally.due), len(self.run.resumed))

    def _journal_header(self, pace: str) -> dict[str, Any]:
        from fp4bench.evidence.record import FORMAT

        commit = self.config.hook.pytest_benchmark_generate_commit_info(config=self.config)
        key = {
            "format": FORMAT,
            "machine_info": self.machine_info,
            "device": self.device.torch_name,
            "options": self.asked,
            "pace": pace,
            "warm": self.config.option.warm,
            "slowdowns": self.slowdowns,
            "commit": [commit.get("id"), bool(commit.get("dirty"))],
        }
        return {"key": key}

    def short(self, path: Path) -> str:
        """A path as a user of this project writes it."""
        root = self.config.rootpath
        return str(path.relative_to(root)) if path.is_relative_to(root) else str(path)

    # Collecting

    def pytest_report_header(self) -> str | None:
        return self.gate.header() if self.gate else None

    def pytest_generate_tests(self, metafunc: pytest.Metafunc) -> None:
        marker = metafunc.definition.get_closest_marker("cases")
        if marker is None:
            return
        from fp4bench.cases import CASES

        try:
            cases = list(CASES[marker.args[0]](self.selection))
        except ValueError as error:  # a provider that is none; options were checked before
            self.broken, cases = error, []  # raised here it would be one file's collection error
        self.ops.add(marker.args[0])
        params = []
        for case in cases:
            reason = case.why_not(self.device)
            self.tally.generated.add(str(case))
            if reason:
                self.tally.skipped[str(case)] = reason
            params.append(pytest.param(case, marks=pytest.mark.skip(reason=reason)) if reason else case)
        metafunc.parametrize("case", params, ids=map(str, cases))

    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        try:
            if self.broken:
                raise self.broken
            if self.ops and not self.tally.generated:
                from fp4bench.cases import why_nothing

                raise ValueError(f"nothing to run: {why_nothing(self.ops, self.selection)}")
            if "moe" in self.ops and not self.selection.moe_shards:
                # Models without experts are no reason to report a skipped test in each run.
                items[:] = [item for item in items if not _is_for(item, "moe")]
            for item in items:
                options.check_floor(item)
        except ValueError as error:
            raise pytest.UsageError(f"fp4bench: {error}") from error

    def pytest_collection_finish(self, session: pytest.Session) -> None:
        found = [(str(case), item) for item in session.items if (case := case_of(item))]
        self.item_of = dict(found)
        self.tally.selected = set(self.item_of)
        if self.config.option.collectonly or not found:
            return
        try:
            if len(found) > len(self.item_of):
                case_id, item = next((c, item) for c, item in found if self.item_of[c] is not item)
                raise ValueError(f"{case_id} has two tests, and a run times it once: deselect {item.nodeid} or the other")
            if unknown := self.slowdowns.keys() - self.tally.due:
                raise ValueError(f"--inject slows down {min(unknown)}, which this run does not time")
            if self.config.option.resume:
                self._resume()
        except ValueError as error:
            raise pytest.UsageError(f"fp4bench: {error}") from error
        if self.tally.due:
            self.run.start()

    def _resume(self) -> None:
        """Raises ValueError where there is nothing to go on with, or where what was timed would be lost."""
        self.run.resume()
        if lost := self.run.timed.keys() - self.tally.due:
            raise ValueError(f"--resume: the run that was cut off had timed {min(lost)} too: select what it had selected")
        self.notes.append(f"{len(self.run.resumed)} cases were timed before, by the run that this one resumed")

    # Measuring

    def bench(self, case: Case, benchmark: Any, item: pytest.Item) -> None:
        """What the `bench` fixture does."""
        from fp4bench.workers.process import StartFailed, WorkerError

        benchmark._mode = "fp4bench"
        try:
            if benchmark.disabled:
                self.run.check(case)
                return
            found = self.run.time(case)
        except StartFailed as error:
            # It would fail for each case that follows.
            pytest.exit(f"fp4bench: {error}\n{error.traceback}", returncode=pytest.ExitCode.INTERNAL_ERROR)
        except WorkerError as error:
            raise pytest.fail.Exception(_told(error), pytrace=False) from None
        except OSError as error:
            # Going on would lose each case that follows.
            pytest.exit(f"fp4bench: {error}", returncode=pytest.ExitCode.TESTS_FAILED)
        finally:
            self.progress.advance(self.run.timed[str(case)].record if str(case) in self.run.timed else None)
        self._keep(found, benchmark)
        self.tally.timed[str(case)] = item, case

    def _keep(self, found: TimedCase, benchmark: Any) -> None:
        record = found.record
        # Rows of one shape stand together, so that their relative times say which mode and provider is best for it.
        benchmark.group = "{op} {model}.{layer}.tp{tp}-m{m}".format(**record)
        benchmark.name = record["case_id"]
        benchmark.params = {"case": record["case_id"]}
        benchmark.extra_info.update(record)
        stats = benchmark._make_stats(found.calls_per_sample)
        for seconds in found.seconds:
            stats.update(seconds * found.calls_per_sample)

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_makereport(self, item: pytest.Item, call: pytest.CallInfo[None]) -> Iterator[None]:
        report: Any = yield
        if case := case_of(item):
            if report.failed:
                # A case that failed after it was timed must not be stored.
                self.tally.fail(str(case))
                if benchmark := getattr(item, "funcargs", {}).get("benchmark"):
                    benchmark.has_error = True
            elif report.skipped and str(case) not in self.tally.skipped:
                reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else str(report.longrepr)
                self.tally.skipped[str(case)] = reason.removeprefix("Skipped: ")
        return report

    @pytest.hookimpl(tryfirst=True)
    def pytest_report_teststatus(self, report: pytest.TestReport) -> tuple[str, str, str] | None:
        """No dot for a passed case where the progress line counts it."""
        quiet = self._progressing and report.when == "call" and report.passed and "[" in report.nodeid
        return ("passed", "", "PASSED") if quiet else None

    @property
    def _progressing(self) -> bool:
        return "progress" in self.__dict__ and self.progress.live

    # Concluding

    @pytest.hookimpl(wrapper=True)
    def pytest_runtestloop(self, session: pytest.Session) -> Iterator[None]:
        try:
            result: Any = yield
            if not self.config.option.collectonly:
                self._conclude()
            return result
        finally:
            if self._progressing:
                self.progress.end()
            if not self._concluded:
                self._leave_unfinished()

    def _conclude(self) -> None:
        """After the last case."""
        if self.benchmarks.disabled or self.benchmarks.skip or not self.tally.selected:
            return
        try:
            if self.tally.timed:
                self._look_at_the_machine()
                self.storing.derive(self.benchmarks)
            if self.gate:
                self.gate.judge()
        except OSError as error:
            self.storing.failed(str(error))
            return
        self._concluded = True
        benchmarks = self.benchmarks
        if self.tally.timed:
            self.storing.take_over(benchmarks)
        if self.gate and self.gate.baseline and not (benchmarks.verbose or benchmarks.histogram):
            # Our summary says what changed; pytest-benchmark's table would hide it.
            benchmarks.quiet = True

    def _leave_unfinished(self) -> None:
        """After -x, Ctrl-C or an internal error. What was timed is in the journal, and is no run that could be stored."""
        if self.tally.timed:
            self.notes.append(f"the run was stopped; with --resume it goes on after the {len(self.tally.timed)} cases it timed")
            self.benchmarks.save = self.benchmarks.autosave = None

    def _look_at_the_machine(self) -> None:
        from fp4bench.plugin.conditions import invalid_reasons
        from fp4bench.workers.process import StartFailed

        try:
            self.run.read_canaries()
        except StartFailed as error:
            self.run.note_canary_error(error)
        self.invalid = invalid_reasons(self.run, self.device.is_cuda)
        if self.invalid and not self.gate:
            self.notes += [f"this run is INVALID, and cannot be accepted: {reason}" for reason in self.invalid]

    @property
    def benchmarks(self) -> Any:
        """pytest-benchmark's session."""
        return self.config._benchmarksession  # type: ignore[attr-defined]

    @pytest.hookimpl(trylast=True)
    def pytest_sessionfinish(self, session: pytest.Session) -> None:
        if self.gate:
            try:
                self.gate.write(self.config.option.verdicts)
            except OSError as error:
                self.storing.failed(str(error))
        if session.exitstatus != pytest.ExitCode.OK:
            return
        if not self.storing.wrote_all:
            session.exitstatus = pytest.ExitCode.TESTS_FAILED
        elif self.gate and self.gate.invalid and self.config.option.gate != "off":
            session.exitstatus = INVALID_RUN

    @pytest.hookimpl(trylast=True)
    def pytest_terminal_summary(self, terminalreporter: pytest.TerminalReporter) -> None:
        if self.gate:
            self.gate.summary(terminalreporter)
        if self.storing.path:
            terminalreporter.write_line(f"fp4bench: stored as {self.short(self.storing.path)}")
        for note in self.notes:
            terminalreporter.write_line(f"fp4bench: {note}")

    def pytest_unconfigure(self) -> None:
        # Also where the collection ended in an error, which pytest tells us nothing of.
        if "run" in self.__dict__:
            self.run.close()

    # pytest-benchmark's hooks

    @pytest.hookimpl(tryfirst=True)
    def pytest_benchmark_generate_machine_info(self) -> dict[str, Any]:
        return self.machine_info

    def pytest_benchmark_update_json(self, output_json: dict[str, Any]) -> None:
        output_json["fp4bench"] = self.storing.info(complete=self._concluded and self.tally.complete)

    @property
    def own_floors(self) -> dict[str, float]:
        """Of the timed cases that have one."""
        return options.own_floors(self.floors, {case_id: item for case_id, (item, _) in self.tally.timed.items()})


def _is_for(item: pytest.Item, op: str) -> bool:
    """Whether a test is that of an operation's cases."""
    marker = item.get_closest_marker("cases")
    return marker is not None and marker.args[0] == op


def _told(error: Any) -> str:
    """A worker's error as a test's failure: what happened, and where in the provider's code, if there."""
    parts = [str(error)]
    if getattr(error, "type_name", "") != "WrongResultError":
        parts += [text for text in (getattr(error, "traceback", ""), error.output) if text]
    return "\n\n".join(parts)
