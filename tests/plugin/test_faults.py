"""What goes wrong in a run costs the case it hit, or is said; nothing that was finished is lost. Real processes."""

import json
import signal

import pytest
from full_disk import run_on_a_full_disk
from project import CASES, COMPARE, FEW, Project, case, case_ids, ended, prepared

STORED = (*FEW, "--benchmark-save=run")


@pytest.fixture
def project(tmp_path):
    return Project.create(tmp_path / "project")


# Cases that fail


@pytest.fixture(scope="module")
def faulty(tmp_path_factory):
    """A run of six cases of which five fail, each in its own way."""
    project = Project.create(tmp_path_factory.mktemp("faulty") / "project")
    cases = [case(layer, m) for layer in ("o", "down") for m in (1, 2, 4)]
    kinds = ("exit", "hang", "complain", "nan", "out_of_memory")
    faults = dict(zip(cases, kinds, strict=False))
    result = project.run(*STORED, "--batch-sizes=1,2,4", "--case-timeout=3", "--benchmark-json=all.json", faults=faults)
    return project, result, {fault: case_id for case_id, fault in faults.items()}, cases[-1]


@pytest.mark.parametrize(
    ("fault", "sentences"),
    [
        ("exit", ["the worker process ended with exit code 3 before it answered", "no licence"]),
        ("hang", ["the worker process did not answer within 3 s and was killed", "in hang"]),
        ("complain", ["ValueError: no such tile", "in complain"]),
        ("nan", ["WrongResultError: output is not finite in 1 of"]),
        ("out_of_memory", ["OutOfMemoryError: CUDA out of memory. Tried to allocate 8.00 GiB."]),
    ],
)
def test_a_case_that_fails_says_what_happened(faulty, fault, sentences):
    _, result, case_of, _ = faulty
    heading = f"_ test_gemm[{case_of[fault]}] _"
    told = result.text.partition(heading)[2].partition("\n____")[0]
    assert told.splitlines()[1].startswith(sentences[0])
    for sentence in sentences:
        assert sentence in told
    assert "another exception" not in told
    if fault == "nan":
        assert "Traceback" not in told  # of our own check


def test_the_other_cases_are_timed_and_the_run_is_not_complete(faulty):
    project, result, case_of, healthy = faulty
    assert result.ret == 1
    assert len(result.lines("FAILED")) == 5
    run = project.stored("0001_run")
    assert case_ids(run) == [healthy]
    assert case_ids(json.loads((project.path / "all.json").read_text())) == [healthy]
    assert run["fp4bench"]["complete"] is False
    assert sorted(run["fp4bench"]["failed"]) == sorted(case_of.values())
    assert "has failed cases" in project.accept(project.runs / "0001_run.json").text
    assert project.journals == []


def test_a_case_that_fails_after_it_was_timed_is_not_stored(project):
    test = project.path / "perf" / "test_gemm.py"
    test.write_text(test.read_text() + "    assert case.problem.m != 4, 'checked too late'\n")
    # Stopped, the run is none; with --resume it becomes one.
    result = project.run(*STORED, "-x")
    assert result.ret == 1
    assert result.lines("fp4bench: ") == ["fp4bench: the run was stopped; with --resume it goes on after the 1 cases it timed"]
    assert list(project.path.glob(".benchmarks/**/*.json")) == []
    result = project.run(*STORED, "--resume")
    assert result.ret == 1
    run = project.stored("0001_run")
    assert case_ids(run) == [CASES[0], CASES[2]]
    assert run["fp4bench"]["failed"] == [CASES[1], CASES[3]]


def test_a_skip_in_the_test_itself_is_a_reason(project):
    test = project.path / "perf" / "test_gemm.py"
    skip = "    if case.problem.m == 4:\n        pytest.skip('too large')\n    bench"
    test.write_text(test.read_text().replace("    bench", skip))
    assert project.run(*COMPARE).ret == 0
    assert project.stored("0001_run")["fp4bench"]["complete"] is True
    assert case_ids(project.stored("0001_run")) == [CASES[0], CASES[2]]


# Runs that are cut off


def test_a_run_goes_on_after_sigkill_and_ctrl_c_where_it_was(project):
    result = project.run(*STORED, faults={CASES[1]: "kill_pytest"})
    assert result.ret == -signal.SIGKILL
    assert len(project.journals) == 1

    result = project.run(*STORED, "--resume", "-k", "m4")
    assert result.ret == pytest.ExitCode.USAGE_ERROR
    assert result.lines("ERROR") == [
        f"ERROR: fp4bench: --resume: the run that was cut off had timed {CASES[0]} too: select what it had selected"
    ]

    log = project.path / "second"
    result = project.run(*STORED, "--resume", log=log, faults={CASES[2]: "interrupt_pytest"})
    assert result.ret == pytest.ExitCode.INTERRUPTED
    assert "the run was stopped; with --resume it goes on after the 2 cases it timed" in result.text
    assert prepared(log) == [CASES[1], CASES[2]]
    assert list(project.runs.glob("*.json")) == []

    log = project.path / "third"
    result = project.run(*STORED, "--resume", log=log)
    assert result.ret == 0
    assert prepared(log) == [CASES[2], CASES[3]]
    assert "fp4bench: 2 cases were timed before, by the run that this one resumed" in result.text
    run = project.stored("0001_run")
    assert case_ids(run) == CASES
    assert run["fp4bench"]["complete"] is True
    times = [reading["at_s"] for reading in run["fp4bench"]["canaries"] if reading["name"] == "copy"]
    assert len(times) == 4  # at the start of each part and at the end
    assert times == sorted(times)
    assert run["fp4bench"]["wall_s"] >= times[-1]
    assert project.journals == []
    assert project.accept(project.runs / "0001_run.json").ret == 0


def test_there_must_be_something_to_resume(project):
    result = project.run(*STORED, "--resume")
    assert result.ret == pytest.ExitCode.USAGE_ERROR
    (line,) = result.lines("ERROR")
    assert line.startswith("ERROR: fp4bench: --resume found no run to go on with in ")
    assert "Traceback" not in result.text


def test_a_full_disk_loses_nothing_that_was_finished(project, tmp_path):
    disk = tmp_path / "disk"
    disk.mkdir()
    # The runs are on the small disk, all else is not.
    arguments = [*STORED, f"--benchmark-storage={disk}"]
    first, second = (project.command(str(project.path / "perf"), *arguments, *more) for more in ([], ["--resume"]))
    code = f"""
import json, subprocess

def run(command):
    done = subprocess.run(command, cwd={str(project.path)!r}, env={project.environment()!r}, capture_output=True, text=True)
    print(done.stdout, done.stderr)
    return done.returncode, done.stdout

def entries():
    (journal,) = Path().glob("*/unfinished/*.jsonl")
    return [json.loads(line) for line in journal.read_text().splitlines()[1:]]

def cases():
    return [entry["record"]["case_id"] for entry in entries() if "record" in entry]

fill(4096)  # the header, the canaries, and a case or two
code, text = run({first})
assert code == 1
assert "fp4bench: cannot write the journal" in text and "No space left on device" in text, text
assert "then go on with --resume" in text and "Traceback" not in text
finished = len(cases())
assert 0 < finished < {len(CASES)}
assert list(Path().glob("*/*.json")) == []

free()
fill(8192)  # the rest of the journal, and no run beside it
code, text = run({second})
assert code == 1
assert f"{{finished}} cases were timed before" in text
assert "fp4bench: the run was not stored: cannot store the run in" in text, text
assert "--resume takes it up and stores it" in text and "Traceback" not in text
assert cases() == {CASES}
assert list(Path().glob("*/*.json")) == []

free()
code, text = run({second})
assert code == 0
assert "{len(CASES)} cases were timed before" in text
(stored,) = Path().glob("*/*.json")
stored = json.loads(stored.read_text())
assert stored["fp4bench"]["complete"] is True
assert [bench["name"] for bench in stored["benchmarks"]] == {CASES}
assert list(Path().glob("*/unfinished/*")) == []
"""
    run_on_a_full_disk("tmpfs", disk, code)


def test_a_verdicts_file_or_json_that_cannot_be_written_is_said_and_the_run_is_stored(project):
    blocked = project.path / "blocked"
    blocked.mkdir()
    result = project.run(*COMPARE, f"--verdicts={blocked}", f"--benchmark-json={blocked}")
    assert result.ret == 1
    assert f"fp4bench: cannot write the verdicts {blocked}: Is a directory" in result.text
    assert "fp4bench: --benchmark-json was not written: " in result.text
    assert case_ids(project.stored("0001_run")) == CASES


def test_two_runs_at_once_are_both_stored(project):
    results = [ended(process) for process in [project.start(*STORED, "--benchmark-histogram=plots/all") for _ in range(2)]]
    assert [result.ret for result in results] == [0, 0]
    for number, name in enumerate(("0001_run", "0002_run"), 1):
        assert case_ids(project.stored(name)) == CASES, number
    assert project.journals == []
    assert CASES[0] in results[0].text  # in the table, which a histogram brings
    assert list((project.path / "plots").glob("*.svg"))


# A run that is not timed


def test_without_timing_only_the_checks_run(project):
    result = project.run(*FEW, "--benchmark-disable", "--benchmark-compare", "--verdicts=v.json", faults={CASES[1]: "nan"})
    assert result.ret == 1
    assert [line for line in result.lines("FAILED") if f"[{CASES[1]}]" in line] == result.lines("FAILED")
    assert len(result.lines("FAILED")) == 1
    assert "nothing was compared: the run was stopped, or no case was timed" in result.text
    assert json.loads((project.path / "v.json").read_text())["outcome"] == "not_judged"
    assert not project.runs.exists()
