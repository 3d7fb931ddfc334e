"""What the accepted runs of H200s say of cheap launches: chains of small kernels that were 700 cycles a kernel faster.

Of a moment, for two cards of one machine met them at the same times, each in a process of its own; and of a graph, for the
samples of a case are all cheap or none is, though such a moment is hardly longer than taking them.
"""

import json
import re
from datetime import datetime, timedelta
from functools import cache
from pathlib import Path
from statistics import median

import pytest
from recorded import MACHINE

from fp4bench.evidence.baselines import stored_files

RECORDED = Path(__file__).parents[2] / "baselines" / MACHINE
CHEAPER = 300  # cycles a kernel; the others are within 100 of usual where a case repeats at all


@cache
def runs():
    return {path.name[:4]: json.loads(path.read_text()) for path in stored_files(RECORDED)[:32]}


@cache
def usual(key):
    """The median over all runs of a quantile of a case's cycles, by case id."""
    values = {}
    for run in runs().values():
        for bench in run["benchmarks"]:
            values.setdefault(bench["extra_info"]["case_id"], []).append(bench["extra_info"][key])
    return {case_id: median(v) for case_id, v in values.items()}


def kernels(record):
    """How many kernels a call is, 0 of single ones."""
    found = re.match(r"(\d+) kernels, ", (record["kernels"] or [""])[0])
    return int(found[1]) if found else 0


def saved(record, key):
    """Cycles a kernel below usual, at a quantile of the samples."""
    return (usual(key)[record["case_id"]] - record[key]) / kernels(record)


def cheap(record):
    return kernels(record) > 0 and min(saved(record, key) for key in ("cycles_q25", "cycles", "cycles_q75")) > CHEAPER


def moments(number):
    """When the cheap cases of a run were timed, about: its canaries' times are stored, and the cases lie between them."""
    run = runs()[number]
    info, records = run["fp4bench"], [bench["extra_info"] for bench in run["benchmarks"]]
    began = datetime.fromisoformat(run["datetime"]) - timedelta(seconds=info["wall_s"])  # stored at its end
    read = sorted({reading["at_s"]: reading["in_s"] for reading in info["canaries"]}.items())
    first, last = sum(read[0]), read[-1][0]
    took = [r["samples"] * (r["gap_s"] + seconds_of(r) * (2 if r["l2"] == "cold_flush" else 1)) + 0.12 for r in records]
    found, so_far = [], 0.0
    for record, seconds in zip(records, took, strict=True):
        if cheap(record):
            found.append(began + timedelta(seconds=first + (last - first) * so_far / sum(took)))
        so_far += seconds
    return found


def seconds_of(record):
    """Of a sample."""
    return record["cycles"] / record["sm_mhz"] * 1e-6 * record["calls_per_sample"]


def apart(moment, others):
    return min(abs((moment - other).total_seconds()) for other in others)


@pytest.mark.parametrize(("one", "other"), [("0003", "0006"), ("0014", "0017"), ("0025", "0029"), ("0027", "0031")])
def test_two_cards_of_a_machine_met_them_at_the_same_moments(one, other):
    here, there = moments(one), moments(other)
    assert here
    assert there
    coinciding = sum(apart(moment, there) < 3 for moment in here)
    assert coinciding >= 0.8 * len(here)


def test_that_would_be_seen_to_fail():
    assert sum(apart(moment + timedelta(seconds=9), moments("0006")) < 3 for moment in moments("0003")) < 0.5 * len(
        moments("0003")
    )


def test_the_samples_of_a_case_are_all_cheap_or_none_is():
    steady = [
        record
        for run in runs().values()
        for record in (bench["extra_info"] for bench in run["benchmarks"])
        if record["op"] == "quantize" and kernels(record)
    ]
    assert sum(map(cheap, steady)) >= 15
    mixed = [r for r in steady if saved(r, "cycles_q25") > CHEAPER and saved(r, "cycles_q75") < CHEAPER]
    assert mixed == []
