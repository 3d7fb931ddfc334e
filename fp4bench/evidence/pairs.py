"""Is B slower than A? From interleaved pairs of runs, each run a fresh process.

Of each case the natural logarithm of B's median over A's is one number a pair. Its mean over the pairs is the effect, and its
variance between pairs holds all that a new process changes. With few pairs one case knows its variance badly, so variances are
moderated across cases (`moderate`). Errors are corrected over all cases (Holm).
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import stats

from fp4bench.evidence.record import COMPARABLE
from fp4bench.evidence.statistics import Spread, fit_prior, holm_adjusted

ALPHA = 0.05  # chance that any unchanged case of a comparison is called slower or faster
FEWEST_PAIRS = 2  # with one there is no variance
# With fewer cases the spread of their variances is not known well enough to learn from.
_FEWEST_CASES = 10

Floats = NDArray[np.float64]


class Finding(Enum):
    SLOWER = "SLOWER"
    FASTER = "FASTER"
    SAME = "SAME"
    UNDECIDED = "UNDECIDED"


@dataclass(frozen=True)
class CaseReading:
    """A case in one run: median seconds and SM cycles of a call (None without stamps), and what must agree to compare it."""

    seconds: float
    cycles: float | None = None
    conditions: tuple[tuple[str, Any], ...] = ()


@dataclass(frozen=True)
class SideRun:
    """What one run measured, by case id, and the ids of cases that failed in it."""

    cases: Mapping[str, CaseReading]
    failed: tuple[str, ...] = ()


@dataclass(frozen=True)
class Pair:
    """A run of each side, one right after the other, in either order."""

    a: SideRun
    b: SideRun


@dataclass(frozen=True)
class Comparison:
    """B against A in one case.

    change: B's time over A's, less one. low, high: its 95 % interval, for this case alone. p: two-sided, corrected over all
    cases. cycles_change: the same of SM cycles, None where a run has none. pairs: how many count. seconds_a, seconds_b:
    geometric means.
    """

    outcome: Finding
    change: float
    low: float
    high: float
    p: float
    cycles_change: float | None
    pairs: int
    seconds_a: float
    seconds_b: float


def read(stored: Mapping[str, Any]) -> SideRun:
    """A stored run, as parsed from its JSON. Raises ValueError where it is none."""
    try:
        cases = {bench["extra_info"]["case_id"]: _reading(bench) for bench in stored["benchmarks"]}
        return SideRun(cases, tuple(stored["fp4bench"].get("failed") or ()))
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"this is not a run that fp4bench stored ({error!r})") from error


def _reading(bench: Mapping[str, Any]) -> CaseReading:
    record = bench["extra_info"]
    return CaseReading(bench["stats"]["median"], record.get("cycles"), tuple((key, record.get(key)) for key in COMPARABLE))


def order(pairs: int) -> list[str]:
    """Which side runs first in each pair: ABBA BAAB and so on, so that a drift in time weighs on both alike."""
    return ["BA" if pair % 4 in (1, 2) else "AB" for pair in range(pairs)]


def compare(pairs: Sequence[Pair], floor: float) -> dict[str, Comparison]:
    """Each case that at least two pairs measured on both sides, the slowest first; `gaps` names the others.

    SLOWER: p below `ALPHA` after Holm's correction, and the change beyond the floor (relative; FASTER is its mirror image,
    beyond 1/(1 + floor)). SAME: the whole interval within the floor. UNDECIDED: neither; more pairs may tell.
    """
    usable = {case_id: [pair for pair in pairs if _comparable(pair, case_id)] for case_id in _case_ids(pairs)}
    usable = {case_id: both for case_id, both in usable.items() if len(both) >= FEWEST_PAIRS}
    if not usable:
        return {}
    ratios = [
        np.log([pair.b.cases[case].seconds / pair.a.cases[case].seconds for pair in both]) for case, both in usable.items()
    ]
    count = np.array([len(ratio) for ratio in ratios], dtype=np.float64)
    effect = np.array([ratio.mean() for ratio in ratios])
    variance, freedom = moderate(np.array([ratio.var(ddof=1) for ratio in ratios]), count - 1)
    error = np.sqrt(variance / count)
    p = holm_adjusted(2 * stats.t.sf(np.abs(effect) / error, freedom))
    half = stats.t.ppf(0.975, freedom) * error
    found = {
        case_id: Comparison(
            outcome=_decide(effect[i], half[i], p[i], math.log1p(floor)),
            change=math.expm1(effect[i]),
            low=math.expm1(effect[i] - half[i]),
            high=math.expm1(effect[i] + half[i]),
            p=float(p[i]),
            cycles_change=_cycles_change(both, case_id),
            pairs=len(both),
            seconds_a=_mean_seconds([pair.a for pair in both], case_id),
            seconds_b=_mean_seconds([pair.b for pair in both], case_id),
        )
        for i, (case_id, both) in enumerate(usable.items())
    }
    return dict(sorted(found.items(), key=lambda item: -item[1].change))


def gaps(pairs: Sequence[Pair]) -> dict[str, str]:
    """What kept a case out of any pair, by case id: where it failed, was not timed, or was timed in another way."""
    return {case_id: gap for case_id in _case_ids(pairs) if (gap := _gap(pairs, case_id))}


def moderate(variances: Floats, freedom: Floats) -> tuple[Floats, Floats]:
    """Variances, and their degrees of freedom, that have learned from each other.

    Empirical Bayes (`statistics.fit_prior`): the new variance is (d0 s0^2 + d s^2)/(d0 + d), with d0 + d degrees of freedom.
    A case whose variance this prior cannot explain (F test at 1 %) keeps its own, and fewer than ten cases all do.
    """
    # Equal timings in each pair are a coarse clock, not a measurement without error.
    variances = np.maximum(variances, max(1e-5 * float(np.median(variances)), 1e-16))
    prior = fit_prior(Spread(0.0, v, f, 1) for v, f in zip(variances.tolist(), freedom.tolist(), strict=True))
    if len(variances) < _FEWEST_CASES or prior is None:
        return variances, freedom
    # At most one variance for all, known as well as all pairs together know it.
    prior_freedom = min(prior.freedom, float(freedom.sum()))
    moderated = (prior_freedom * prior.variance + freedom * variances) / (prior_freedom + freedom)
    alone = variances / prior.variance > stats.f.ppf(0.99, freedom, prior_freedom)
    return np.where(alone, variances, moderated), np.where(alone, freedom, freedom + prior_freedom)


def _decide(effect: float, half: float, p: float, floor: float) -> Finding:
    if p < ALPHA and abs(effect) > floor:
        return Finding.SLOWER if effect > 0 else Finding.FASTER
    return Finding.SAME if abs(effect) + half <= floor else Finding.UNDECIDED


def _comparable(pair: Pair, case_id: str) -> bool:
    a, b = pair.a.cases.get(case_id), pair.b.cases.get(case_id)
    failed = case_id in pair.a.failed or case_id in pair.b.failed
    return a is not None and b is not None and a.conditions == b.conditions and not failed


def _case_ids(pairs: Sequence[Pair]) -> list[str]:
    """Every id of any run, timed or failed, sorted."""
    return sorted({case_id for pair in pairs for run in (pair.a, pair.b) for case_id in (*run.cases, *run.failed)})


def _gap(pairs: Sequence[Pair], case_id: str) -> str:
    found = []
    for side, runs in (("A", [pair.a for pair in pairs]), ("B", [pair.b for pair in pairs])):
        failed = sum(case_id in run.failed for run in runs)
        absent = sum(case_id not in run.cases and case_id not in run.failed for run in runs)
        found += [f"failed in {failed} of {len(runs)} runs of {side}"] if failed else []
        found += [f"not timed in {absent} of {len(runs)} runs of {side}"] if absent else []
    differing = {
        f"{key} is {before} in A and {after} in B"
        for pair in pairs
        if case_id in pair.a.cases and case_id in pair.b.cases
        for (key, before), (_, after) in zip(pair.a.cases[case_id].conditions, pair.b.cases[case_id].conditions, strict=True)
        if before != after
    }
    return "; ".join([*found, *(f"not comparable: {difference}" for difference in sorted(differing))])


def _cycles_change(pairs: Sequence[Pair], case_id: str) -> float | None:
    logs = []
    for pair in pairs:
        before, after = pair.a.cases[case_id].cycles, pair.b.cases[case_id].cycles
        if before is None or after is None:
            return None
        logs.append(math.log(after / before))
    return math.expm1(sum(logs) / len(logs))


def _mean_seconds(runs: Sequence[SideRun], case_id: str) -> float:
    return math.exp(sum(math.log(run.cases[case_id].seconds) for run in runs) / len(runs))
