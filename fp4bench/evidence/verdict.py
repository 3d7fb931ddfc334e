"""Is a case slower than its baseline? A pure function of the accepted runs, the timings now, and a policy.

A case has two witnesses: seconds, and SM cycles (on a clock without cycles: the fastest sample). A change counts where both
show it, beyond the policy's floor, and significantly over all cases together.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from enum import Enum
from types import MappingProxyType
from typing import Any

import numpy as np

from fp4bench.evidence import statistics
from fp4bench.evidence.baselines import Baseline, Timing, not_comparable, way
from fp4bench.evidence.histories import Effects, changed_kernels, effects, has_own_runs, mean_mhz, moderated
from fp4bench.evidence.statistics import Spread


class Outcome(Enum):
    """What became of a case, worst first."""

    REGRESSED = "REGRESSED"
    MISSING = "MISSING"
    INVALID = "INVALID"
    INCONCLUSIVE = "INCONCLUSIVE"
    FASTER = "FASTER"
    NEW = "NEW"
    SAME = "SAME"


@dataclass(frozen=True)
class Policy:
    """When a case counts as slower. Shares: 0.01 is 1 %.

    floor: the smallest change that counts, however certain it is.
    allowance, card_allowance: standard deviation of one run on a card, and of one card, assumed until runs show it.
    drift: standard deviation of a card between days, which runs of one day do not show.
    blind: a case whose smallest detectable slowdown is beyond this is called blind.
    alpha: probability that a run of unchanged code has one or more false regressions, all cases together; the same for FASTER.
    repetitions: fresh processes that must confirm a suspect. pause_seconds: between two of them.
    """

    floor: float
    allowance: float
    card_allowance: float
    drift: float
    blind: float
    alpha: float = 0.01
    repetitions: int = 3
    pause_seconds: float = 0.0


# By clock. Paced GPU samples by clock stamps repeat within 0.1 % on a card, and cards differ by up to 4 % in some cases (NVIDIA
# H200); events include the launch. On two cores of a shared machine a BF16 GEMV took 2.1 ms for some seconds and 3.1 ms for the
# next, its fastest sample too; such phases last up to 40 s, so a suspect is measured again over half a minute, and the first
# look may be the laxer.
POLICIES = {
    "cuda_graph_stamps": Policy(floor=0.01, allowance=0.002, card_allowance=0.02, drift=0.001, blind=0.02),
    "cuda_graph_events": Policy(floor=0.02, allowance=0.01, card_allowance=0.02, drift=0.001, blind=0.05),
    "cuda_events": Policy(floor=0.05, allowance=0.03, card_allowance=0.03, drift=0.001, blind=0.15),
    "perf_counter": Policy(
        floor=0.15, allowance=0.05, card_allowance=0.05, drift=0.0, blind=0.50, alpha=0.05, repetitions=8, pause_seconds=4
    ),
}

# One policy for all cases, or one by clock: a run may hold cases that no graph can capture beside those that it can.
Policies = Policy | Mapping[str, Policy]

_NO_FLOORS: Mapping[str, float] = MappingProxyType({})
_NOTHING_EXPECTED: Mapping[str, str] = MappingProxyType({})
_NOTHING_SEEN: Mapping[str, tuple[float, float]] = MappingProxyType({})


@dataclass(frozen=True)
class Verdict:
    """What became of a case, and a stable code of why.

    change: of the median, relative to the baseline's mean. interval: 95 % bounds of the change. mde: the smallest slowdown that
    this case shows with 95 % probability. None where there is nothing to compare with.
    """

    outcome: Outcome
    reason: str
    change: float | None = None
    interval: tuple[float, float] | None = None
    mde: float | None = None
    detail: str = ""


def judge(
    baseline: Baseline,
    now: Mapping[str, Timing],
    policy: Policies,
    floors: Mapping[str, float] = _NO_FLOORS,
    expected: Mapping[str, str] = _NOTHING_EXPECTED,
    seen: Mapping[str, tuple[float, float]] = _NOTHING_SEEN,
) -> dict[str, Verdict]:
    """A verdict for each case of `now`, in its order, then MISSING ones. Holm's correction is over all that can be compared.

    floors: a floor of its own for some cases. expected: cases that belong to this run and are not in `now`, with the reason;
    those that the baseline holds are MISSING, as are cases of `now` that lost the clock that they were timed by. seen: by case,
    the variance of time and of the second witness between processes of this run, where it was measured more than once; a case
    is not taken to scatter less than that.
    """
    verdicts: dict[str, Verdict | None] = {}
    questions: list[_Question] = []
    for case_id, timing in now.items():
        verdicts[case_id] = _new(baseline, case_id, timing)
        if verdicts[case_id] is None:
            question = _question(baseline, case_id, timing, policy_of(policy, timing), floors)
            questions.append(_scattering(question, seen[case_id]) if case_id in seen else question)
    verdicts |= {question.case_id: verdict for question, verdict in zip(questions, _answers(questions), strict=True)}
    for case_id, why in expected.items():
        if case_id not in now and case_id in baseline.cases:
            verdicts[case_id] = Verdict(Outcome.MISSING, "not_timed", detail=why)
    return {case_id: verdict for case_id, verdict in verdicts.items() if verdict}


def detectable(baseline: Baseline, policy: Policies, floors: Mapping[str, float] = _NO_FLOORS) -> dict[str, float]:
    """The smallest slowdown that each case of a baseline shows with 95 % probability in a run of all of them."""
    now = {case_id: baseline.newest(case_id) for case_id in baseline.cases}
    return {
        case_id: verdict.mde for case_id, verdict in judge(baseline, now, policy, floors).items() if verdict.mde is not None
    }


def invalid(verdicts: Mapping[str, Verdict], reasons: Sequence[str]) -> dict[str, Verdict]:
    """The verdicts of a run whose conditions were bad: INVALID for every case, with the numbers that it has."""
    why = "; ".join(reasons)
    return {
        case_id: replace(verdict, outcome=Outcome.INVALID, reason="invalid_run", detail=why)
        for case_id, verdict in verdicts.items()
    }


def policy_of(policy: Policies, timing: Timing) -> Policy:
    """The policy for a timing, by its clock. Raises ValueError for a clock that has none."""
    if isinstance(policy, Policy):
        return policy
    clock = str(timing.record.get("clock"))
    if clock not in policy:
        raise ValueError(f"no policy for the clock {clock!r}: there are {', '.join(policy)}")
    return policy[clock]


def promised(policy: Policies, timings: Iterable[Timing]) -> float | None:
    """The probability that a run of these cases and unchanged code has a false regression at all; None of no case."""
    return min((policy_of(policy, timing).alpha for timing in timings), default=None)


def floor_of(case_id: str, policy: Policy, floors: Mapping[str, float]) -> float:
    """A case's floor as a difference of logarithms."""
    return statistics.to_log(floors.get(case_id, policy.floor))


@dataclass(frozen=True)
class _Question:
    """What is known of a case that can be compared."""

    case_id: str
    effects: Effects
    spreads: tuple[Spread, Spread]  # of time and of the second witness
    floor: float
    alpha: float
    kernels: str  # how they changed, or nothing
    mhz: tuple[float, float] | None
    own: bool  # compared with runs of its own card
    waits_for_memory: bool  # so that the SM clock does not slow it down


def _new(baseline: Baseline, case_id: str, timing: Timing) -> Verdict | None:
    if case_id not in baseline.cases:
        return Verdict(Outcome.NEW, "not_in_baseline")
    before = baseline.newest(case_id)
    if _lost_its_clock(before, timing):
        detail = f"clock was {before.record['clock']}, is {timing.record['clock']}: it can no longer be timed alike{_NO_CLOCK}"
        return Verdict(Outcome.MISSING, "clock_changed", detail=detail)
    why = not_comparable(before.record, timing.record)
    return Verdict(Outcome.NEW, "not_comparable", detail=why) if why else None


# The better first. What L2 and copies are follows from the clock, so they are no work of their own.
_CUDA_CLOCKS = ("cuda_graph_stamps", "cuda_graph_events", "cuda_events")
_WORK = ("flops", "bytes", "scale_rule")
_NO_CLOCK = ", for a kernel that waits for the device cannot be captured in a graph, and without Triton there are no stamps"


def _lost_its_clock(before: Timing, timing: Timing) -> bool:
    """Whether the same work, timed in the same way, is now on a worse clock: as a case never seen it would escape the gate."""
    clocks = before.record.get("clock"), timing.record.get("clock")
    if not all(clock in _CUDA_CLOCKS for clock in clocks) or way(before) != way(timing):
        return False
    worse = _CUDA_CLOCKS.index(str(clocks[0])) < _CUDA_CLOCKS.index(str(clocks[1]))
    return worse and all(before.record.get(key) == timing.record.get(key) for key in _WORK)


def _question(baseline: Baseline, case_id: str, timing: Timing, policy: Policy, floors: Mapping[str, float]) -> _Question:
    found = effects(baseline, case_id, timing)
    assumed = policy.allowance, policy.card_allowance, policy.drift
    spreads = tuple(moderated(baseline, case_id, witness, *assumed) for witness in ("time", found.witness))
    before = mean_mhz(baseline, case_id)
    mhz = (before, timing.record["sm_mhz"]) if before and found.clock is not None else None
    kernels = changed_kernels(baseline.newest(case_id).record, timing.record)
    floor, own = floor_of(case_id, policy, floors), has_own_runs(baseline, case_id)
    waits = _waits_for_memory(baseline.newest(case_id).record)
    return _Question(case_id, found, (spreads[0], spreads[1]), floor, policy.alpha, kernels, mhz, own, waits)


# Operations a byte below which memory is the roof on every GPU here (copy bandwidth and BF16 rate of an H200 meet at 187), and
# the share of a roof from which on it is what a kernel waits for.
_OPERATIONS_A_BYTE, _SHARE_OF_ROOF = 64, 0.5


def _waits_for_memory(record: Mapping[str, Any]) -> bool:
    intensity = (record.get("flops") or 0) / (record.get("bytes") or 1)
    return intensity < _OPERATIONS_A_BYTE and (record.get("roofline_fraction") or 0.0) >= _SHARE_OF_ROOF


def _scattering(question: _Question, seen: tuple[float, float]) -> _Question:
    time, second = (
        replace(spread, variance=max(spread.variance, variance))
        for spread, variance in zip(question.spreads, seen, strict=True)
    )
    return replace(question, spreads=(time, second))


def _answers(questions: Sequence[_Question]) -> list[Verdict]:
    """The verdicts of cases that are judged together. Rows of the arrays: time, second witness; columns: cases."""
    if not questions:
        return []
    alpha = min(question.alpha for question in questions)
    tail = alpha / len(questions)  # Holm's first and strictest step; what a case is promised holds at this one
    effect = np.array([(q.effects.time, q.effects.second) for q in questions]).T
    error = np.array([[statistics.standard_error(s) for s in q.spreads] for q in questions]).T
    freedom = np.array([[s.freedom for s in q.spreads] for q in questions]).T
    floor = np.array([q.floor for q in questions])
    # Both witnesses must speak, so the weaker one's p-value is the case's (an intersection-union test).
    slower = statistics.holm(statistics.upper_tail(effect / error, freedom).max(axis=0), alpha) & (effect > floor).all(axis=0)
    faster = statistics.holm(statistics.upper_tail(-effect / error, freedom).max(axis=0), alpha) & (-effect > floor).all(axis=0)
    threshold = statistics.threshold(error, freedom, tail, floor)
    mde = statistics.detectable(error, freedom, tail, floor).max(axis=0)
    half = statistics.quantile(0.025, freedom[0]) * error[0]
    verdicts = []
    for i, question in enumerate(questions):
        time = question.effects.time
        outcome, reason, detail = _decide(question, bool(slower[i]), bool(faster[i]), tuple(map(float, threshold[:, i])), tail)
        verdicts.append(
            Verdict(
                outcome,
                reason,
                statistics.to_share(time),
                (statistics.to_share(time - float(half[i])), statistics.to_share(time + float(half[i]))),
                statistics.to_share(float(mde[i])),
                "; ".join(part for part in (question.kernels, detail) if part),
            )
        )
    return verdicts


def _decide(q: _Question, slower: bool, faster: bool, threshold: tuple[float, ...], tail: float) -> tuple[Outcome, str, str]:
    """Outcome, reason code and detail."""
    if slower or faster:
        return (Outcome.REGRESSED, "slower", _witnesses(q)) if slower else (Outcome.FASTER, "faster", _witnesses(q))
    sign = 1 if q.effects.time > 0 else -1
    time, second = abs(q.effects.time), sign * q.effects.second
    if time > q.floor:
        excused = q.effects.witness == "cycles" and second <= q.floor and not q.waits_for_memory
        if excused and _clock_explains(q, -1):
            return Outcome.SAME, "lower_clock" if sign > 0 else "higher_clock", f"{_witnesses(q)}{_clocks(q)}"
        if time > threshold[0] and second <= threshold[1]:
            return Outcome.INCONCLUSIVE, "one_witness", f"{_witnesses(q)}{_clocks(q)}: they disagree; record 3 more runs"
        return Outcome.INCONCLUSIVE, "not_significant", f"{_witnesses(q)}; {_remedy(q, threshold, tail)}"
    if q.effects.witness == "cycles" and abs(q.effects.second) > threshold[1]:
        if _clock_explains(q, 1):
            moved = "higher_clock" if q.effects.second > 0 else "lower_clock"
            return Outcome.SAME, moved, f"{_witnesses(q)}{_clocks(q)}"
        return Outcome.INCONCLUSIVE, "one_witness", f"{_witnesses(q)}{_clocks(q)}: they disagree; record 3 more runs"
    return Outcome.SAME, "within_floor", ""


def _clock_explains(q: _Question, direction: int) -> bool:
    """Whether the SM clock moved so that it leaves no more than the floor of the change that one witness alone shows.

    direction: 1 where cycles follow the clock (time stays: the kernel waits for memory), -1 where time moves against it.
    """
    if q.effects.clock is None:
        return False
    change = q.effects.second if direction > 0 else q.effects.time
    explained = direction * q.effects.clock
    return change * explained > 0 and abs(change) - abs(explained) <= q.floor


def _witnesses(q: _Question) -> str:
    second = "cycles" if q.effects.witness == "cycles" else "fastest sample"
    return f"time {statistics.to_share(q.effects.time):+.1%}, {second} {statistics.to_share(q.effects.second):+.1%}"


def _clocks(q: _Question) -> str:
    return f", SM clock {q.mhz[0]:.0f} MHz then, {q.mhz[1]:.0f} now" if q.mhz else ""


def _remedy(q: _Question, threshold: tuple[float, ...], tail: float) -> str:
    """What it would take to decide a change of this size."""
    counts = f"a change counts here from {statistics.to_share(max(threshold)):.1%} on"
    if not q.own:
        return f"{counts}, for no accepted run is of this card, and cards differ: accept one of it, or try fp4bench ab"
    size = min(abs(q.effects.time), abs(q.effects.second))
    needed = [statistics.units_needed(spread, size, tail, q.floor) for spread in q.spreads]
    if any(more is None for more in needed):
        return f"{counts}, and more runs would not tell this one: try fp4bench ab"
    more = max(more for more in needed if more is not None)
    return f"{counts}; {more} more accepted run{'s' if more > 1 else ''} would tell this one"
