"""What a drill proves: exact intervals against hand-computed ones, the draw, and when a gate counts as blind."""

from collections import Counter

import pytest

from fp4bench.evidence.power import (
    Injection,
    beyond_chance,
    by_slowdown,
    draw,
    drawable,
    interval,
    lower_bound,
    objections,
    percent,
    upper_bound,
)

CASES = [f"case-{i:02d}" for i in range(31)]  # a prime: no share leaves a draw without a remainder


def injections(detected, missed=0, blind=0, slowdown=0.02):
    """So many of each, in cases of their own."""

    def some(count, outcome, reason, mde):
        return [Injection(f"{reason}-{i}", slowdown, 0, mde, outcome, reason, 0.0) for i in range(count)]

    return [
        *some(detected, "REGRESSED", "slower", 0.01),
        *some(missed, "SAME", "within_floor", 0.01),
        *some(blind, "INCONCLUSIVE", "noisy", 0.05),
    ]


@pytest.mark.parametrize(
    ("hits", "trials", "low", "high"),
    [(57, 60, 0.861, 0.990), (0, 60, 0.0, 0.060), (60, 60, 0.940, 1.0), (1, 1, 0.025, 1.0), (0, 0, 0.0, 1.0)],
)
def test_intervals_are_those_of_clopper_and_pearson(hits, trials, low, high):
    assert interval(hits, trials) == (pytest.approx(low, abs=5e-4), pytest.approx(high, abs=5e-4))


@pytest.mark.parametrize(("trials", "bound"), [(40, 0.0722), (59, 0.0495), (20, 0.1391)])
def test_no_alarm_at_all_proves_a_bound(trials, bound):
    assert upper_bound(0, trials) == pytest.approx(1 - 0.05 ** (1 / trials)) == pytest.approx(bound, abs=5e-5)


@pytest.mark.parametrize(
    ("hits", "trials", "bound"), [(60, 60, 0.951), (57, 60, 0.876), (50, 53, 0.860), (0, 5, 0.0), (0, 0, 0.0)]
)
def test_what_detections_prove(hits, trials, bound):
    assert lower_bound(hits, trials) == pytest.approx(bound, abs=5e-4)


def test_a_rate_of_one_and_no_session_prove_nothing():
    assert upper_bound(3, 3) == upper_bound(0, 0) == 1


@pytest.mark.parametrize(
    ("alarmed", "sessions", "beyond"),
    [(0, 1, False), (1, 1, False), (2, 2, True), (2, 10, False), (3, 10, True), (4, 40, False), (6, 40, True), (0, 0, False)],
)
def test_false_alarms_beyond_chance(alarmed, sessions, beyond):
    # 1 - (0.95^10 + 10 * 0.05 * 0.95^9) is 0.086 for two or more of ten; for three or more it is 0.0115.
    assert beyond_chance(alarmed, sessions, 0.05) is beyond


@pytest.mark.parametrize(("alarmed", "sessions", "beyond"), [(1, 5, True), (1, 6, False), (2, 40, False), (3, 40, True)])
def test_a_stricter_promise_is_broken_sooner(alarmed, sessions, beyond):
    # 1 - 0.99^5 is 0.049, 1 - 0.99^6 is 0.059.
    assert beyond_chance(alarmed, sessions, 0.01) is beyond


def test_a_case_is_blind_if_it_was_declared_so_whatever_became_of_it():
    (one,) = by_slowdown([*injections(3, 1, 2), Injection("lucky", 0.02, 0, 0.05, "REGRESSED", "slower", 0.1)])
    assert (one.detected, one.trials, len(one.blind)) == (3, 4, 3)
    assert one.missed_by_reason == {"within_floor": 1}


def test_a_case_without_a_declared_effect_is_not_excused():
    (one,) = by_slowdown([Injection("silent", 0.02, 0, None, "INCONCLUSIVE", "noisy", None)])
    assert one.trials == 1
    assert [injection.case_id for injection in one.misses] == ["silent"]


def test_injections_are_counted_by_slowdown_the_smallest_first():
    found = by_slowdown([*injections(1, slowdown=0.05), *injections(0, 2, slowdown=0.01)])
    assert [(one.slowdown, one.detected, one.trials) for one in found] == [(0.01, 0, 2), (0.05, 1, 1)]


@pytest.mark.parametrize(
    ("found", "words"),
    [
        pytest.param(injections(57, 3), [], id="sees"),
        pytest.param(injections(0, 60), ["detected 0 of 60"], id="sees-nothing"),
        pytest.param(injections(30, 30), ["detected 30 of 60"], id="a-coin"),
        pytest.param(injections(2), ["detected 2 of 2"], id="too-few-to-prove-anything"),
        pytest.param(injections(0, 0, 60), ["detected 0 of 0", "60 of 60 injections were in cases"], id="all-blind"),
        pytest.param(injections(20, 0, 40), ["40 of 60 injections were in cases"], id="most-blind"),
        pytest.param(injections(30, 0, 30), [], id="half-blind"),
        pytest.param([*injections(0, 60, slowdown=0.01), *injections(60, slowdown=0.05)], [], id="only-the-largest-counts"),
        pytest.param(
            [*injections(60, slowdown=0.01), *injections(0, 60, slowdown=0.05)], ["at 5 %"], id="blind-to-the-largest"
        ),
    ],
)
def test_when_a_gate_is_blind(found, words):
    objected = objections(found, 0, 10, 0.05)
    assert len(objected) == len(words)
    assert all(word in objection for word, objection in zip(words, objected, strict=True))


def test_false_alarms_beyond_chance_are_an_objection():
    assert objections([], 2, 40, 0.05) == []
    assert objections([], 20, 40, 0.05) == ["20 of 40 sessions had a false alarm, and 5 % is what it promises"]


@pytest.mark.parametrize(("share", "size"), [(0.2, 6), (0.19, 5), (1.0, 31), (0.1, 3)])
@pytest.mark.parametrize("seed", range(5))
def test_a_session_never_has_more_than_the_share(share, size, seed):
    sessions = draw(CASES, 62, share, seed)
    assert sum(map(len, sessions)) == 62
    assert max(map(len, sessions)) == size <= share * len(CASES)
    assert all(len(set(session)) == len(session) for session in sessions)


def test_every_case_is_drawn_before_any_is_drawn_again():
    drawn = Counter(case for session in draw(CASES, 62, 0.19, 0) for case in session)
    assert set(drawn.values()) == {2}
    assert set(drawn) == set(CASES)


def test_a_seed_repeats_a_draw_and_another_does_not():
    assert draw(CASES, 20, 0.2, 7) == draw(CASES, 20, 0.2, 7) != draw(CASES, 20, 0.2, 8)


def test_a_share_of_no_case_is_refused():
    with pytest.raises(ValueError, match=r"20 % of 4 comparable cases is none.*--share"):
        draw(CASES[:4], 10, 0.2, 0)


def test_a_share_that_binary_cannot_hold_is_not_rounded_down():
    assert max(map(len, draw(CASES[:10], 10, 0.7 - 0.1 * 4, 0))) == 3


def test_only_cases_with_a_comparison_are_drawn():
    outcomes = ["SAME", "INCONCLUSIVE", "FASTER", "NEW", "MISSING", "REGRESSED", "INVALID"]
    assert drawable({outcome: {"outcome": outcome} for outcome in outcomes}) == ["FASTER", "INCONCLUSIVE", "SAME"]


@pytest.mark.parametrize(
    ("rate", "text"), [(0.02, "2 %"), (0.0025, "0.25 %"), (0.0722, "7.22 %"), (0.5, "50 %"), (1.0, "100 %")]
)
def test_percent(rate, text):
    assert percent(rate) == text
