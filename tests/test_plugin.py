"""The main job end to end: real pytest sessions over a small suite, with a provider from an installed entry point."""

import json
import os
import re
import shutil
import xml.etree.ElementTree as ET
from importlib.util import find_spec
from pathlib import Path

import pytest

import fp4bench
from fp4bench.devices import find_device
from fp4bench.evidence.record import KEYS
from fp4bench.models import get_model
from fp4bench.timing.machine import machine_key

pytest_plugins = ["pytester"]

PERF = Path(__file__).parent.parent / "perf"
MACHINE = machine_key(find_device("cpu"))
TINY = Path(__file__).parent / "tiny" / "config.json"
# Two layers of a tiny model at two batch sizes: four cases.
FEW = (
    "--device=cpu",
    "--providers=paced",
    f"--models={TINY}",
    "--limit-n=128",
    "--batch-sizes=1,4",
    "--modes=w4a16",
    "--formats=mxfp4",
    "--confirm=1",
)
CASES = [f"gemm-mxfp4-w4a16-paced-{get_model(str(TINY))}.{layer}.tp1-m{m}" for layer in ("o", "down") for m in (1, 4)]


@pytest.fixture
def suite(pytester, monkeypatch):
    """A project like this one: the perf tests, its pytest settings, and the paced provider installed beside it."""
    site = pytester.mkdir("site")
    shutil.copy(Path(__file__).parent / "paced_provider.py", site)
    metadata = site / "paced_provider-1.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: paced-provider\nVersion: 1\n")
    (metadata / "entry_points.txt").write_text("[fp4bench.providers]\npaced = paced_provider:PacedProvider\n")
    monkeypatch.syspath_prepend(site)
    # fp4bench too, for a machine where it is checked out and not installed.
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join((str(site), str(Path(fp4bench.__file__).parent.parent))))
    shutil.copytree(PERF, pytester.path / "perf", ignore=shutil.ignore_patterns("__pycache__"))
    pytester.makeini("[pytest]\naddopts = --import-mode=importlib\nfilterwarnings = error\nfp4bench_baselines = baselines\n")
    return pytester


XDIST = pytest.mark.skipif(not find_spec("xdist"), reason="pytest-xdist is not installed")
PLUGIN = ("-p", "fp4bench.plugin")


def run(suite, *args, **environment):
    """One session in a process of its own, as a user starts it."""
    with pytest.MonkeyPatch.context() as patch:
        for name, value in environment.items():
            patch.setenv(name, value)
        return suite.runpytest_subprocess(*PLUGIN, "perf", "-p", "no:cacheprovider", *args)


def text(result):
    return "\n".join(result.outlines + result.errlines)


def stored(suite, name="0001_baseline.json"):
    return json.loads((suite.path / "baselines" / MACHINE / name).read_text())


_recordings = []


@pytest.fixture
def recorded(suite):
    """A suite whose baseline of four cases is recorded: by a session the first time, then from memory."""
    path = suite.path / "baselines" / MACHINE / "0001_baseline.json"
    if not _recordings:
        result = run(suite, *FEW, "--benchmark-save=baseline")
        result.assert_outcomes(passed=4, skipped=1)  # nothing quantizes: an empty parameter set
        _recordings.append(path.read_text())
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(_recordings[0])
    return suite


def test_without_a_baseline_the_run_passes_and_says_how_to_record_one(suite):
    result = run(suite, *FEW, "--limit-k=128", "--benchmark-compare", "--benchmark-compare-fail=median:5%")
    assert result.ret == 0
    lines = [line for line in result.outlines if "no baseline of" in line]
    assert lines == [
        f"fp4bench: no baseline of {MACHINE} in baselines, so nothing was compared; "
        "record one: pytest perf --benchmark-save=baseline"
    ]


def test_the_stored_run_holds_the_record_and_the_machine(recorded):
    run_ = stored(recorded)
    assert run_["machine_info"]["machine"] == MACHINE
    assert "hz_actual" not in json.dumps(run_["machine_info"])  # pytest-benchmark's own, which changes from run to run
    assert run_["fp4bench"]["format"] == 1
    assert [bench["extra_info"]["case_id"] for bench in run_["benchmarks"]] == CASES
    record = run_["benchmarks"][0]["extra_info"]
    assert tuple(record) == KEYS
    assert (record["layer"], record["m"], record["n"], record["k"]) == ("o", 1, 128, 128)
    assert record["scale_rule"] == "floor"
    assert record["exact"] in (True, False)
    assert 0 < record["error"] < 0.01
    assert run_["benchmarks"][0]["stats"]["median"] == pytest.approx(0.02, rel=0.2)
    assert "UNSERIALIZABLE" not in json.dumps(run_)


def test_an_unchanged_run_compares_and_passes(recorded):
    result = run(recorded, *FEW, "--benchmark-compare")
    assert result.ret == 0
    result.stdout.fnmatch_lines(["fp4bench: comparing with baselines/*0001_baseline.json, 4 cases of *"])
    result.stdout.fnmatch_lines([f"{CASES[0]} *20.* ms *20.* ms *%"])
    result.stdout.fnmatch_lines(["fp4bench: 4 SAME against baselines/*/0001_baseline.json"])


def test_one_case_30_percent_slower_fails_naming_exactly_that_case(recorded):
    result = run(
        recorded, *FEW, "--benchmark-compare", "--junitxml=junit.xml", "--benchmark-json=out/run.json", PACED_SLOW=CASES[2]
    )
    assert result.ret == 1
    assert "1 REGRESSED, 3 SAME" in text(result)
    result.stdout.fnmatch_lines(["*= FAILURES =*", f"{CASES[2]} is *% slower than its baseline: 20.* ms then, 26.* ms now*"])
    for case in set(CASES) - {CASES[2]}:
        assert f"{case} is " not in text(result)
    (failure,) = ET.parse(recorded.path / "junit.xml").getroot().iter("failure")
    assert CASES[2] in failure.text
    # The folder of --benchmark-json did not exist, and every case is in the file, the slower one too.
    assert len(json.loads((recorded.path / "out" / "run.json").read_text())["benchmarks"]) == 4


def test_a_regressed_run_is_stored_where_it_is_no_baseline(recorded):
    result = run(recorded, *FEW, "--benchmark-compare", "--benchmark-save=slow", PACED_SLOW=CASES[0])
    assert result.ret == 1
    machine = recorded.path / "baselines" / MACHINE
    assert [path.name for path in (machine / "regressed").iterdir()] == ["0001_slow.json"]
    assert [path.name for path in machine.glob("*.json")] == ["0001_baseline.json"]
    assert f"this run is stored in baselines/{MACHINE}/regressed, where it is no baseline" in text(result)


def test_a_stopped_run_says_that_nothing_was_compared(recorded):
    recorded.path.joinpath("perf", "test_zz.py").write_text("def test_zz():\n    raise AssertionError\n")
    result = run(recorded, *FEW, "--benchmark-compare", "--benchmark-save=part", "-x")
    assert result.ret == 1
    assert "the run was stopped: 4 timed cases were not compared" in text(result)
    assert list((recorded.path / "baselines" / MACHINE / "stopped").glob("*_part.json"))


def test_a_stopped_session_without_cases_gets_no_note(suite):
    suite.makepyfile("def test_it():\n    raise AssertionError\n")
    result = suite.runpytest_inprocess(*PLUGIN, "-x", "-p", "no:cacheprovider", *suite.path.glob("test_*.py"))
    result.assert_outcomes(failed=1)
    assert "fp4bench" not in "\n".join(line for line in result.outlines if not line.startswith(("plugins", "rootdir")))


def test_a_comparison_that_timed_nothing_says_so(recorded):
    result = run(recorded, *FEW, "--benchmark-compare", "--benchmark-disable")
    assert "fp4bench: no case was timed against baselines" in text(result)


def test_another_storage_is_used_for_storing_and_comparing(suite):
    run(suite, *FEW, "--limit-k=128", "--benchmark-save=a", "--benchmark-storage=file://./mine")
    result = run(suite, *FEW, "--limit-k=128", "--benchmark-compare", "--benchmark-storage=file://./mine")
    assert f"2 SAME against mine/{MACHINE}/0001_a.json" in text(result)


def test_a_regression_is_measured_again_by_last_failed(recorded):
    arguments = ("perf", *FEW, "--benchmark-compare")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PACED_SLOW", CASES[1])
        recorded.runpytest_subprocess(*PLUGIN, *arguments)
    result = recorded.runpytest_subprocess(*PLUGIN, *arguments, "--lf")
    assert result.ret == 0
    assert "fp4bench: 1 SAME against" in text(result)


def test_a_wrong_output_fails_and_stores_no_number(suite):
    result = run(suite, *FEW, "--limit-k=128", "--benchmark-json=run.json", PACED_OUTPUT="nan")
    assert result.ret == 1
    assert "output is not finite in 1 of 128 elements, first at [0, 127]: nan" in text(result)
    assert not (suite.path / "run.json").exists() or not json.loads((suite.path / "run.json").read_text())["benchmarks"]


def test_a_case_that_fails_after_it_was_timed_stays_out_of_the_baseline(recorded):
    recorded.path.joinpath("perf", "test_late.py").write_text(
        "import pytest\n\n@pytest.mark.cases('gemm')\ndef test_late(case, bench):\n    bench(case)\n"
        "    assert case.problem.m != 4, 'checked too late'\n"
    )
    result = run(recorded, *FEW, "--benchmark-save=late", "-k", "test_late")
    result.assert_outcomes(failed=2, passed=2, deselected=5)
    ids = [bench["extra_info"]["case_id"] for bench in stored(recorded, "0002_late.json")["benchmarks"]]
    assert ids == [case for case in CASES if case.endswith("m1")]


def test_pytest_benchmarks_own_tools_read_what_is_stored(recorded):
    result = recorded.run("pytest-benchmark", "--storage", "baselines", "list")
    assert "0001_baseline.json" in text(result)
    result = recorded.run("pytest-benchmark", "--storage", "baselines", "compare", "0001", "--columns=median")
    assert CASES[0] in text(result)
    assert result.ret == 0


def test_the_fixture_honours_benchmark_disable(suite):
    result = run(suite, *FEW, "--benchmark-disable")
    result.assert_outcomes(passed=4, skipped=1)


def test_a_table_and_a_histogram_are_drawn_on_request(recorded):
    # Not by importing it: pygal brings pkg_resources, which hides entry points from the sessions run in this process.
    if not find_spec("pygal"):
        pytest.skip("pygal is not installed")
    result = run(recorded, *FEW, "--benchmark-histogram=plots/all")
    assert result.ret == 0
    assert CASES[0] in text(result)
    assert list((recorded.path / "plots").glob("*.svg"))


def test_a_baseline_of_another_machine_is_refused_in_one_line(recorded):
    other = stored(recorded) | {"machine_info": {"machine": "NVIDIA-B200"}}
    (recorded.path / "other.json").write_text(json.dumps(other))
    result = run(recorded, *FEW, "--benchmark-compare=other.json")
    _assert_refused(
        result, f"the baseline other.json was recorded on NVIDIA-B200, and this machine is {MACHINE}: not comparable"
    )


def test_a_truncated_baseline_is_refused_in_one_line(recorded):
    path = recorded.path / "baselines" / MACHINE / "0001_baseline.json"
    path.write_text(path.read_text()[:-100])
    _assert_refused(run(recorded, *FEW, "--benchmark-compare"), "0001_baseline.json is truncated or not JSON")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        pytest.param(["--models=gpt-5"], "unknown model 'gpt-5'", id="model"),
        pytest.param(["--formats=fp3"], "unknown format 'fp3'", id="format"),
        pytest.param(["--providers=nobody"], "unknown provider 'nobody'", id="provider"),
        pytest.param(["--had-sizes=48"], "unknown Hadamard size '48'", id="hadamard"),
        pytest.param(["--tp-sizes=3"], "tensor parallel size 3 does not divide", id="tp"),
        pytest.param(["--models=no/config.json"], "cannot read the model config no/config.json", id="config-absent"),
        pytest.param(["--models=config.json"], "the model config config.json has no num_attention_heads", id="config-fields"),
        pytest.param(["--device=tpu"], "unknown device 'tpu'", id="device"),
        pytest.param(["--benchmark-compare=0042"], "no stored run '0042'", id="baseline-absent"),
        pytest.param(
            ["--benchmark-compare", "perf/test_gemm.py"],
            "took the path 'perf/test_gemm.py' for its value: put the path first",
            id="swallowed-file",
        ),
        pytest.param(["perf", "--providers=torch", "--modes=w4a4"], "nothing to run: no selected provider has", id="empty"),
        pytest.param(["perf", "--benchmark-save=x", "-n", "2"], "leave out -n and --dist", id="xdist", marks=XDIST),
        pytest.param(["--benchmark-compare", "perf"], "took the path 'perf' for its value: put the path first", id="swallowed"),
        pytest.param(
            ["--models", "perf"], "--models took the path 'perf' for a value: put the path first", id="swallowed-list"
        ),
    ],
)
def test_bad_input_gets_one_line_and_a_usage_error(suite, arguments, message):
    suite.path.joinpath("config.json").write_text('{"hidden_size": 64}')
    _assert_refused(suite.runpytest_inprocess(*PLUGIN, *arguments), message)


@pytest.mark.skipif(find_device().is_cuda, reason="there is a GPU")
def test_a_gpu_that_is_not_there_is_refused(suite):
    _assert_refused(suite.runpytest_inprocess(*PLUGIN, "perf", "--device=cuda"), "device 'cuda' is not there")


def _assert_refused(result, message):
    assert result.ret == pytest.ExitCode.USAGE_ERROR
    (line,) = [line for line in result.errlines + result.outlines if line.startswith("ERROR")]
    assert line.startswith("ERROR: fp4bench: ")
    assert message in line
    assert "Traceback" not in text(result)


def test_a_broken_provider_stops_the_run_in_one_line(suite):
    (suite.path / "site" / "paced_provider.py").write_text("class PacedProvider:\n    name = 'paced'\n")
    result = run(suite)
    assert result.ret == pytest.ExitCode.USAGE_ERROR
    assert "the provider of entry point paced = paced_provider:PacedProvider has no version, ops" in text(result)


def test_a_provider_that_cannot_run_is_skipped_with_its_reason(suite):
    result = run(suite, "--device=cpu", "--modes=fp8", "--providers=torch", "--limit-n=3072", "-rs")
    result.assert_outcomes(skipped=3)
    assert "has no FP8 tensor cores" in text(result)


def test_other_projects_are_left_alone(pytester):
    pytester.makepyfile("def test_it(benchmark):\n    benchmark(sum, [1, 2])\n")
    result = pytester.runpytest_subprocess("--benchmark-save=mine", "-p", "no:cacheprovider")
    result.assert_outcomes(passed=1)
    assert list(pytester.path.glob(".benchmarks/*/0001_mine.json"))


def test_the_full_gpu_grid_is_collected_in_seconds(suite):
    everything = [f"--{axis}=all" for axis in ("models", "batch-sizes", "had-sizes", "formats", "modes", "providers")]
    result = run(suite, *everything, "--collect-only", "-q")
    (line,) = [line for line in result.outlines if "tests collected in" in line]
    count, seconds = re.search(r"(\d+) tests collected in ([\d.]+)s", line).groups()
    assert int(count) > 10_000
    assert float(seconds) < 6  # the goal is 3, and 2 idle cores take 1.7
