"""When to sample: bursts of bounded length with idle gaps, until the median is known.

A GPU at its power cap lowers its clock. On an NVIDIA H200 tensor-core work does so in milliseconds: with bursts of 2 ms every
4 ms the same GEMM wanders by 5 % between processes, with bursts of 2 ms every 12 ms it repeats within 0.15 %.
"""

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from statistics import median
from typing import Protocol, TypeVar


class Clocked(Protocol):
    """One sample: its seconds, and the SM clock it ran at where that is known."""

    @property
    def seconds(self) -> float: ...

    @property
    def sm_mhz(self) -> float | None: ...


Sample = TypeVar("Sample", bound=Clocked)


@dataclass(frozen=True)
class Pace:
    """How samples follow each other.

    name: "paced" (what a kernel can do) or "sustained" (what a busy server sees, at the power cap).
    burst_seconds: the length of a sample, or one round of calls if that is longer.
    gap_seconds, most_gap_seconds: the idle time before a sample, to begin with; and the longest that is tried.
    warm_seconds: how long the device works before the first sample where there is no gap.
    fewest, most: bounds of the number of samples; budget_seconds bounds their time, once there are the fewest.
    precision: enough is known when the median's 95 % confidence interval is no wider than this on either side, relatively.
    """

    name: str
    burst_seconds: float
    gap_seconds: float
    most_gap_seconds: float
    warm_seconds: float
    fewest: int
    most: int
    budget_seconds: float
    precision: float


# 2 ms bursts, one part work and five parts rest: see above. Nine samples are the fewest whose second and eighth bound a median
# with 95 % confidence.
PACED = Pace("paced", 2e-3, 0.01, 0.08, 0.0, fewest=9, most=40, budget_seconds=0.4, precision=1.5e-3)
# The power controller needs about 0.3 s to settle (H200); then 2 ms samples without a gap.
SUSTAINED = Pace("sustained", 2e-3, 0.0, 0.0, 0.5, fewest=25, most=200, budget_seconds=0.4, precision=1e-3)
PACES = {pace.name: pace for pace in (PACED, SUSTAINED)}

# A gap is long enough when the clock of paced samples is no lower than after a rest, to this share.
_CLOCK_DROP = 0.004
_REST_SECONDS = 0.03
# Samples this long (one call) average over what makes short ones scatter: their quartiles are 0.05 % apart (eager FP4 GEMM,
# NVIDIA H200), and five tell as much as nine.
_LONG_SECONDS, _FEWEST_LONG = 0.01, 5


def take(read: Callable[[], Sample], pace: Pace, sleep: Callable[[float], None] = time.sleep) -> tuple[list[Sample], float]:
    """Warm up, then sample at a pace. Returns all samples in time order, and the gap in seconds that stood before each."""
    started = time.perf_counter()
    read()
    long = time.perf_counter() - started > _LONG_SECONDS
    gap, samples = find_gap(read, pace, sleep, 2 if long else 3) if pace.gap_seconds else (warm(read, pace), [])
    fewest = min(pace.fewest, _FEWEST_LONG) if long else pace.fewest
    until = time.perf_counter() + pace.budget_seconds
    while len(samples) < pace.most:
        enough = len(samples) >= fewest and known([s.seconds for s in samples], pace.precision)
        if enough or (len(samples) >= fewest and time.perf_counter() > until):
            break
        if gap:
            sleep(gap)
        samples.append(read())
    return samples, gap


def warm(read: Callable[[], Sample], pace: Pace) -> float:
    """Work without rest for the time to warm up. Returns the gap: none."""
    until = time.perf_counter() + pace.warm_seconds
    while time.perf_counter() < until:
        read()
    return 0.0


def find_gap(
    read: Callable[[], Sample], pace: Pace, sleep: Callable[[float], None], looks: int = 3
) -> tuple[float, list[Sample]]:
    """The shortest gap, doubling, at which the SM clock of paced samples is what it is after a rest; the first without clocks.

    Returns it with the `looks` samples that were taken at it; those at shorter gaps warmed the device up.
    """
    gap = pace.gap_seconds
    sleep(max(_REST_SECONDS, gap))
    rested = read().sm_mhz
    while True:
        samples = []
        for _ in range(looks):
            sleep(gap)
            samples.append(read())
        paced = median(sample.sm_mhz or 0.0 for sample in samples)
        if not rested or paced >= (1 - _CLOCK_DROP) * rested or gap >= pace.most_gap_seconds:
            return gap, samples
        gap = min(2 * gap, pace.most_gap_seconds)


def known(seconds: list[float], precision: float) -> bool:
    """Whether order statistics bound the median with 95 % confidence within `precision` of it, on average of both sides.

    The bounds are the usual ones from the binomial distribution, by its normal approximation (Conover, Practical Nonparametric
    Statistics, section 3.2).
    """
    ordered, n = sorted(seconds), len(seconds)
    reach = 1.96 * math.sqrt(n) / 2
    low, high = ordered[max(0, math.ceil(n / 2 - reach) - 1)], ordered[min(n - 1, math.floor(n / 2 + reach))]
    return (high - low) / 2 <= precision * median(ordered)
