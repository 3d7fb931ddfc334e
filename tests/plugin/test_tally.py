"""What became of the cases of a session, and whether that is all of them."""

from types import SimpleNamespace

import pytest

from fp4bench.plugin.tally import Tally, case_of


@pytest.fixture
def tally():
    """Three cases: one is skipped from the beginning, one was timed, one is still due."""
    return Tally({"a", "b", "c"}, {"a", "b", "c"}, {"a": "no FP8"}, [], {"b": ("item", "case")})


def test_what_is_due_is_selected_and_not_skipped(tally):
    assert tally.due == {"b", "c"}
    tally.selected.remove("c")
    assert tally.due == {"b"}
    assert tally.left_out == {"c"}


def test_a_run_is_complete_when_all_is_timed_or_skipped(tally):
    assert not tally.complete
    tally.timed["c"] = ("item", "case")
    assert tally.complete
    tally.generated.add("d")  # deselected: its user left it out
    assert tally.complete


def test_a_skip_in_the_test_makes_it_complete(tally):
    tally.skipped["c"] = "too large"
    assert tally.complete


def test_a_case_that_failed_after_it_was_timed_has_no_number(tally):
    tally.timed["c"] = ("item", "case")
    tally.fail("b")
    tally.fail("b")  # its teardown too
    assert tally.failed == ["b"]
    assert list(tally.timed) == ["c"]
    assert not tally.complete


def test_other_tests_have_no_case():
    other = SimpleNamespace(get_closest_marker=lambda name: None, callspec=SimpleNamespace(params={"case": 1}))
    empty = SimpleNamespace(get_closest_marker=lambda name: "mark", callspec=SimpleNamespace(params={"case": "NOTSET"}))
    plain = SimpleNamespace(get_closest_marker=lambda name: "mark")
    assert [case_of(item) for item in (other, empty, plain)] == [None, None, None]
