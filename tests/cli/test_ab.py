"""A/B of two refs of a small real repository. Its pytest is a script that "measures" what the tree it runs in says."""

import argparse
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

import fp4bench
from fp4bench.cli import ab

# A session: the tree's speed.json is seconds by case, with a little noise; "fails", "crash" and "hang" may be in it.
FAKE = """
import json, os, random, sys, time
from pathlib import Path
import fp4bench

log, *args = sys.argv[1:]
log = Path(log)
number = len(log.read_text().splitlines()) if log.exists() else 0
tree = json.loads(Path("speed.json").read_text())
entry = {"cwd": os.getcwd(), "args": args, "fp4bench": fp4bench.__file__, "pid": os.getpid(), "tree": tree["name"]}
with log.open("a") as file:
    file.write(json.dumps(entry) + "\\n")
if tree.get("hang"):
    time.sleep(60)
if tree.get("crash"):
    print("the last words")
    sys.exit(3)
rng = random.Random(number)
benchmarks = [
    {"stats": {"median": seconds * (1 + rng.gauss(0, 0.001))},
     "extra_info": {"case_id": case, "cycles": tree.get("cycles", {}).get(case), "clock": "cuda_graph_stamps", "flops": 1}}
    for case, seconds in tree["seconds"].items()
]
invalid = ["the clock drifts"] if tree.get("invalid") == number else []
stored = {"benchmarks": benchmarks, "fp4bench": {"format": 2, "failed": tree.get("fails", []), "invalid": invalid}}
path = next(arg.split("=", 1)[1] for arg in args if arg.startswith("--benchmark-json="))
Path(path).write_text(json.dumps(stored))
sys.exit(tree.get("exit") or (6 if invalid else 1 if tree.get("fails") else 0))
"""
SECONDS = {f"case-{i:02d}": 1e-5 * (i + 1) for i in range(12)}


@pytest.fixture
def repository(tmp_path, monkeypatch, capsys):
    """A git repository with an fp4bench of its own, where tags are trees that measure differently."""
    folder = tmp_path / "repository"
    (folder / "fp4bench").mkdir(parents=True)
    (folder / "fp4bench" / "__init__.py").write_text("")
    (tmp_path / "fake.py").write_text(FAKE)
    (tmp_path / "temporary").mkdir()
    monkeypatch.chdir(folder)
    monkeypatch.setenv("TMPDIR", str(tmp_path / "temporary"))
    monkeypatch.setattr("tempfile.tempdir", None)  # or the first TMPDIR of this process stays
    monkeypatch.setenv("GIT_CONFIG_GLOBAL", os.devnull)

    class Repository:
        path = folder
        log = tmp_path / "log.jsonl"
        report = tmp_path / "report.json"
        temporary = tmp_path / "temporary"
        command = (sys.executable, str(tmp_path / "fake.py"), str(log))

        def git(self, *words):
            identity = ("-c", "user.name=a", "-c", "user.email=a@b", "-c", "init.defaultBranch=main")
            done = subprocess.run(["git", *identity, *words], cwd=folder, check=True, capture_output=True, text=True)
            return done.stdout

        def tree(self, tag, seconds=SECONDS, **more):
            (folder / "speed.json").write_text(json.dumps({"name": tag, "seconds": seconds} | more))
            self.git("add", ".")
            self.git("commit", "-q", "-m", tag)
            self.git("tag", tag)

        def ab(self, *words):
            return ab.run(parse("ab", *words, "--json", str(self.report)), self.command)

        @property
        def sessions(self):
            return [json.loads(line) for line in self.log.read_text().splitlines()]

        @property
        def found(self):
            return json.loads(self.report.read_text())

        @property
        def text(self):
            return capsys.readouterr().out

        @property
        def is_clean(self):
            """No worktree and no temporary folder is left, and the present tree is as it was."""
            worktrees = self.git("worktree", "list").splitlines()
            return len(worktrees) == 1 and not list(self.temporary.iterdir()) and not self.git("status", "--porcelain")

    repository = Repository()
    repository.git("init", "-q")
    (folder / ".gitignore").write_text("__pycache__/\n")
    repository.tree("old")
    return repository


def parse(*words):
    parser = argparse.ArgumentParser()
    ab.add_parser(parser.add_subparsers())
    return parser.parse_args(words)


def slowed(ratio, *cases):
    return {case: seconds * (ratio if case in cases else 1) for case, seconds in SECONDS.items()}


def test_a_slower_case_is_found(repository):
    repository.tree("new", slowed(1.02, "case-03"))
    assert repository.ab("old", "new") == 1
    outcomes = {case: comparison["outcome"] for case, comparison in repository.found["comparisons"].items()}
    assert outcomes == dict.fromkeys(SECONDS, "SAME") | {"case-03": "SLOWER"}
    assert next(iter(outcomes)) == "case-03"  # the slowest first
    text = repository.text
    assert "1 SLOWER, 11 SAME; floor 1 %" in text
    assert "Both run in the environment of" in text
    assert repository.is_clean


def test_a_faster_case_fails_nothing(repository):
    repository.tree("new", slowed(0.9, "case-03"))
    assert repository.ab("old", "new") == 0
    assert "1 FASTER, 11 SAME" in repository.text


def test_a_change_below_the_floor_is_none(repository):
    repository.tree("new", slowed(1.03, "case-03"))
    assert repository.ab("old", "new", "--floor", "5") == 0
    assert repository.found["comparisons"]["case-03"]["outcome"] == "SAME"


def test_each_side_runs_in_its_own_tree_and_in_turn(repository):
    repository.tree("new")
    repository.ab("old", "new", "--pairs", "4", "--", "--models", "llama3.1-8b")
    sessions = repository.sessions
    assert [session["tree"] for session in sessions] == ["old", "new", "new", "old", "new", "old", "old", "new"]
    assert len({session["pid"] for session in sessions}) == 8
    for session in sessions:
        assert Path(session["fp4bench"]).is_relative_to(session["cwd"])
        assert session["args"][:2] == ["--models", "llama3.1-8b"]
        assert "--gate=off" in session["args"]


def test_the_present_tree_is_taken_as_it_is(repository):
    (repository.path / "speed.json").write_text(json.dumps({"name": "edited", "seconds": slowed(1.1, "case-00")}))
    assert repository.ab("old", ".", "--pairs", "2") == 1
    assert {session["tree"] for session in repository.sessions} == {"old", "edited"}
    assert [session["cwd"] for session in repository.sessions if session["tree"] == "edited"] == [str(repository.path)] * 2
    assert repository.found["sides"]["B"] == {"ref": ".", "commit": None}


def test_from_a_folder_of_the_repository(repository, monkeypatch):
    inner = repository.path / "suite"
    (inner / "fp4bench").mkdir(parents=True)
    (inner / "fp4bench" / "__init__.py").write_text("")
    (inner / "speed.json").write_text(json.dumps({"name": "inner", "seconds": SECONDS}))
    repository.tree("new")
    monkeypatch.chdir(inner)
    assert repository.ab("new", "new", "--pairs", "2") == 0
    assert {session["tree"] for session in repository.sessions} == {"inner"}


def test_cases_of_one_side_are_named(repository):
    fewer = {case: seconds for case, seconds in SECONDS.items() if case not in ("case-01", "case-02")}
    repository.tree("new", fewer, fails=["case-02"])
    assert repository.ab("old", "new", "--pairs", "2") == 0
    text = repository.text
    assert "NOT COMPARED: case-01 (not timed in 2 of 2 runs of B)" in text
    assert "NOT COMPARED: case-02 (failed in 2 of 2 runs of B)" in text
    assert "2 NOT COMPARED" in text
    assert set(repository.found["gaps"]) == {"case-01", "case-02"}


def test_cycles_contradict_time(repository):
    repository.tree("a", cycles=dict.fromkeys(SECONDS, 1000))
    repository.tree("b", slowed(1.1, "case-03"), cycles=dict.fromkeys(SECONDS, 1000))
    assert repository.ab("a", "b") == 1
    row = next(line for line in repository.text.splitlines() if line.startswith("case-03"))
    assert row.endswith("+0.00%  SLOWER (not in cycles: the GPU's clock was lower)")


def test_a_crash_removes_the_worktrees_and_keeps_what_was_measured(repository):
    repository.tree("new", crash=True)
    with pytest.raises(ValueError, match=r"B \(new\): .* exit code 3 and stored no run.*\n.*the last words"):
        repository.ab("old", "new")
    assert repository.is_clean
    assert [run["side"] for run in repository.found["runs"]] == ["A"]
    assert not repository.found["complete"]


def test_a_run_that_crashed_afterwards_does_not_count(repository):
    repository.tree("new", exit=4)
    with pytest.raises(ValueError, match=r"B \(new\): the pytest session ended with exit code 4; its last lines"):
        repository.ab("old", "new")
    assert len(repository.found["runs"]) == 1


def test_an_invalid_run_is_repeated(repository):
    repository.tree("new", invalid=1)
    assert repository.ab("old", "new", "--pairs", "2") == 0
    assert [session["tree"] for session in repository.sessions] == ["old", "new", "new", "new", "old"]
    assert repository.found["invalid"] == ["B in pair 1: the clock drifts"]
    assert "INVALID, not counted: B in pair 1: the clock drifts" in repository.text


@pytest.mark.parametrize("ref", ["nothing", "--help", "old:speed.json"])
def test_a_ref_that_is_none_is_refused_first(ref, repository):
    args = argparse.Namespace(ref_a="old", ref_b=ref, pairs=2, floor=0.01, json=None, pytest_args=[])
    with pytest.raises(ValueError, match="this repository has no such commit; give a branch, a tag, a commit, or"):
        ab.run(args, repository.command)
    assert not repository.log.exists()


def test_outside_a_repository(repository, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match="this folder is in no git repository"):
        repository.ab("old", "old")


def test_a_tree_without_its_own_fp4bench_is_refused(repository, tmp_path, monkeypatch):
    (tmp_path / "installed" / "fp4bench").mkdir(parents=True)
    (tmp_path / "installed" / "fp4bench" / "__init__.py").write_text("")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "installed"))
    repository.git("rm", "-rq", "fp4bench")
    repository.tree("bare")
    with pytest.raises(ValueError, match=r"B \(bare\) would be timed with the fp4bench of .*installed"):
        repository.ab("old", "bare")
    assert repository.is_clean
    assert not repository.log.exists()


def test_one_pair_is_refused(repository):
    with pytest.raises(ValueError, match="--pairs 1 has no variance"):
        repository.ab("old", "old", "--pairs", "1")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_interrupted_nothing_is_left(number, repository, tmp_path):
    repository.tree("new", hang=True)
    # A file: the code of `python -c` would import the fp4bench of the present folder.
    main = tmp_path / "main.py"
    main.write_text(f"""
import argparse, sys
from fp4bench.cli import ab
parser = argparse.ArgumentParser()
ab.add_parser(parser.add_subparsers())
ab.run(parser.parse_args(["ab", "new", "old"]), {list(repository.command)!r})
""")
    environment = os.environ | {"PYTHONPATH": str(Path(fp4bench.__file__).parent.parent)}
    # In a session of its own, so that SIGINT can be sent to the whole group, as a terminal does.
    process = subprocess.Popen(
        [sys.executable, str(main)],
        env=environment,
        start_new_session=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )
    wait_until(lambda: repository.log.exists() and repository.log.read_text())
    if number == signal.SIGINT:
        os.killpg(process.pid, number)
    else:
        process.send_signal(number)
    process.communicate(timeout=8)  # the session is told to end, not waited for
    assert process.returncode != 0
    with pytest.raises(ProcessLookupError):
        os.kill(repository.sessions[0]["pid"], 0)
    assert repository.is_clean


def wait_until(happened, seconds=15):
    deadline = time.monotonic() + seconds
    while not happened():
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.02)


def test_pytest_options_come_after_two_dashes_wherever_ours_stand():
    for words in (("a", "b", "--pairs", "3", "--", "-k", "x"), ("--pairs", "3", "a", "b", "--", "-k", "x")):
        args = parse("ab", *words)
        assert (args.ref_a, args.ref_b, args.pairs, args.pytest_args) == ("a", "b", 3, ["-k", "x"])
    assert parse("ab", "a", "b").pytest_args == []


@pytest.mark.parametrize("words", [("a",), ("a", "b", "c"), ("a", "b", "--floor", "-1"), ("a", "b", "--pairs", "none")])
def test_misuse(words):
    with pytest.raises(SystemExit) as stopped:
        parse("ab", *words)
    assert stopped.value.code == 2
