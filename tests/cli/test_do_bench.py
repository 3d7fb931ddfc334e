"""`fp4bench do-bench` on a CPU: the readings are made up by the worker's handler below, all else is real."""

import argparse
import json
from pathlib import Path

import pytest
from recorded import write

from fp4bench.cli import do_bench
from fp4bench.devices import find_device
from fp4bench.evidence import rivals
from fp4bench.timing.machine import machine_info
from fp4bench.workers.do_bench import DoBench, Slowed

HERE = Path(__file__).parent
IDS = [f"gemm-bf16-torch-llama3.2-1b.{layer}.tp1-m{m}" for layer in ("qkv", "o") for m in (1, 4)]
OPTIONS = {"models": ["llama3.2-1b"], "modes": ["bf16"], "providers": ["torch"], "batch_sizes": ["1", "4"]}


class StandIn:
    """Reads 1 s in each first look of a process, 2 s in the next, and so on; a case of m = 4 of layer o fails."""

    def __init__(self, device):
        self.device, self.calls = device, 0

    def __call__(self, request):
        self.calls += 1
        if str(request.case).endswith("o.tp1-m4"):
            raise RuntimeError("operation not permitted when stream is capturing")
        return (float(self.calls), *(self.calls * (1 + share) for share in request.slowdowns))


@pytest.fixture
def command(tmp_path, monkeypatch, capsys):
    """Run it on a stored run of four cases; its exit code and lines."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(HERE)
    monkeypatch.syspath_prepend(HERE.parent)

    def run(*words, ids=IDS, factory="test_do_bench:StandIn"):
        stored = {
            "fp4bench": {"format": 3, "session": "x 2026-11-27", "options": OPTIONS},
            "machine_info": machine_info(find_device("cpu")),
            "datetime": "2026-11-27T00:00:00",
            "benchmarks": [
                {"name": i, "stats": {"median": 1.0, "min": 1.0}, "extra_info": {"case_id": i, "op": "gemm"}} for i in ids
            ],
        }
        path = write(tmp_path / "run.json", stored)
        parser = argparse.ArgumentParser()
        do_bench.add_parser(parser.add_subparsers())
        args = parser.parse_args(["do-bench", str(path), "--device", "cpu", "--json", "readings.json", *words])
        return do_bench.run(args, factory), capsys.readouterr().out.splitlines()

    return run


def test_each_reading_is_of_a_fresh_process_and_a_failure_costs_its_case_alone(command):
    code, lines = command("--repeat", "2", "--slowdown", "2", "--slowdown", "5")
    assert code == 1
    told = json.loads(Path("readings.json").read_text())
    # A process that went on would have read 5, 6 and 7 s.
    assert told["seconds"] == {IDS[0]: [1.0, 1.0], IDS[1]: [2.0, 2.0], IDS[2]: [3.0, 3.0]}
    assert told["slowed"]["0.02"][IDS[1]] == [2.04, 2.04]
    assert told["slowed"]["0.05"][IDS[2]] == pytest.approx([3.15, 3.15])
    assert list(told["failed"]) == [IDS[3]]
    assert "stream is capturing" in told["failed"][IDS[3]]
    assert lines[-1] == "3 cases; the readings of a case lie 0.0% apart (median), 0.0% at most"
    # The report takes what was written: 2 and 5 % as read, 6 % scaled.
    (one,) = rivals.count(rivals.do_bench_answers([told], [0.02, 0.05, 0.06]))
    assert (one.cases, one.flags, one.injected) == (3, 0, {0.02: (0, 3), 0.05: (0, 3), 0.06: (3, 3)})


def test_cases_evenly_spread():
    assert list(do_bench.spread_out(dict.fromkeys("abcdefgh"), 3)) == ["a", "c", "f"]
    assert (
        list(do_bench.spread_out(dict.fromkeys("ab"), 3)) == list(do_bench.spread_out(dict.fromkeys("ab"), None)) == ["a", "b"]
    )


def test_a_case_that_is_no_longer_there(command):
    with pytest.raises(ValueError, match=r"holds gemm-x, which its options do not select here"):
        command(ids=["gemm-x"])


def test_a_cpu_has_no_graphs(command):
    with pytest.raises(ValueError, match="this device is a CPU"):
        command(factory=do_bench.FACTORY)


def test_a_slowed_call_idles_as_long_as_is_said_however_short():
    idled = []
    short = Slowed(lambda: "result", delay=0.2e-6, launch=2e-6, spin=idled.append)
    assert short.every == 40
    idled.clear()  # what compiled it
    assert {short() for _ in range(400)} == {"result"}
    # Ten launches of 2 us, and what they idle: 400 times 0.2 us.
    assert 10 * 2000 + sum(idled) == pytest.approx(400 * 200)
    long = Slowed(lambda: None, delay=50e-6, launch=2e-6, spin=idled.append)
    assert long.every == 1
    assert idled[-1] == 48_000


@pytest.mark.gpu
def test_a_gpu_reads_what_a_slowdown_adds():
    from fp4bench.cases import gemm_cases, select
    from fp4bench.workers.do_bench import ReadCase

    selection = select(OPTIONS, find_device("cuda"))
    reader = DoBench("cuda")
    plain, slowed = reader(ReadCase(next(gemm_cases(selection)), (0.2,)))
    assert slowed / plain == pytest.approx(1.2, abs=0.05)
