"""Side by side on the same stored runs: what rules of other tools, and the gate's, flag and miss.

Where the numbers of the other tools come from:
- pytest-benchmark 5.3, `--benchmark-compare-fail=median:5%`: fails a case whose median is more than 5 % above one stored run's.
- gpucheck 0.1.0: its fixture drops samples further than 1.5 interquartile ranges from the quartiles; a regression has p < 0.05
  in a two-sided Mann-Whitney test (normal approximation, corrected for ties, not for continuity) and a median of at least 1.1
  times the stored one's. Its samples are times of single calls, ours are means of a graph's calls.
- triton 3.6, `do_bench_cudagraph(rep=200)`: the mean of 10 replays of a graph of 200 ms of calls, L2 warm and the clock as it
  comes. It has no rule of its own; the 5 % on it are what a user would take.
"""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from statistics import median
from types import MappingProxyType
from typing import Any

import numpy as np
from scipy import stats

from fp4bench.evidence.baselines import Baseline, StoredRun, Timing, not_comparable
from fp4bench.evidence.histories import card_of, has_own_runs
from fp4bench.evidence.power import interval, percent
from fp4bench.evidence.verdict import POLICIES, Outcome, Policies, judge

MEDIAN_5 = "pytest-benchmark, median:5%"
MEDIAN_2 = "pytest-benchmark, median:2%"
RANKS = "Mann-Whitney on samples, p < 0.05"
GPUCHECK = "gpucheck 0.1.0: the same, and medians 10 % apart"
DO_BENCH = "do_bench_cudagraph(rep=200), 5 %"
FIRST_LOOK = "fp4bench, first look"
CONFIRMED = "fp4bench, as the gate ended"
RULES = (MEDIAN_5, MEDIAN_2, RANKS, GPUCHECK, DO_BENCH, FIRST_LOOK, CONFIRMED)

SAME_CARD, OTHER_CARD = "same card", "other card"
_ANY_CARD = "its baseline then"

_NOTHING_TOLD: Mapping[tuple[str, str], Mapping[str, bool]] = MappingProxyType({})

_ALPHA = 0.05
_FENCE = 1.5
_LEAST_RATIO = 1.1


@dataclass(frozen=True, eq=False)
class Sampled:
    """A stored run and its raw samples, seconds by case id; empty where they were not kept."""

    run: StoredRun
    samples: Mapping[str, Sequence[float]] = field(default_factory=dict)

    @property
    def identity(self) -> tuple[str, str]:
        """What an accepted copy of a run shares with it."""
        return self.run.session, self.run.datetime


@dataclass(frozen=True)
class Answer:
    """What one rule said of one case of one run. injected: its slowdown, None on unchanged code."""

    rule: str
    compared_with: str
    run: str
    case_id: str
    injected: float | None
    flagged: bool


@dataclass(frozen=True)
class Count:
    """The answers of one rule, counted.

    cases, flags: of unchanged cases. runs, flagged_runs: of those that hold any. injected: detected and trials by slowdown, the
    smallest first. alarms: how often by case id. missed: the same by slowdown.
    """

    rule: str
    compared_with: str
    cases: int
    flags: int
    runs: int
    flagged_runs: int
    injected: Mapping[float, tuple[int, int]]
    alarms: Mapping[str, int]
    missed: Mapping[float, Mapping[str, int]]


def beyond(before: float, after: float, share: float) -> bool:
    """Whether a time is more than `share` above an earlier one, as pytest-benchmark computes it."""
    return after / before * 100 - 100 > share * 100


def without_outliers(seconds: Sequence[float]) -> list[float]:
    """The samples, at least one, within 1.5 interquartile ranges of the quartiles. Of three or fewer none is ever beyond."""
    low, high = np.quantile(seconds, (0.25, 0.75))
    reach = _FENCE * (high - low)
    return [value for value in seconds if low - reach <= value <= high + reach]


def ranks_higher(before: Sequence[float], after: Sequence[float], least_ratio: float = 1.0) -> bool:
    """Whether samples are slower: p < 0.05 in a two-sided Mann-Whitney test, the median higher and by the least ratio."""
    before, after = without_outliers(before), without_outliers(after)
    ratio = median(after) / median(before)
    if ratio <= 1 or ratio < least_ratio:
        return False
    return float(stats.mannwhitneyu(before, after, method="asymptotic", use_continuity=False).pvalue) < _ALPHA


def compare(
    runs: Sequence[Sampled],
    against: Sequence[Sampled],
    baseline: Baseline,
    ended: Mapping[tuple[str, str], Mapping[str, bool]] = _NOTHING_TOLD,
    policy: Policies = POLICIES,
) -> list[Answer]:
    """The answers of every rule but do_bench_cudagraph, of all cases that a rule can compare. All runs are of one machine.

    The other tools know one run: the newest in `against` of the same card that holds the case, or, where there is none, of any
    card. Neither it nor the baseline is ever the run itself, or one with injections. The first look judges by the whole
    baseline, nothing being measured again; no case of an INVALID run.

    ended: by `Sampled.identity`, whether each case was flagged when the gate had confirmed its suspects (`End.flags`); counted
    where the first look can compare too.
    """
    against = [one for one in against if not has_injections(one.run)]
    answers = []
    for sampled in runs:
        answers += _others(sampled, [one for one in against if one.identity != sampled.identity])
        looks = _first_look(sampled, baseline, policy)
        answers += looks
        if end := ended.get(sampled.identity):
            compared = [look.case_id for look in looks if look.case_id in end]
            answers += [_answer(CONFIRMED, _ANY_CARD, sampled.run, case_id, end[case_id]) for case_id in compared]
    return answers


def has_injections(run: StoredRun) -> bool:
    return any(timing.record.get("injected") for timing in run.cases.values())


def do_bench_answers(readings: Sequence[Mapping[str, Any]], slowdowns: Iterable[float] = ()) -> list[Answer]:
    """The 5 % rule on readings of do_bench_cudagraph, each as `fp4bench do-bench` writes it; several may be of one card.

    Each later reading of a case is compared with the first one of its card, and the first one of a card with that of the first
    card. A slowdown that was not read is the reading, scaled.

    Raises ValueError for what holds no readings.
    """
    answers = []
    shares: tuple[float | None, ...] = (None, *slowdowns)
    cards: dict[str, dict[str, float]] = {}
    for number, told in enumerate(readings):
        one = _readings(told)
        others = next(iter(cards.values()), {})
        own = cards.setdefault(one.card, {})
        for case_id, values in one.seconds.items():
            before = [own.get(case_id, values[0])] * len(values)
            scopes = [SAME_CARD] * len(values)
            compared = list(range(len(values)))
            if case_id not in own:
                own[case_id] = values[0]
                if case_id in others:
                    before[0], scopes[0] = others[case_id], OTHER_CARD
                else:
                    compared = compared[1:]
            answers += [
                Answer(
                    DO_BENCH,
                    scopes[i],
                    f"{number}.{i} {one.card}",
                    case_id,
                    share,
                    beyond(before[i], one.slowed_by(share, case_id, i), 0.05),
                )
                for i in compared
                for share in shares
            ]
    return answers


@dataclass(frozen=True)
class _Readings:
    """Of one card: seconds by case, and by slowdown where they were read so too, in the same order."""

    card: str
    seconds: Mapping[str, Sequence[float]]
    slowed: Mapping[float, Mapping[str, Sequence[float]]]

    def slowed_by(self, share: float | None, case_id: str, number: int) -> float:
        if share is None:
            return self.seconds[case_id][number]
        read = self.slowed.get(share, {}).get(case_id)
        return read[number] if read else self.seconds[case_id][number] * (1 + share)


def _readings(told: Mapping[str, Any]) -> _Readings:
    def table(rows: Any) -> dict[str, list[float]]:
        return {str(case_id): [float(value) for value in values] for case_id, values in rows.items()}

    try:
        card, seconds = str(told["uuid"]), table(told["seconds"])
        slowed = {float(share): table(rows) for share, rows in told.get("slowed", {}).items()}
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise ValueError(f"readings of do_bench_cudagraph are {{uuid, seconds: {{case id: [s, ...]}}}}: {error!r}") from error
    for rows in (seconds, *slowed.values()):
        if bad := [case_id for case_id, values in rows.items() if not values or not all(0 < v < float("inf") for v in values)]:
            raise ValueError(f"readings of do_bench_cudagraph of {card} hold no positive seconds for {bad[0]}")
    for rows in slowed.values():
        if bad := [case_id for case_id in rows if len(rows[case_id]) != len(seconds.get(case_id, ()))]:
            raise ValueError(f"readings of do_bench_cudagraph of {card} hold other numbers of slowed ones for {bad[0]}")
    return _Readings(card, seconds, slowed)


def _answer(rule: str, compared_with: str, run: StoredRun, case_id: str, flagged: bool) -> Answer:
    return Answer(rule, compared_with, str(run.path), case_id, run.cases[case_id].record.get("injected") or None, flagged)


def _others(sampled: Sampled, against: Sequence[Sampled]) -> list[Answer]:
    answers = []
    for case_id, timing in sampled.run.cases.items():
        found = _reference(sampled.run, case_id, timing, against)
        if found is None:
            continue
        scope = SAME_CARD if _card(found.run) == _card(sampled.run) else OTHER_CARD
        before = found.run.cases[case_id].median
        flags = {MEDIAN_5: beyond(before, timing.median, 0.05), MEDIAN_2: beyond(before, timing.median, 0.02)}
        if case_id in sampled.samples and case_id in found.samples:
            pair = found.samples[case_id], sampled.samples[case_id]
            flags |= {RANKS: ranks_higher(*pair), GPUCHECK: ranks_higher(*pair, least_ratio=_LEAST_RATIO)}
        answers += [_answer(rule, scope, sampled.run, case_id, flagged) for rule, flagged in flags.items()]
    return answers


def _reference(run: StoredRun, case_id: str, timing: Timing, against: Sequence[Sampled]) -> Sampled | None:
    """The one run that a case is compared with; of two copies of a run, the one with samples."""
    usable = [
        one for one in against if case_id in one.run.cases and not not_comparable(one.run.cases[case_id].record, timing.record)
    ]
    return max(usable, key=lambda one: (_card(one.run) == _card(run), one.run.datetime, case_id in one.samples), default=None)


def _card(run: StoredRun) -> str:
    return card_of(run.session)


def _first_look(sampled: Sampled, baseline: Baseline, policy: Policies) -> list[Answer]:
    run = sampled.run
    others = tuple(one for one in baseline.runs if Sampled(one).identity != sampled.identity)
    if run.info.get("invalid") or not others:
        return []
    known = Baseline(others, _card(run))
    verdicts = judge(known, run.cases, policy)
    return [
        _answer(
            FIRST_LOOK,
            SAME_CARD if has_own_runs(known, case_id) else OTHER_CARD,
            run,
            case_id,
            verdict.outcome is Outcome.REGRESSED,
        )
        for case_id, verdict in verdicts.items()
        if verdict.outcome is not Outcome.NEW
    ]


@dataclass(frozen=True)
class End:
    """How the gate judged a run in the end, as it or a drill told. run: its path as it was named then.

    outcomes: by case id; a drill names those of false alarms and of injected cases alone. seconds: of those that it tells.
    slowdowns: of the injected cases, None where it does not tell.
    """

    run: str
    outcomes: Mapping[str, str]
    seconds: Mapping[str, float]
    slowdowns: Mapping[str, float] | None

    def flags(self, run: StoredRun) -> dict[str, bool]:
        """Whether each judged case of the run was REGRESSED. Raises ValueError where this is how another run ended."""
        slowed = {case_id: t.record["injected"] for case_id, t in run.cases.items() if t.record.get("injected")}
        other = any(run.cases[c].median != value for c, value in self.seconds.items() if c in run.cases)
        if other or (self.slowdowns is not None and dict(self.slowdowns) != slowed):
            raise ValueError(f"{run.path} is not the run that was judged as {self.run}: give the one that was")
        judged = [c for c in run.cases if self.outcomes.get(c) not in ("NEW", "INVALID", "MISSING")]
        return {case_id: self.outcomes.get(case_id) == "REGRESSED" for case_id in judged}


def ends(told: Mapping[str, Any]) -> list[End]:
    """The runs that a verdicts file (`--verdicts`) or a drill's report (`fp4bench drill --json`) tells of.

    Raises ValueError for what is neither. A run that was not stored is left out.
    """
    try:
        found = _drilled(told) if "sessions" in told else [_judged(told)]
    except (KeyError, TypeError, AttributeError, IndexError) as error:
        raise ValueError(f"this is neither a verdicts file nor a drill's report: {error!r}") from error
    return [end for end in found if end.run]


def _judged(told: Mapping[str, Any]) -> End:
    outcomes = {case_id: str(row["outcome"]) for case_id, row in told["cases"].items()}
    seconds = {case_id: row["seconds"] for case_id, row in told["cases"].items() if row["seconds"] is not None}
    return End(told["run"] or "", outcomes, seconds, None)


def _drilled(told: Mapping[str, Any]) -> list[End]:
    found = []
    for number, session in enumerate(told["sessions"]):
        outcomes = {case_id: str(alarm["outcome"]) for case_id, alarm in session["alarms"].items()}
        outcomes |= {one["case_id"]: str(one["outcome"]) for one in told["injections"] if one["session"] == number}
        found.append(End(session["run"] or "", outcomes, {}, session["plan"]))
    return found


def count(answers: Iterable[Answer]) -> list[Count]:
    """A count a rule and what it compares with, in the order of `RULES`."""
    groups: dict[tuple[str, str], list[Answer]] = {}
    for answer in answers:
        groups.setdefault((answer.rule, answer.compared_with), []).append(answer)
    order = sorted(groups, key=lambda key: (RULES.index(key[0]), key[1] == OTHER_CARD))
    return [_count(*key, groups[key]) for key in order]


def _count(rule: str, compared_with: str, answers: Sequence[Answer]) -> Count:
    unchanged = [answer for answer in answers if answer.injected is None]
    alarms = [answer for answer in unchanged if answer.flagged]
    slowed: dict[float, list[Answer]] = {}
    for answer in answers:
        if answer.injected is not None:
            slowed.setdefault(answer.injected, []).append(answer)
    return Count(
        rule,
        compared_with,
        len(unchanged),
        len(alarms),
        len({answer.run for answer in unchanged}),
        len({answer.run for answer in alarms}),
        {share: (sum(a.flagged for a in slowed[share]), len(slowed[share])) for share in sorted(slowed)},
        dict(Counter(answer.case_id for answer in alarms).most_common()),
        {share: dict(Counter(a.case_id for a in slowed[share] if not a.flagged).most_common()) for share in sorted(slowed)},
    )


def table(counts: Sequence[Count]) -> list[str]:
    """A Markdown table: each cell is `hits of trials (95 % interval of the rate)`."""
    shares = sorted({share for one in counts for share in one.injected})
    head = ["rule", "compared with", "false alarms: cases", "false alarms: runs", *(f"detected: {percent(s)}" for s in shares)]
    lines = [f"| {' | '.join(head)} |", f"|---|---|{'---:|' * (len(head) - 2)}"]
    for one in counts:
        cells = [one.rule, one.compared_with, _rate(one.flags, one.cases), _rate(one.flagged_runs, one.runs)]
        cells += [_rate(*one.injected.get(share, (0, 0))) for share in shares]
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def _rate(hits: int, trials: int) -> str:
    if not trials:
        return ""
    low, high = interval(hits, trials)
    return f"{hits} of {trials} ({percent(low)} to {percent(high)})"


def notes(runs: Sequence[Sampled], against: Sequence[Sampled], counts: Sequence[Count]) -> list[str]:
    """What was counted, and what these numbers do not say."""
    slowed = Counter(t.record["injected"] for one in runs for t in one.run.cases.values() if t.record.get("injected"))
    shown = ", ".join(f"{slowed[share]} by {percent(share)}" for share in sorted(slowed))
    cards = {_card(one.run) for one in runs}
    timed = sum(len(one.run.cases) for one in runs)
    rules = {one.rule for one in counts}
    lines = [
        f"{timed} timings in {len(runs)} runs of {len(cards)} cards; {sum(slowed.values())} of them were slowed down on purpose"
        f"{f' ({shown})' if shown else ''}. In brackets: the 95 % interval of the rate (Clopper-Pearson).",
        "pytest-benchmark, Mann-Whitney and gpucheck compare with one run, the newest of the card; other card: where the card "
        "has no other run. fp4bench compares with all accepted runs; other card: where none of them is of this card.",
        f"{FIRST_LOOK}: what it flags is not measured again in fresh processes, as the gate does before it calls it REGRESSED.",
    ]
    if CONFIRMED in rules:
        lines.append(f"{CONFIRMED}: of the runs whose verdicts were given, with the baseline that they were judged by.")
    if DO_BENCH in rules:
        lines.append(
            f"{DO_BENCH}: each later reading against the first one of the card; other card: the first one of a card against "
            "that of the first card; a slowdown was read so where the readings have it, else a reading is scaled."
        )
    if bare := sum(not one.samples for one in runs):
        lines.append(
            f"{bare} of {len(runs)} runs have no raw samples beside them (--benchmark-save-data): no Mann-Whitney test."
        )
    if bad := sum(bool(one.run.info.get("invalid")) for one in runs):
        lines.append(f"{bad} of {len(runs)} runs are INVALID: fp4bench judges none of their cases, the other rules do.")
    if left := sum(has_injections(one.run) for one in against):
        lines.append(f"{left} of {len(against)} runs to compare with have injected slowdowns and were left out.")
    return lines


def as_json(counts: Sequence[Count]) -> list[dict[str, Any]]:
    """The counts as plain JSON values, with the bounds of each rate and the cases behind it."""
    return [
        asdict(one)
        | {
            "cases_interval": interval(one.flags, one.cases),
            "runs_interval": interval(one.flagged_runs, one.runs),
            "injected": [
                {"slowdown": share, "detected": hits, "trials": trials, "interval": interval(hits, trials)}
                for share, (hits, trials) in one.injected.items()
            ],
            "missed": [{"slowdown": share, "cases": cases} for share, cases in one.missed.items()],
        }
        for one in counts
    ]
