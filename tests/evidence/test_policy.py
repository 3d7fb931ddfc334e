"""The shipped policy on simulated machines: how often it cries wolf, and what it sees. Both can fail, as the last tests show.

Noise in logarithms, as measured on H200s: each card has its own speed in each case (0.1 % apart in most cases, 3 % in a tenth),
and processes on one card repeat within 0.03-0.15 %; a few cases are much worse, and one takes 4 % longer in a third of all
processes. A drift of a card from day to day comes on top. Cycles share most of the noise of time. The whole gate runs,
repetitions included.
"""

from dataclasses import dataclass, replace
from functools import cache

import numpy as np
import pytest
from recorded import baseline, timing

from fp4bench.evidence import gate, statistics
from fp4bench.evidence.gate import judge_run
from fp4bench.evidence.verdict import POLICIES, Outcome, detectable

CASES = tuple(f"c{i}" for i in range(60))
STAMPS = POLICIES["cuda_graph_stamps"]
BAD, BIMODAL = 3, 1  # the first cases are bad, the next is bimodal
DRIFT = 0.0007


class Machine:
    """Sixty cases on cards that differ: by 0.1 % in 60 % of the cases, 0.7 % in 30 %, 3 % in 10 %."""

    def __init__(self, rng):
        self.rng = rng
        self.between = rng.permutation(np.repeat([0.001, 0.007, 0.03], [36, 18, 6]))
        self.within = rng.uniform(0.0003, 0.0015, len(CASES))
        self.within[:BAD] = rng.uniform(0.01, 0.02, BAD)
        self.speed = np.log(rng.uniform(10e-6, 1e-3, len(CASES)))

    def card(self):
        """Deviations of time and cycles that all runs of a card share."""
        return self._witnesses(self.between)

    def day(self, card):
        """The same of a card on one day."""
        drift = self._witnesses(np.full(len(CASES), DRIFT))
        return card[0] + drift[0], card[1] + drift[1]

    def run(self, day, slowdown=0.0):
        """One process's timings by case id."""
        own = self._witnesses(self.within)
        slow = np.zeros(len(CASES))
        slow[BAD : BAD + BIMODAL] = 0.04 * (self.rng.uniform(size=BIMODAL) < 0.3)
        time = self.speed + day[0] + own[0] + slow + slowdown
        cycles = self.speed + 21.3 + day[1] + own[1] + slow + slowdown
        return {c: timing(t, cycles=n) for c, t, n in zip(CASES, np.exp(time).tolist(), np.exp(cycles).tolist(), strict=True)}

    def _witnesses(self, sd):
        """Two deviations of this standard deviation each, of which 80 % of the variance is common."""
        common, time, cycles = self.rng.normal(0, 1, (3, len(CASES)))
        return tuple(sd * (0.8**0.5 * common + 0.2**0.5 * own) for own in (time, cycles))


@dataclass(frozen=True)
class Scenario:
    """What is accepted, and whether the run to be judged is of the first of these cards, or of another."""

    cards: int
    runs: int
    known: bool = True


SCENARIOS = {
    "six-cards-of-two-runs": Scenario(6, 2),
    "one-card-of-four-runs": Scenario(1, 4),
    "one-card-of-one-run": Scenario(1, 1),
    "an-unknown-card-beside-six": Scenario(6, 2, known=False),
}


@dataclass(frozen=True)
class Injection:
    """A case that was slowed down: whether it claims to show that, whether it was found, and whether it is bad or bimodal."""

    seeing: bool
    found: bool
    noisy: bool


def gate_runs(scenario, policy=STAMPS, slowdown=0.0, machines=60, runs=5, slowed=6, disguised=False):
    """The false alarms of each gate run, all injections, and the share of cases that claim to see 2 % on each machine.

    disguised: a run of an unknown card says that it is of the first.
    """
    rng = np.random.default_rng((scenario.cards, scenario.runs, scenario.known, round(slowdown * 1e4)))
    alarms, injections, claims = [], [], []
    for _ in range(machines):
        machine = Machine(rng)
        cards = [machine.card() for _ in range(scenario.cards)]
        # The runs of a card are of one day: its drift is not among what they show.
        days = [machine.day(card) for card in cards]
        stored = [(f"GPU-{i} 2026-11-01", machine.run(day)) for i, day in enumerate(days) for _ in range(scenario.runs)]
        card = "GPU-0" if scenario.known or disguised else "GPU-unknown"
        before = baseline(*(run for _, run in stored), sessions=[session for session, _ in stored], card=card)
        mde = detectable(before, policy)
        claims.append(rate(mde[c] <= 0.02 for c in CASES))
        for _ in range(runs):
            day, by = machine.day(cards[0] if scenario.known else machine.card()), np.zeros(len(CASES))
            if slowdown:
                by[rng.choice(len(CASES), slowed, replace=False)] = np.log1p(slowdown)

            def measure_again(case_ids, machine=machine, day=day, by=by):
                return {c: t for c, t in machine.run(day, by).items() if c in case_ids}

            found = judge_run(before, machine.run(day, by), policy, {}, {}, measure_again, sleep=lambda _: None)
            hit = {c for c, verdict in found.items() if verdict.outcome is Outcome.REGRESSED}
            injected = {CASES[i] for i in by.nonzero()[0]}
            alarms.append(sorted(hit - injected))
            injections += [Injection(mde[c] <= slowdown, c in hit, c in CASES[: BAD + BIMODAL]) for c in injected]
    return alarms, injections, claims


def rate(values):
    values = list(values)
    return sum(values) / len(values)


@cache
def shipped(name, slowdown=0.0):
    return gate_runs(SCENARIOS[name], slowdown=slowdown)


# One per cent of runs is promised; of 300 runs two are within chance of that, seven (2.3 %) are not.
MOST_ALARMS = 6
# What a case claims before its card's runs have shown its noise is an allowance, which four of sixty cases here exceed.
LEAST_FOUND = dict.fromkeys(SCENARIOS, 0.95) | {"one-card-of-one-run": 0.93}
LEAST_CLAIMED = {
    "six-cards-of-two-runs": 0.85,
    "one-card-of-four-runs": 0.85,
    "one-card-of-one-run": 0.85,
    "an-unknown-card-beside-six": 0.3,
}


@pytest.mark.parametrize("name", SCENARIOS)
def test_unchanged_code_is_rarely_called_slower(name):
    alarms, _, _ = shipped(name)
    assert len(alarms) == 300
    assert sum(map(bool, alarms)) <= MOST_ALARMS


@pytest.mark.parametrize("name", SCENARIOS)
def test_two_per_cent_are_found_in_cases_that_claim_to_show_them(name):
    alarms, injections, _ = shipped(name, 0.02)
    seeing = [injection.found for injection in injections if injection.seeing]
    assert len(seeing) > 300
    assert rate(seeing) >= LEAST_FOUND[name]
    assert sum(map(bool, alarms)) <= MOST_ALARMS  # nor does a true regression drag others with it


def test_two_per_cent_are_found_in_all_but_the_noisy_cases_from_the_first_run_on():
    _, injections, _ = shipped("one-card-of-one-run", 0.02)
    assert rate(i.found for i in injections if not i.noisy) >= 0.95


@pytest.mark.parametrize("name", SCENARIOS)
def test_most_cases_claim_to_show_two_per_cent_on_a_known_card(name):
    _, _, claims = shipped(name)
    assert rate(claims) >= LEAST_CLAIMED[name]


def test_five_per_cent_are_found_nearly_always():
    _, injections, _ = gate_runs(SCENARIOS["six-cards-of-two-runs"], slowdown=0.05, machines=12)
    assert rate(i.found for i in injections if i.seeing) >= 0.99
    assert rate(i.seeing for i in injections) > 0.85


@pytest.mark.parametrize("name", ["six-cards-of-two-runs", "one-card-of-four-runs"])
def test_the_noisy_cases_are_those_that_are_declared_blind(name):
    _, injections, _ = shipped(name, 0.02)
    assert rate(i.seeing for i in injections if i.noisy) < 0.25  # a bimodal case may have shown one mode alone
    assert rate(i.seeing for i in injections if not i.noisy) > 0.9


@pytest.mark.parametrize("cards", [Scenario(1, 4, known=False), Scenario(2, 4, known=False)], ids=str)
def test_one_or_two_cards_do_not_show_how_cards_differ(cards):
    alarms, _, _ = gate_runs(cards, machines=30)
    assert sum(map(bool, alarms)) <= MOST_ALARMS


# What the tests above would miss if they could not fail


def test_samples_taken_for_runs_would_be_caught(monkeypatch):
    """The error of a median over a run's own samples is a fraction of that between runs."""
    honest = statistics.standard_error
    monkeypatch.setattr(statistics, "standard_error", lambda spread: honest(spread) / 5)
    monkeypatch.setattr(gate, "_variances", lambda *_: (0.0, 0.0))
    alarms, _, _ = gate_runs(SCENARIOS["an-unknown-card-beside-six"], machines=12)
    assert rate(map(bool, alarms)) > 2 * MOST_ALARMS / 300


def test_cards_taken_for_one_would_be_caught():
    """Runs of a card are compared with runs of it: those of others taken for its own would be false alarms."""
    alarms, _, _ = gate_runs(SCENARIOS["an-unknown-card-beside-six"], machines=6, disguised=True)
    assert rate(map(bool, alarms)) > 0.5


def test_looks_that_scatter_unnoticed_would_be_caught(monkeypatch):
    monkeypatch.setattr(gate, "_variances", lambda *_: (0.0, 0.0))
    alarms, _, _ = gate_runs(SCENARIOS["one-card-of-one-run"], machines=40)
    assert rate(map(bool, alarms)) > 2 * MOST_ALARMS / 300


def test_a_gate_that_is_blind_would_be_caught():
    _, injections, _ = gate_runs(SCENARIOS["six-cards-of-two-runs"], replace(STAMPS, floor=0.03), 0.02, machines=10)
    assert rate(i.found for i in injections) < 0.05


def test_a_promise_without_its_margin_would_be_caught(monkeypatch):
    """The detectable slowdown must be beyond the threshold, which is passed by half of the injections of its size."""
    monkeypatch.setattr(statistics, "detectable", statistics.threshold)
    scenario, policy = SCENARIOS["six-cards-of-two-runs"], replace(STAMPS, floor=0.0195)
    _, injections, _ = gate_runs(scenario, policy, 0.02, machines=10)
    assert rate(i.found for i in injections if i.seeing) < 0.95
