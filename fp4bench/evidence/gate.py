"""The verdicts of a run: every case is judged, and those that look slower are measured again before they count."""

import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from math import exp, fsum, log
from statistics import variance

from fp4bench.evidence import statistics
from fp4bench.evidence.baselines import Baseline, Timing, not_comparable
from fp4bench.evidence.histories import effects
from fp4bench.evidence.verdict import Outcome, Policies, Verdict, floor_of, judge, policy_of

# Undecided cases are measured again too, where they are few: their second look is cheap, and may show a regression.
_MOST_UNDECIDED = 20

MeasureAgain = Callable[[list[str]], Mapping[str, Timing | str]]


def judge_run(
    baseline: Baseline,
    now: Mapping[str, Timing],
    policy: Policies,
    floors: Mapping[str, float],
    expected: Mapping[str, str],
    measure_again: MeasureAgain,
    sleep: Callable[[float], None] = time.sleep,
) -> dict[str, Verdict]:
    """A verdict for each case of `now`, then MISSING ones.

    A case is REGRESSED only if it is slower by more than half its floor in each repetition too, by both witnesses, and if the
    mean of all looks passes the rule that the first look had to pass, the case not being taken to scatter less than its looks
    do: a busy machine slows seconds of a run, a slower kernel all of it, and a baseline of few runs does not know its noisy
    cases. `measure_again` times the given cases in one fresh process; a string is the error of a case that failed there.
    """
    first = judge(baseline, now, policy, floors, expected)
    suspects = _suspects(first, {c: floors.get(c, policy_of(policy, timing).floor) for c, timing in now.items()})
    looks = {case_id: [now[case_id]] for case_id in suspects}
    decided: dict[str, Verdict] = {}
    policies = {case_id: policy_of(policy, now[case_id]) for case_id in suspects}
    rounds = max((p.repetitions for p in policies.values()), default=0)
    for repetition in range(rounds):
        open_ = [c for c in suspects if c not in decided and repetition < policies[c].repetitions]
        if not open_:
            break
        if repetition:
            sleep(max(policies[case_id].pause_seconds for case_id in open_))
        answers = measure_again(list(open_))
        for case_id in open_:
            half = floor_of(case_id, policies[case_id], floors) / 2
            verdict = _look(baseline, case_id, first[case_id], looks[case_id], answers.get(case_id, "no answer"), half)
            if verdict is not None:
                decided[case_id] = verdict
    if not rounds:
        return first
    open_ = [c for c in suspects if c not in decided]
    seen = {c: _variances(baseline, c, looks[c]) for c in open_}
    again = judge(baseline, dict(now) | {c: _mean(looks[c]) for c in open_}, policy, floors, expected, seen)
    for case_id in suspects:
        if case_id not in decided:
            decided[case_id] = _conclude(baseline, case_id, first[case_id], again[case_id], looks[case_id])
    return first | decided


def _suspects(verdicts: Mapping[str, Verdict], floors: Mapping[str, float]) -> list[str]:
    """REGRESSED cases, and those slower by more than their floor that are undecided, if they are few."""
    regressed = {case_id for case_id, verdict in verdicts.items() if verdict.outcome is Outcome.REGRESSED}
    undecided = {c for c, v in verdicts.items() if v.outcome is Outcome.INCONCLUSIVE and (v.change or 0.0) > floors[c]}
    wanted = regressed | (undecided if len(undecided) <= _MOST_UNDECIDED else set())
    return [case_id for case_id in verdicts if case_id in wanted]


def _look(
    baseline: Baseline, case_id: str, first: Verdict, looks: list[Timing], answer: Timing | str, half_floor: float
) -> Verdict | None:
    """Add a repetition to the looks at a suspect. A verdict ends them; None: it is still slower.

    Change, interval and mde of a verdict are those of the first look, which is the one that is stored.
    """
    if isinstance(answer, str):
        detail = f"failed when measured again, {_so_far(baseline, case_id, looks)}: {answer}"
        return replace(first, outcome=Outcome.INCONCLUSIVE, reason="repetition_failed", detail=detail)
    if why := not_comparable(looks[0].record, answer.record):
        detail = f"when measured again, {why}"
        return replace(first, outcome=Outcome.INCONCLUSIVE, reason="repetition_not_comparable", detail=detail)
    looks.append(answer)
    found, shown = effects(baseline, case_id, answer), _so_far(baseline, case_id, looks)
    if min(found.time, found.second) > half_floor:
        return None
    if found.time > half_floor:
        second = "cycles" if found.witness == "cycles" else "the fastest sample"
        detail = _joined(first.detail, f"slower when measured again, but not by {second}: {shown}")
        return replace(first, outcome=Outcome.INCONCLUSIVE, reason="one_witness", detail=detail)
    return replace(first, outcome=Outcome.SAME, reason="not_confirmed", detail=f"not slower when measured again: {shown}")


def _conclude(baseline: Baseline, case_id: str, first: Verdict, again: Verdict, looks: list[Timing]) -> Verdict:
    """The verdict of a suspect that was slower each time: does the mean of all looks pass?"""
    shown = _so_far(baseline, case_id, looks)
    if again.outcome is Outcome.REGRESSED:
        return replace(first, outcome=Outcome.REGRESSED, reason="confirmed", detail=_joined(first.detail, shown))
    if again.outcome is Outcome.INCONCLUSIVE:
        return replace(
            first, outcome=Outcome.INCONCLUSIVE, reason=again.reason, detail=_joined(again.detail, f"mean of {shown}")
        )
    return replace(first, outcome=Outcome.SAME, reason="not_confirmed", detail=f"the mean of all looks is not slower: {shown}")


def _so_far(baseline: Baseline, case_id: str, looks: list[Timing]) -> str:
    """`looks +2.1 %, +1.9 %, +2.0 % (cycles +2.0 %, +1.9 %, +2.1 %)`."""
    found = [effects(baseline, case_id, look) for look in looks]
    times = ", ".join(f"{statistics.to_share(e.time):+.1%}" for e in found)
    seconds = ", ".join(f"{statistics.to_share(e.second):+.1%}" for e in found)
    return f"{len(looks)} look{'s' if len(looks) > 1 else ''} {times} ({found[0].witness} {seconds})"


def _variances(baseline: Baseline, case_id: str, looks: list[Timing]) -> tuple[float, float]:
    """Of time and of the second witness, between two or more looks."""
    found = [effects(baseline, case_id, look) for look in looks]
    return variance(e.time for e in found), variance(e.second for e in found)


def _joined(*parts: str) -> str:
    return "; ".join(part for part in parts if part)


def _mean(looks: list[Timing]) -> Timing:
    """The geometric mean of several looks at a case, as one timing."""

    def mean(values: list[float]) -> float:
        return exp(fsum(map(log, values)) / len(values))

    record = dict(looks[0].record)
    for key in ("cycles", "sm_mhz"):
        values = [look.record.get(key) for look in looks]
        record[key] = mean([value for value in values if value]) if all(values) else None
    return Timing(mean([look.median for look in looks]), mean([look.fastest for look in looks]), record)
