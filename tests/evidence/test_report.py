"""The comparison table, as text."""

import pytest

from fp4bench.evidence.baselines import Baseline, Timing
from fp4bench.evidence.report import comparison, counts, duration, environment_changes
from fp4bench.evidence.verdict import Outcome, Verdict


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (2.5, "2.500 s"),
        (1.0, "1.000 s"),
        (0.0481, "48.10 ms"),
        (12.4e-6, "12.40 us"),
        (1.234e-3, "1.234 ms"),
        (4e-8, "0.04000 us"),
    ],
)
def test_durations_have_four_digits_and_a_fitting_unit(seconds, text):
    assert duration(seconds) == text


def test_a_line_shows_baseline_now_change_and_outcome(tmp_path):
    baseline = Baseline(tmp_path, "", {}, {"a": Timing(1e-3, 1e-3, {}), "b": Timing(1e-3, 1e-3, {})})
    now = {"a": Timing(1.5e-3, 1e-3, {}), "b": Timing(1.01e-3, 1e-3, {}), "new": Timing(2e-3, 2e-3, {})}
    verdicts = {
        "a": Verdict(Outcome.REGRESSED, "", 0.5),
        "b": Verdict(Outcome.SAME, "", 0.01),
        "new": Verdict(Outcome.NEW, "not_in_baseline"),
    }
    assert [line.split() for line in comparison(baseline, now, verdicts)] == [
        ["case", "baseline", "now", "change"],
        ["a", "1.000", "ms", "1.500", "ms", "+50.0%", "REGRESSED"],
        ["b", "1.000", "ms", "1.010", "ms", "+1.0%"],
        ["new", "2.000", "ms", "NEW"],
    ]
    assert counts(verdicts) == "1 REGRESSED, 1 SAME, 1 NEW"


def test_no_verdicts_are_said_so():
    assert counts({}) == "no case was timed"


def test_changed_facts_of_the_machine_are_named(tmp_path):
    baseline = Baseline(tmp_path, "", {"torch": "2.11.0", "driver": "580"}, {})
    assert environment_changes(baseline, {"torch": "2.13.0", "driver": "580"}) == "torch 2.11.0 -> 2.13.0"
