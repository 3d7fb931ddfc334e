"""A drill of real sessions on a CPU, and what other rules say of the very same runs: accept, drill, report."""

import argparse
import json
import os
import sys

from project import CASES, FEW

from fp4bench.cli import drill, report


def parsed(command, *words):
    parser = argparse.ArgumentParser()
    command.add_parser(parser.add_subparsers())
    return parser.parse_args([command.__name__.rpartition(".")[2], *map(str, words)])


def test_a_drills_runs_can_be_judged_by_their_samples(accepted, tmp_path, monkeypatch, capsys):
    project = accepted[0].copy(tmp_path / "project")
    monkeypatch.chdir(project.path)
    for name in [name for name in os.environ if name.startswith("PYTEST_")]:
        monkeypatch.delenv(name)
    for name, value in project.environment().items():
        monkeypatch.setenv(name, value)
    asked = parsed(drill, "--slowdown", "300", "--cases", "2", "--share", "0.5", "--seed", "1", "--json", "drill.json")
    asked.pytest_args = [*FEW, "--confirm=0"]  # an injected slowdown is confirmed in tests/plugin/test_gate.py
    drill.run(asked, (sys.executable, "-m", "pytest", "-p", "fp4bench.plugin", "perf"))
    told = json.loads((project.path / "drill.json").read_text())
    slowed = sorted(injection["case_id"] for injection in told["injections"])
    assert (len(told["sessions"]), len(slowed), set(slowed) <= set(CASES)) == (2, 2, True)

    runs = [project.path / session["run"] for session in told["sessions"]]
    assert all(run.with_suffix(".samples.jsonl").is_file() for run in runs)
    counted = ("--side-by-side", runs[1], "--against", runs[0], "--verdicts", "drill.json", "--json", "counts.json")
    assert report.run(parsed(report, *counted)) == 0
    text = capsys.readouterr().out
    assert "no raw samples" not in text
    ranks = next(rule for rule in json.loads((project.path / "counts.json").read_text())["rules"] if "Mann" in rule["rule"])
    # Both were slowed down to four times their time, and the other two were compared too.
    assert (ranks["injected"][0]["detected"], ranks["injected"][0]["trials"], ranks["cases"]) == (2, 2, 2)
