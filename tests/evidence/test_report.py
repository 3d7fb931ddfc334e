"""What a run and a baseline look like as text."""

import json

import pytest
from recorded import CASES, MACHINE, baseline, stored_run, timing, timings, write

from fp4bench.evidence import report
from fp4bench.evidence.baselines import accepted, parse
from fp4bench.evidence.histories import mean_seconds
from fp4bench.evidence.verdict import POLICIES, Outcome, Verdict, invalid, judge

STAMPS = POLICIES["cuda_graph_stamps"]


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
    assert report.duration(seconds) == text


@pytest.fixture
def six_runs(tmp_path):
    for number in range(1, 7):
        write(tmp_path / f"{number:04}_night.json", stored_run(number, day=(number + 1) // 2))
    return accepted(tmp_path, MACHINE).on("GPU-1")


def verdict(outcome, change=None, **more):
    interval = None if change is None else (change - 0.002, change + 0.002)
    return Verdict(outcome, "code", change, interval, None if change is None else 0.013, **more)


def test_rows_hold_both_sides_as_plain_values(six_runs):
    now = timings(stored_run(7))
    table = report.rows(six_runs, now, judge(six_runs, now, STAMPS, expected={"gone": "x"}))
    assert json.loads(json.dumps(table, allow_nan=False)) == table
    keys = {"outcome", "reason", "change", "low", "high", "mde", "detail", "baseline_seconds", "seconds"}
    assert all(set(row) == keys for row in table.values())
    row = table[CASES[0]]
    assert row["outcome"] == "SAME"
    assert row["low"] < row["change"] < row["high"]
    assert row["seconds"] / row["baseline_seconds"] - 1 == pytest.approx(row["change"])


def test_rows_of_what_is_missing_or_has_no_baseline(six_runs):
    table = report.rows(six_runs, {}, {CASES[0]: verdict(Outcome.MISSING)})
    assert table[CASES[0]]["baseline_seconds"] == pytest.approx(20e-6, rel=0.01)
    assert table[CASES[0]]["seconds"] is None
    assert report.rows(None, {"a": timing(1.0)}, {"a": verdict(Outcome.NEW)})["a"]["baseline_seconds"] is None


def summary(before, now, verdicts, info=None, **options):
    return report.summary(before, now, verdicts, before.runs[-1].machine_info if info is None else info, STAMPS, **options)


def test_a_summary_begins_with_counts_and_lists_the_worst_first(six_runs):
    now = timings(stored_run(7))
    changes = {CASES[0]: 0.02, CASES[1]: 0.05, CASES[2]: -0.04, CASES[3]: 0.001}
    kinds = [Outcome.REGRESSED, Outcome.REGRESSED, Outcome.FASTER, Outcome.SAME]
    verdicts = {c: verdict(kind, change) for (c, change), kind in zip(changes.items(), kinds, strict=True)}
    verdicts["gone"] = verdict(Outcome.MISSING, detail="skipped: out of memory")
    lines = summary(six_runs, now, verdicts)
    assert lines[0] == "2 REGRESSED, 1 MISSING, 1 FASTER, 1 SAME against 0001_night..0006_night (6 runs, 1 card)"
    text = "\n".join(lines)
    assert text.index("REGRESSED:") < text.index(CASES[1]) < text.index(CASES[0] + " ") < text.index("MISSING:")
    assert CASES[3] not in text
    (worst,) = [line.split() for line in lines if CASES[1] in line]
    then, here = (report.duration(t).split() for t in (mean_seconds(six_runs, CASES[1]), now[CASES[1]].median))
    assert worst[1:] == [*then, "->", *here, "+5.0%", "[+4.8%,", "+5.2%]"]
    (index,) = [i for i, line in enumerate(lines) if "gone" in line and line.endswith("skipped: out of memory")]
    assert lines[index + 1] == "  if they are gone for good: fp4bench accept RUN.json --retire 'ID-OR-GLOB' ..."
    assert lines[index + 2] == ""
    assert sum("--retire" in line for line in lines) == 1


def test_every_regression_is_listed_and_ten_of_the_others(six_runs):
    many = {f"r{i}": verdict(Outcome.REGRESSED, 0.05) for i in range(30)} | {f"n{i}": verdict(Outcome.NEW) for i in range(30)}
    lines = summary(six_runs, {case_id: timing(1.0) for case_id in many}, many)
    assert sum(line.startswith("  r") for line in lines) == 30
    assert sum(line.startswith("  n") for line in lines) == 10
    assert "  and 20 more" in lines


def test_the_command_that_accepts_is_there_to_be_typed(six_runs):
    now = {"new": timing(1.0)}
    verdicts = {"new": verdict(Outcome.NEW)}
    (line,) = [line for line in summary(six_runs, now, verdicts, stored=".benchmarks/x/0007_a.json") if "accept " in line]
    assert line.endswith('fp4bench accept .benchmarks/x/0007_a.json --name NAME --reason "..."')
    assert any("--benchmark-save" in line for line in summary(six_runs, now, verdicts))
    assert not any("accept " in line for line in summary(six_runs, now, {"new": verdict(Outcome.SAME, 0.0)}))
    assert not any("accept " in line for line in summary(six_runs, now, invalid(verdicts, ["hot"])))


def test_only_runs_timed_in_the_same_way_are_counted():
    before = baseline({"a": timing(1.0)}, {"a": timing(1.0)}, {"a": timing(1.1, pace="sustained")})
    now = {"a": timing(1.0)}
    for pace, count in (("paced", "2 runs"), ("sustained", "1 run"), (None, "3 runs")):
        text = "\n".join(summary(before.on("GPU-1", pace), now, {"a": verdict(Outcome.SAME, 0.0)}))
        assert f"the baseline has {count} of 1 card" in text


def test_an_invalid_run_lists_no_cases(six_runs):
    now = timings(stored_run(7))
    lines = summary(six_runs, now, invalid(judge(six_runs, now, STAMPS), ["too hot"]))
    assert lines[0].startswith("12 INVALID against")
    assert not any(CASES[0] in line for line in lines)


def test_what_changed_around_the_cases_is_named(six_runs):
    now = timings(stored_run(7))
    now[CASES[2]].record["kernels"] = ["other<1>"]
    info = dict(six_runs.runs[-1].machine_info) | {"torch": "2.13.0", "vllm": "0.26.0"}
    del info["driver"]
    text = "\n".join(summary(six_runs, now, judge(six_runs, now, STAMPS), info))
    assert "changed since 0006_night: torch 2.11.0 -> 2.13.0, vllm None -> 0.26.0, driver 580 -> None" in text
    assert f"other kernels in 1 case, such as {CASES[2]}: kernels were decode<64, 128>, are other<1>" in text


def test_nothing_changed_says_nothing(six_runs):
    now = timings(stored_run(7))
    assert not any("changed" in line or "kernels" in line for line in summary(six_runs, now, judge(six_runs, now, STAMPS)))


def test_a_young_baseline_is_provisional(six_runs):
    young = baseline({"a": timing(1.0)}, {"a": timing(1.0)})
    text = "\n".join(summary(young, {"a": timing(1.0)}, judge(young, {"a": timing(1.0)}, STAMPS)))
    assert "the baseline has 2 runs of 1 card, 2 of this one; provisional: how runs differ is assumed, not measured" in text
    now = timings(stored_run(7))
    text = "\n".join(summary(six_runs, now, judge(six_runs, now, STAMPS)))
    assert "the baseline has 6 runs of 1 card, 6 of this one" in text
    assert "provisional" not in text


def test_a_run_of_an_unknown_card_is_said_to_be_one(six_runs):
    now, unknown = timings(stored_run(7)), six_runs.on("GPU-9")
    text = "\n".join(summary(unknown, now, judge(unknown, now, STAMPS)))
    assert "6 runs of 1 card, none of this one: cards differ; provisional: how cards differ is assumed, not measured" in text


def test_cases_that_are_younger_than_the_baseline_are_counted_as_provisional():
    old, young = {"a": timing(1.0), "b": timing(1.0)}, {"c": timing(1.0)}
    before = baseline(old, old, old, old | young)
    text = "\n".join(summary(before, old | young, judge(before, old | young, STAMPS)))
    assert "; provisional for 1 case: how runs differ" in text


@pytest.mark.parametrize(
    ("sessions", "card", "provisional"),
    [
        (["A 1", "A 1", "A 2"], "A", True),
        (["A 1", "A 1", "A 2", "A 2"], "A", False),
        (["A 1", "A 1", "B 1", "B 1"], "A", True),
        (["A 1", "A 1", "B 1", "B 1", "C 1", "C 1"], "A", False),
        (["A 1", "A 1", "A 2", "A 2"], "D", True),
        (["A 1", "B 1", "C 1"], "D", True),
        (["A 1", "B 1", "C 1", "E 1"], "D", False),
    ],
)
def test_a_baseline_is_provisional_until_the_runs_are_there_that_it_asks_for(sessions, card, provisional):
    now = {"a": timing(1.0)}
    before = baseline(*[now] * len(sessions), sessions=sessions, card=card)
    assert any("provisional" in line for line in summary(before, now, judge(before, now, STAMPS))) is provisional


def test_blind_cases_are_counted():
    noisy = baseline(*({"a": timing(1.0 + 0.05 * i), "b": timing(1.0)} for i in range(4)))
    now = {"a": timing(1.05), "b": timing(1.0)}
    text = "\n".join(summary(noisy, now, judge(noisy, now, STAMPS)))
    assert "1 of 2 cases is blind" in text


def test_no_verdicts_are_said_so():
    assert report.counts({}) == "no case was timed"


# Markdown

ROW = {"reason": "x", "change": 0.05, "low": 0.04, "high": 0.06, "mde": 0.01, "baseline_seconds": 1e-3, "seconds": 1.05e-3}


def verdicts_file(cases, outcome="regressed", reasons=()):
    return {"outcome": outcome, "run": None, "counts": {}, "invalid": list(reasons), "cases": cases}


def test_markdown_shows_what_is_not_the_same():
    text = report.markdown(
        verdicts_file(
            {
                "calm": ROW | {"outcome": "SAME", "detail": ""},
                "fresh": dict.fromkeys(ROW) | {"outcome": "NEW", "detail": ""},
                "slow": ROW | {"outcome": "REGRESSED", "detail": "kernels | were\n<b>`a`</b>"},
            }
        )
    )
    assert text.startswith("### fp4bench: regressed\n\n1 REGRESSED, 1 NEW, 1 SAME\n")
    assert "calm" not in text
    assert "| `slow` | REGRESSED | 1.000 ms | 1.050 ms | +5.0% [+4.0%, +6.0%] | kernels \\| were &lt;b>'a'&lt;/b> |" in text
    assert "| `fresh` | NEW |  |  |  |  |" in text
    assert text.index("`slow`") < text.index("`fresh`")


def test_markdown_of_a_run_without_verdicts():
    assert "has no baseline" in report.markdown(verdicts_file({}, "no_baseline"))
    bad = report.markdown(verdicts_file({"a": ROW | {"outcome": "INVALID", "detail": "hot"}}, "invalid", ["hot <&>"]))
    assert "the run is invalid" in bad
    assert "- hot &lt;&amp;>" in bad
    assert "`a`" not in bad


@pytest.mark.parametrize("kind", [list, dict.fromkeys])
def test_markdown_names_failed_cases(kind):
    text = report.markdown(verdicts_file({}, "ok") | {"failed": kind([f"f{i}" for i in range(12)])})
    assert "- failed, and so not judged: `f0`, `f1`," in text
    assert text.count("`f") == 10
    assert " and 2 more" in text
    assert "failed" not in report.markdown(verdicts_file({}, "ok") | {"failed": kind([])})


def test_markdown_stays_small_and_says_what_it_left_out():
    long = {f"case-{i}": ROW | {"outcome": "NEW", "detail": "ä" * 3000} for i in range(2000)}
    text = report.markdown(verdicts_file(long))
    assert len(text.encode()) < 60_000
    shown = text.count("| `case-")
    assert shown > 40
    assert f"and {2000 - shown} more" in text


@pytest.mark.parametrize(
    "damaged", [{}, [], {"outcome": "ok"}, {"outcome": "ok", "cases": {"a": {}}}, {"outcome": "ok", "cases": 3}]
)
def test_what_is_no_verdicts_file_is_refused(damaged):
    with pytest.raises(ValueError, match="no verdicts file"):
        report.markdown(damaged)


# Baselines


def test_accepted_runs_are_listed_with_their_wall_time_and_reason(tmp_path):
    run = stored_run(1, accepted={"name": "first", "reason": "the | first", "date": "2026-11-21"})
    write(tmp_path / "0001_first.json", run)
    lines = report.accepted_runs(accepted(tmp_path, MACHINE))
    assert lines[-1] == "| 0001_first | 2026-11-01T01:00 | GPU-1 2026-11-01 | 12 | 61 s | the \\| first |"


def test_before_and_after(tmp_path, six_runs):
    fresh = parse(stored_run(7, cases=(*CASES[1:], "another")), tmp_path / "run.json")
    lines = report.before_after(six_runs, [fresh], most=3)
    assert lines[0].startswith("11 cases beside 0001_night..0006_night")
    assert sum(" -> " in line for line in lines) == 3
    assert lines[4].startswith("  and 8 more, none beyond")
    assert lines[5:] == ["new: 1 case: another", f"only in the baseline: 1 case: {CASES[0]}"]
    assert report.before_after(None, [fresh, fresh]) == ["the first baseline of this machine: 12 cases in 2 runs"]


def test_runs_of_one_card_are_shown_beside_its_own(tmp_path):
    then = baseline(
        {CASES[0]: timing(1.0)}, {CASES[0]: timing(2.0)}, sessions=["GPU-1 2026-11-01", "GPU-2 2026-11-01"], card=None
    )
    fresh = parse(stored_run(7, cases=CASES[:1]), tmp_path / "run.json")
    assert " 1.000 s -> " in report.before_after(then, [fresh])[1]
    other = parse(stored_run(8, cases=CASES[:1], session="GPU-3 2026-11-01"), tmp_path / "run.json")
    assert " 1.414 s -> " in report.before_after(then, [other])[1]
    assert " 1.414 s -> " in report.before_after(then, [fresh, other])[1]
