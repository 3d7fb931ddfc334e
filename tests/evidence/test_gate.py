"""A case that looks slower is measured again, and fails only if it is slower every time."""

import pytest

from fp4bench.evidence.baselines import Baseline, Timing
from fp4bench.evidence.gate import judge_run
from fp4bench.evidence.verdict import Outcome, Policy

POLICY = Policy(threshold=0.25, repetitions=3, pause_seconds=4)


def timing(seconds):
    return Timing(seconds, seconds, {"clock": "perf_counter"})


@pytest.fixture
def gate(tmp_path):
    """judge_run over a baseline of 1 s for each case, with `again` holding what each repetition reads, and a log of calls."""
    log = []

    def run(now, again, policy=POLICY):
        readings = {case_id: iter(seconds) for case_id, seconds in again.items()}

        def measure_again(case_id):
            log.append(case_id)
            return timing(next(readings[case_id]))

        baseline = Baseline(tmp_path, "", {}, {case_id: timing(1.0) for case_id in now if case_id != "new"})
        return judge_run(baseline, {c: timing(s) for c, s in now.items()}, policy, measure_again, sleep=log.append)

    return run, log


def test_slower_every_time_is_regressed(gate):
    run, log = gate
    verdicts = run({"a": 1.4, "b": 1.0}, {"a": [1.4, 1.3, 1.5]})
    assert [v.outcome for v in verdicts.values()] == [Outcome.REGRESSED, Outcome.SAME]
    assert verdicts["a"].change == pytest.approx(0.4)  # of the first measurement, which is the one that is stored
    assert log == ["a", 4, "a", 4, "a"]


def test_once_not_slower_clears_a_case_and_is_said(gate):
    run, log = gate
    verdicts = run({"a": 1.4, "b": 1.4}, {"a": [1.4, 1.1], "b": [1.4, 1.4, 1.4]})
    assert verdicts["a"].outcome is Outcome.SAME
    assert verdicts["a"].reason == "not_confirmed"
    assert verdicts["a"].detail == "not slower when measured again: 1.100 s"
    assert verdicts["b"].outcome is Outcome.REGRESSED
    assert log == ["a", "b", 4, "a", "b", 4, "b"]


def test_nothing_is_measured_again_without_a_suspect(gate):
    run, log = gate
    verdicts = run({"a": 1.1, "fast": 0.5, "new": 9.0}, {})
    assert [v.outcome for v in verdicts.values()] == [Outcome.SAME, Outcome.FASTER, Outcome.NEW]
    assert log == []


def test_without_repetitions_the_first_look_counts(gate):
    run, log = gate
    verdicts = run({"a": 1.4}, {}, Policy(threshold=0.25, repetitions=0, pause_seconds=4))
    assert verdicts["a"].outcome is Outcome.REGRESSED
    assert log == []
