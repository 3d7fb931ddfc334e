"""The shipped policy on each accepted run of H200s beside all others: what it flags, and finds where cases are made slower.

The first look alone: what a suspect is when measured again is not stored.
"""

from collections import Counter
from dataclasses import replace
from functools import cache
from pathlib import Path

import pytest
from recorded import MACHINE

from fp4bench.evidence import statistics
from fp4bench.evidence.baselines import Baseline, Timing, card_of, parse, read, stored_files
from fp4bench.evidence.verdict import POLICIES, Outcome, judge

RECORDED = Path(__file__).parents[2] / "baselines" / MACHINE


@cache
def recorded():
    return tuple(parse(read(path), path) for path in stored_files(RECORDED)[:32])


def slowed(timing, share):
    record = timing.record | {"cycles": timing.record["cycles"] * (1 + share)}
    return Timing(timing.median * (1 + share), timing.fastest * (1 + share), record)


def replayed(policies, slowdowns=(0.02, 0.05)):
    """Counts over all runs: verdicts and alarms of unchanged cases; by slowdown, cases that claim to show it, and those found.

    Every other case is slowed down at a time, so that each is once.
    """
    counts = Counter()
    for run in recorded():
        others = tuple(other for other in recorded() if other is not run)
        baseline = Baseline(others, card_of(run.session), "paced", warm=False)
        unchanged = judge(baseline, run.cases, policies)
        alarms = sum(verdict.outcome is Outcome.REGRESSED for verdict in unchanged.values())
        counts += Counter({"verdicts": len(unchanged), "alarms": alarms, "runs with alarms": bool(alarms)})
        for slowdown in slowdowns:
            for half in (0, 1):
                chosen = [case_id for case_id in list(run.cases)[half::2] if case_id in unchanged]
                now = run.cases | {case_id: slowed(run.cases[case_id], slowdown) for case_id in chosen}
                verdicts = judge(baseline, now, policies)
                seeing = [c for c in chosen if unchanged[c].mde is not None and unchanged[c].mde <= slowdown]
                counts["seeing", slowdown] += len(seeing)
                counts["found", slowdown] += sum(verdicts[c].outcome is Outcome.REGRESSED for c in seeing)
    return counts


@pytest.fixture(scope="module")
def shipped():
    return replayed(POLICIES)


@pytest.mark.parametrize("slowdown", [0.02, 0.05])
def test_what_claims_to_show_a_slowdown_shows_it(shipped, slowdown):
    assert shipped["seeing", slowdown] > 2000  # of 3132
    assert shipped["found", slowdown] >= 0.99 * shipped["seeing", slowdown]


def test_first_looks_at_unchanged_code_are_rarely_suspects(shipped):
    """Three of 32: a card's first, whose machine was busy, and two beside a run whose launches were faster for a second."""
    assert shipped["runs with alarms"] <= 3
    assert shipped["alarms"] <= 0.003 * shipped["verdicts"]


def test_a_claim_to_see_what_only_half_of_all_runs_show_would_be_caught(monkeypatch):
    monkeypatch.setattr(statistics, "_MISS_A_WITNESS", 0.5)
    counts = replayed(POLICIES, slowdowns=(0.02,))
    assert counts["found", 0.02] < 0.99 * counts["seeing", 0.02]


def test_a_policy_that_knows_no_noise_would_be_caught():
    certain = {clock: replace(policy, floor=0.001, allowance=1e-4, drift=0.0, alpha=0.5) for clock, policy in POLICIES.items()}
    assert replayed(certain, slowdowns=())["runs with alarms"] > 3
