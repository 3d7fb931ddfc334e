"""How well runs repeat: half ranges of all runs and of six, by time and by cycles, and the table that shows them."""

from dataclasses import replace
from itertools import combinations

import numpy as np
import pytest
from recorded import MACHINE, baseline, timing

from fp4bench.evidence import repeats
from fp4bench.evidence.baselines import BaselineError, StoredRun
from fp4bench.evidence.verdict import POLICIES, detectable

STAMPS = POLICIES["cuda_graph_stamps"]


def run_at(moment, card):
    return StoredRun(None, "run", f"2026-11-{moment}+00:00", {"machine": MACHINE}, {"session": f"{card} 2026-11-01"}, {})


@pytest.mark.parametrize(
    ("runs", "expected"),
    [
        # Two cards beside each other, and one nearly an hour later.
        ([("01T09:00:00", "A"), ("01T09:00:20", "B"), ("01T09:55:00", "C")], "AB C"),
        # In a row: each within ten minutes of the one before, the order of the files aside.
        ([("01T09:18:00", "C"), ("01T09:00:00", "A"), ("01T09:09:00", "B")], "ABC"),
        # A card that comes again is of the same machine, and brings those beside it along.
        (
            [("01T09:00:00", "A"), ("02T09:00:00", "B"), ("03T09:00:00", "B"), ("03T09:05:00", "A"), ("04T09:00:00", "C")],
            "AB C",
        ),
        ([("01T09:00:00", "A"), ("01T09:10:01", "B")], "A B"),
    ],
)
def test_machines_are_told_by_cards_and_moments(runs, expected):
    found = repeats.machines(run_at(moment, card) for moment, card in runs)
    groups = {number: "".join(sorted(c for c, n in found.items() if n == number)) for number in found.values()}
    assert sorted(groups.values()) == sorted(expected.split())


def test_draws_are_all_there_are_where_they_are_few():
    machines = (0, 0, 0, 0, 1, 1, 2)
    every = [draw for draw in combinations(range(7), 6) if len({machines[i] for i in draw}) == 3]
    assert list(repeats.draws(machines)) == every
    assert len(every) == 6  # without the only run of machine 2 there are two machines


@pytest.mark.parametrize("machines", [(0, 1, 2, 0, 1), (0, 1) * 10, ()])
def test_fewer_runs_or_machines_show_nothing(machines):
    assert repeats.draws(machines) == ()


def test_many_draws_are_a_fixed_sample_of_distinct_runs():
    machines = tuple(i % 4 for i in range(30))
    drawn = repeats.draws(machines)
    assert len(drawn) == 1000
    assert all(len(set(draw)) == 6 and len({machines[i] for i in draw}) >= 3 for draw in drawn)
    repeats.draws.cache_clear()
    assert repeats.draws(machines) == drawn
    # Each run is in a fifth of them, but for chance.
    counts = np.bincount(np.array(drawn).ravel(), minlength=30)
    assert 150 < counts.min() <= counts.max() < 250


def on_cards(*values, cycles=None):
    """A baseline of runs of the case "a", each on a card of its own at a day of its own."""
    cycles = cycles or [None] * len(values)
    runs = [{"a": timing(value, cycles=c)} for value, c in zip(values, cycles, strict=True)]
    return baseline(*runs, sessions=[f"GPU-{i} 2026-11-01" for i in range(len(runs))])


def test_the_half_range_of_six_by_hand():
    # Of seven runs one is 10 % slower: six of the seven draws have it, and a half range of 0.05 over a median of 1.
    seven = on_cards(1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.1)
    assert repeats.half_ranges_of_six(seven) == {"a": pytest.approx(0.05 * 6 / 7)}
    assert repeats.half_ranges(seven) == {"a": pytest.approx(0.05)}
    assert repeats.half_ranges_of_six(on_cards(1.0, 1.1, 1.0, 1.0, 1.0)) == {}


def test_cycles_may_agree_where_times_do_not():
    clocks = on_cards(1.0, 1.02, 1.04, 1.0, 1.02, 1.04, cycles=[1.8e9] * 6)
    assert repeats.half_ranges_of_six(clocks) == {"a": pytest.approx(0.02 / 1.02)}
    assert repeats.half_ranges_of_six(clocks, "cycles") == {"a": 0.0}
    assert "a" not in repeats.half_ranges_of_six(on_cards(*[1.0] * 6, cycles=[0.0] * 6), "cycles")


def test_of_six_does_not_grow_with_the_number_of_runs():
    """Half the range of six normal values is 1.267 standard deviations; of 30 it is 2.043."""
    noise = np.random.default_rng(0).normal(1.0, 0.001, (200, 30))
    runs = [{f"c{i}": timing(float(values[k])) for i, values in enumerate(noise)} for k in range(30)]
    many = baseline(*runs, sessions=[f"GPU-{k} 2026-11-01" for k in range(30)])
    assert np.mean(list(repeats.half_ranges_of_six(many).values())) == pytest.approx(1.267e-3, rel=0.03)
    assert np.mean(list(repeats.half_ranges(many).values())) == pytest.approx(2.043e-3, rel=0.03)


def test_each_card_of_a_wide_case_is_shown():
    wide = on_cards(1.0, 1.0, 1.0, 1.0, 1.0, 1.06, cycles=[1e9] * 6)
    lines = repeats.by_card(wide)
    assert lines[0].startswith("Beyond 1 %: 1 case.")
    assert lines[-1] == "| `a` |" + " +0.0 / +0.0 |" * 5 + " +6.0 / +0.0 | 0.00% |"
    assert repeats.by_card(on_cards(*[1.0] * 6)) == []
    assert repeats.by_card(baseline({"a": timing(1.0)}, {"a": timing(1.1)})) == []  # of one card


def test_a_card_that_holds_no_wide_case_has_no_column():
    runs = {"steady": timing(1.0)}, {"a": timing(1.0)}, {"a": timing(1.1)}
    lines = repeats.by_card(baseline(*runs, sessions=[f"GPU-{card} 2026-11-01" for card in "xyz"]))
    assert lines[2] == "| case | GPU-y | GPU-z | widest on a card |"


def test_the_half_range_is_over_the_median():
    spread = repeats.half_ranges(
        baseline(*({"a": timing(t), "b": timing(1.0)} for t in (1.0, 1.02, 1.1)), {"once": timing(1.0)})
    )
    assert spread == {"a": pytest.approx(0.05 / 1.02), "b": 0.0}


def test_the_spread_is_a_table_of_shares_and_names_blind_cases():
    names = {f"c{i}": 1.0 for i in range(8)}
    record = {"op": "gemm", "mode": "w4a16", "provider": "example"}

    def run(sign):
        steady = {c: timing(t * (1 + sign * 0.001), **record) for c, t in names.items()}
        return steady | {"wide": timing(1 + sign * 0.005, **record), "wild": timing(1 + sign * 0.05, **record)}

    lines = repeats.spread(baseline(run(1), run(-1), run(1), run(-1)), STAMPS)
    cells = next(line for line in lines if line.startswith("| **all**")).split(" | ")
    assert cells[1:9] == ["10", "", "", "", "80%", "90%", "0.10%", "5.00%"]  # of six runs of one card nothing
    assert any(line.startswith("| gemm w4a16 example | 10 |") for line in lines)
    (wild,) = [line for line in lines if line.startswith("- `wild`")]
    assert "half range 5.00%" in wild
    assert not any(line.startswith("- `c0`") for line in lines)
    lenient = repeats.spread(baseline(run(1), run(-1), run(1), run(-1)), replace(STAMPS, blind=10.0))
    assert [line[:8] for line in lenient if line.startswith("- ")] == ["- `wild`"]  # beyond 1 %, whatever the policy says


def test_a_case_that_one_run_holds_is_blind():
    lines = repeats.spread(baseline({"a": timing(1.0)}), STAMPS)
    assert "| **all** | 0 | | | | | | | | | |" in lines
    assert any(line.startswith("- `a`: half range unknown") for line in lines)


def test_the_spread_has_a_column_of_one_card():
    """Of the cards that have two runs or more the median one's, and detectable slowdowns on the card of the newest run."""
    seconds = {"A 1": (1.0, 1.002), "B 1": (1.1, 1.1088), "C 1": (1.2, 1.2012), "D 1": (1.3,)}
    sessions = [session for session, values in seconds.items() for _ in values]
    runs = [{f"c{i}": timing(value) for i in range(6)} for values in seconds.values() for value in values]
    before = baseline(*runs, sessions=sessions)
    assert repeats.half_ranges_on_a_card(before) == {f"c{i}": pytest.approx(0.001 / 1.001) for i in range(6)}
    row = next(line for line in repeats.spread(before, STAMPS) if line.startswith("| **all**"))
    mde = detectable(before.on("D"), STAMPS)["c0"]
    assert row.split(" | ")[1:] == ["6", "0%", "0%", "0%", "0%", "0%", "13.53%", "13.53%", "0.10%", f"{mde:.2%} |"]
    assert mde < 0.05 < detectable(before.on("GPU-9"), STAMPS)["c0"]


def test_cards_are_named_by_how_they_begin():
    every = baseline(*[{"a": timing(1.0)}] * 4, sessions=[f"GPU-{card} 2026-11-01" for card in ("ab1", "ab2", "ab1", "c3")])
    assert every.of_cards(["ab1"]).cards == ("GPU-ab1",)
    assert len(every.of_cards(["GPU-c", "ab1"]).runs) == 3
    with pytest.raises(BaselineError, match=r"^GPU-ab1, GPU-ab2 all begin with 'ab': the cards are GPU-ab1, GPU-ab2, GPU-c3$"):
        every.of_cards(["ab"])
    for absent in ("d", "", "GPU-"):
        with pytest.raises(BaselineError, match=r"no accepted run of .* is of a card whose UUID begins with"):
            every.of_cards([absent])
