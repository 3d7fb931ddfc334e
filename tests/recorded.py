"""Runs as they are stored, made up and deterministic: what tests of the evidence edit, swap and damage."""

import copy
import json
from math import exp
from pathlib import Path

import numpy as np

from fp4bench.evidence.baselines import Baseline, StoredRun, Timing, parse
from fp4bench.evidence.record import COMPARABLE, FORMAT

MACHINE = "NVIDIA-H200"
CASES = tuple(
    f"gemm-mxfp4-w4a16-example-llama3.3-70b.{layer}.tp1-m{m}" for layer in ("qkv", "o", "gate_up") for m in (1, 16, 64, 256)
)
_ALIKE = (2_000_000, 1_000_000, "floor", None, "cuda_graph_stamps", "cold", 4, "arena", "paced")
ALIKE = dict(zip(COMPARABLE, _ALIKE, strict=True))


def timing(seconds, *, cycles=None, fastest=None, mhz=1800.0, **changes):
    """A timing by clock stamps; cycles and the fastest sample follow from seconds and MHz unless given."""
    record = ALIKE | {"cycles": seconds * mhz * 1e6 if cycles is None else cycles, "sm_mhz": mhz, "kernels": None, **changes}
    return Timing(seconds, 0.99 * seconds if fastest is None else fastest, record)


def cpu_timing(seconds, fastest=None, **changes):
    """A timing by the wall clock, which knows no cycles."""
    record = ALIKE | {"clock": "perf_counter", "l2": "warm", "cycles": None, "sm_mhz": None, "kernels": None, **changes}
    return Timing(seconds, 0.9 * seconds if fastest is None else fastest, record)


def baseline(*runs, sessions=None, card="GPU-1"):
    """A baseline of runs given as {case id: Timing}, for a run of GPU-1: its runs too unless said, each on a day of its own."""
    sessions = sessions or [f"GPU-1 2026-11-{day:02}" for day in range(1, len(runs) + 1)]
    return Baseline(
        tuple(
            StoredRun(
                Path(f"{i:04}_run.json"),
                f"{i:04}_run",
                f"2026-11-{i:02}T00:00:00",
                {"machine": MACHINE},
                {"session": s},
                dict(cases),
            )
            for i, (cases, s) in enumerate(zip(runs, sessions, strict=True), start=1)
        ),
        card,
    )


def stored_run(number=1, *, day=None, deviation=0.001, seed=0, cases=CASES, **info):
    """A run of GPU-1, an H200, as JSON. Runs of different numbers differ by chance with this standard deviation."""
    noise = np.random.default_rng((seed, number)).normal(0, deviation, (2, len(cases)))
    day = number if day is None else day
    benches = []
    for i, case_id in enumerate(cases):
        seconds = 20e-6 * 1.3**i * exp(noise[0, i])
        cycles = 20e-6 * 1.3**i * 1800e6 * exp(0.7 * noise[0, i] + 0.3 * noise[1, i])
        record = ALIKE | {
            "case_id": case_id,
            "op": "gemm",
            "mode": "w4a16",
            "provider": "example",
            "cycles": cycles,
            "sm_mhz": cycles / seconds / 1e6,
            "kernels": ["decode<64, 128>"],
            "injected": None,
        }
        stats = {"median": seconds, "min": 0.99 * seconds, "rounds": 20, "data": [seconds] * 20}
        benches.append(
            {"name": case_id, "fullname": f"perf/test_gemm.py::test_gemm[{case_id}]", "stats": stats, "extra_info": record}
        )
    return {
        "machine_info": {"machine": MACHINE, "uuid": "GPU-1", "torch": "2.11.0", "driver": "580"},
        "commit_info": {"id": "82c8394", "dirty": False},
        "benchmarks": benches,
        "datetime": f"2026-11-{day:02}T{number:02}:00:00",
        "version": "5.3.1",
        "fp4bench": {
            "format": FORMAT,
            "version": "0.1.0",
            "session": f"GPU-1 2026-11-{day:02}",
            "complete": True,
            "failed": [],
            "invalid": [],
            "options": {},
            "seed": 0,
            "wall_s": 61.0,
            "accepted": None,
            **info,
        },
    }


def edited(run, edit, case_id=CASES[0]):
    """A copy of a stored run whose case was changed by `edit(bench)`."""
    run = copy.deepcopy(run)
    edit(next(bench for bench in run["benchmarks"] if bench["extra_info"]["case_id"] == case_id))
    return run


def scaled(run, factor, case_id=CASES[0]):
    """A copy in which a case takes `factor` times as long, in seconds and in cycles."""

    def edit(bench):
        bench["stats"]["median"] *= factor
        bench["stats"]["min"] *= factor
        bench["extra_info"]["cycles"] *= factor

    return edited(run, edit, case_id)


def write(path, run):
    """Store a run, or any text, at a path."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(run if isinstance(run, str) else json.dumps(run), encoding="utf-8")
    return path


def timings(run):
    """The cases of a stored run."""
    return parse(run, Path("now.json")).cases
