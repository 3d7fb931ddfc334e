"""How well accepted runs repeat: half the range of a case's run medians over their median, and what makes it wide.

A range grows with the number of runs, so that of all runs says nothing beside a bound for a few. Beside it stands what six runs
of at least three machines show: the mean half range over draws of so many from those that hold the case.
"""

import random
from collections.abc import Iterable, Sequence
from datetime import datetime, timedelta
from functools import lru_cache
from itertools import combinations, islice
from math import comb
from statistics import mean, median

import numpy as np
from numpy.typing import ArrayLike

from fp4bench.evidence.baselines import Baseline, StoredRun, Timing
from fp4bench.evidence.histories import card_of
from fp4bench.evidence.statistics import Floats
from fp4bench.evidence.verdict import POLICIES, Policies, detectable, policy_of

# What is asked of runs that repeat: the first share at most for half of the cases, the second for nearly all.
_SHARES = (0.003, 0.01)
_RUNS, _MACHINES = 6, 3
# All draws where they are no more than this; otherwise the first so many of a fixed seed.
_MOST_DRAWS, _MOST_ATTEMPTS, _SEED = 1000, 20_000, 0
# No record names the machine that a card is in.
_ONE_START = timedelta(minutes=10)


def machines(runs: Iterable[StoredRun]) -> dict[str, int]:
    """The machine of each card, as a number: cards whose runs began within ten minutes of each other are taken to be of one.

    So several machines count as one where they ran together, and one as several only where its cards took turns.
    """
    number: dict[str, int] = {}
    before: tuple[datetime, str] | None = None
    for began, card in sorted((datetime.fromisoformat(run.datetime), card_of(run.session)) for run in runs):
        number.setdefault(card, len(number))
        if before and began - before[0] <= _ONE_START:
            joined, kept = number[card], number[before[1]]
            number = {other: kept if n == joined else n for other, n in number.items()}
        before = began, card
    return number


@lru_cache(maxsize=64)
def draws(machines: tuple[int, ...]) -> tuple[tuple[int, ...], ...]:
    """Six runs of at least three machines, by their places, in all ways or in a fixed sample of them; machines: of each run."""
    number = len(machines)
    if number < _RUNS or len(set(machines)) < _MACHINES:
        return ()
    every: Iterable[tuple[int, ...]] = combinations(range(number), _RUNS)
    if comb(number, _RUNS) > _MOST_DRAWS:
        rng = random.Random(_SEED)
        every = (tuple(rng.sample(range(number), _RUNS)) for _ in range(_MOST_ATTEMPTS))
    fit = (draw for draw in every if len({machines[i] for i in draw}) >= _MACHINES)
    return tuple(islice(fit, _MOST_DRAWS))


def half_ranges(baseline: Baseline) -> dict[str, float]:
    """Half the range of a case's run medians over their median, for the cases that two or more runs hold."""
    medians = {case_id: [t.median for _, t in runs] for case_id, runs in baseline.cases.items() if len(runs) > 1}
    return {case_id: float(_half_range(seconds)) for case_id, seconds in medians.items()}


def half_ranges_of_six(baseline: Baseline, witness: str = "time") -> dict[str, float]:
    """The mean of the half ranges of draws of six runs of at least three machines, for the cases that have such.

    witness: "time" or "cycles".
    """
    of_card, found = machines(baseline.runs), {}
    for case_id, runs in baseline.cases.items():
        values = [_witnessed(timing, witness) for _, timing in runs]
        drawn = draws(tuple(of_card[card_of(session)] for session, _ in runs))
        if drawn and all(values):
            found[case_id] = float(_half_range(np.array(values)[np.array(drawn)]).mean())
    return found


def half_ranges_on_a_card(baseline: Baseline) -> dict[str, float]:
    """The half range among the runs of one card; of the cards that have two or more, the median one's."""
    found = {}
    for case_id, runs in baseline.cases.items():
        cards = _by_card((session, timing.median) for session, timing in runs)
        if several := [float(_half_range(seconds)) for seconds in cards.values() if len(seconds) > 1]:
            found[case_id] = median(several)
    return found


def _half_range(values: ArrayLike) -> Floats:
    """Along the last axis."""
    values = np.asarray(values, dtype=np.float64)
    return np.asarray(np.ptp(values, axis=-1) / 2 / np.median(values, axis=-1))


def _witnessed(timing: Timing, witness: str) -> float:
    """Seconds, or cycles; 0 where it knows none."""
    return timing.median if witness == "time" else float(timing.record.get("cycles") or 0.0)


def _by_card(values: Iterable[tuple[str, float]]) -> dict[str, list[float]]:
    """Values of runs, given with their sessions, by card."""
    cards: dict[str, list[float]] = {}
    for session, value in values:
        cards.setdefault(card_of(session), []).append(value)
    return cards


def spread(baseline: Baseline, policy: Policies = POLICIES) -> list[str]:
    """How well runs repeat, as a Markdown table by operation, mode and provider, and the blind cases by name.

    Smallest detectable slowdowns are those of a run on the card of the newest accepted one.
    """
    baseline = baseline.on(card_of(baseline.runs[-1].session))
    found = _Found(baseline, policy)
    several = len(set(machines(baseline.runs).values()))
    lines = [
        f"{baseline.label}, {_plural(several, 'machine')}: {_plural(len(baseline.cases), 'case')}, "
        f"{len(found.of_all)} of them in two or more runs. Half the range of a case's medians over their median: of six runs "
        f"of at least three machines the mean over draws of such runs ({len(found.of_six)} cases), and of all its runs.",
        "",
        "| cases | number | six runs <= 0.3 % | <= 1 % | in cycles <= 1 % | all runs <= 0.3 % | <= 1 % | median | largest "
        "| one card | smallest slowdown seen |",
        "|---|---:|---:|---:|---:|---:|---:|---:|---:|---:|---:|",
    ]
    lines += [found.row(name, members) for name, members in _groups(baseline, found.of_all)]
    blind = found.blind()
    lines += [
        "",
        f"{_plural(len(blind), 'blind case')}: a half range of all runs beyond 1 %, or a smallest detectable slowdown beyond "
        "the policy's.",
    ]
    return lines + [f"- `{case_id}`: {found.told(case_id)}" for case_id in blind]


class _Found:
    """What a baseline shows of each case: half ranges by case id, and smallest detectable slowdowns."""

    def __init__(self, baseline: Baseline, policy: Policies) -> None:
        self._baseline, self._policy = baseline, policy
        self.of_all, self._on_card = half_ranges(baseline), half_ranges_on_a_card(baseline)
        self.of_six, self._cycles_of_six = half_ranges_of_six(baseline), half_ranges_of_six(baseline, "cycles")
        self._mdes = detectable(baseline, policy)

    def row(self, name: str, members: Sequence[str]) -> str:
        """A row of the table, of cases that two or more runs hold."""
        if not members:
            return f"| {name} | 0 | | | | | | | | | |"
        ranges = [self.of_all[c] for c in members]
        six, cycles = ([by[c] for c in members if c in by] for by in (self.of_six, self._cycles_of_six))
        on_card = [self._on_card[c] for c in members if c in self._on_card]
        within = [_share_within(values, share) for values in (six, ranges) for share in _SHARES]
        within.insert(2, _share_within(cycles, _SHARES[1]))
        sizes = median(ranges), max(ranges), median(on_card) if on_card else None, median(self._mdes[c] for c in members)
        cells = name, str(len(members)), *within, *("" if size is None else f"{size:.2%}" for size in sizes)
        return f"| {' | '.join(cells)} |"

    def blind(self) -> list[str]:
        """The cases whose runs spread by more than 1 %, or that are blind by the policy, the blindest first."""
        wide = {c for c in self._baseline.cases if self.of_all.get(c, 1.0) > _SHARES[1]}
        unseen = {c for c, mde in self._mdes.items() if mde > policy_of(self._policy, self._baseline.newest(c)).blind}
        return sorted(wide | unseen, key=lambda case_id: -self._mdes[case_id])

    def told(self, case_id: str) -> str:
        ranges = (f"half range {_percent(self.of_all.get(case_id))}", f"of six runs {_percent(self.of_six.get(case_id))}")
        return f"{', '.join(ranges)}, smallest slowdown seen {_percent(self._mdes[case_id])}"


def by_card(baseline: Baseline) -> list[str]:
    """The cases whose half range of six runs, or of all where there is none, is beyond 1 %: what each card reads, as Markdown.

    The mean of a card's runs beside the median card, time and cycles. Cards that differ in time alone run at other clocks;
    where a column reads like the others and the case is wide all the same, runs of one card differ.
    """
    ranges = half_ranges(baseline) | half_ranges_of_six(baseline)
    wide = sorted((c for c in ranges if ranges[c] > _SHARES[1]), key=lambda case_id: -ranges[case_id])
    # Of runs that today's are not compared with a card may be left that holds none of them.
    holding = {card_of(session) for case_id in wide for session, _ in baseline.cases[case_id]}
    cards = [card for card in baseline.cards if card in holding]
    if not wide or len(cards) < 2:
        return []
    lines = [
        f"Beyond 1 %: {_plural(len(wide), 'case')}. Each card's mean beside the median card, in % of time and of cycles:",
        "",
        f"| case | {' | '.join(card[:8] for card in cards)} | widest on a card |",
        f"|---|{'---:|' * (len(cards) + 1)}",
    ]
    return lines + [_card_row(baseline, case_id, cards) for case_id in wide]


def _card_row(baseline: Baseline, case_id: str, cards: Sequence[str]) -> str:
    times, cycles = (
        _by_card((session, _witnessed(timing, witness)) for session, timing in baseline.cases[case_id])
        for witness in ("time", "cycles")
    )
    cells = [f"{_beside(times, card)} / {_beside(cycles, card)}" if card in times else "" for card in cards]
    return f"| `{case_id}` | {' | '.join(cells)} | {max(float(_half_range(values)) for values in times.values()):.2%} |"


def _beside(by_card: dict[str, list[float]], card: str) -> str:
    means = {other: mean(values) for other, values in by_card.items()}
    return f"{100 * (means[card] / median(means.values()) - 1):+.1f}" if all(means.values()) else "-"


def _groups(baseline: Baseline, members: Iterable[str]) -> list[tuple[str, list[str]]]:
    groups: dict[str, list[str]] = {}
    everyone = list(members)
    for case_id in everyone:
        record = baseline.newest(case_id).record
        name = " ".join(str(record[key]) for key in ("op", "mode", "provider") if record.get(key))
        groups.setdefault(name or "other", []).append(case_id)
    return [*sorted(groups.items()), ("**all**", everyone)]


def _share_within(ranges: Sequence[float], bound: float) -> str:
    return f"{sum(r <= bound for r in ranges) / len(ranges):.0%}" if ranges else ""


def _plural(number: int, noun: str) -> str:
    return f"{number} {noun}{'' if number == 1 else 's'}"


def _percent(share: float | None) -> str:
    return "unknown" if share is None else f"{share:.2%}"
