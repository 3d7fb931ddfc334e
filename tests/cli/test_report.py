"""`fp4bench report --side-by-side` as typed, on stored runs with their samples beside them."""

import argparse
import json

import pytest
from recorded import CASES, MACHINE, scaled, stored_run, write

from fp4bench.cli import report
from fp4bench.evidence.storage import samples_path


@pytest.fixture
def fp4bench(tmp_path, monkeypatch, capsys):
    """Run `fp4bench report` beside a baseline of four runs; its exit code (2: a refusal) and its lines."""
    monkeypatch.chdir(tmp_path)
    for number in range(1, 5):
        write(tmp_path / "baselines" / MACHINE / f"{number:04}_night.json", stored_run(number))

    def run(*arguments):
        parser = argparse.ArgumentParser(prog="fp4bench")
        report.add_parser(parser.add_subparsers(required=True))
        args = parser.parse_args(["report", *map(str, arguments)])
        try:
            return args.run(args), capsys.readouterr().out.splitlines()
        except ValueError as error:
            return 2, [str(error)]

    return run


def stored(tmp_path, number, run, samples=True):
    """A run in .benchmarks, with ten samples a case 0.01 % apart."""
    path = write(tmp_path / ".benchmarks" / MACHINE / f"{number:04}_gate.json", run)
    if samples:
        lines = [
            {"name": b["name"], "seconds": [b["stats"]["median"] * (1 + i * 1e-4) for i in range(10)]}
            for b in run["benchmarks"]
        ]
        samples_path(path).write_text("".join(f"{json.dumps(line)}\n" for line in lines), encoding="utf-8")
    return path


def slowed(run, share, case_id=CASES[0]):
    run = scaled(run, 1 + share, case_id)
    next(b for b in run["benchmarks"] if b["name"] == case_id)["extra_info"]["injected"] = share
    return run


@pytest.fixture
def runs(tmp_path):
    """One to compare with, one on unchanged code and one with a case slowed down by 3 %."""
    return (
        stored(tmp_path, 1, stored_run(5)),
        stored(tmp_path, 2, stored_run(6)),
        stored(tmp_path, 3, slowed(stored_run(7), 0.03)),
    )


def cells(lines, rule):
    (row,) = [line for line in lines if line.startswith(f"| {rule}")]
    return [cell.strip().partition(" (")[0] for cell in row.strip("|").split(" | ")]


def test_rules_side_by_side(fp4bench, runs, tmp_path):
    before, unchanged, injected = runs
    (tmp_path / "do_bench.json").write_text(json.dumps({"uuid": "GPU-1", "seconds": {CASES[0]: [1.0, 1.03]}}))
    table = {case_id: {"outcome": "REGRESSED" if case_id == CASES[0] else "SAME", "seconds": None} for case_id in CASES}
    write(tmp_path / "told" / "verdicts.json", {"run": str(injected.relative_to(tmp_path)), "cases": table})
    code, lines = fp4bench(
        *("--side-by-side", unchanged, injected, "--against", before),
        *("--do-bench", "do_bench.json", "--verdicts", "told/verdicts.json", "--json", "counts.json"),
    )
    assert code == 0
    assert cells(lines, "pytest-benchmark, median:5%")[1:] == ["same card", "0 of 23", "0 of 2", "0 of 1"]
    assert cells(lines, "pytest-benchmark, median:2%")[4] == "1 of 1"
    assert cells(lines, "Mann-Whitney")[4] == "1 of 1"
    assert cells(lines, "gpucheck")[4] == "0 of 1"
    assert cells(lines, "do_bench_cudagraph")[2:] == ["0 of 1", "0 of 1", "1 of 1"]  # 1.03 * 1.03
    assert cells(lines, "fp4bench, first look")[1:] == ["same card", "0 of 23", "0 of 2", "1 of 1"]
    assert cells(lines, "fp4bench, as the gate ended")[1:] == ["its baseline then", "0 of 11", "0 of 1", "1 of 1"]
    assert any(
        line.startswith("- 24 timings in 2 runs of 1 cards; 1 of them were slowed down on purpose (1 by 3 %)") for line in lines
    )
    told = json.loads((tmp_path / "counts.json").read_text())
    assert [rule["rule"] for rule in told["rules"]][-1] == "fp4bench, as the gate ended"
    assert told["rules"][0]["missed"] == [{"slowdown": 0.03, "cases": {CASES[0]: 1}}]
    assert [f"- {note}" for note in told["notes"]] == [line for line in lines if line.startswith("- ")]


def test_without_against_the_accepted_runs_are_compared_with(fp4bench, runs):
    code, lines = fp4bench("--side-by-side", runs[1])
    assert code == 0
    assert cells(lines, "pytest-benchmark, median:5%")[1:4] == ["same card", "0 of 12", "0 of 1"]
    assert not any(line.startswith("| Mann-Whitney") for line in lines)  # accepted runs have no samples


def test_a_drills_report_gives_the_ends_of_its_runs(fp4bench, runs, tmp_path):
    told = {
        "sessions": [
            {"run": f".benchmarks/{MACHINE}/0002_gate.json", "plan": {}, "alarms": {}},
            {"run": f".benchmarks/{MACHINE}/0003_gate.json", "plan": {CASES[0]: 0.03}, "alarms": {}},
            {"run": f".benchmarks/{MACHINE}/0004_gate.json", "plan": {CASES[0]: 0.03}, "alarms": {}},
        ],
        "injections": [{"case_id": CASES[0], "session": s, "outcome": "REGRESSED"} for s in (1, 2)],
    }
    (tmp_path / "drill.json").write_text(json.dumps(told))
    code, lines = fp4bench("--side-by-side", *runs[1:], "--verdicts", "drill.json")
    assert code == 0
    assert cells(lines, "fp4bench, as the gate ended")[2:] == ["0 of 23", "0 of 2", "1 of 1"]


def test_the_runs_that_verdicts_name_are_found_beside_the_file(fp4bench, tmp_path):
    project = tmp_path / "elsewhere"
    run = stored(project, 2, stored_run(6))
    told = {"run": f".benchmarks/{MACHINE}/0002_gate.json", "cases": {CASES[0]: {"outcome": "REGRESSED", "seconds": None}}}
    (project / "verdicts.json").write_text(json.dumps(told))
    code, lines = fp4bench("--side-by-side", run, "--verdicts", project / "verdicts.json")
    assert code == 0
    assert cells(lines, "fp4bench, as the gate ended")[2:] == ["1 of 12", "1 of 1"]


def test_verdicts_of_another_run_are_refused(fp4bench, runs, tmp_path):
    told = {"run": f".benchmarks/{MACHINE}/0003_gate.json", "cases": {CASES[1]: {"outcome": "SAME", "seconds": 1.0}}}
    (tmp_path / "verdicts.json").write_text(json.dumps(told))
    code, lines = fp4bench("--side-by-side", runs[1], "--verdicts", "verdicts.json")
    assert (code, lines) == (2, ["verdicts.json tells of none of these runs: give the runs that it names too"])
    code, lines = fp4bench("--side-by-side", runs[2], "--verdicts", "verdicts.json")
    assert code == 2
    assert "is not the run that was judged as" in lines[0]


def test_refusals(fp4bench, runs, tmp_path):
    code, lines = fp4bench("--side-by-side", runs[1], runs[1])
    assert (code, lines) == (2, [f"{runs[1]} and {runs[1]} are the same run: give it once"])
    other = stored_run(6)
    other["machine_info"]["machine"] = "NVIDIA-B200"
    path = write(tmp_path / "b200.json", other)
    code, lines = fp4bench("--side-by-side", runs[1], "--against", path)
    assert (code, lines) == (2, [f"{path} is of NVIDIA-B200, and {runs[1]} of {MACHINE}: compare runs of one machine"])
    code, lines = fp4bench("--side-by-side", path)
    assert (code, lines) == (2, ["no accepted run in baselines/NVIDIA-B200: name the place of the baselines with --folder"])
    code, lines = fp4bench("--spread", "--against", path)
    assert (code, lines) == (2, ["--against goes with --side-by-side RUN.json"])
    code, lines = fp4bench("--do-bench", path)
    assert (code, lines) == (2, ["--do-bench goes with --side-by-side RUN.json"])
    code, lines = fp4bench("--side-by-side", runs[1], "--do-bench", "absent.json")
    assert (code, lines) == (2, ["cannot read the readings absent.json: No such file or directory"])
    write(tmp_path / "counts.json", "mine")
    code, lines = fp4bench("--side-by-side", runs[1], "--json", "counts.json")
    assert (code, lines) == (2, ["counts.json exists: name a new file for --json"])
    assert (tmp_path / "counts.json").read_text() == "mine"


@pytest.mark.parametrize(
    "text",
    [
        '{"name": "a", "seconds": [1.0',
        '{"name": "a"}\n',
        '{"name": "a", "seconds": ["x"]}\n',
        '{"name": "a", "seconds": []}\n',
        '{"name": "a", "seconds": [0.0]}\n',
        "3\n",
    ],
)
def test_damaged_samples_are_refused(fp4bench, runs, text):
    samples_path(runs[1]).write_text(text)
    code, lines = fp4bench("--side-by-side", runs[1])
    assert code == 2
    assert lines[0].startswith(f"the samples {samples_path(runs[1])} are truncated or not a case a line")
