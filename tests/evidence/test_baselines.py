"""Finding, reading and refusing stored runs."""

import json

import pytest

from fp4bench.evidence.baselines import BaselineError, find, load
from fp4bench.evidence.record import FORMAT


def stored_run(**changes):
    run = {
        "machine_info": {"machine": "NVIDIA-H200", "torch": "2.11.0"},
        "datetime": "2026-11-21T06:53:07",
        "fp4bench": {"format": FORMAT},
        "benchmarks": [{"extra_info": {"case_id": "gemm-a"}, "stats": {"median": 2.0, "min": 1.0}}],
    }
    return run | changes


def write(folder, name, run):
    path = folder / name
    path.write_text(run if isinstance(run, str) else json.dumps(run), encoding="utf-8")
    return path


def test_the_newest_number_is_found(tmp_path):
    for name in ("0002_b.json", "0010_a.json", "0001_z.json", "notes.json", "12_short.json"):
        write(tmp_path, name, stored_run())
    assert find(tmp_path).name == "0010_a.json"
    assert find(tmp_path, "0002").name == "0002_b.json"
    assert find(tmp_path, str(tmp_path / "notes.json")).name == "notes.json"


def test_nothing_stored_is_no_baseline(tmp_path):
    assert find(tmp_path / "absent") is None


def test_a_run_that_is_not_there_is_named_with_those_that_are(tmp_path):
    write(tmp_path, "0001_first.json", stored_run())
    with pytest.raises(BaselineError, match=r"no stored run '0007' in .*, which holds 0001_first"):
        find(tmp_path, "0007")


def test_cases_are_read_by_id(tmp_path):
    baseline = load(write(tmp_path, "0001_a.json", stored_run()), "NVIDIA-H200")
    assert baseline.cases["gemm-a"].median == 2.0
    assert baseline.cases["gemm-a"].fastest == 1.0
    assert baseline.machine_info["torch"] == "2.11.0"


@pytest.mark.parametrize(
    ("run", "message"),
    [
        pytest.param(
            stored_run(machine_info={"machine": "NVIDIA-B200"}), "recorded on NVIDIA-B200.*is NVIDIA-H200", id="machine"
        ),
        pytest.param(stored_run(fp4bench={"format": 99}), f"format 99, and this fp4bench reads {FORMAT}", id="format"),
        pytest.param({"benchmarks": []}, "not a run that fp4bench stored", id="foreign"),
        pytest.param(stored_run(benchmarks=[{"stats": {}}]), "not a run that fp4bench stored", id="no-extra-info"),
        pytest.param(json.dumps(stored_run())[:-20], "truncated or not JSON", id="truncated"),
        pytest.param("", "truncated or not JSON", id="empty"),
        pytest.param("[1, 2]", "not a run that fp4bench stored", id="a-list"),
    ],
)
def test_what_cannot_be_compared_is_refused_in_one_line(tmp_path, run, message):
    path = write(tmp_path, "0001_a.json", run)
    with pytest.raises(BaselineError, match=message) as refusal:
        load(path, "NVIDIA-H200")
    assert str(path) in str(refusal.value)
    assert "\n" not in str(refusal.value)


def test_a_file_that_cannot_be_read_is_refused(tmp_path):
    with pytest.raises(BaselineError, match="cannot read the baseline"):
        load(tmp_path, "NVIDIA-H200")  # a folder


def test_a_file_that_is_not_text_is_refused(tmp_path):
    path = tmp_path / "0001_a.json"
    path.write_bytes(b"\xff\xfe\x00garbage")
    with pytest.raises(BaselineError, match="truncated or not JSON"):
        load(path, "NVIDIA-H200")
