"""What becomes of a lucky run that is accepted: on the runs of H200s that are recorded, and on simulated ones.

The rule before was that one run begins a case's history anew; the tests ask of it what they ask of the rule that is shipped.
"""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from recorded import MACHINE, timing

from fp4bench.evidence import histories
from fp4bench.evidence.acceptance import Candidate, Candidates
from fp4bench.evidence.baselines import Baseline, StoredRun, card_of, parse, read, stored_files
from fp4bench.evidence.gate import judge_run
from fp4bench.evidence.verdict import POLICIES, Outcome, judge

RECORDED = Path(__file__).parents[2] / "baselines" / MACHINE
# An eager chain of 49 kernels: 125 us in one process of fifteen, in the others 143. In run 22, the second of its card, 125.
BIMODAL = "quantize-mxfp4-rceil-eager-llama3.3-70b.down.tp1-m64"


def begins_anew_at_two(candidates):
    return candidates.moves[0]


def begins_anew_at_one(candidates):
    moves = candidates.moves[0]
    return replace(moves, restarts=(*moves.restarts, *moves.alone), alone={})


RULES = [begins_anew_at_two, begins_anew_at_one]


def accept_in_turn(runs, rule, baseline=None):
    """The baseline after runs were accepted one by one."""
    for run in runs:
        found = rule(Candidates((Candidate({}, run),), RECORDED, baseline))
        info = run.info | {"accepted": {"restarts": list(found.restarts), "alone": dict(found.alone)}}
        baseline = Baseline((*(baseline.runs if baseline else ()), replace(run, info=info)))
    return baseline


@pytest.fixture(scope="module")
def recorded():
    return [parse(read(path), path) for path in stored_files(RECORDED)[:22]]


@pytest.mark.parametrize("rule", RULES)
def test_the_recorded_runs_accepted_in_turn(recorded, rule):
    lucky, before = recorded[21], recorded[20]
    assert lucky.cases[BIMODAL].median < 0.9 * before.cases[BIMODAL].median
    assert card_of(lucky.session) == card_of(before.session)
    baseline = accept_in_turn(recorded, rule).on(card_of(lucky.session), "paced", False)
    # The next run of this card, as it was recorded in seven of seven later ones: like the first.
    verdict = judge(baseline, before.cases, POLICIES)[BIMODAL]
    if rule is begins_anew_at_one:
        assert verdict.outcome is Outcome.REGRESSED
    else:
        assert verdict.outcome is Outcome.INCONCLUSIVE
        assert verdict.mde > 0.1  # the case is called blind
        assert len(baseline.cases[BIMODAL]) == 22


CASES = tuple(f"c{i}" for i in range(20))
FAST, SHARE = np.log(0.88), 1 / 12


def simulated_run(rng, speed, card, number, lucky=False):
    """The first two cases are fast in a twelfth of all processes; the first one in this one, where it is lucky."""
    case = np.arange(len(CASES))
    luck = np.where((case < 2) & (rng.uniform(size=len(CASES)) < SHARE) | (case == 0) & lucky, FAST, 0.0)
    time = speed[card] + luck + rng.normal(0, 0.0007, len(CASES))
    cases = {c: timing(t) for c, t in zip(CASES, np.exp(time).tolist(), strict=True)}
    path = Path(f"{number:04}_run.json")
    session = f"GPU-{card} 2026-11-{1 + number:02}"
    return StoredRun(path, path.stem, f"{number:04}", {"machine": MACHINE}, {"session": session}, cases)


def alarms(rule, runs, machines=40, gate_runs=3):
    """The share of gate runs that call something slower: three cards' runs accepted in turn, the last one, of GPU-0, lucky."""
    rng = np.random.default_rng(3)
    found = []
    for _ in range(machines):
        speed = np.log(rng.uniform(10e-6, 1e-3, len(CASES))) + rng.normal(0, 0.005, (3, len(CASES)))
        stored = [simulated_run(rng, speed, (runs - 1 - number) % 3, number, number == runs - 1) for number in range(runs)]
        baseline = accept_in_turn(stored, rule).on("GPU-0", "paced", False)

        def measure_again(case_ids, speed=speed):
            again = simulated_run(rng, speed, 0, 9).cases
            return {case_id: again[case_id] for case_id in case_ids}

        for _ in range(gate_runs):
            now = simulated_run(rng, speed, 0, 8).cases
            verdicts = judge_run(baseline, now, POLICIES, {}, {}, measure_again, sleep=lambda _: None)
            found.append(any(verdict.outcome is Outcome.REGRESSED for verdict in verdicts.values()))
    return sum(found) / len(found)


# Where the run before was as lucky, on whatever card, the two confirm each other: one in twelve, and no rule sees more in them.
# Four runs: GPU-0 has an earlier one. Three: the lucky one is all that there is of it.
@pytest.mark.parametrize("runs", [3, 4, 7])
def test_an_accepted_lucky_run_rarely_raises_an_alarm(runs):
    assert alarms(begins_anew_at_two, runs) <= 1.5 * SHARE


def test_one_run_that_begins_a_history_would_be_caught():
    assert alarms(begins_anew_at_one, 4, machines=10) > 0.4


def test_a_lucky_first_run_that_speaks_for_its_card_would_be_caught(monkeypatch):
    monkeypatch.setattr(histories, "_known_card", lambda baseline, _: baseline.card)
    assert alarms(begins_anew_at_two, 3, machines=10) > 0.4
