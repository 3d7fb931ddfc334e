"""A suspect is measured again in fresh processes, and fails only if it is slower every time and on the mean."""

from dataclasses import replace

import pytest
from recorded import baseline, timing

from fp4bench.evidence.gate import judge_run
from fp4bench.evidence.verdict import POLICIES, Outcome

POLICY = replace(POLICIES["cuda_graph_stamps"], repetitions=3, pause_seconds=4)
OTHERS = {f"same{i}": timing(1.0) for i in range(20)}


@pytest.fixture
def gate():
    """judge_run over accepted runs of about 1 s for each case; `again` holds what each repetition reads; a log of its calls."""
    log = []

    def run(now, again, policy=POLICY, before=1.0, sd=0.001, expected=None, floors=None):
        readings = {case_id: iter(values) for case_id, values in again.items()}

        def measure_again(case_ids):
            log.append(tuple(case_ids))
            answers = ((case_id, next(readings[case_id], None)) for case_id in case_ids)
            return {c: a if isinstance(a, str) or hasattr(a, "median") else timing(a) for c, a in answers if a is not None}

        now = {c: value if hasattr(value, "median") else timing(value) for c, value in now.items()} | OTHERS
        names = [*(c for c in now if c != "new"), *(expected or ())]
        offsets = (-1.26, -0.64, -0.2, 0.2, 0.64, 1.26)
        runs = [{c: timing(before * (1 + sd * o)) for c in names} for o in offsets]
        verdicts = judge_run(
            baseline(*runs), now, policy, floors or {}, expected or {}, measure_again, sleep=lambda s: log.append(s)
        )
        return {c: verdict for c, verdict in verdicts.items() if c not in OTHERS}

    return run, log


def test_slower_every_time_is_regressed(gate):
    run, log = gate
    verdicts = run({"a": 1.04, "b": 1.0}, {"a": [1.04, 1.03, 1.05]})
    assert [v.outcome for v in verdicts.values()] == [Outcome.REGRESSED, Outcome.SAME]
    assert verdicts["a"].reason == "confirmed"
    assert verdicts["a"].change == pytest.approx(0.04, abs=1e-4)  # of the first measurement, which is the one that is stored
    assert "4 looks +4.0%, +4.0%, +3.0%, +5.0% (cycles +4.0%, +4.0%, +3.0%, +5.0%)" in verdicts["a"].detail
    assert log == [("a",), 4, ("a",), 4, ("a",)]


def test_once_not_slower_clears_a_case_and_is_said(gate):
    run, log = gate
    verdicts = run({"a": 1.04, "b": 1.04}, {"a": [1.04, 1.004], "b": [1.04, 1.04, 1.04]})
    assert (verdicts["a"].outcome, verdicts["a"].reason) == (Outcome.SAME, "not_confirmed")
    assert verdicts["a"].detail.startswith("not slower when measured again: 3 looks +4.0%, +4.0%, +0.4%")
    assert verdicts["b"].outcome is Outcome.REGRESSED
    assert log == [("a", "b"), 4, ("a", "b"), 4, ("b",)]


def test_both_witnesses_must_confirm(gate):
    run, _ = gate
    lower_clock = timing(1.04, cycles=1800e6, mhz=1731.0)
    verdict = run({"a": 1.04}, {"a": [lower_clock] * 3})["a"]
    assert (verdict.outcome, verdict.reason) == (Outcome.INCONCLUSIVE, "one_witness")
    assert "; slower when measured again, but not by cycles: 2 looks +4.0%, +4.0% (cycles +4.0%, +0.0%)" in verdict.detail


def test_a_repetition_slower_by_the_second_witness_alone_clears_a_case(gate):
    run, _ = gate
    verdict = run({"a": 1.04}, {"a": [timing(1.0, cycles=1.04 * 1800e6)]})["a"]
    assert (verdict.outcome, verdict.reason) == (Outcome.SAME, "not_confirmed")


def test_the_mean_of_all_looks_must_pass_too(gate):
    run, log = gate
    # Each repetition is slower by more than half the floor, their mean by less than the floor.
    verdict = run({"a": 1.012}, {"a": [1.006, 1.006, 1.006]})["a"]
    assert (verdict.outcome, verdict.reason) == (Outcome.SAME, "not_confirmed")
    assert verdict.detail.startswith("the mean of all looks is not slower: 4 looks +1.2%, +0.6%")
    assert len(log) == 5


def test_an_undecided_case_gets_its_second_looks(gate):
    run, log = gate
    # Noise of 1 %: 3 % is not significant in one look, and the mean of the looks is.
    assert run({"a": 1.03}, {}, replace(POLICY, repetitions=0), sd=0.01)["a"].outcome is Outcome.INCONCLUSIVE
    assert log == []
    assert run({"a": 1.03}, {"a": [1.045, 1.045, 1.045]}, sd=0.01)["a"].outcome is Outcome.REGRESSED


def test_looks_that_differ_more_than_accepted_runs_do_confirm_nothing(gate):
    run, _ = gate
    # Each is slower than half the floor, their mean is beyond anything that six runs of 0.1 % would have by chance.
    verdict = run({"a": 1.04}, {"a": [1.01, 1.03, 1.06]})["a"]
    assert (verdict.outcome, verdict.reason) == (Outcome.INCONCLUSIVE, "not_significant")
    assert "mean of 4 looks +4.0%, +1.0%, +3.0%, +6.0%" in verdict.detail
    assert run({"a": 1.04}, {"a": [1.037, 1.035, 1.039]})["a"].outcome is Outcome.REGRESSED


def test_cycles_that_differ_between_looks_confirm_nothing(gate):
    run, _ = gate
    looks = [timing(1.04, cycles=1800e6 * factor) for factor in (1.01, 1.03, 1.06)]
    assert run({"a": 1.04}, {"a": looks})["a"].outcome is Outcome.INCONCLUSIVE


def test_one_repetition_shows_a_scatter_too(gate):
    run, _ = gate
    once = replace(POLICY, repetitions=1)
    assert run({"a": 1.04}, {"a": [1.04]}, once)["a"].outcome is Outcome.REGRESSED
    assert run({"a": 1.04}, {"a": [1.006]}, once)["a"].outcome is Outcome.INCONCLUSIVE


def test_an_undecided_case_that_stays_so_says_its_looks(gate):
    run, _ = gate
    verdict = run({"a": 1.03}, {"a": [1.03, 1.03, 1.03]}, sd=0.01)["a"]
    assert verdict.outcome is Outcome.INCONCLUSIVE
    assert "mean of 4 looks +3.0%, +3.0%, +3.0%, +3.0%" in verdict.detail


def test_an_undecided_case_of_one_witness_stays_undecided(gate):
    run, log = gate
    alone = timing(1.05, cycles=1800e6)
    verdict = run({"a": alone}, {"a": [alone] * 3})["a"]
    assert (verdict.outcome, verdict.reason) == (Outcome.INCONCLUSIVE, "one_witness")
    assert "2 looks" in verdict.detail
    assert log == [("a",)]


def test_an_undecided_case_that_is_not_slower_is_not_measured_again(gate):
    run, log = gate
    verdicts = run({"cycles_alone": timing(1.001, cycles=1.05 * 1800e6), "faster_alone": timing(0.95, cycles=1800e6)}, {})
    assert {verdict.outcome for verdict in verdicts.values()} == {Outcome.INCONCLUSIVE}
    assert log == []


@pytest.mark.parametrize(("many", "measured"), [(20, 20), (21, 0)])
def test_undecided_cases_are_measured_again_if_they_are_few(gate, many, measured):
    run, log = gate
    run({f"u{i}": 1.03 for i in range(many)}, {f"u{i}": [1.0] for i in range(many)}, sd=0.01)
    assert sum(map(len, log)) == measured


@pytest.mark.parametrize("answer", ["CUDA error: out of memory", None])
def test_a_suspect_that_fails_is_inconclusive_and_says_so(gate, answer):
    run, log = gate
    verdict = run({"a": 1.04}, {"a": [1.04, answer]})["a"]
    assert (verdict.outcome, verdict.reason) == (Outcome.INCONCLUSIVE, "repetition_failed")
    assert verdict.detail.endswith(
        f"failed when measured again, 2 looks +4.0%, +4.0% (cycles +4.0%, +4.0%): {answer or 'no answer'}"
    )
    assert verdict.change == pytest.approx(0.04, abs=1e-4)
    assert log == [("a",), 4, ("a",)]


def test_a_repetition_on_another_clock_decides_nothing(gate):
    run, _ = gate
    verdict = run({"a": 1.04}, {"a": [timing(1.04, clock="cuda_events")]})["a"]
    assert (verdict.outcome, verdict.reason) == (Outcome.INCONCLUSIVE, "repetition_not_comparable")
    assert "clock was cuda_graph_stamps, is cuda_events" in verdict.detail


def test_nothing_is_measured_again_without_a_suspect(gate):
    run, log = gate
    verdicts = run({"a": 1.005, "fast": 0.5, "new": 9.0}, {}, expected={"gone": "skipped: no GPU"})
    assert [v.outcome for v in verdicts.values()] == [Outcome.SAME, Outcome.FASTER, Outcome.NEW, Outcome.MISSING]
    assert log == []


def test_without_repetitions_the_first_look_counts(gate):
    run, log = gate
    verdicts = run({"a": 1.04}, {}, replace(POLICY, repetitions=0))
    assert (verdicts["a"].outcome, verdicts["a"].reason) == (Outcome.REGRESSED, "slower")
    assert log == []


def test_a_floor_of_its_own_holds_for_repetitions_too(gate):
    run, _ = gate
    assert run({"a": 1.08}, {"a": [1.02] * 3}, floors={"a": 0.05})["a"].outcome is Outcome.SAME
    assert run({"a": 1.08}, {"a": [1.08] * 3}, floors={"a": 0.05})["a"].outcome is Outcome.REGRESSED


def test_cases_of_two_clocks_are_repeated_as_their_policies_say(gate):
    _, log = gate
    policies = {"cuda_graph_stamps": replace(POLICY, repetitions=1), "cuda_events": replace(POLICY, repetitions=2)}
    events = timing(1.3, clock="cuda_events")
    verdicts = judge_run(
        baseline(*[{"a": timing(1.0), "e": timing(1.0, clock="cuda_events")}] * 3),
        {"a": timing(1.3), "e": events},
        policies,
        {},
        {},
        lambda ids: log.append(tuple(ids)) or {"a": timing(1.3), "e": events},
        sleep=log.append,
    )
    assert {v.outcome for v in verdicts.values()} == {Outcome.REGRESSED}
    assert log == [("a", "e"), 4, ("e",)]
