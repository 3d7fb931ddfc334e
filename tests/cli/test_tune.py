"""`fp4bench tune`: what is tuned, what it writes and says; who measures is made up."""

import argparse
import json

import pytest

pytest.importorskip("triton")

from fp4bench import devices
from fp4bench.cli import main, tune
from fp4bench.devices import Device
from fp4bench.evidence import journal
from fp4bench.evidence.journal import Journal
from fp4bench.kernels import configs
from fp4bench.tuning import campaign, compiling
from fp4bench.tuning.readings import CAREFUL, Readings
from fp4bench.tuning.search import launches

MADE_UP = Device("cuda:0", "NVIDIA Made-Up", (9, 0), 99, 60 << 20)


def asked(*arguments):
    parser = argparse.ArgumentParser()
    tune.add_parser(parser.add_subparsers())
    return parser.parse_args(["tune", *arguments])


def test_works_are_layers_by_formats_operands_and_batch_sizes():
    works = tune.works_of(asked("--layers", "o", "down", "--batch-sizes", "1", "64"))
    assert [(work.operand, work.format, work.m, work.n, work.k) for work in works] == [
        (operand, name, m, 8192, k)
        for operand, name in (("bf16", "mxfp4"), ("bf16", "nvfp4"), ("e4m3", "mxfp4"))
        for k in (8192, 28672)
        for m in (1, 64)
    ]
    (work,) = tune.works_of(asked("--shapes", "96x64", "--batch-sizes", "3", "--formats", "nvfp4"))
    assert work == configs.Work("bf16", "nvfp4", 3, 96, 64)


@pytest.mark.parametrize(
    ("arguments", "why"), [(["--layers", "moon"], "no layer is named moon: there are qkv, o"), (["--models", "moon"], "moon")]
)
def test_unknown_layers_and_models_are_one_sentence(arguments, why):
    with pytest.raises(ValueError, match=why):
        tune.works_of(asked(*arguments))


def test_a_cpu_has_nothing_to_tune(capsys, monkeypatch):
    assert main(["tune", "--device", "cpu"]) == 2
    assert "nothing to tune" in capsys.readouterr().err


@pytest.fixture
def made_up(monkeypatch, tmp_path):
    """A Hopper GPU on which the second launch of every work takes 1 us, and the others 2."""
    monkeypatch.setattr(devices, "find_device", lambda name: MADE_UP)
    monkeypatch.setenv(configs.FOLDER_VARIABLE, str(tmp_path / "tables"))
    monkeypatch.chdir(tmp_path)
    compiled = []
    monkeypatch.setattr(compiling, "compile_all", lambda jobs, device, processes, told: compiled.extend(jobs))

    def measure_all(works, device, path, *, until, silence, show):
        with Journal.reopen(path) as file:
            readings = Readings(journal.read(path)[1], file)
            for work in works[: 1 if until < 1e12 else None]:
                for at, launch in enumerate(launches(work, device)[:2]):
                    seconds = 1e-6 * (2 - at)
                    readings.begin(work, launch)
                    readings.timed(work, launch, CAREFUL, seconds, [seconds])
                readings.finish(work)
                show(campaign.progress(path, {work: 2}))
        return until > 1e12

    monkeypatch.setattr(campaign, "measure_all", measure_all)
    return compiled


COMMAND = ("tune", "--shapes", "96x64", "--batch-sizes", "1", "8", "--formats", "mxfp4", "--operands", "bf16")


def test_it_writes_the_table_and_says_what_changed_and_the_readings_stay(made_up, tmp_path, capsys):
    works = tune.works_of(asked(*COMMAND[1:]))
    before = {work: configs.default(work, MADE_UP) for work in works}
    assert main(COMMAND) == 0
    said = capsys.readouterr()
    assert "2 of 2 products get another launch" in said.out
    assert "1.00 us" in said.out
    assert "1 of 1 products" in said.err
    table = configs.load(tmp_path / "tables" / "NVIDIA-Made-Up.json")
    assert {entry.work: entry.launch for entry in table.entries} == {
        work: next(launch for launch in configs.candidates(work, MADE_UP) if launch != before[work]) for work in works
    }
    (readings,) = (tmp_path / ".benchmarks" / "tune").iterdir()
    assert readings.suffix == ".readings"
    assert {json.loads(line).get("step") for line in readings.read_text().splitlines()[1:]} == {"begun", "careful", "done"}


def test_a_spent_budget_keeps_what_is_done_and_the_next_command_goes_on(made_up, capsys):
    assert main([*COMMAND, "--budget", "5"]) == 1
    said = capsys.readouterr().out
    assert "1 of 1 products get another launch" in said
    assert "goes on" in said
    assert {work.m for work, _ in made_up} == {1, 8}
    made_up.clear()
    assert main(COMMAND) == 0
    assert {work.m for work, _ in made_up} == {8}


def test_anew_forgets_an_unfinished_search(made_up, capsys):
    assert main([*COMMAND, "--budget", "5"]) == 1
    made_up.clear()
    assert main([*COMMAND, "--anew"]) == 0
    assert {work.m for work, _ in made_up} == {1, 8}


def test_a_table_that_is_there_keeps_what_is_not_measured_anew(made_up, tmp_path, capsys):
    for m in ("1", "8"):
        assert main([*COMMAND[:4], m, *COMMAND[6:], "--output", str(tmp_path / "beside")]) == 0
    table = configs.load(tmp_path / "beside" / "NVIDIA-Made-Up.json")
    assert {entry.work.m for entry in table.entries} == {1, 8}
