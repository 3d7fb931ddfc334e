"""Is a case slower than its baseline? A pure function of two timings and a policy."""

from dataclasses import dataclass
from enum import Enum

from fp4bench.evidence.baselines import Timing
from fp4bench.evidence.record import COMPARABLE


class Outcome(Enum):
    REGRESSED = "REGRESSED"
    FASTER = "FASTER"
    SAME = "SAME"
    NEW = "NEW"


@dataclass(frozen=True)
class Policy:
    """When a case counts as slower.

    threshold: the relative change beyond which a measurement is called slower or faster.
    repetitions: how often a slower case is measured again; it counts if it is slower every time.
    pause_seconds: between two repetitions.
    """

    threshold: float
    repetitions: int
    pause_seconds: float


# By clock. On two cores of a shared machine (AMD EPYC) a BF16 GEMV took 2.1 ms for some seconds and 3.1 ms for the next, its
# fastest sample too; such phases last up to half a minute. A GPU that is timed back to back wanders by 8 % (power cap).
POLICIES = {
    "perf_counter": Policy(0.25, repetitions=8, pause_seconds=4),
    "cuda_events": Policy(0.10, repetitions=2, pause_seconds=1),
}


@dataclass(frozen=True)
class Verdict:
    """What became of a case. `change`: of the median, relative to the baseline's, None without one. `reason`: a stable code."""

    outcome: Outcome
    reason: str
    change: float | None = None
    detail: str = ""


def judge(baseline: Timing | None, now: Timing, policy: Policy) -> Verdict:
    """Slower or faster only if the median and the fastest sample both changed by more than the threshold.

    Noise of a busy machine slows the median and spares the fastest sample; a slower kernel slows both.
    """
    if baseline is None:
        return Verdict(Outcome.NEW, "not_in_baseline")
    for key in COMPARABLE:
        before, after = baseline.record.get(key), now.record.get(key)
        if before != after:
            return Verdict(Outcome.NEW, "not_comparable", detail=f"{key} was {before}, is {after}")
    median, fastest = now.median / baseline.median, now.fastest / baseline.fastest
    slower, faster = 1 + policy.threshold, 1 / (1 + policy.threshold)
    if median > slower and fastest > slower:
        return Verdict(Outcome.REGRESSED, "median_and_fastest", median - 1)
    if median < faster and fastest < faster:
        return Verdict(Outcome.FASTER, "median_and_fastest", median - 1)
    return Verdict(Outcome.SAME, "within_threshold", median - 1)
