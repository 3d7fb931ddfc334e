"""What was measured before a run was cut off can be reported from its journal."""

import json
from pathlib import Path

import pytest
from products import product

from fp4bench import cli
from fp4bench.cli import report as cli_report
from fp4bench.evidence.baselines import parse
from fp4bench.evidence.journal import JournalError
from fp4bench.evidence.results import join
from fp4bench.evidence.unfinished import as_run

RECORDED = Path(__file__).parents[2] / "baselines" / "NVIDIA-H200" / "moe" / "20261127T130429-gpt-oss-120b.jsonl"
KEY = {"format": 3, "machine_info": {"machine": "NVIDIA-H200", "uuid": "GPU-1"}, "options": {}}


def journal(folder, *lines, name="20261127T130429-77.jsonl"):
    path = folder / name
    path.write_text("".join(json.dumps(line) + "\n" for line in ({"key": KEY}, *lines)))
    return path


def finished(*arguments, seconds=(3e-5, 1e-5, 2e-5)):
    return {"at_s": 1.0, "record": product(*arguments)["extra_info"], "seconds": list(seconds), "calls_per_sample": 4}


def conditions(copy, rate):
    return {"at_s": 0.5, "conditions": {"ceilings": {"copy_gbps": copy, "bf16_tflops": rate, "fp8_tflops": None}}}


def test_finished_cases_are_those_of_a_run(tmp_path):
    path = journal(tmp_path, conditions(1000.0, 80.0), finished("torch", "bf16", 1, 40), conditions(3000.0, 90.0))
    run = parse(as_run(path), path)
    assert (run.datetime, run.info["session"]) == ("2026-11-27T13:04:29+00:00", "GPU-1 2026-11-27")
    assert not run.info["complete"]
    assert run.info["accepted"] is None
    assert run.info["ceilings"] == {"copy_gbps": 2000.0, "bf16_tflops": 85.0, "fp8_tflops": None}
    (timing,) = run.cases.values()
    assert (timing.median, timing.fastest) == (2e-5, 1e-5)
    least = timing.record["bytes"] / 2e12
    assert timing.record["roofline_fraction"] == pytest.approx(least / 2e-5)
    join([run])


def test_what_follows_from_the_whole_run_is_filled_and_what_did_not_finish_left_out(tmp_path):
    slow = finished("torch", "bf16", 1, 40, seconds=(8e-5, 8e-5))
    unknown = {"at_s": 2.0, "record": None, "seconds": None}
    path = journal(tmp_path, slow, finished("a", "w4a16", 1, 12), unknown)
    run = parse(as_run(path), path)
    assert {timing.record["speedup_vs_bf16"] for timing in run.cases.values()} == {1.0, 4.0}


def test_a_case_that_was_timed_again_counts_once(tmp_path):
    path = journal(tmp_path, finished("a", "w4a16", 1, 12), finished("a", "w4a16", 1, 12, seconds=(7e-5,)))
    assert [bench["stats"]["median"] for bench in as_run(path)["benchmarks"]] == [7e-5]


def test_files_that_tell_nothing(tmp_path):
    with pytest.raises(ValueError, match="nothing to report"):
        as_run(journal(tmp_path, conditions(1.0, 1.0)))
    with pytest.raises(JournalError, match="cannot read the journal"):
        as_run(tmp_path / "none.jsonl")


def test_a_renamed_journal_counts_from_when_it_was_last_written(tmp_path):
    path = journal(tmp_path, finished("a", "w4a16", 1, 12), name="renamed.jsonl")
    assert parse(as_run(path), path).datetime[:4].isdigit()


def test_the_recorded_one_is_shown_and_called_incomplete():
    lines = cli_report.lines(cli.parser().parse_args(["report", "--compare", str(RECORDED)]))
    assert "is incomplete" in lines[1]
    assert any("zipf routing" in line for line in lines)
