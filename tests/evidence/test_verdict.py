"""When a case counts as slower: a table of timings, and symmetry."""

import pytest

from fp4bench.evidence.baselines import Timing
from fp4bench.evidence.verdict import POLICIES, Outcome, Policy, judge

RECORD = {"flops": 1, "bytes": 1, "scale_rule": None, "clock": "perf_counter", "l2": "warm"}
POLICY = Policy(threshold=0.25, repetitions=0, pause_seconds=0)


def timing(median, fastest, **changes):
    return Timing(median, fastest, RECORD | changes)


@pytest.mark.parametrize(
    ("median", "fastest", "outcome"),
    [
        pytest.param(1.0, 0.9, Outcome.SAME, id="identical"),
        pytest.param(1.24, 1.1, Outcome.SAME, id="just-within"),
        pytest.param(1.3, 1.17, Outcome.REGRESSED, id="all-30%-slower"),
        pytest.param(2.0, 0.9, Outcome.SAME, id="busy-machine-slows-the-median-only"),
        pytest.param(1.0, 1.5, Outcome.SAME, id="one-lucky-sample-then"),
        pytest.param(0.7, 0.63, Outcome.FASTER, id="all-30%-faster"),
        pytest.param(0.7, 0.9, Outcome.SAME, id="only-the-median-faster"),
    ],
)
def test_the_median_and_the_fastest_sample_must_agree(median, fastest, outcome):
    assert judge(timing(1.0, 0.9), timing(median, fastest), POLICY).outcome is outcome


@pytest.mark.parametrize("ratio", [0.5, 0.79, 0.81, 1.0, 1.24, 1.26, 3.0])
def test_swapping_the_sides_swaps_the_outcome(ratio):
    swapped = {Outcome.REGRESSED: Outcome.FASTER, Outcome.FASTER: Outcome.REGRESSED, Outcome.SAME: Outcome.SAME}
    a, b = timing(1.0, 0.9), timing(ratio, 0.9 * ratio)
    assert judge(b, a, POLICY).outcome is swapped[judge(a, b, POLICY).outcome]


def test_the_change_is_that_of_the_median():
    assert judge(timing(1.0, 0.9), timing(1.5, 1.4), POLICY).change == pytest.approx(0.5)


def test_a_case_without_a_baseline_is_new():
    assert judge(None, timing(1, 1), POLICY).outcome is Outcome.NEW


@pytest.mark.parametrize(
    "change", [{"clock": "cuda_events"}, {"l2": "cold"}, {"flops": 2}, {"bytes": 2}, {"scale_rule": "even"}]
)
def test_other_work_or_another_clock_is_never_compared(change):
    verdict = judge(timing(1.0, 0.9), timing(9.0, 9.0, **change), POLICY)
    assert verdict.outcome is Outcome.NEW
    assert verdict.reason == "not_comparable"
    assert next(iter(change)) in verdict.detail


def test_every_clock_has_a_policy():
    from fp4bench.timing.clock import CpuClock, CudaEventClock

    assert {CpuClock.name, CudaEventClock.name} == set(POLICIES)
