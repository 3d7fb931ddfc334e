"""What the accepted runs of a case say of the next one: variances of runs and cards, shared across cases; Holm; power.

All values are natural logarithms of seconds or cycles: a difference of 0.02 is a change of 2 %, and slower mirrors faster.
The unit of replication is the run (one process) on a card; samples of one run replicate nothing. Cards of one model differ by
percents in some cases (NVIDIA H200: half a percent at the median of 60 cases, 4 % at the worst, where runs of one card repeat
within 0.1 %), so a card that has runs of its own is compared with those.
Degrees of freedom are called `freedom`; they need not be whole.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from math import expm1, inf, log1p, sqrt

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import special  # type: ignore[import-untyped,unused-ignore]

Floats = NDArray[np.float64]

# Beyond this a t distribution is normal to all digits that matter; scipy's t takes no infinite freedom.
_MOST_FREEDOM = 1e6
# A standard deviation of 1e-6 of a case's time: less than any clock resolves. Runs that agree to the bit have no variance.
_LEAST_VARIANCE = 1e-12
# The moments of log variances from fewer cases say nothing of how variances scatter.
_FEWEST_CASES = 5
# A slowdown of the minimum detectable size passes each of two witnesses with 97.5 %, so both with at least 95 %.
_MISS_A_WITNESS = 0.025


@dataclass(frozen=True)
class Spread:
    """A case by one witness (time or cycles).

    mean: of this card's runs, or of the cards' means. variance: of one new run around the true mean. freedom: of `variance`, 0
    where nothing is known of it. units: how many runs, or cards, are behind `mean`.
    """

    mean: float
    variance: float
    freedom: float
    units: int


@dataclass(frozen=True)
class Prior:
    """What is known of a case's variance before its own runs: a typical value, and how many degrees of freedom it is worth."""

    variance: float
    freedom: float


def on_card(own: Sequence[float], others: Iterable[Sequence[float]]) -> Spread:
    """Of a case on a card that has runs: their mean, and the variance of runs around their card's mean, all cards together."""
    groups = [list(own), *(list(group) for group in others)]
    if not all(groups):
        raise ValueError("a spread needs a run on each card")
    mean = sum(groups[0]) / len(groups[0])
    freedom = sum(map(len, groups)) - len(groups)
    return Spread(mean, _squares(groups) / freedom if freedom else 0.0, freedom, len(groups[0]))


def across_cards(cards: Iterable[Sequence[float]]) -> Spread:
    """Of a case on a card that has no runs: mean and variance from other cards, one sequence of runs a card.

    Method of moments of a one-way random-effects layout with unequal group sizes, on unweighted card means: their mean square
    estimates between + within * mean(1 / runs), that of runs around their card's mean estimates within. `variance` is
    between + within, a negative estimate of between taken as 0. Its freedom is that of the cards' means: Satterthwaite's would
    be more, but two cards that happen to agree, however often they ran, say little of a third. Of one card it is 0, and
    `variance` the part within alone: a lower bound, to be moderated.
    """
    groups = [list(group) for group in cards]
    if not groups or not all(groups):
        raise ValueError("a spread needs at least one card, and a run on each")
    means = [sum(group) / len(group) for group in groups]
    mean = sum(means) / len(means)
    inner, outer = sum(map(len, groups)) - len(groups), len(groups) - 1
    within = _squares(groups) / inner if inner else 0.0
    of_means = _squares([means]) / outer if outer else 0.0
    share = sum(1 / len(group) for group in groups) / len(groups)
    return Spread(mean, max(of_means + (1 - share) * within, within), outer, len(groups))


def _squares(groups: Iterable[Sequence[float]]) -> float:
    """The sum of squares of values around their group's mean."""
    return sum((x - sum(group) / len(group)) ** 2 for group in groups for x in group)


def fit_prior(spreads: Iterable[Spread]) -> Prior | None:
    """The distribution of variances over cases: moments of their logarithms (Smyth 2004, limma's fitFDist).

    An infinite freedom says that the cases differ by no more than chance. None with fewer than five cases: they show no prior.
    """
    known = [s for s in spreads if s.freedom > 0]
    if len(known) < _FEWEST_CASES:
        return None
    freedom = np.array([s.freedom for s in known])
    variance = np.array([s.variance for s in known])
    # As limma does: a variance of zero would have the logarithm -inf.
    variance = np.maximum(variance, max(1e-5 * float(np.median(variance)), _LEAST_VARIANCE))
    e = np.log(variance) - special.digamma(freedom / 2) + np.log(freedom / 2)
    excess = float(np.var(e, ddof=1) - np.mean(special.polygamma(1, freedom / 2)))
    if excess <= 0:
        return Prior(float(np.mean(variance)), inf)
    half = inverse_trigamma(excess)
    return Prior(float(np.exp(np.mean(e) + special.digamma(half) - np.log(half))), 2 * half)


def inverse_trigamma(y: float) -> float:
    """The x whose trigamma is y, by Newton's method on 1 / trigamma, which is nearly linear (Smyth 2004, appendix)."""
    if y > 1e7:
        return 1 / sqrt(y)
    if y < 1e-6:
        return 1 / y
    x = 0.5 + 1 / y
    for _ in range(50):
        value = float(special.polygamma(1, x))
        step = value * (1 - value / y) / float(special.polygamma(2, x))
        x += step
        if -step / x < 1e-8:
            break
    return x


def moderate(own: Spread, prior: Prior) -> Spread:
    """The case's variance drawn towards the prior, each weighted by its freedom."""
    weight = min(prior.freedom, _MOST_FREEDOM)
    freedom = weight + own.freedom
    variance = (weight * prior.variance + own.freedom * own.variance) / freedom if freedom else prior.variance
    return replace(own, variance=max(variance, _LEAST_VARIANCE), freedom=min(max(freedom, 1.0), _MOST_FREEDOM))


def with_more(spread: Spread, more: Prior) -> Spread:
    """The spread with a further, independent variance on top; the freedom of the sum is Satterthwaite's."""
    variance = spread.variance + more.variance
    doubt = spread.variance**2 / spread.freedom + more.variance**2 / more.freedom
    return replace(spread, variance=variance, freedom=min(variance**2 / doubt, _MOST_FREEDOM))


def standard_error(spread: Spread) -> float:
    """Of one new run minus the baseline's mean."""
    return float(_error(spread.variance, spread.units))


def _error(variance: float, units: ArrayLike) -> Floats:
    return np.asarray(np.sqrt(variance * (1 + 1 / np.asarray(units))))


def upper_tail(t: ArrayLike, freedom: ArrayLike) -> Floats:
    """The probability that Student's t exceeds `t`."""
    return np.asarray(special.stdtr(freedom, -np.asarray(t, dtype=np.float64)))


def quantile(tail: float, freedom: ArrayLike) -> Floats:
    """The t that is exceeded with probability `tail`."""
    return np.asarray(-special.stdtrit(freedom, tail))


def holm(p_values: ArrayLike, alpha: float) -> NDArray[np.bool_]:
    """Which hypotheses Holm's step-down rejects: one or more false rejections with probability `alpha` at most, however the
    p-values depend on each other."""
    return np.asarray(holm_adjusted(p_values) <= alpha)


def holm_adjusted(p_values: ArrayLike) -> Floats:
    """The least `alpha` at which `holm` rejects each hypothesis, at most 1."""
    p = np.asarray(p_values, dtype=np.float64)
    order = np.argsort(p, kind="stable")
    adjusted = np.empty_like(p)
    adjusted[order] = np.minimum(np.maximum.accumulate(p[order] * np.arange(len(p), 0, -1)), 1.0)
    return adjusted


def threshold(error: ArrayLike, freedom: ArrayLike, tail: float, floor: ArrayLike) -> Floats:
    """The measured difference from which on a case counts as slower: significant at `tail`, and above its floor."""
    return np.maximum(floor, quantile(tail, freedom) * np.asarray(error))


def detectable(error: ArrayLike, freedom: ArrayLike, tail: float, floor: ArrayLike) -> Floats:
    """The smallest true difference that passes `threshold` with 97.5 % by this witness, and so with 95 % by two."""
    return threshold(error, freedom, tail, floor) + quantile(_MISS_A_WITNESS, freedom) * np.asarray(error)


def units_needed(spread: Spread, effect: float, tail: float, floor: float, most: int = 60) -> int | None:
    """How many more runs (cards) bring the smallest detectable difference down to `effect`; None where `most` do not.

    The variance is taken to stay what it is; each adds one degree of freedom.
    """
    more = np.arange(1, most + 1)
    enough = detectable(_error(spread.variance, spread.units + more), spread.freedom + more, tail, floor) <= effect
    return int(more[enough.argmax()]) if enough.any() else None


def to_log(share: float) -> float:
    """0.02 (2 % slower) as a difference of logarithms."""
    return log1p(share)


def to_share(difference: float) -> float:
    """A difference of logarithms as a relative change."""
    return expm1(difference)
