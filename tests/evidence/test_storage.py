import copy
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from full_disk import KINDS, run_on_a_full_disk
from pytest_benchmark.storage.file import FileStorage

from fp4bench.evidence import storage
from fp4bench.evidence.storage import samples_path, store, stored_runs

STATS = {
    **{"min": 1.0, "max": 3.0, "mean": 2.0, "stddev": 1.0, "rounds": 3, "median": 2.0, "iqr": 1.0, "q1": 1.5, "q3": 2.5},
    **{"iqr_outliers": 0, "stddev_outliers": 1, "outliers": "1;0", "ld15iqr": 1.0, "hd15iqr": 3.0, "ops": 0.5, "total": 6.0},
    **{"data": [1.0, 2.0, 3.0], "iterations": 1},
}


def make_run(number=0, cases=2, **changes):
    """What pytest-benchmark hands over, with `number` in it."""
    benches = [
        {
            **{"group": None, "name": f"case-{i}", "fullname": f"perf/test_gemm.py::test_gemm[case-{i}]", "params": None},
            **{"param": None, "extra_info": {"case_id": f"case-{i}", "cycles": None}, "options": {}, "stats": dict(STATS)},
        }
        for i in range(cases)
    ]
    return {
        "machine_info": {"machine": "NVIDIA-H200"},
        "commit_info": {"id": "0" * 40, "dirty": False},
        "benchmarks": benches,
        "datetime": "2026-11-21T10:00:00+00:00",
        "version": "5.3.1",
        "fp4bench": {"format": 2, "number": number, "failed": [], "canaries": [{"name": "copy", "seconds": 1e-3}]},
        **changes,
    }


def read(path):
    return json.loads(path.read_text())


def without_data(run):
    run = copy.deepcopy(run)
    for bench in run["benchmarks"]:
        bench["stats"].pop("data", None)
    return run


def test_a_run_is_stored_without_its_samples_and_stays_as_it_was(tmp_path):
    run = make_run()
    before = copy.deepcopy(run)
    path = store(run, tmp_path / "new" / "NVIDIA-H200", "baseline")
    assert path == tmp_path / "new" / "NVIDIA-H200" / "0001_baseline.json"
    assert read(path) == without_data(run)
    assert run == before
    assert list(path.parent.iterdir()) == [path]


def test_samples_are_kept_beside_where_asked(tmp_path):
    run = make_run()
    path = store(run, tmp_path, "baseline", samples=True)
    assert read(path) == without_data(run)
    assert samples_path(path).name == "0001_baseline.samples.jsonl"
    assert [json.loads(line) for line in samples_path(path).read_text().splitlines()] == [
        {"name": "case-0", "seconds": [1.0, 2.0, 3.0]},
        {"name": "case-1", "seconds": [1.0, 2.0, 3.0]},
    ]
    assert sorted(tmp_path.iterdir()) == sorted([path, samples_path(path)])


def test_a_benchmark_is_a_line_and_all_else_is_indented(tmp_path):
    lines = store(make_run(), tmp_path, "x").read_text().splitlines()
    assert lines[:3] == ["{", '  "machine_info": {', '    "machine": "NVIDIA-H200"']
    rows = [line for line in lines if "fullname" in line]
    assert [json.loads(row.rstrip(","))["name"] for row in rows] == ["case-0", "case-1"]
    assert all(row.startswith("    {") for row in rows)
    assert lines[-1] == "}"


def test_a_run_without_cases_can_be_stored(tmp_path):
    assert read(store(make_run(cases=0), tmp_path, "x", samples=True))["benchmarks"] == []
    assert len(list(tmp_path.iterdir())) == 1


@pytest.mark.parametrize(
    ("neighbours", "number"),
    [
        ([], "0001"),
        (["0001_a.json", "0007_b.json"], "0008"),
        (["9999_a.json"], "10000"),
        (["10000_a.json", "9999_b.json"], "10001"),
        (["abcd_a.json", "00x1_a.json", "README.md", "0005.json", "12_a.json"], "0001"),
        (["20261121_note.json", "0002_a.json"], "0003"),
        (["0004_lost.samples.jsonl"], "0005"),
        ([".0001.partial"], "0002"),  # of a process that was killed, or that stores right now
        (["0002_a.json", ".0003.partial", ".0004.partial"], "0005"),
    ],
)
def test_a_run_gets_the_next_number_whatever_lies_about(neighbours, number, tmp_path):
    for name in neighbours:
        (tmp_path / name).write_text("theirs")
    assert store(make_run(), tmp_path, "x").name == f"{number}_x.json"
    assert all((tmp_path / name).read_text() == "theirs" for name in neighbours)


def test_stored_runs_are_in_the_order_of_their_numbers(tmp_path):
    names = ["0002_a.json", "9999_b.json", "10000_c.json", "0001_z.json"]
    for name in (*names, "0001_z.samples.jsonl", ".0003.partial", "note.json"):
        (tmp_path / name).touch()
    assert [path.name for path in stored_runs(tmp_path)] == ["0001_z.json", *names[:3]]


def test_a_number_is_taken_whatever_name_is_stored_under_it(tmp_path, monkeypatch):
    # Another process stored its run between this one's look at the folder and its reservation.
    store(make_run(1), tmp_path, "theirs")
    answers = iter([0])
    real = storage._highest
    monkeypatch.setattr(storage, "_highest", lambda folder: next(answers, real(folder)))
    assert store(make_run(2), tmp_path, "ours").name == "0002_ours.json"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["0001_theirs.json", "0002_ours.json"]


@pytest.mark.parametrize("hard_links", [True, False])
@pytest.mark.parametrize("taken", ["0001_x.json", "0001_x.samples.jsonl"])
def test_a_name_that_is_taken_in_the_last_moment_is_not_replaced(taken, hard_links, tmp_path, monkeypatch):
    # By someone who does not reserve numbers: the name appears after all looks at the folder.
    (tmp_path / taken).write_text("theirs")
    answers = iter([0, 0])
    real = storage._highest
    monkeypatch.setattr(storage, "_highest", lambda folder: next(answers, real(folder)))
    if not hard_links:
        monkeypatch.setattr(os, "link", no_hard_links)
    path = store(make_run(), tmp_path, "x", samples=True)
    assert path.name == "0002_x.json"
    assert (tmp_path / taken).read_text() == "theirs"
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted([taken, path.name, samples_path(path).name])


def no_hard_links(*_):
    raise PermissionError(1, "Operation not permitted")


def test_a_disk_without_hard_links(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "link", no_hard_links)
    paths = [store(make_run(number), tmp_path, "x", samples=True) for number in range(3)]
    assert [read(path)["fp4bench"]["number"] for path in paths] == [0, 1, 2]
    assert all(len(samples_path(path).read_text().splitlines()) == 2 for path in paths)
    assert len(list(tmp_path.iterdir())) == 6


@pytest.mark.parametrize(
    ("planted", "message"),
    [
        ({"mean": float("nan")}, r"run\.benchmarks\[0\]\.stats\.mean is nan"),
        ({"data": [1.0, float("inf")]}, r"run\.benchmarks\[0\]\.stats\.data\[1\] is inf"),
        ({"max": {1}}, r"run\.benchmarks\[0\]\.stats\.max is a set"),
    ],
)
@pytest.mark.parametrize("samples", [True, False])
def test_what_json_does_not_know_is_refused_by_name(planted, message, samples, tmp_path):
    run = make_run()
    run["benchmarks"][0]["stats"].update(planted)
    with pytest.raises(ValueError, match=message):
        store(run, tmp_path, "x", samples)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["", "a/b", "../x", "a\0b", "a\\b"])
def test_a_name_that_is_none_is_refused(name, tmp_path):
    with pytest.raises(ValueError, match="cannot be a part of a file name"):
        store(make_run(), tmp_path, name)
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_cannot_be_made_is_told_in_a_sentence(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(OSError, match=r"^cannot store the run in .*file/x \(Not a directory\): free space there or mend it"):
        store(make_run(), tmp_path / "file" / "x", "x")


# pytest-benchmark


class Warnings:
    """A logger that keeps what went wrong."""

    def __init__(self):
        self.said = []

    def warning(self, text, **_):
        self.said.append(text)


def test_pytest_benchmark_loads_it(tmp_path):
    for number in range(2):
        store(make_run(number), tmp_path / "NVIDIA-H200", "x", samples=True)
    logger = Warnings()
    loaded = list(FileStorage(tmp_path, logger, "NVIDIA-H200").load())
    assert logger.said == []
    assert [str(path) for path, _ in loaded] == ["NVIDIA-H200/0001_x.json", "NVIDIA-H200/0002_x.json"]
    assert [data["fp4bench"]["number"] for _, data in loaded] == [0, 1]
    assert loaded[0][1]["benchmarks"][0]["stats"]["median"] == 2.0


def test_pytest_benchmarks_command_line_lists_and_compares_it(tmp_path):
    for name in ("before", "after"):
        store(make_run(), tmp_path / "NVIDIA-H200", name, samples=True)

    def command(*arguments):
        line = [sys.executable, "-m", "pytest_benchmark", "--storage", str(tmp_path), *arguments]
        done = subprocess.run(line, cwd=tmp_path, capture_output=True, text=True, timeout=60)
        assert (done.returncode, done.stderr) == (0, "")
        return done.stdout

    listed = [Path(line).name for line in command("list").split()]
    assert listed == ["0001_before.json", "0002_after.json"]
    compared = command("compare")
    assert all(f"{case} ({run})" in compared for case in ("case-0", "case-1") for run in ("0001_before", "0002_after"))


# Faults

STORE_TWENTY = """
import sys
from pathlib import Path
from fp4bench.evidence.storage import store
folder, who, shared_name = Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
print("ready", flush=True)
input()
for number in range(20):
    run = {"benchmarks": [{"name": "c", "stats": {"data": [1.0], "median": 1.0}}], "fp4bench": {"number": 100 * who + number}}
    store(run, folder, shared_name or f"by-{who}", samples=True)
"""


@pytest.mark.parametrize("shared_name", ["nightly", ""], ids=["one_name", "two_names"])
def test_two_processes_store_into_one_folder_at_once(shared_name, tmp_path):
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True, "env": environment}
    command = [sys.executable, "-W", "error", "-c", STORE_TWENTY, str(tmp_path)]
    processes = [subprocess.Popen([*command, str(who), shared_name], **pipes) for who in (1, 2)]
    for process in processes:
        assert process.stdout.readline() == "ready\n"
    for process in processes:
        process.stdin.write("\n")
        process.stdin.flush()
    for process in processes:
        process.communicate(timeout=60)
        assert process.returncode == 0
    runs = stored_runs(tmp_path)
    assert sorted(read(path)["fp4bench"]["number"] for path in runs) == [*range(100, 120), *range(200, 220)]
    numbers = [int(path.name.partition("_")[0]) for path in runs]
    assert len(set(numbers)) == 40
    assert all(samples_path(path).is_file() for path in runs)
    assert len(list(tmp_path.iterdir())) == 80  # and no temporary file


@pytest.mark.parametrize("samples", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_a_full_disk_leaves_what_was_there_and_nothing_else(kind, samples, tmp_path):
    # The run alone fits, and with its samples it does not; or it does not fit by itself.
    code = f"""
from fp4bench.evidence.storage import store
samples, text = {samples}, "" if {samples} else "x" * 20_000
bench = {{"name": "c", "stats": {{"median": 1.0, "data": [1.0] * 5_000}}, "text": text}}
small = {{"benchmarks": []}}
run = {{"benchmarks": [bench]}}
kept = store(small, Path("runs"), "x")
fill(left=12_000)
before = kept.read_bytes()
try:
    store(run, Path("runs"), "x", samples)
except OSError as error:
    text = str(error)
    assert error.errno
else:
    raise AssertionError("it was stored")
assert text.startswith("cannot store the run in runs ("), text
assert list(Path("runs").iterdir()) == [kept], list(Path("runs").iterdir())
assert kept.read_bytes() == before
free()
assert store(run, Path("runs"), "x", samples).name == "0002_x.json"
"""
    run_on_a_full_disk(kind, tmp_path, code)


def test_a_process_killed_while_it_stores_costs_a_number_at_most(tmp_path):
    code = """
import os, signal, sys
from pathlib import Path
from fp4bench.evidence.storage import store
os.fsync = lambda descriptor: os.kill(os.getpid(), signal.SIGKILL)
store({"benchmarks": []}, Path(sys.argv[1]), "x")
"""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    assert subprocess.run([sys.executable, "-c", code, str(tmp_path)], env=environment).returncode == -9
    assert stored_runs(tmp_path) == []
    assert store(make_run(), tmp_path, "x").name == "0002_x.json"
