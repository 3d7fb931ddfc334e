"""What a drill proves of the gate: injections drawn at random, detections, blind cases and false alarms, with exact intervals.

Counts are binomial: each injection and each session is one independent trial.
"""

import random
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from scipy import stats

# Without these a gate is called blind: the lower 95 % bound of its detection rate, and the share of injections in blind cases.
SEEN_AT_LEAST = 0.5
BLIND_AT_MOST = 0.5

# A case with one of these outcomes on unchanged code can be drawn. NEW and MISSING have nothing to be compared; a case that is
# REGRESSED without an injection would be a detection that proves nothing.
_DRAWN = ("SAME", "INCONCLUSIVE", "FASTER")


@dataclass(frozen=True)
class Injection:
    """One case slowed down on purpose, and what the gate said.

    slowdown, mde, change: relative. mde: what the gate declared on unchanged code, before the injection; None where it did not.
    outcome: None where the session has no verdict for the case. session: the index of the session. detail: the verdict's, with
    every look of a suspect.
    """

    case_id: str
    slowdown: float
    session: int
    mde: float | None
    outcome: str | None
    reason: str
    change: float | None
    detail: str = ""

    @property
    def detected(self) -> bool:
        return self.outcome == "REGRESSED"

    @property
    def blind(self) -> bool:
        """Whether the gate had said that it cannot see this slowdown in this case."""
        return self.mde is not None and self.mde > self.slowdown


@dataclass(frozen=True)
class Detections:
    """The injections of one slowdown, counted. `detected` of `trials` are of cases that are not blind."""

    slowdown: float
    injections: tuple[Injection, ...]

    @property
    def sighted(self) -> tuple[Injection, ...]:
        return tuple(injection for injection in self.injections if not injection.blind)

    @property
    def blind(self) -> tuple[Injection, ...]:
        return tuple(injection for injection in self.injections if injection.blind)

    @property
    def trials(self) -> int:
        return len(self.sighted)

    @property
    def detected(self) -> int:
        return sum(injection.detected for injection in self.sighted)

    @property
    def misses(self) -> tuple[Injection, ...]:
        """Those of cases that are not blind: each speaks against the gate."""
        return tuple(injection for injection in self.sighted if not injection.detected)

    @property
    def missed_by_reason(self) -> dict[str, int]:
        return dict(Counter(injection.reason for injection in self.misses).most_common())


def percent(rate: float) -> str:
    """Three significant digits: `2 %`, `0.25 %`."""
    return f"{100 * rate:.3g} %"


def by_slowdown(injections: Iterable[Injection]) -> list[Detections]:
    """The injections counted by slowdown, the smallest first."""
    injections = list(injections)
    slowdowns = sorted({injection.slowdown for injection in injections})
    return [Detections(slowdown, tuple(i for i in injections if i.slowdown == slowdown)) for slowdown in slowdowns]


def interval(hits: int, trials: int) -> tuple[float, float]:
    """The two-sided 95 % interval of a rate (Clopper-Pearson): 57 of 60 is 0.861 to 0.990. No trial says nothing: 0 to 1."""
    low = float(stats.beta.ppf(0.025, hits, trials - hits + 1)) if hits else 0.0
    high = float(stats.beta.ppf(0.975, hits + 1, trials - hits)) if hits < trials else 1.0
    return low, high


def upper_bound(hits: int, trials: int) -> float:
    """What a rate is below with 95 % confidence, one-sided (Clopper-Pearson): 0 of 40 is 0.0722."""
    return float(stats.beta.ppf(0.95, hits + 1, trials - hits)) if hits < trials else 1.0


def lower_bound(hits: int, trials: int) -> float:
    """What a rate is above with 95 % confidence, one-sided: 60 of 60 is 0.951."""
    return 1 - upper_bound(trials - hits, trials)


def beyond_chance(alarmed: int, sessions: int, promised: float) -> bool:
    """Whether a gate that keeps its promise would have so many sessions with a false alarm in fewer than 5 % of drills.

    promised: the share of sessions on unchanged code that have any regression, at most (`verdict.promised`).
    """
    return float(stats.binom.sf(alarmed - 1, sessions, promised)) < 0.05


def drawable(cases: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """The ids that a drill may draw, sorted. `cases`: verdicts of a session on unchanged code by id."""
    return sorted(case_id for case_id, verdict in cases.items() if verdict["outcome"] in _DRAWN)


def draw(cases: Sequence[str], count: int, share: float, seed: int) -> list[tuple[str, ...]]:
    """`count` injections as sessions of distinct cases, each at most `share` of `cases`.

    No case is drawn again before all others were. Raises ValueError where the share allows no case at all.
    """
    size = int(share * len(cases) + 1e-9)  # 0.2 of 15 is 3, also in binary
    if size < 1:
        raise ValueError(f"{percent(share)} of {len(cases)} comparable cases is none: select more cases, or raise --share")
    rng = random.Random(seed)
    sessions: list[tuple[str, ...]] = []
    waiting: list[str] = []
    while count > 0:
        if len(waiting) < size:
            # A new round of all cases, in which those that still wait from the last one come last: never twice in a session.
            others = [case for case in cases if case not in waiting]
            waiting += [*rng.sample(others, len(others)), *waiting]
        now = min(size, count)
        sessions.append(tuple(waiting[:now]))
        waiting, count = waiting[now:], count - now
    return sessions


def objections(injections: Iterable[Injection], alarmed: int, sessions: int, promised: float) -> list[str]:
    """Why the gate cannot be trusted, a sentence each; empty where it sees.

    At the largest slowdown, the lower 95 % bound of the detection rate in cases that are not blind must be above one half, and
    at most half of the injections may be in blind cases. Sessions with a false alarm must not be beyond chance.
    """
    found = []
    if counted := by_slowdown(injections):
        largest = counted[-1]
        low, _ = interval(largest.detected, largest.trials)
        if low <= SEEN_AT_LEAST:
            found.append(
                f"at {percent(largest.slowdown)} it detected {largest.detected} of {largest.trials} injections in cases that "
                f"are not blind, which proves a rate of {percent(low)}, and more than {percent(SEEN_AT_LEAST)} is asked for"
            )
        if len(largest.blind) > BLIND_AT_MOST * len(largest.injections):
            found.append(
                f"{len(largest.blind)} of {len(largest.injections)} injections were in cases that it declares blind to "
                f"{percent(largest.slowdown)}"
            )
    if beyond_chance(alarmed, sessions, promised):
        found.append(f"{alarmed} of {sessions} sessions had a false alarm, and {percent(promised)} is what it promises")
    return found
