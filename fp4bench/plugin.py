"""The pytest plugin: options, the `bench` fixture over pytest-benchmark, stored runs by machine, verdicts as test reports.

Glue only. A project's conftest.py loads it (`pytest_plugins = ["fp4bench.plugin"]`) and its settings name `fp4bench_baselines`.
What it knows of pytest-benchmark's insides (5.3): `benchmark._mode`, `benchmark._make_stats`, `benchmark.has_error`,
`config._benchmarksession` with `benchmarks`, `machine_id` and `storage.default_machine_id`.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from fp4bench.cases import Case, Selection
    from fp4bench.devices import Device
    from fp4bench.evidence.baselines import Baseline, Timing
    from fp4bench.evidence.verdict import Verdict
    from fp4bench.timing.clock import Clock, Measurement

# Options that choose cases; those of the reference benchmarks keep their names.
_LIST_OPTIONS = {
    "models": "short names, Hugging Face ids, or paths of config.json files",
    "tp-sizes": "tensor parallel sizes",
    "batch-sizes": "batch sizes, the m of a GEMM",
    "had-sizes": "Hadamard sizes of the rotation before quantization: none, 16, 32, 64, 128",
    "limit-k": "only layers with these k",
    "limit-n": "only layers with these n",
    "formats": "FP4 formats: mxfp4, nvfp4",
    "modes": "GEMM modes: bf16, fp8, w4a16, w4a8, w4a4, w4a4_noquant",
    "providers": "providers",
}


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("fp4bench", "fp4bench: which cases to time")
    for name, what in _LIST_OPTIONS.items():
        group.addoption(f"--{name}", nargs="+", metavar="X", help=f"{what}; several, or all. Put the test path before it.")
    group.addoption("--device", default="auto", help="auto (a GPU where there is one), cpu, cuda or cuda:<index>")
    group.addoption(
        "--confirm", type=int, metavar="N", help="measure a slower case N times again; it fails if slower every time"
    )
    parser.addini("fp4bench_baselines", "Folder of stored runs, one folder a machine; the plugin acts only where it is set.")


@pytest.hookimpl(tryfirst=True)
def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "cases(op): run the test once for each selected case of an operation (gemm, quantize)")
    if not config.getini("fp4bench_baselines") or not config.pluginmanager.hasplugin("benchmark"):
        return
    suite = Suite(config)
    config.stash[_SUITE] = suite
    config.pluginmanager.register(suite, "fp4bench-suite")
    try:
        suite.prepare_options()
    except ValueError as error:
        raise pytest.UsageError(f"fp4bench: {error}") from error


_SUITE = pytest.StashKey["Suite"]()


@pytest.fixture
def bench(request: pytest.FixtureRequest, benchmark: Any) -> Bench:
    """Checks a case's output against its reference, then times it: `bench(case)`."""
    suite = request.config.stash.get(_SUITE, None)
    if suite is None:
        raise pytest.UsageError("the bench fixture needs `fp4bench_baselines = baselines` in the project's pytest settings")
    return Bench(suite, benchmark, request.node)


@dataclass(frozen=True)
class Bench:
    """The `bench` fixture of one test."""

    suite: Suite
    benchmark: Any  # pytest_benchmark.fixture.BenchmarkFixture
    item: pytest.Item

    def __call__(self, case: Case) -> None:
        """Prepare the case, compare its output with the reference, then time it and store the record.

        A wrong output raises WrongResultError, and the case stores no number. With --benchmark-disable nothing is timed.
        """
        from fp4bench.checking import check

        inputs = self.suite.inputs(case)
        call = case.provider.prepare(case.problem, inputs)
        agreement = check(case.problem, inputs, case.rule, call())
        self.benchmark._mode = "fp4bench"
        if self.benchmark.disabled:
            return
        measurement = self.suite.clock.measure(call)
        record = _record(case, measurement) | {"error": agreement.error, "exact": agreement.exact}
        self._store(record, measurement)
        self.suite.measured[str(case)] = self.item, case

    def _store(self, record: dict[str, Any], measurement: Measurement) -> None:
        benchmark = self.benchmark
        # Rows of one shape stand together, so that their relative times say which mode and provider is best for it.
        benchmark.group = "{op} {model}.{layer}.tp{tp}-m{m}".format(**record)
        benchmark.name = record["case_id"]
        benchmark.params = {"case": record["case_id"]}
        benchmark.extra_info.update(record)
        stats = benchmark._make_stats(measurement.calls_per_sample)
        for seconds in measurement.seconds:
            stats.update(seconds * measurement.calls_per_sample)


def _is_test_path(value: str) -> bool:
    """Whether an option's value is rather the path of tests, which the option swallowed."""
    return Path(value).is_dir() or value.endswith(".py") or "::" in value


def _record(case: Case, measurement: Measurement) -> dict[str, Any]:
    from fp4bench.evidence.record import make_record

    timed = {"clock": measurement.clock, "l2": measurement.l2, "calls_per_sample": measurement.calls_per_sample}
    return make_record(case.facts() | timed, measurement.seconds)


class Suite:
    """One session: the selection, the clock, the baseline, and what was measured."""

    def __init__(self, config: pytest.Config) -> None:
        self.config = config
        self.folder = config.rootpath / config.getini("fp4bench_baselines")
        self.baseline: Baseline | None = None
        self.verdicts: dict[str, Verdict] = {}
        self.measured: dict[str, tuple[pytest.Item, Case]] = {}
        self.notes: list[str] = []
        self.broken: ValueError | None = None
        self.empty: bool | None = None  # None until a test asked for cases
        self._inputs: tuple[Any, Any] = (None, None)

    # Options

    def prepare_options(self) -> None:
        """Check options before anything runs, and point pytest-benchmark at this machine's stored runs. Raises ValueError."""
        from pytest_benchmark.logger import PytestBenchmarkWarning

        option = self.config.option
        self._check_selection()
        keeps = option.benchmark_save or option.benchmark_autosave
        if (option.benchmark_compare or keeps) and self.config.getoption("dist", "no") != "no":
            raise ValueError("cases cannot be timed beside each other: leave out -n and --dist")
        if isinstance(option.benchmark_json, Path):
            # pytest-benchmark opens the file at the end of the session: without its folder the run would be lost.
            option.benchmark_json.parent.mkdir(parents=True, exist_ok=True)
        if option.benchmark_storage == "file://./.benchmarks":
            option.benchmark_storage = f"file://{self.folder}"
        else:
            self.folder = Path(option.benchmark_storage.removeprefix("file://")).absolute()
        # pytest-benchmark warns at the end of a session, outside of any test ("nothing to save"): as an error it would hide the
        # failures.
        warnings.filterwarnings("default", category=PytestBenchmarkWarning)
        if option.collectonly:
            option.benchmark_compare = None
        if option.benchmark_compare:
            self._find_baseline()

    def _check_selection(self) -> None:
        asked = self._asked()
        try:
            if asked or self.config.option.device != "auto":
                _ = self.selection
        except ValueError:
            for name, values in asked.items():
                if path := next(filter(_is_test_path, values), None):
                    option = name.replace("_", "-")
                    raise ValueError(f"--{option} took the path {path!r} for a value: put the path first") from None
            raise

    def _find_baseline(self) -> None:
        from fp4bench.evidence import baselines

        wanted = self.config.option.benchmark_compare
        if isinstance(wanted, str) and _is_test_path(wanted):
            raise ValueError(f"--benchmark-compare took the path {wanted!r} for its value: put the path first")
        machine = self.machine_info["machine"]
        path = baselines.find(self.folder / machine, wanted if isinstance(wanted, str) else None)
        if path is None:
            kept = self.config.option.benchmark_save or self.config.option.benchmark_autosave
            hint = "this run is stored as one" if kept else "record one: pytest perf --benchmark-save=baseline"
            self.notes.append(f"no baseline of {machine} in {self._short(self.folder)}, so nothing was compared; {hint}")
            # pytest-benchmark would warn, or stop with a traceback after the run.
            self.config.option.benchmark_compare = self.config.option.benchmark_compare_fail = None
            return
        self.baseline = baselines.load(path, machine)
        self.config.option.benchmark_compare = str(path)

    def _asked(self) -> dict[str, list[str]]:
        """The list options that were given, by name. Values may be separated by spaces or commas."""
        asked = {}
        for option in _LIST_OPTIONS:
            name = option.replace("-", "_")
            if values := [part for value in self.config.getoption(name) or () for part in value.split(",")]:
                asked[name] = values
        return asked

    def _short(self, path: Path) -> str:
        return str(path.relative_to(self.config.rootpath)) if path.is_relative_to(self.config.rootpath) else str(path)

    @cached_property
    def device(self) -> Device:
        from fp4bench.devices import find_device

        return find_device(self.config.option.device)

    @cached_property
    def selection(self) -> Selection:
        from fp4bench.cases import select

        return select(self._asked(), self.device)

    @cached_property
    def machine_info(self) -> dict[str, Any]:
        from fp4bench.timing.machine import machine_info

        return machine_info(self.device)

    @cached_property
    def clock(self) -> Clock:
        from fp4bench.timing.clock import clock_for

        return clock_for(self.device)

    def inputs(self, case: Case) -> Any:
        """The case's inputs; cases of one shape follow each other and share them."""
        key = (case.problem.op, case.problem.shape)
        if self._inputs[0] != key:
            self._inputs = (None, None)  # frees the old ones first
            self._inputs = (key, case.problem.inputs(self.device.torch_name))
        return self._inputs[1]

    # Hooks

    def pytest_report_header(self) -> str | None:
        if self.baseline is None:
            return None
        cases = len(self.baseline.cases)
        return f"fp4bench: comparing with {self._short(self.baseline.path)}, {cases} cases of {self.baseline.datetime[:19]}"

    def pytest_generate_tests(self, metafunc: pytest.Metafunc) -> None:
        marker = metafunc.definition.get_closest_marker("cases")
        if marker is None:
            return
        from fp4bench.cases import CASES

        try:
            cases = list(CASES[marker.args[0]](self.selection))
        except ValueError as error:  # a provider that is none; options were checked before
            self.broken, cases = error, []  # raised here it would be one file's collection error
        self.empty = not cases and self.empty is not False
        params = []
        for case in cases:
            reason = case.why_not(self.device)
            params.append(pytest.param(case, marks=pytest.mark.skip(reason=reason)) if reason else case)
        metafunc.parametrize("case", params, ids=map(str, cases))

    def pytest_collection_modifyitems(self) -> None:
        if self.broken:
            raise pytest.UsageError(f"fp4bench: {self.broken}")
        if self.empty:
            raise pytest.UsageError("fp4bench: nothing to run: no selected provider has a selected mode and format")

    def pytest_sessionstart(self, session: pytest.Session) -> None:
        option = self.config.option
        if option.benchmark_save or option.benchmark_autosave:
            # pytest-benchmark's own key has no GPU in it.
            self._store_under(self.machine_info["machine"])

    def _store_under(self, folder: str) -> None:
        benchmarks = self.config._benchmarksession  # type: ignore[attr-defined]
        benchmarks.machine_id = benchmarks.storage.default_machine_id = folder

    def _set_aside(self, why: str) -> None:
        """Store this run where no later one takes it for a baseline."""
        if self.config.option.benchmark_save or self.config.option.benchmark_autosave:
            folder = f"{self.machine_info['machine']}/{why}"
            self._store_under(folder)
            self.notes.append(f"this run is stored in {self._short(self.folder / folder)}, where it is no baseline")

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_makereport(self, item: pytest.Item, call: pytest.CallInfo[None]) -> Iterator[None]:
        report: Any = yield
        if report.failed and (benchmark := getattr(item, "funcargs", {}).get("benchmark")):
            # A case that failed after it was timed must not become a baseline.
            benchmark.has_error = True
            self.measured = {case_id: (it, case) for case_id, (it, case) in self.measured.items() if it is not item}
        return report

    @pytest.hookimpl(wrapper=True)
    def pytest_runtestloop(self, session: pytest.Session) -> Iterator[None]:
        complete = False
        try:
            result: Any = yield
            complete = True
            return result
        finally:
            self._conclude(complete)

    def _conclude(self, complete: bool) -> None:
        """After the last case, or after -x, Ctrl-C or an internal error stopped the run."""
        from fp4bench.evidence.record import add_speedups

        now = self._timings()
        add_speedups([timing.record for timing in now.values()], {case_id: t.median for case_id, t in now.items()})
        if not complete and now:
            self.notes.append(f"the run was stopped: {len(now)} timed cases were not compared")
            self._set_aside("stopped")
        if complete and self.baseline is not None:
            self._judge(self.baseline, now)

    def _timings(self) -> dict[str, Timing]:
        from fp4bench.evidence.baselines import Timing

        stored = self.config._benchmarksession.benchmarks  # type: ignore[attr-defined]
        return {
            metadata.extra_info["case_id"]: Timing(metadata.stats.median, metadata.stats.min, metadata.extra_info)
            for metadata in stored
            if metadata and not metadata.has_error and metadata.extra_info.get("case_id") in self.measured
        }

    def _judge(self, baseline: Baseline, now: Mapping[str, Timing]) -> None:
        from fp4bench.evidence.gate import judge_run
        from fp4bench.evidence.report import duration
        from fp4bench.evidence.verdict import POLICIES, Outcome

        policy = POLICIES[self.clock.name]
        if self.config.option.confirm is not None:
            policy = replace(policy, repetitions=self.config.option.confirm)
        self.verdicts = judge_run(baseline, now, policy, self._measure_again)
        for case_id, verdict in self.verdicts.items():
            if verdict.outcome is Outcome.REGRESSED:
                then, here = duration(baseline.cases[case_id].median), duration(now[case_id].median)
                text = (
                    f"{case_id} is {verdict.change:.1%} slower than its baseline: {then} then, {here} now. "
                    f"Its median and its fastest sample are slower by more than {policy.threshold:.0%}; "
                    f"it was measured again {policy.repetitions} times, and slower each time."
                )
                self._fail(self.measured[case_id][0], text)
        if any(verdict.outcome is Outcome.REGRESSED for verdict in self.verdicts.values()):
            self._set_aside("regressed")
        option = self.config.option
        if not (option.benchmark_verbose or option.benchmark_histogram):
            # Our table says it in a line a case; pytest-benchmark's would print each case twice.
            self.config._benchmarksession.quiet = True  # type: ignore[attr-defined]

    def _measure_again(self, case_id: str) -> Timing:
        from fp4bench.evidence.baselines import Timing

        case = self.measured[case_id][1]
        measurement = self.clock.measure(case.provider.prepare(case.problem, self.inputs(case)))
        return Timing(median(measurement.seconds), min(measurement.seconds), _record(case, measurement))

    def _fail(self, item: pytest.Item, text: str) -> None:
        """Report a regression as a failed test: exit code 1, FAILURES, JUnit, and `--lf` measures it again."""
        report = pytest.TestReport(item.nodeid, item.location, {}, "failed", text, "call", sections=[], duration=0)
        self.config.hook.pytest_runtest_logreport(report=report)

    @pytest.hookimpl(trylast=True)
    def pytest_terminal_summary(self, terminalreporter: pytest.TerminalReporter) -> None:
        from fp4bench.evidence import report

        baseline = self.baseline
        if baseline is not None:
            if self.verdicts:
                terminalreporter.section("fp4bench: baseline and now")
                lines = report.comparison(baseline, self._timings(), self.verdicts)
                terminalreporter.write("\n".join((*lines, "")) + "\n")
            self.notes.append(f"{report.counts(self.verdicts)} against {self._short(baseline.path)}")
            if left := baseline.cases.keys() - self.verdicts.keys():
                self.notes.append(f"{len(left)} cases of the baseline were not timed now")
            if changes := report.environment_changes(baseline, self.machine_info):
                self.notes.append(f"changed since the baseline: {changes}")
        for note in self.notes:
            terminalreporter.write_line(f"fp4bench: {note}")

    # pytest-benchmark's hooks

    @pytest.hookimpl(tryfirst=True)
    def pytest_benchmark_generate_machine_info(self) -> dict[str, Any]:
        return self.machine_info

    @pytest.hookimpl(tryfirst=True)
    def pytest_benchmark_compare_machine_info(self, machine_info: Any, compared_benchmark: dict[str, Any]) -> None:
        # The same machine, as `load` made sure. pytest-benchmark would warn of every new torch; the summary names changes.
        compared_benchmark["machine_info"] = machine_info

    def pytest_benchmark_update_json(self, output_json: dict[str, Any]) -> None:
        from fp4bench import __version__
        from fp4bench.evidence.record import FORMAT

        output_json["fp4bench"] = {"format": FORMAT, "version": __version__}
