"""Variances, moderation, Holm and power, against hand-computed values and simulations."""

from dataclasses import replace
from math import inf, sqrt

import numpy as np
import pytest

from fp4bench.evidence.statistics import (
    Prior,
    Spread,
    across_cards,
    detectable,
    fit_prior,
    holm,
    holm_adjusted,
    moderate,
    on_card,
    quantile,
    standard_error,
    threshold,
    to_log,
    to_share,
    units_needed,
    upper_tail,
    with_more,
)


def same(found, expected):
    assert (found.mean, found.variance, found.freedom) == pytest.approx((expected.mean, expected.variance, expected.freedom))
    assert found.units == expected.units


@pytest.mark.parametrize(
    ("own", "others", "expected"),
    [
        pytest.param([5.0], [], Spread(5, 0, 0, 1), id="one-run"),
        pytest.param([1.0, 3.0], [], Spread(2, 2, 1, 2), id="two-runs"),
        pytest.param([1.0, 2.0, 3.0], [], Spread(2, 1, 2, 3), id="three-runs"),
        # Squares around the cards' own means: 2 + 0 + 0.5 over 1 + 0 + 1; where the other cards are does not matter.
        pytest.param([1.0, 3.0], [[40.0], [7.0, 8.0]], Spread(2, 1.25, 2, 2), id="other-cards-show-how-runs-differ"),
        pytest.param([5.0], [[1.0, 3.0]], Spread(5, 2, 1, 1), id="one-run-beside-a-card-of-two"),
        pytest.param([5.0], [[1.0], [9.0]], Spread(5, 0, 0, 1), id="cards-of-one-run-show-nothing-of-runs"),
        pytest.param([2.0, 2.0], [[3.0, 3.0]], Spread(2, 0, 2, 2), id="identical"),
    ],
)
def test_a_spread_on_a_card_by_hand(own, others, expected):
    same(on_card(own, others), expected)


@pytest.mark.parametrize(
    ("cards", "expected"),
    [
        pytest.param([[5.0]], Spread(5, 0, 0, 1), id="one-run"),
        pytest.param([[1.0, 3.0]], Spread(2, 2, 0, 1), id="one-card-says-nothing-of-others"),
        pytest.param([[1.0], [2.0], [3.0]], Spread(2, 1, 2, 3), id="a-run-a-card"),
        # Means 2 and 4, their mean square 2; within 2; mean of 1/2 and 1: 0.75; 2 + 0.25 * 2.
        pytest.param([[1.0, 3.0], [4.0]], Spread(3, 2.5, 1, 2), id="unequal"),
        # Means 2, 6 and 4, their mean square 4; within (2 + 2) / 2; mean of 1/2, 1/2 and 1: 2/3; 4 + 2/3.
        pytest.param([[1.0, 3.0], [5.0, 7.0], [4.0]], Spread(4, 14 / 3, 2, 3), id="three-cards"),
        pytest.param([[1.0, 3.0], [1.0, 3.0]], Spread(2, 2, 1, 2), id="no-variance-between-cards-is-not-negative"),
        pytest.param([[2.0], [2.0], [2.0]], Spread(2, 0, 2, 3), id="identical"),
    ],
)
def test_a_spread_across_cards_by_hand(cards, expected):
    same(across_cards(cards), expected)


def test_a_spread_needs_runs():
    with pytest.raises(ValueError, match="at least one card"):
        across_cards([])
    with pytest.raises(ValueError, match="a run on each"):
        across_cards([[1.0], []])
    for own, others in (([], [[1.0]]), ([1.0], [[]])):
        with pytest.raises(ValueError, match="a run on each card"):
            on_card(own, others)


@pytest.mark.parametrize("sizes", [(1,) * 6, (3, 3, 3), (1, 2, 5), (4, 1, 1, 1)], ids=str)
def test_the_variance_is_that_of_a_run_on_another_card(sizes):
    rng = np.random.default_rng(1)
    between, within, trials = 0.3, 0.2, 4000
    found = [across_cards([rng.normal(rng.normal(0, between), within, n).tolist() for n in sizes]) for _ in range(trials)]
    # Clipping a negative part at zero may only add.
    assert between**2 + within**2 == pytest.approx(np.mean([s.variance for s in found]), rel=0.05)


@pytest.mark.parametrize("sizes", [(2,), (2, 2, 2), (1, 2, 5), (2, 1, 1)], ids=str)
def test_the_variance_on_a_card_is_that_of_its_runs_wherever_the_cards_are(sizes):
    rng = np.random.default_rng(1)
    groups = [[rng.normal(rng.normal(0, 3.0), 0.2, n).tolist() for n in sizes] for _ in range(4000)]
    found = [on_card(own, others) for own, *others in groups]
    assert np.mean([s.variance for s in found]) == pytest.approx(0.2**2, rel=0.05)
    assert {s.freedom for s in found} == {sum(sizes) - len(sizes)}


@pytest.mark.parametrize("runs", [1, 2, 8])
def test_more_runs_of_two_cards_say_no_more_of_a_third(runs):
    assert across_cards([[1.0] * runs, [1.1] * runs]).freedom == 1


@pytest.mark.parametrize(("prior_freedom", "own"), [(4, 5), (4, 2), (12, 5), (40, 11)])
def test_the_prior_that_variances_were_drawn_from_is_found(prior_freedom, own):
    rng = np.random.default_rng(2)
    n = 20000
    true = 0.04 * prior_freedom / rng.chisquare(prior_freedom, n)
    known = [Spread(0, float(v), own, own + 1) for v in true * rng.chisquare(own, n) / own]
    prior = fit_prior(known)
    assert prior.freedom == pytest.approx(prior_freedom, rel=0.15)
    assert prior.variance == pytest.approx(0.04, rel=0.05)


def test_cases_that_differ_by_chance_alone_share_one_variance():
    rng = np.random.default_rng(3)
    known = [Spread(0, 0.04, 100, 101) for _ in range(10)]
    prior = fit_prior(known)
    assert prior == Prior(pytest.approx(0.04), inf)
    own = Spread(0, float(rng.chisquare(5)), 5, 6)
    assert moderate(own, prior).variance == pytest.approx(0.04, rel=1e-2)


def test_a_few_cases_show_no_prior():
    assert fit_prior([Spread(0, 1, 5, 6)] * 4) is None
    assert fit_prior([Spread(0, 1, 0, 1)] * 50) is None


@pytest.mark.parametrize("zeros", [1, 30, 60])
def test_runs_that_agree_to_the_bit_break_nothing(zeros):
    rng = np.random.default_rng(4)
    known = [Spread(0, 0.0 if i < zeros else 1e-6 * float(rng.chisquare(5)), 5, 6) for i in range(60)]
    found = moderate(known[0], fit_prior(known))
    assert 0 < found.variance < 1e-4
    assert standard_error(found) > 0


def test_a_variance_is_drawn_towards_the_prior_by_weight():
    found = moderate(Spread(1.0, 4.0, 3, 4), Prior(1.0, 6))
    assert (found.mean, found.variance, found.freedom, found.units) == (1.0, pytest.approx(2.0), 9, 4)


def test_there_is_always_some_variance_and_freedom():
    found = moderate(Spread(0, 0.0, 0, 1), Prior(0.0, 0.01))
    assert found.variance > 0
    assert found.freedom >= 1


def test_a_variance_on_top_by_hand():
    # 2 + 2 with (2 + 2)**2 / (2**2 / 4 + 2**2 / 30) degrees.
    same(with_more(Spread(1.0, 2.0, 4, 3), Prior(2.0, 30)), Spread(1.0, 4.0, 16 / (1 + 4 / 30), 3))
    same(with_more(Spread(1.0, 2.0, 4, 3), Prior(0.0, 30)), Spread(1.0, 2.0, 4, 3))


def test_the_error_counts_the_new_run_and_the_baseline():
    assert standard_error(Spread(0, 4.0, 1, 4)) == pytest.approx(2 * sqrt(1.25))
    assert standard_error(Spread(0, 4.0, 0, 1)) == pytest.approx(2 * sqrt(2))


def test_t_agrees_with_tables():
    assert float(quantile(0.025, 10)) == pytest.approx(2.2281, abs=1e-4)
    assert float(quantile(0.05 / 1000, 20)) == pytest.approx(4.84, abs=0.01)
    assert float(quantile(0.025, 1e6)) == pytest.approx(1.95996, abs=1e-4)
    assert float(upper_tail(2.2281, 10)) == pytest.approx(0.025, abs=1e-5)
    assert float(upper_tail(40.0, 20)) > 0  # tails do not vanish by rounding


def test_holm_by_hand():
    # 0.01 <= 0.05 / 4, 0.013 <= 0.05 / 3, 0.03 > 0.05 / 2: 0.04 is not looked at.
    assert holm([0.03, 0.01, 0.04, 0.013], 0.05).tolist() == [False, True, False, True]
    assert holm([0.05], 0.05).tolist() == [True]
    assert holm([], 0.05).tolist() == []
    assert holm([0.02, 0.02, 0.02], 0.05).tolist() == [False, False, False]


def test_holm_keeps_the_family_wise_rate():
    rng = np.random.default_rng(5)
    false = np.mean([holm(rng.uniform(size=50), 0.05).any() for _ in range(4000)])
    assert false < 0.06
    assert false > 0.03  # and spends what it may


def test_what_is_detectable_is_detected():
    """A difference of the detectable size passes the threshold in 97.5 % of draws."""
    rng = np.random.default_rng(6)
    error, freedom, tail = 0.002, 30, 1e-4
    for floor in (0.0, 0.01, 0.05):
        true = float(detectable(error, freedom, tail, floor))
        measured_error = error * np.sqrt(rng.chisquare(freedom, 20000) / freedom)
        passes = rng.normal(true, error, 20000) > threshold(measured_error, freedom, tail, floor)
        assert np.mean(passes) == pytest.approx(0.975, abs=0.02)


def test_more_runs_are_needed_for_smaller_effects():
    noisy = Spread(0, 0.01**2, 5, 3)
    needed = [units_needed(noisy, effect, 1e-3, 0.01) for effect in (0.09, 0.07, 0.06)]
    assert needed == sorted(needed)
    assert needed[0] >= 1
    assert units_needed(noisy, 0.02, 1e-3, 0.01) is None


@pytest.mark.parametrize("effect", [0.03, 0.04, 0.06, 0.08])
@pytest.mark.parametrize("spread", [Spread(0.0, 1e-4, 2.0, 2), Spread(0.0, 4e-5, 5.0, 4)])
def test_so_many_more_runs_tell_an_effect_and_one_fewer_does_not(spread, effect):
    def smallest(more):
        then = replace(spread, freedom=spread.freedom + more, units=spread.units + more)
        return detectable(standard_error(then), then.freedom, 1e-3, 0.01)

    needed = units_needed(spread, effect, 1e-3, 0.01)
    if needed is None:
        assert smallest(60) > effect
    else:
        assert smallest(needed) <= effect
        assert needed == 1 or smallest(needed - 1) > effect


def test_a_change_and_its_logarithm():
    assert to_share(to_log(0.02)) == pytest.approx(0.02)
    assert to_share(-to_log(1.0)) == pytest.approx(-0.5)


def test_holms_adjusted_values_by_hand():
    # 4 x .01, 3 x .02, 2 x .03, and .04 raised to what came before it.
    assert holm_adjusted(np.array([0.04, 0.01, 0.03, 0.02])) == pytest.approx([0.06, 0.04, 0.06, 0.06])
    assert holm_adjusted(np.array([0.9, 0.8])) == pytest.approx([1.0, 1.0])
