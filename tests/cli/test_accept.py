"""`fp4bench accept` and `fp4bench report` as typed."""

import json

import pytest
from recorded import CASES, MACHINE, scaled, stored_run, write

from fp4bench.cli import accept as command
from fp4bench.cli import report as report_command


@pytest.fixture
def fp4bench(tmp_path, monkeypatch, capsys):
    """Run a command in an empty folder; its exit code (2: a refusal) and what it wrote."""
    import argparse

    monkeypatch.chdir(tmp_path)

    def run(*arguments):
        parser = argparse.ArgumentParser(prog="fp4bench")
        commands = parser.add_subparsers(required=True)
        for one in (command, report_command):
            one.add_parser(commands)
        args = parser.parse_args([str(argument) for argument in arguments])
        try:
            return args.run(args), capsys.readouterr().out
        except ValueError as error:
            return 2, str(error)

    return run


def test_the_first_run_and_the_next(fp4bench, tmp_path):
    first = write(tmp_path / "runs" / "0001_a.json", stored_run(1))
    code, text = fp4bench("accept", first, "--name", "first", "--reason", "a start")
    assert code == 0
    assert text.splitlines() == [
        "the first baseline of this machine: 12 cases in 1 run",
        f"accepted: baselines/{MACHINE}/0001_first.json",
    ]
    second = write(tmp_path / "runs" / "0002_a.json", scaled(stored_run(2), 0.5))
    code, text = fp4bench("accept", second, "--name", "faster", "--reason", "a new kernel")
    assert code == 0
    lines = text.splitlines()
    assert lines[0] == "12 cases beside 0001_first, the largest changes first:"
    assert lines[1].split()[0] == CASES[0]
    assert lines[1].split()[-1].startswith("-50.")
    assert lines[-2:] == [
        f"1 case moved in one run: {CASES[0]} (until the next run shows it too, both times count)",
        f"accepted: baselines/{MACHINE}/0002_faster.json",
    ]
    third = write(tmp_path / "runs" / "0003_a.json", scaled(stored_run(3), 0.5))
    code, text = fp4bench("accept", third, "--name", "faster", "--reason", "the same kernel")
    assert text.splitlines()[-2:] == [
        f"1 case that moved start anew: {CASES[0]}",
        f"accepted: baselines/{MACHINE}/0003_faster.json",
    ]


def test_many_cases_that_moved_are_counted_and_five_named(fp4bench, tmp_path):
    before = write(tmp_path / "0001_a.json", stored_run(1))
    assert fp4bench("accept", before, "--name", "first", "--reason", "a start")[0] == 0
    slower = stored_run(2)
    for case_id in CASES[:7]:
        slower = scaled(slower, 1.2, case_id)
    after = write(tmp_path / "0002_a.json", slower)
    again = write(tmp_path / "0003_a.json", slower | {"datetime": "2026-11-09"})
    lines = fp4bench("accept", after, again, "--name", "slower", "--reason", "exact scales")[1].splitlines()
    assert f"7 cases that moved start anew: {', '.join(CASES[:5])}, ..." in lines
    assert not any("moved in one run" in line for line in lines)


def test_cases_that_are_gone_are_retired(fp4bench, tmp_path):
    before = write(tmp_path / "0001_a.json", stored_run(1))
    assert fp4bench("accept", before, "--name", "first", "--reason", "a start")[0] == 0
    run = stored_run(2)
    after = write(tmp_path / "0002_a.json", run | {"benchmarks": run["benchmarks"][2:]})
    asked = ("accept", after, "--name", "fewer", "--reason", "x", "--retire", CASES[0], "--retire")
    assert fp4bench(*asked, "nothing*") == (2, f"--retire 'nothing*' matches no case of the baseline in baselines/{MACHINE}")
    code, text = fp4bench(*asked, "*.qkv.tp1-m16")
    assert code == 0
    assert text.splitlines()[-2] == f"2 cases leave the baseline: {CASES[0]}, {CASES[1]}"
    assert "anew" not in text


def test_a_refusal_writes_nothing(fp4bench, tmp_path):
    path = write(tmp_path / "0001_a.json", stored_run(1, complete=False))
    code, text = fp4bench("accept", path, "--name", "x", "--reason", "y")
    assert code == 2
    assert text == f"{path} is incomplete, cases that were selected are not in it: record it anew, or go on with --resume"
    assert not (tmp_path / "baselines").exists()


def test_name_and_reason_must_be_given(fp4bench, tmp_path, capsys):
    path = write(tmp_path / "0001_a.json", stored_run(1))
    for given in (["--name", "x"], ["--reason", "y"]):
        with pytest.raises(SystemExit, match="2"):
            fp4bench("accept", path, *given)
    assert "required" in capsys.readouterr().err


def test_another_folder(fp4bench, tmp_path):
    path = write(tmp_path / "0001_a.json", stored_run(1))
    assert fp4bench("accept", path, "--name", "x", "--reason", "y", "--folder", "elsewhere")[0] == 0
    assert (tmp_path / "elsewhere" / MACHINE / "0001_x.json").is_file()


def test_a_dirty_tree_only_when_told(fp4bench, tmp_path):
    path = write(tmp_path / "0001_a.json", stored_run(1) | {"commit_info": {"id": "abc", "dirty": True}})
    asked = ("accept", path, "--name", "x", "--reason", "y")
    assert fp4bench(*asked)[0] == 2
    assert fp4bench(*asked, "--allow-dirty")[0] == 0


def test_the_report_lists_runs_and_their_spread(fp4bench, tmp_path):
    for number in (1, 2, 3):
        write(tmp_path / "baselines" / MACHINE / f"{number:04}_night.json", stored_run(number))
    code, text = fp4bench("report")
    assert code == 0
    assert text.startswith(f"### {MACHINE}\n")
    assert text.count("_night |") == 3
    code, text = fp4bench("report", "--spread", "--machine", MACHINE)
    assert code == 0
    assert "| **all** | 12 | | | | 100% | 100% |" in " ".join(text.split())
    (card,) = {stored_run(number)["fp4bench"]["session"].split()[0] for number in (1, 2, 3)}
    assert fp4bench("report", "--spread", "--cards", card[:6]) == (0, text)
    assert fp4bench("report", "--spread", "--cards", "0")[0] == 2


def test_the_report_of_nothing_says_where_it_looked(fp4bench):
    assert fp4bench("report")[1].startswith("no accepted run in baselines:")
    assert fp4bench("report", "--spread", "--machine", "nothing")[1].startswith("no accepted run in baselines/nothing:")


def test_a_verdicts_file_becomes_markdown(fp4bench, tmp_path):
    path = write(tmp_path / "verdict.json", json.dumps({"outcome": "no_baseline", "cases": {}, "invalid": []}))
    assert fp4bench("report", "--markdown", path) == (
        0,
        "### fp4bench: this machine has no baseline, so nothing was compared\n\nno case was timed\n",
    )
    assert fp4bench("report", "--markdown", write(path, "{"))[1].startswith(f"the verdicts file {path} is truncated")
    assert fp4bench("report", "--markdown", tmp_path / "absent")[1].startswith("cannot read the verdicts file")
