"""What rules of other tools, and the gate's, flag and miss, on samples and stored runs whose answer is known."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from pytest_benchmark.utils import parse_compare_fail
from recorded import CASES, scaled, stored_run
from scipy import stats

from fp4bench.evidence import rivals
from fp4bench.evidence.baselines import Baseline, parse
from fp4bench.evidence.rivals import (
    CONFIRMED,
    DO_BENCH,
    FIRST_LOOK,
    GPUCHECK,
    MEDIAN_2,
    MEDIAN_5,
    OTHER_CARD,
    RANKS,
    SAME_CARD,
    Answer,
    Sampled,
)
from fp4bench.evidence.verdict import POLICIES

A, B = CASES[:2]


def sampled(run, name="run", kept=True):
    """A stored run with 10 samples a case around its medians, 0.1 % apart."""
    stored = parse(run, Path(f"{name}.json"))
    steps = 1 + 0.001 * (np.arange(10) - 4.5)
    samples = {case_id: list(timing.median * steps) for case_id, timing in stored.cases.items()}
    return Sampled(stored, samples if kept else {})


def on_card(run, card):
    return run | {"fp4bench": run["fp4bench"] | {"session": f"{card} 2026-11-01"}}


def injected(run, slowdown):
    """The run with its first case slowed down on purpose."""
    run = scaled(run, 1 + slowdown)
    run["benchmarks"][0]["extra_info"]["injected"] = slowdown
    return run


@pytest.fixture(scope="module")
def baseline():
    """Four runs of one card."""
    runs = [parse(stored_run(number), Path(f"{number:04}_night.json")) for number in range(1, 5)]
    return Baseline(tuple(runs))


def found(answers, rule, case_id=A):
    return [answer.flagged for answer in answers if answer.rule == rule and answer.case_id == case_id]


@pytest.mark.parametrize(("after", "expected"), [(1.05, False), (1.0501, True), (0.5, False)])
def test_a_median_beyond_a_share(after, expected):
    assert rivals.beyond(1.0, after, 0.05) is expected


def test_the_share_is_as_pytest_benchmark_has_it():
    check = parse_compare_fail("median:5%")
    for after in np.linspace(1.049, 1.051, 41).tolist():
        theirs = check.fails({"median": after}, {"median": 1.0})
        assert rivals.beyond(1.0, after, 0.05) is bool(theirs)


def test_outliers_are_beyond_the_fences():
    steady = [1.0, 1.1, 1.2, 1.3, 1.4]  # quartiles 1.1 and 1.3, fences 0.8 and 1.6
    assert rivals.without_outliers([*steady, 9.0, 0.1]) == steady
    assert rivals.without_outliers([*steady, 1.8]) == steady  # quartiles 1.125 and 1.375, upper fence 1.75
    assert rivals.without_outliers([*steady, 1.7]) == [*steady, 1.7]
    assert rivals.without_outliers([1.0, 1.0, 9.0]) == [1.0, 1.0, 9.0]
    assert rivals.without_outliers([1.0, 1.0, 1.0, 1.0]) == [1.0] * 4


def test_a_rank_test_without_a_least_effect_sees_everything_that_is_real():
    before = list(1 + 0.001 * (np.arange(20) - 9.5))
    slower, faster = [1.005 * s for s in before], [0.98 * s for s in before]
    assert rivals.ranks_higher(before, slower)
    assert not rivals.ranks_higher(before, before)
    assert not rivals.ranks_higher(before, faster)
    assert not rivals.ranks_higher(before, slower, least_ratio=1.1)
    assert rivals.ranks_higher(before, [1.11 * s for s in before], least_ratio=1.1)


@pytest.mark.filterwarnings("error")
def test_samples_that_are_all_alike_are_no_regression():
    assert not rivals.ranks_higher([1.0] * 9, [1.0] * 9)


def test_the_p_value_is_that_of_a_normal_approximation_without_continuity():
    # 3 against 3 that do not overlap: z = 4.5 / sqrt(9 * 7 / 12) = 1.9640, p = 0.0495; corrected for continuity 0.0809.
    assert rivals.ranks_higher([1.0, 1.1, 1.2], [2.0, 2.1, 2.2])
    assert not rivals.ranks_higher([1.0, 1.1], [2.0, 2.1, 2.2])  # z = 3 / sqrt(6 * 6 / 12) = 1.7321, p = 0.083


def test_equal_medians_are_no_regression():
    low, high = [0.90, 0.91, 0.92, 0.93, *[1.0] * 5], [*[1.0] * 5, 1.07, 1.08, 1.09, 1.10]
    assert stats.mannwhitneyu(low, high, method="asymptotic", use_continuity=False).pvalue < 0.05
    assert not rivals.ranks_higher(low, high)


def test_outliers_are_dropped_before_the_ranks_are_taken():
    before = [1.000, 1.001, 1.002, 1.003, 1.004]
    after = [1.0025, 1.0035, 1.0045, 1.005, 1.0055, 0.5]
    assert rivals.ranks_higher(before, after)  # p is 0.047, and 0.20 with the sample at 0.5


def test_each_rule_has_its_sight(baseline):
    before = sampled(stored_run(5), "before")
    by_share = {
        slowdown: rivals.compare([sampled(injected(stored_run(6, deviation=0.0), slowdown))], [before], baseline)
        for slowdown in (0.015, 0.03, 0.06, 0.12)
    }
    seen = {rule: [found(by_share[s], rule) for s in by_share] for rule in (MEDIAN_5, MEDIAN_2, RANKS, GPUCHECK, FIRST_LOOK)}
    assert seen == {
        MEDIAN_5: [[False], [False], [True], [True]],
        MEDIAN_2: [[False], [True], [True], [True]],
        RANKS: [[True], [True], [True], [True]],
        GPUCHECK: [[False], [False], [False], [True]],
        FIRST_LOOK: [[True], [True], [True], [True]],
    }


def test_a_change_that_does_not_matter_is_flagged_by_the_rank_test_alone(baseline):
    before, now = sampled(stored_run(5, deviation=0.0)), sampled(scaled(stored_run(6, deviation=0.0), 1.004))
    counts = rivals.count(rivals.compare([now], [before], baseline))
    assert {one.rule: (one.cases, one.flags, one.runs, one.flagged_runs) for one in counts} == {
        MEDIAN_5: (12, 0, 1, 0),
        MEDIAN_2: (12, 0, 1, 0),
        RANKS: (12, 1, 1, 1),
        GPUCHECK: (12, 0, 1, 0),
        FIRST_LOOK: (12, 0, 1, 0),
    }


def test_the_newest_run_of_the_card_is_compared_with(baseline):
    old, new = sampled(stored_run(5), "old"), sampled(scaled(stored_run(6), 0.5), "new")
    elsewhere = sampled(on_card(scaled(stored_run(7), 2.0), "GPU-2"), "elsewhere")
    now = sampled(stored_run(8))
    answers = rivals.compare([now], [new, elsewhere, old], baseline)
    assert found(answers, MEDIAN_5) == [True]  # twice the newest one
    assert {a.compared_with for a in answers} == {SAME_CARD}
    (other, *_) = rivals.compare([now], [elsewhere], baseline)
    assert (other.compared_with, other.flagged) == (OTHER_CARD, False)


def test_a_run_that_lacks_the_case_is_passed_over(baseline):
    old, new = sampled(stored_run(5), "old"), sampled(stored_run(6, cases=(B,)), "new")
    answers = rivals.compare([sampled(stored_run(8))], [old, new], baseline)
    assert len([a for a in answers if a.rule == MEDIAN_5]) == 12
    answers = rivals.compare([sampled(stored_run(8))], [new], baseline)
    assert [a.case_id for a in answers if a.rule == MEDIAN_5] == [B]


def test_other_work_is_not_compared(baseline):
    other = stored_run(5)
    other["benchmarks"][0]["extra_info"]["l2"] = "warm"
    answers = rivals.compare([sampled(stored_run(8))], [sampled(other)], baseline)
    assert found(answers, MEDIAN_5) == []
    assert found(answers, MEDIAN_5, B) == [False]


def test_a_run_is_never_compared_with_itself_or_with_injections(baseline):
    now, drilled = sampled(stored_run(8)), sampled(injected(stored_run(9), 0.02))
    assert {a.rule for a in rivals.compare([now], [now, drilled], baseline)} == {FIRST_LOOK}


def test_an_accepted_run_is_not_in_the_baseline_that_it_is_judged_by(baseline):
    slow = scaled(stored_run(4), 1.1)
    with_it = Baseline((*baseline.runs[:1], parse(slow, Path("0004_night.json"))))
    assert [a.flagged for a in _first_looks(slow, with_it) if a.case_id == A] == [True]
    assert _first_looks(slow, Baseline(with_it.runs[1:])) == []  # alone it is compared with nothing


def _first_looks(run, baseline):
    return [a for a in rivals.compare([sampled(run)], [], baseline) if a.rule == FIRST_LOOK]


def test_what_the_first_look_compares_with(baseline):
    assert {a.compared_with for a in _first_looks(stored_run(8), baseline)} == {SAME_CARD}
    assert {a.compared_with for a in _first_looks(on_card(stored_run(8), "GPU-2"), baseline)} == {OTHER_CARD}


def test_an_invalid_run_is_judged_by_the_others_alone(baseline):
    now = sampled(scaled(stored_run(8, invalid=["the GPU was busy"]), 1.2))
    answers = rivals.compare([now], [sampled(stored_run(5))], baseline)
    assert found(answers, MEDIAN_5) == [True]
    assert found(answers, FIRST_LOOK) == []
    assert any("1 of 1 runs are INVALID" in note for note in rivals.notes([now], [], rivals.count(answers)))


def test_a_new_case_has_no_answer(baseline):
    assert _first_looks(stored_run(8, cases=("another",)), baseline) == []


def test_without_samples_there_is_no_rank_test(baseline):
    now = sampled(stored_run(8), kept=False)
    answers = rivals.compare([now], [sampled(stored_run(5))], baseline)
    assert {a.rule for a in answers} == {MEDIAN_5, MEDIAN_2, FIRST_LOOK}
    assert any(note.startswith("1 of 1 runs have no raw samples") for note in rivals.notes([now], [], rivals.count(answers)))


def test_of_two_copies_the_one_with_samples_is_taken(baseline):
    bare, kept = sampled(stored_run(5), "accepted", kept=False), sampled(stored_run(5), "stored")
    for against in ([bare, kept], [kept, bare]):
        assert found(rivals.compare([sampled(stored_run(8))], against, baseline), RANKS) == [False]
    newer = sampled(stored_run(6), kept=False)
    assert found(rivals.compare([sampled(stored_run(8))], [kept, newer], baseline), RANKS) == []


def test_how_the_gate_ended_is_counted_beside_its_first_look(baseline):
    now = sampled(scaled(stored_run(8), 1.2))
    answers = rivals.compare([now], [], baseline, {now.identity: {A: False, B: True, "another": True}})
    assert found(answers, FIRST_LOOK) == [True]
    assert [(a.case_id, a.flagged) for a in answers if a.rule == CONFIRMED] == [(A, False), (B, True)]


def verdict(outcome, seconds=1.0):
    return {"outcome": outcome, "seconds": seconds}


def test_a_verdicts_file_tells_how_a_run_ended():
    run = parse(stored_run(8), Path("run.json"))
    table = {case_id: verdict("SAME", timing.median) for case_id, timing in run.cases.items()}
    table |= {A: table[A] | {"outcome": "REGRESSED"}, B: table[B] | {"outcome": "NEW"}, "gone": verdict("MISSING", None)}
    (end,) = rivals.ends({"run": "x/0001_a.json", "cases": table})
    assert end.run == "x/0001_a.json"
    assert end.flags(run) == {A: True, **dict.fromkeys(CASES[2:], False)}
    with pytest.raises(ValueError, match=r"run\.json is not the run that was judged as x/0001_a\.json"):
        end.flags(parse(stored_run(9), Path("run.json")))


def drill(run="x/0001_a.json"):
    unchanged = {"run": run, "plan": {}, "alarms": {B: verdict("REGRESSED")}}
    return {
        "sessions": [unchanged, {"run": "x/0002_a.json", "plan": {A: 0.02}, "alarms": {}}],
        "injections": [{"case_id": A, "session": 1, "outcome": "REGRESSED"}],
    }


def test_a_drill_tells_how_its_runs_ended():
    first, second = rivals.ends(drill())
    unchanged, slowed = parse(stored_run(8), Path("a.json")), parse(injected(stored_run(9), 0.02), Path("b.json"))
    assert [case_id for case_id, flagged in first.flags(unchanged).items() if flagged] == [B]
    assert [case_id for case_id, flagged in second.flags(slowed).items() if flagged] == [A]
    assert len(second.flags(slowed)) == 12
    with pytest.raises(ValueError, match=r"b\.json is not the run"):
        first.flags(slowed)
    with pytest.raises(ValueError, match=r"a\.json is not the run"):
        second.flags(unchanged)


def test_a_run_that_was_not_stored_has_no_end():
    assert [end.run for end in rivals.ends(drill(run=None))] == ["x/0002_a.json"]
    assert rivals.ends({"run": None, "cases": {}}) == []


@pytest.mark.parametrize("told", [{}, {"cases": 3, "run": "x"}, {"sessions": [1]}, [], {"sessions": [{}], "injections": []}])
def test_what_is_no_verdicts_file(told):
    with pytest.raises(ValueError, match="neither a verdicts file nor a drill's report"):
        rivals.ends(told)


def test_readings_of_do_bench():
    readings = [
        {"uuid": "GPU-1", "seconds": {"a": [1.0, 1.04, 1.06], "b": [1.0, 1.0]}},
        {"uuid": "GPU-2", "seconds": {"a": [1.07, 1.07], "c": [1.0]}},
        {"uuid": "GPU-1", "seconds": {"a": [1.1, 1.055]}},
    ]
    one, other = rivals.count(rivals.do_bench_answers(readings, [0.02]))
    assert (one.rule, one.compared_with, other.compared_with) == (DO_BENCH, SAME_CARD, OTHER_CARD)
    # On a card: two later readings of a and one of b, one of a on the second card, and both of a in the third file.
    assert (one.cases, one.flags, one.runs, one.flagged_runs, one.alarms) == (6, 3, 5, 3, {"a": 3})
    assert one.injected == {0.02: (4, 6)}  # 1.04 too
    assert one.missed == {0.02: {"a": 1, "b": 1}}
    assert (other.cases, other.flags, other.injected) == (1, 1, {0.02: (1, 1)})


def test_a_slowdown_that_was_read_is_not_scaled():
    readings = [{"uuid": "GPU-1", "seconds": {"a": [1.0, 1.0]}, "slowed": {"0.04": {"a": [1.04, 1.06]}}, "failed": {}}]
    (one,) = rivals.count(rivals.do_bench_answers(readings, [0.04, 0.06]))
    assert one.injected == {0.04: (1, 1), 0.06: (1, 1)}
    readings[0]["slowed"]["0.04"]["a"] = [1.06, 1.04]
    (one,) = rivals.count(rivals.do_bench_answers(readings, [0.04]))
    assert one.injected == {0.04: (0, 1)}  # the second reading's, and not the first one's


@pytest.mark.parametrize(
    "reading",
    [
        *({}, [], {"uuid": "x", "seconds": {"a": []}}, {"uuid": "x", "seconds": {"a": [0.0]}}, {"uuid": "x", "seconds": 3}),
        {"uuid": "x", "seconds": {"a": [1.0, 1.0]}, "slowed": {"0.02": {"a": [1.0]}}},
        {"uuid": "x", "seconds": {"a": [1.0]}, "slowed": {"2 %": {"a": [1.0]}}},
    ],
)
def test_what_are_no_readings(reading):
    with pytest.raises(ValueError, match="readings of do_bench_cudagraph"):
        rivals.do_bench_answers([reading])


def answers(rule, flags, injected=None, run="a", compared_with=SAME_CARD):
    return [Answer(rule, compared_with, run, f"case-{i}", injected, flagged) for i, flagged in enumerate(flags)]


def test_counts_and_their_table():
    some = [
        *answers(FIRST_LOOK, [False] * 40),
        *answers(MEDIAN_5, [True, False, False], compared_with=OTHER_CARD),
        *answers(MEDIAN_5, [True, True, False]),
        *answers(MEDIAN_5, [True, False], run="b"),
        *answers(MEDIAN_5, [False], run="c"),
        *answers(MEDIAN_5, [True, False, False, False], injected=0.05, run="d"),
    ]
    counts = rivals.count(some)
    assert [(one.rule, one.compared_with) for one in counts] == [
        (MEDIAN_5, SAME_CARD),
        (MEDIAN_5, OTHER_CARD),
        (FIRST_LOOK, SAME_CARD),
    ]
    same = counts[0]
    assert (same.cases, same.flags, same.runs, same.flagged_runs) == (6, 3, 3, 2)
    assert same.alarms == {"case-0": 2, "case-1": 1}
    assert same.missed == {0.05: {"case-1": 1, "case-2": 1, "case-3": 1}}
    lines = rivals.table(counts)
    assert lines[0] == "| rule | compared with | false alarms: cases | false alarms: runs | detected: 5 % |"
    assert lines[2] == (
        f"| {MEDIAN_5} | same card | 3 of 6 (11.8 % to 88.2 %) | 2 of 3 (9.43 % to 99.2 %) | 1 of 4 (0.631 % to 80.6 %) |"
    )
    assert lines[4] == f"| {FIRST_LOOK} | same card | 0 of 40 (0 % to 8.81 %) | 0 of 1 (0 % to 97.5 %) |  |"
    assert {line.count("|") for line in lines} == {6}
    told = rivals.as_json(counts)[0]
    assert told["injected"][0] == {
        "slowdown": 0.05,
        "detected": 1,
        "trials": 4,
        "interval": pytest.approx((0.00631, 0.806), rel=1e-3),
    }
    assert told["missed"] == [{"slowdown": 0.05, "cases": {"case-1": 1, "case-2": 1, "case-3": 1}}]


def test_the_notes_say_what_was_counted(baseline):
    runs = [
        sampled(stored_run(8)),
        sampled(on_card(injected(stored_run(9), 0.02), "GPU-2")),
        sampled(injected(stored_run(10), 0.05)),
    ]
    found = rivals.notes(runs, [runs[2]], rivals.count(answers(DO_BENCH, [True])))
    assert found[0].startswith("36 timings in 3 runs of 2 cards; 2 of them were slowed down on purpose (1 by 2 %, 1 by 5 %).")
    assert any("else a reading is scaled" in note for note in found)
    assert any("not measured again in fresh processes" in note for note in found)
    assert found[-1] == "1 of 1 runs to compare with have injected slowdowns and were left out."
    assert not any(note.startswith(CONFIRMED) for note in found)


def test_a_laxer_policy_reaches_the_first_look(baseline):
    lax = {clock: replace(policy, floor=0.5) for clock, policy in POLICIES.items()}
    now = sampled(scaled(stored_run(8), 1.2))
    assert found(rivals.compare([now], [], baseline, policy=lax), FIRST_LOOK) == [False]
    assert found(rivals.compare([now], [], baseline), FIRST_LOOK) == [True]
