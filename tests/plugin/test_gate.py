"""The main job end to end: real pytest sessions over a small suite, against a baseline that was accepted."""

import json
import subprocess
import sys
import xml.etree.ElementTree as ET

import pytest
from project import CASES, COMPARE, FEW, MACHINE, Project, case_ids, prepared, processes, scale

from fp4bench.evidence.record import FORMAT, KEYS


@pytest.fixture
def project(accepted, tmp_path):
    return accepted[0].copy(tmp_path / "project")


# Without a baseline


def test_without_a_baseline_the_run_passes_and_says_how_to_accept_it(first):
    _, result = first
    assert result.ret == 0
    assert f"fp4bench: no accepted run of {MACHINE}, so nothing will be compared" in result.text
    assert result.lines("fp4bench: nothing was compared") == [
        f"fp4bench: nothing was compared: no run of {MACHINE} is accepted yet; accept this run with: "
        f'fp4bench accept .benchmarks/{MACHINE}/0001_first.json --name first --reason "..."'
    ]
    assert f"fp4bench: stored as .benchmarks/{MACHINE}/0001_first.json" in result.text


def test_a_stored_run_holds_its_cases_and_what_fp4bench_says_of_it(first):
    run = first[0].stored("0001_first")
    assert run["machine_info"]["machine"] == MACHINE
    assert "hz_actual" not in json.dumps(run["machine_info"])  # pytest-benchmark's own, which changes from run to run
    assert case_ids(run) == CASES
    info = run["fp4bench"]
    assert (info["format"], info["complete"], info["failed"], info["invalid"]) == (FORMAT, True, [], [])
    assert info["session"].startswith(f"{MACHINE} 20")
    assert info["options"]["batch_sizes"] == ["1", "4"]
    assert info["ceilings"]["copy_gbps"] > 0
    assert info["accepted"] is None
    assert 0 < info["wall_s"] < 120
    readings = [reading for reading in info["canaries"] if reading["name"] == "copy"]
    assert len(readings) >= 2  # at the start and at the end
    assert 0 < readings[0]["at_s"] < readings[-1]["at_s"]
    assert "UNSERIALIZABLE" not in json.dumps(run)


def test_a_record_is_whole(first):
    bench = first[0].stored("0001_first")["benchmarks"][0]
    record = bench["extra_info"]
    assert tuple(record) == KEYS
    assert (record["layer"], record["m"], record["n"], record["k"]) == ("o", 1, 128, 128)
    assert (record["scale_rule"], record["pace"], record["injected"]) == ("floor", "paced", None)
    assert record["exact"] in (True, False)
    assert 0 < record["error"] < 0.01
    assert record["roofline_fraction"] > 0
    assert bench["stats"]["median"] == pytest.approx(0.02, rel=0.2)


def test_raw_samples_are_beside_the_run_and_in_the_json_that_was_asked_for(first):
    project, _ = first
    assert all("data" not in bench["stats"] for bench in project.stored("0001_first")["benchmarks"])
    samples = [json.loads(line) for line in (project.runs / "0001_first.samples.jsonl").read_text().splitlines()]
    assert [each["name"] for each in samples] == CASES
    assert all(len(each["seconds"]) >= 7 for each in samples)
    # The folder of --benchmark-json did not exist.
    written = json.loads((project.path / "out" / "all.json").read_text())
    assert written["benchmarks"][0]["stats"]["data"] == samples[0]["seconds"]


def test_no_journal_is_left_of_a_finished_run(first):
    assert first[0].journals == []


def test_strict_fails_without_a_baseline(tmp_path):
    project = Project.create(tmp_path / "project")
    result = project.run(*COMPARE, "--gate=strict", faults=dict.fromkeys(CASES, "absent"))
    assert result.ret == 1
    assert f"--gate=strict: no run of {MACHINE} is accepted in baselines" in result.text


# Unchanged code


def test_an_accepted_run_is_a_baseline_and_an_unchanged_run_is_the_same(accepted, project):
    assert accepted[1].ret == 0, accepted[1].text
    result = project.run(*COMPARE, "--verdicts=out/verdicts.json")
    assert result.ret == 0
    assert f"fp4bench: comparing with 0001_first of baselines/{MACHINE}, 4 cases" in result.text
    assert "4 SAME against 0001_first" in result.text
    assert "Outliers" not in result.text  # pytest-benchmark's table
    assert project.stored("0002_run")["fp4bench"]["complete"] is True
    assert not (project.runs / "0002_run.samples.jsonl").exists()
    verdicts = json.loads((project.path / "out" / "verdicts.json").read_text())
    cases = verdicts.pop("cases")
    assert verdicts == {
        "outcome": "ok",
        "run": f".benchmarks/{MACHINE}/0002_run.json",
        "machine": MACHINE,
        "promised": 0.05,
        "counts": {"SAME": 4},
        "invalid": [],
        "failed": [],
    }
    assert list(cases) == CASES
    keys = ("outcome", "reason", "change", "low", "high", "mde", "detail", "baseline_seconds", "seconds")
    assert tuple(cases[CASES[0]]) == keys
    assert cases[CASES[0]]["low"] < cases[CASES[0]]["change"] < cases[CASES[0]]["high"]
    assert cases[CASES[0]]["seconds"] == pytest.approx(cases[CASES[0]]["baseline_seconds"], rel=0.1)


def test_pytest_benchmarks_own_tools_read_what_is_stored(first):
    arguments = ["--storage", ".benchmarks", "compare", f"{MACHINE}/0001", "--columns=median"]
    command = [sys.executable, "-m", "pytest_benchmark", *arguments]
    done = subprocess.run(command, cwd=first[0].path, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert CASES[0] in done.stdout


# A slower case


@pytest.fixture(scope="module")
def regressed(accepted, tmp_path_factory):
    """A copy of the project where one case is slower, and how its session ended."""
    project = accepted[0].copy(tmp_path_factory.mktemp("regressed") / "project")
    log = project.path / "prepared"
    result = project.run(*COMPARE, "--junitxml=junit.xml", "--verdicts=v.json", faults={CASES[2]: "slow"}, log=log)
    return project, result, log


def test_one_slower_case_fails_and_is_named_alone(regressed):
    project, result, _ = regressed
    assert result.ret == 1
    assert "1 REGRESSED, 3 SAME against 0001_first" in result.text
    (line,) = result.lines(f"{CASES[2]} is REGRESSED: +")
    assert "beside its baseline, 20." in line
    assert "ms then and 30." in line
    assert not any(f"{case} is " in result.text for case in set(CASES) - {CASES[2]})
    (failure,) = ET.parse(project.path / "junit.xml").getroot().iter("failure")
    assert CASES[2] in failure.text


def test_a_suspect_is_measured_again_in_a_fresh_process_and_no_other_case_is(regressed):
    log = regressed[2]
    assert prepared(log) == [*CASES, CASES[2]]
    *first, again = processes(log)
    assert len(set(first)) == 1
    assert again not in first
    detail = json.loads((regressed[0].path / "v.json").read_text())["cases"][CASES[2]]["detail"]
    assert detail.count("2 looks") == 1


def test_a_regressed_run_is_stored_where_it_is_no_baseline(regressed):
    project, _, _ = regressed
    assert case_ids(project.stored("0002_run")) == CASES
    assert [path.name for path in (project.path / "baselines" / MACHINE).iterdir()] == ["0001_first.json"]
    verdicts = json.loads((project.path / "v.json").read_text())
    assert verdicts["outcome"] == "regressed"
    assert verdicts["counts"] == {"REGRESSED": 1, "SAME": 3}


def test_last_failed_measures_the_slower_case_alone_until_it_is_fast_again(regressed):
    project, _, _ = regressed
    result = project.run(*COMPARE, "--lf", faults={CASES[2]: "slow"})
    assert result.ret == 1
    assert "1 REGRESSED against 0001_first" in result.text
    assert case_ids(project.stored("0003_run")) == [CASES[2]]
    assert project.stored("0003_run")["fp4bench"]["left_out"] > 0
    result = project.run(*COMPARE, "--lf")
    assert result.ret == 0
    assert "1 SAME against 0001_first" in result.text


def test_a_run_that_is_stopped_while_it_confirms_a_suspect_is_not_judged(project):
    log = project.path / "log"
    result = project.run(*COMPARE, "--verdicts=v.json", log=log, faults={CASES[0]: "suspect"})
    assert result.ret == pytest.ExitCode.INTERRUPTED
    assert prepared(log) == [*CASES, CASES[0]]
    assert "nothing was compared: the run was stopped" in result.text
    assert json.loads((project.path / "v.json").read_text())["outcome"] == "not_judged"
    assert len(project.journals) == 1

    log = project.path / "resumed"
    result = project.run(*COMPARE, "--resume", log=log)
    assert result.ret == 0
    assert prepared(log) == [CASES[0]]  # the suspect alone
    assert "4 SAME against 0001_first" in result.text
    assert case_ids(project.stored("0002_run")) == CASES


# Other outcomes


def changed(run):
    """As if case 0 had been much slower, case 1 were new, and cases 2 and 3 had been faster by a third."""
    del run["benchmarks"][1]
    for case_id, factor in ((CASES[0], 10), (CASES[2], 0.66), (CASES[3], 0.66)):
        scale(run, case_id, factor)


@pytest.fixture
def changes(project):
    """A project whose next run has a case of each kind, and floors of its own: case 3's is its test's."""
    project.edit_baseline(changed)
    with (project.path / "pyproject.toml").open("a") as settings:
        settings.write('[tool.fp4bench.floors]\n"*.down.*-m1" = 0.1\n')
    test = project.path / "perf" / "test_gemm.py"
    test.write_text(test.read_text().replace("@pytest.mark.cases", "@pytest.mark.floor(0.9)\n@pytest.mark.cases"))
    return project


def test_each_outcome_is_shown_with_what_to_do_and_strict_fails_new_cases(changes):
    result = changes.run(*COMPARE, "--confirm=0", "--gate=strict")
    assert result.ret == 1
    assert "1 REGRESSED, 1 FASTER, 1 NEW, 1 SAME against 0001_first" in result.text
    failed = [line.split()[1].partition("[")[2].rstrip("]") for line in result.lines("FAILED")]
    assert sorted(failed) == sorted([CASES[1], CASES[2]])
    accept = f'to accept what is NEW and FASTER: fp4bench accept .benchmarks/{MACHINE}/0002_run.json --name NAME --reason "..."'
    assert accept in result.text
    assert changes.stored("0002_run")["fp4bench"]["floors"] == dict(zip(CASES, (0.9, 0.9, 0.1, 0.9), strict=True))


def test_without_the_gate_all_is_shown_and_nothing_fails(changes):
    result = changes.run(*COMPARE, "--confirm=0", "--gate=off", "--verdicts=v.json")
    assert result.ret == 0
    assert "1 REGRESSED, 1 FASTER, 1 NEW, 1 SAME against 0001_first" in result.text
    assert json.loads((changes.path / "v.json").read_text())["outcome"] == "regressed"


def test_skipped_and_vanished_cases_are_missing_and_fail_also_where_nothing_was_timed(project):
    def with_more(run):
        for bench in json.loads(json.dumps(run["benchmarks"][:2])):
            bench["extra_info"]["case_id"] = f"old-{bench['extra_info']['case_id']}"
            run["benchmarks"].append(bench)
        run["benchmarks"][-1]["extra_info"]["m"] = 2  # not selected

    project.edit_baseline(with_more)
    result = project.run(*COMPARE, "--verdicts=v.json", faults=dict.fromkeys(CASES, "absent"))
    assert result.ret == 1
    assert "5 MISSING against 0001_first" in result.text
    cases = json.loads((project.path / "v.json").read_text())["cases"]
    assert {case_id: row["detail"] for case_id, row in cases.items()} == {
        **dict.fromkeys(CASES, "skipped: it is away today"),
        f"old-{CASES[0]}": "the provider paced no longer offers it",
    }
    assert len(result.lines("FAILED")) == 5


def test_what_was_timed_in_another_way_is_not_compared(project):
    def sustained(run):
        for bench in run["benchmarks"]:
            bench["extra_info"]["pace"] = "sustained"

    project.edit_baseline(sustained)
    result = project.run(*COMPARE, "--verdicts=v.json")
    assert result.ret == 0
    cases = json.loads((project.path / "v.json").read_text())["cases"]
    assert {(row["outcome"], row["reason"]) for row in cases.values()} == {("NEW", "not_in_baseline")}


def test_deselected_cases_are_not_missing_and_a_cpu_is_timed_in_one_way(project):
    absent = dict.fromkeys((CASES[0], CASES[1]), "absent")
    result = project.run(*COMPARE, "-k", "m4", "--sustained", "--warm", faults=absent)
    assert result.ret == 1
    assert result.lines("FAILED") == [line for line in result.lines("FAILED") if f"[{CASES[1]}]" in line]
    assert "1 MISSING, 1 SAME against 0001_first" in result.text


def test_a_run_in_bad_conditions_is_invalid_and_nothing_regressed(project):
    def other_machine(run):
        for reading in run["fp4bench"]["canaries"]:
            reading["seconds"] *= 1000

    project.edit_baseline(other_machine)
    result = project.run(*COMPARE, "--verdicts=v.json", faults={CASES[0]: "slow"})
    assert result.ret == 6
    assert result.lines("INVALID: the canary bf16 takes ")
    assert "if the change is here to stay: fp4bench accept .benchmarks/" in result.text
    assert "REGRESSED" not in result.text
    assert result.lines("FAILED") == []
    verdicts = json.loads((project.path / "v.json").read_text())
    assert verdicts["outcome"] == "invalid"
    assert verdicts["counts"] == {"INVALID": 4}
    assert verdicts["invalid"]
    # Valid in itself, so it may become the baseline.
    assert project.stored("0002_run")["fp4bench"]["invalid"] == []
    assert project.accept(project.runs / "0002_run.json").ret == 0


def test_a_run_that_is_invalid_in_itself_says_so_and_cannot_be_accepted(project):
    with (project.path / "conftest.py").open("a") as settings:
        settings.write("conditions.CPU_LIMITS = Limits(drift=1e-9, level=50)\n")
    assert project.run(*COMPARE).ret == 6
    result = project.run(*FEW, "--benchmark-save=second")
    assert result.ret == 0
    assert "fp4bench: this run is INVALID, and cannot be accepted: the canary " in result.text
    for name in ("0002_run", "0003_second"):
        assert "is invalid (the canary " in project.accept(project.runs / f"{name}.json").text


def test_an_injected_slowdown_is_found_recorded_and_never_accepted(project):
    (project.path / "plan.json").write_text(json.dumps({CASES[3]: 0.5}))
    result = project.run(*COMPARE, "--inject=plan.json")
    assert result.ret == 1
    assert "1 REGRESSED, 3 SAME against 0001_first" in result.text
    assert result.lines(f"{CASES[3]} is REGRESSED: +")
    records = {bench["extra_info"]["case_id"]: bench["extra_info"] for bench in project.stored("0002_run")["benchmarks"]}
    assert {case_id: record["injected"] for case_id, record in records.items() if record["injected"]} == {CASES[3]: 0.5}
    refused = project.accept(project.runs / "0002_run.json")
    assert refused.ret == 2
    assert "never accept it" in refused.text
