"""The verdicts of a run: every case is judged, and those that look slower are measured again before they count."""

import time
from collections.abc import Callable, Mapping

from fp4bench.evidence.baselines import Baseline, Timing
from fp4bench.evidence.report import duration
from fp4bench.evidence.verdict import Outcome, Policy, Verdict, judge


def judge_run(
    baseline: Baseline,
    now: Mapping[str, Timing],
    policy: Policy,
    measure_again: Callable[[str], Timing],
    sleep: Callable[[float], None] = time.sleep,
) -> dict[str, Verdict]:
    """A verdict for each case of `now`, in its order.

    A case is REGRESSED only if it is slower in each of the policy's repetitions too: a busy machine slows seconds of a run, a
    slower kernel all of it. Repetitions are spread over time, all suspects in each. `measure_again` times a case by its id.
    """
    verdicts = {case_id: judge(baseline.cases.get(case_id), timing, policy) for case_id, timing in now.items()}
    for repetition in range(policy.repetitions):
        suspects = [case_id for case_id, verdict in verdicts.items() if verdict.outcome is Outcome.REGRESSED]
        if suspects and repetition:
            sleep(policy.pause_seconds)
        for case_id in suspects:
            again = measure_again(case_id)
            if judge(baseline.cases[case_id], again, policy).outcome is not Outcome.REGRESSED:
                detail = f"not slower when measured again: {duration(again.median)}"
                verdicts[case_id] = Verdict(Outcome.SAME, "not_confirmed", verdicts[case_id].change, detail)
    return verdicts
