"""A case's accepted runs by each witness: seconds, and SM cycles or, where a clock gives none, the fastest sample."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from functools import lru_cache
from math import exp, log
from typing import Any

from fp4bench.evidence import statistics
from fp4bench.evidence.baselines import Baseline, Timing
from fp4bench.evidence.baselines import card_of as card_of
from fp4bench.evidence.statistics import Prior, Spread

# A variance with fewer degrees of freedom than this is not known.
ENOUGH_FREEDOM = 3
# What the allowance is worth beside the few runs of a case: much, for two or three hardly show how they differ.
_ALLOWANCE_FREEDOM = 30.0
# And what it is worth where there are runs enough, and too few cases to say what is usual among them.
_ALLOWANCE_FREEDOM_LATER = 4.0


@dataclass(frozen=True)
class Effects:
    """How a timing differs from the baseline's mean, in logarithms; positive is slower, or a higher SM clock.

    second: by `witness`, "cycles" or "fastest". clock: None where either side does not know its SM clock.
    """

    time: float
    second: float
    witness: str
    clock: float | None


def effects(baseline: Baseline, case_id: str, timing: Timing) -> Effects:
    """A timing against the mean of its case's accepted runs, on its card where there are any, by both witnesses."""
    history = _histories(baseline)[case_id]
    witness = "cycles" if history.cycles and timing.record.get("cycles") else "fastest"
    mean = history.spread(witness).mean
    value = timing.record["cycles"] if witness == "cycles" else timing.fastest
    mhz = timing.record.get("sm_mhz")
    clock = log(mhz) - history.log_mhz if mhz and history.log_mhz is not None else None
    return Effects(log(timing.median) - history.time.mean, log(value) - mean, witness, clock)


def mean_seconds(baseline: Baseline, case_id: str) -> float:
    """The baseline's mean of a case's medians: what a change is relative to."""
    return exp(_histories(baseline)[case_id].time.mean)


def mean_mhz(baseline: Baseline, case_id: str) -> float | None:
    """The mean SM clock of a case's accepted runs, None where one does not know it."""
    mean = _histories(baseline)[case_id].log_mhz
    return None if mean is None else exp(mean)


def changed_kernels(before: Mapping[str, Any], after: Mapping[str, Any]) -> str:
    """`kernels were a, b, are c` where both records name them and they differ; else nothing."""
    then, now = before.get("kernels"), after.get("kernels")
    if not then or not now or list(then) == list(now):
        return ""
    return f"kernels were {', '.join(map(str, then))}, are {', '.join(map(str, now))}"


@dataclass(frozen=True)
class _History:
    """A case's accepted runs by each witness, before anything is shared between cases."""

    clock: str | None
    time: Spread
    fastest: Spread
    cycles: Spread | None
    log_mhz: float | None
    on_card: bool  # compared with runs of its own card
    days: int  # of those runs

    def spread(self, witness: str) -> Spread:
        if witness == "cycles":
            assert self.cycles is not None
            return self.cycles
        return self.time if witness == "time" else self.fastest


@lru_cache(maxsize=4)
def _histories(baseline: Baseline) -> dict[str, _History]:
    return {case_id: _history(runs, _known_card(baseline, case_id)) for case_id, runs in baseline.cases.items()}


def _known_card(baseline: Baseline, case_id: str) -> str | None:
    """The card whose runs the case is compared with. Not one of which there is but a move that no second run has confirmed."""
    doubtful = [timing for _, timing in baseline.unconfirmed.get(case_id, ())]
    own = [timing for session, timing in baseline.cases[case_id] if card_of(session) == baseline.card]
    return baseline.card if any(all(timing is not other for other in doubtful) for timing in own) else None


def _history(runs: tuple[tuple[str, Timing], ...], card: str | None) -> _History:
    def spread(values: Iterable[float]) -> Spread:
        cards: dict[str, list[float]] = {}
        for (session, _), value in zip(runs, values, strict=True):
            cards.setdefault(card_of(session), []).append(log(value))
        own = cards.pop(card, None) if card else None
        return statistics.on_card(own, cards.values()) if own else statistics.across_cards(cards.values())

    timings = [timing for _, timing in runs]
    cycles: list[Any] = [timing.record.get("cycles") for timing in timings]
    mhz: list[Any] = [timing.record.get("sm_mhz") for timing in timings]
    own = {session for session, _ in runs if card_of(session) == card}
    return _History(
        timings[-1].record.get("clock"),
        spread(timing.median for timing in timings),
        spread(timing.fastest for timing in timings),
        spread(cycles) if all(cycles) else None,
        spread(mhz).mean if all(mhz) else None,
        bool(own),
        len(own),
    )


@lru_cache(maxsize=64)
def _prior(baseline: Baseline, clock: str | None, witness: str, on_card: bool) -> Prior | None:
    """What the cases say of each other's variances: those timed by one clock, on a known card or not, are one population."""
    histories = [h for h in _histories(baseline).values() if h.clock == clock and h.on_card == on_card]
    spreads = [h.spread(witness) for h in histories if witness != "cycles" or h.cycles]
    return statistics.fit_prior(spread for spread in spreads if spread.freedom >= ENOUGH_FREEDOM)


def moderated(baseline: Baseline, case_id: str, witness: str, allowance: float, card_allowance: float, drift: float) -> Spread:
    """A case's spread with what is known beside its own runs: the other cases, or, of few runs, an allowance.

    Standard deviations as shares: allowance, of one run on a card; card_allowance, of one card; drift, of a card between days,
    which runs of one day do not show and which is added where runs of one card are compared.
    """
    history = _histories(baseline)[case_id]
    own = history.spread(witness)
    enough = own.freedom >= ENOUGH_FREEDOM
    if enough and (prior := _prior(baseline, history.clock, witness, history.on_card)):
        found = statistics.moderate(own, prior)
    else:
        usual = statistics.to_log(allowance if history.on_card else card_allowance)
        assumed = statistics.moderate(own, Prior(usual**2, _ALLOWANCE_FREEDOM_LATER if enough else _ALLOWANCE_FREEDOM))
        # An assumption may not vouch for a case that is seen to scatter more.
        found = replace(assumed, variance=max(assumed.variance, own.variance))
    if not history.on_card:
        return found
    # The new run has a day of its own, and the mean as many as the card's runs have: a share that more runs of a day keep.
    share = (1 + 1 / history.days) / (1 + 1 / own.units)
    return statistics.with_more(found, Prior(share * statistics.to_log(drift) ** 2, _ALLOWANCE_FREEDOM))


def has_own_runs(baseline: Baseline, case_id: str) -> bool:
    """Whether a case is compared with runs of its own card, and not with those of other cards."""
    return _histories(baseline)[case_id].on_card


def is_provisional(baseline: Baseline, case_id: str) -> bool:
    """Whether a case's noise is still assumed: too few runs show how runs of a card differ, or too few cards how cards do."""
    return _histories(baseline)[case_id].time.freedom < ENOUGH_FREEDOM
