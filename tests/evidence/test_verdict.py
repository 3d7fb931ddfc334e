"""When a case counts as slower: tables of timings, recorded runs with planted edits, and symmetry."""

import re
from dataclasses import replace
from math import exp, log1p

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from recorded import CASES, MACHINE, baseline, cpu_timing, edited, scaled, stored_run, timing, timings, write

from fp4bench.evidence.baselines import accepted
from fp4bench.evidence.verdict import POLICIES, Outcome, Policy, Verdict, detectable, invalid, judge

STAMPS, CPU = POLICIES["cuda_graph_stamps"], POLICIES["perf_counter"]
US = 1e-6


def quiet(runs=6, sd=0.001, cases=20, mhz=1800.0):
    """Runs of one card, of cases that all take about 50 us, with this standard deviation."""
    offsets = np.linspace(-1, 1, runs) if runs > 1 else np.zeros(1)
    offsets /= offsets.std(ddof=1) if runs > 1 else 1
    return baseline(*({f"c{i}": timing(50 * US * exp(sd * o), mhz=mhz) for i in range(cases)} for o in offsets.tolist()))


def judged(now, before=None, policy=STAMPS, **options):
    """The verdict of one case among nineteen that did not change."""
    before = before or quiet()
    rest = {f"c{i}": timing(50 * US) for i in range(1, 20)}
    return judge(before, {"c0": now, **rest}, policy, **options)["c0"]


# A table of shapes: time and cycles by factor, the SM clock then 1800 MHz.
@pytest.mark.parametrize(
    ("time", "cycles", "mhz", "outcome", "reason"),
    [
        pytest.param(1.0, 1.0, 1800, Outcome.SAME, "within_floor", id="identical"),
        pytest.param(1.009, 1.009, 1800, Outcome.SAME, "within_floor", id="significant-but-below-the-floor"),
        pytest.param(1.02, 1.02, 1800, Outcome.REGRESSED, "slower", id="2%-slower"),
        pytest.param(1.05, 1.05, 1800, Outcome.REGRESSED, "slower", id="5%-slower"),
        pytest.param(1 / 1.02, 1 / 1.02, 1800, Outcome.FASTER, "faster", id="2%-faster"),
        pytest.param(1.05, 1.0, 1714, Outcome.SAME, "lower_clock", id="throttled"),
        pytest.param(1 / 1.05, 1.0, 1890, Outcome.SAME, "higher_clock", id="boosted"),
        pytest.param(1.05, 1.02, 1748, Outcome.REGRESSED, "slower", id="throttled-and-slower"),
        pytest.param(1.05, 1.0, 1800, Outcome.INCONCLUSIVE, "one_witness", id="time-alone-without-a-clock-to-blame"),
        pytest.param(1.05, 1.0, 1790, Outcome.INCONCLUSIVE, "one_witness", id="the-clock-explains-a-tenth"),
        pytest.param(1.05, 1.0, None, Outcome.INCONCLUSIVE, "one_witness", id="time-alone-and-no-clock-known"),
        pytest.param(1.05, 1.0, 1890, Outcome.INCONCLUSIVE, "one_witness", id="slower-at-a-higher-clock"),
        pytest.param(1.02, 1.008, 1800, Outcome.INCONCLUSIVE, "one_witness", id="cycles-significant-but-below-the-floor"),
        pytest.param(1.0, 1.05, 1800, Outcome.INCONCLUSIVE, "one_witness", id="cycles-alone"),
        pytest.param(1.0, 1.05, 1890, Outcome.SAME, "higher_clock", id="memory-bound-at-a-higher-clock"),
        pytest.param(1.0, 1 / 1.05, 1714, Outcome.SAME, "lower_clock", id="memory-bound-at-a-lower-clock"),
    ],
)
def test_both_witnesses_must_agree(time, cycles, mhz, outcome, reason):
    verdict = judged(timing(50 * US * time, cycles=50 * US * 1800e6 * cycles, mhz=mhz))
    assert (verdict.outcome, verdict.reason) == (outcome, reason)
    assert verdict.change == pytest.approx(time - 1, abs=1e-4)


@pytest.mark.parametrize(
    ("median", "fastest", "outcome"),
    [
        pytest.param(1.0, 0.9, Outcome.SAME, id="identical"),
        pytest.param(1.14, 1.1, Outcome.SAME, id="just-within"),
        pytest.param(2.5, 2.25, Outcome.REGRESSED, id="all-slower"),
        pytest.param(2.5, 0.9, Outcome.INCONCLUSIVE, id="busy-machine-slows-the-median-only"),
        pytest.param(1.0, 2.0, Outcome.SAME, id="one-lucky-sample-then"),
        pytest.param(0.4, 0.36, Outcome.FASTER, id="all-faster"),
        pytest.param(0.4, 0.9, Outcome.INCONCLUSIVE, id="only-the-median-faster"),
    ],
)
def test_without_cycles_the_fastest_sample_speaks(median, fastest, outcome):
    before = baseline({f"c{i}": cpu_timing(1.0) for i in range(20)})
    now = {"c0": cpu_timing(median, fastest), **{f"c{i}": cpu_timing(1.0) for i in range(1, 20)}}
    assert judge(before, now, CPU)["c0"].outcome is outcome


@pytest.mark.parametrize(
    ("share", "flops", "outcome"),
    [
        pytest.param(0.9, 2_000_000, Outcome.INCONCLUSIVE, id="waits-for-memory"),
        pytest.param(0.3, 2_000_000, Outcome.SAME, id="small-kernels"),
        pytest.param(0.9, 500_000_000, Outcome.SAME, id="waits-for-the-sms"),
        pytest.param(None, 2_000_000, Outcome.SAME, id="without-a-roof"),
    ],
)
def test_the_sm_clock_is_no_excuse_for_what_waits_for_memory(share, flops, outcome):
    facts = {"roofline_fraction": share, "flops": flops}
    before = baseline(*({f"c{i}": timing(50 * US * f, **facts) for i in range(20)} for f in (0.999, 1.0, 1.001)))
    now = {"c0": timing(52 * US, cycles=50 * US * 1800e6, mhz=1731.0, **facts)}
    now |= {f"c{i}": timing(50 * US, **facts) for i in range(1, 20)}
    found = judge(before, now, STAMPS)["c0"]
    assert (found.outcome, found.reason) == (outcome, "lower_clock" if outcome is Outcome.SAME else "one_witness")


def test_the_lower_clock_is_said():
    detail = judged(timing(50 * US * 1.05, cycles=50 * US * 1800e6, mhz=1714.0)).detail
    assert detail == "time +5.0%, cycles +0.0%, SM clock 1800 MHz then, 1714 now"


def test_an_effect_within_the_noise_is_inconclusive_and_says_what_it_takes():
    # Cases that differ so much say little of each other, and four runs say little of a case.
    sds, offsets = [0.01, *np.geomspace(0.001, 0.05, 19)], (-1.16, -0.39, 0.39, 1.16)
    differing = baseline(*({f"c{i}": timing(50 * US * exp(sd * o)) for i, sd in enumerate(sds)} for o in offsets))
    noisy = judged(timing(50 * US * 1.07), differing)
    assert (noisy.outcome, noisy.reason) == (Outcome.INCONCLUSIVE, "not_significant")
    assert re.search(r"; \d more accepted runs would tell this one", noisy.detail)
    hopeless = judged(timing(50 * US * 1.05), quiet(runs=6, sd=0.03))
    assert hopeless.outcome is Outcome.INCONCLUSIVE
    assert "try fp4bench ab" in hopeless.detail


# Three cards that lie 4 % from each other, two runs each, on two days, which repeat within 0.1 %
CARDS = {"GPU-1": -0.04, "GPU-2": 0.0, "GPU-3": 0.04}


def cards(card, runs=2, cases=20):
    """Their baseline, for a run of `card`."""
    signs = [1.0, -1.0, 0.5, -0.5][:runs]
    stored = [(name, day, offset + 0.0007 * sign) for name, offset in CARDS.items() for day, sign in enumerate(signs, start=1)]
    return baseline(
        *({f"c{i}": timing(50 * US * exp(t)) for i in range(cases)} for _, _, t in stored),
        sessions=[f"{name} 2026-11-{day:02}" for name, day, _ in stored],
        card=card,
    )


def on_cards(card, then, slowdown):
    """The verdict of c0 in a run of `card` that is as fast as `then`, a slowdown in c0 apart."""
    now = {f"c{i}": timing(50 * US * exp(then) * (1 + slowdown * (i == 0))) for i in range(20)}
    return judge(cards(card), now, STAMPS)["c0"]


@pytest.mark.parametrize("card", CARDS)
@pytest.mark.parametrize(
    ("slowdown", "outcome"), [(0.02, Outcome.REGRESSED), (0.0, Outcome.SAME), (1 / 1.02 - 1, Outcome.FASTER)]
)
def test_a_known_card_is_compared_with_its_own_runs(card, slowdown, outcome):
    verdict = on_cards(card, CARDS[card], slowdown)
    assert verdict.outcome is outcome
    assert verdict.change == pytest.approx(slowdown, abs=1e-4)
    assert verdict.mde < 0.02


@pytest.mark.parametrize("card", ["GPU-9", None])
def test_an_unknown_card_is_compared_with_all_and_says_so(card):
    verdict = on_cards(card, 0.0, 0.02)
    assert (verdict.outcome, verdict.reason) == (Outcome.INCONCLUSIVE, "not_significant")
    assert verdict.change == pytest.approx(0.02, abs=1e-4)  # of the mean of the cards
    assert "no accepted run is of this card, and cards differ" in verdict.detail
    assert verdict.mde > 0.1
    assert "this card" not in on_cards("GPU-1", CARDS["GPU-1"], 0.005).detail


def test_an_unknown_card_that_lies_among_the_others_is_neither_slower_nor_faster():
    found = [on_cards("GPU-9", then, 0.0).outcome for then in CARDS.values()]
    assert found == [Outcome.INCONCLUSIVE, Outcome.SAME, Outcome.INCONCLUSIVE]
    assert on_cards("GPU-9", 0.5, 0.0).outcome is Outcome.REGRESSED


def test_a_card_with_more_runs_counts_as_one_card():
    one, many = {"a": timing(1.0)}, {"a": timing(1.1)}
    sessions = ["GPU-1 d1", "GPU-2 d1", "GPU-2 d2", "GPU-2 d3"]
    for card, mean in (("GPU-9", (1.0 * 1.1) ** 0.5), ("GPU-1", 1.0), ("GPU-2", 1.1)):
        before = baseline(one, many, many, many, sessions=sessions, card=card)
        assert judge(before, one, STAMPS)["a"].change == pytest.approx(1.0 / mean - 1)


def test_the_clock_too_is_that_of_the_card():
    """A card that always ran at 1700 MHz has not been throttled since, whatever the others run at."""
    slow, fast = {"a": timing(1.05, mhz=1714.0)}, {"a": timing(1.0, mhz=1800.0)}
    before = baseline(slow, fast, fast, sessions=["GPU-1 d1", "GPU-2 d1", "GPU-2 d2"])
    assert judge(before, {"a": timing(1.11, mhz=1714.0)}, STAMPS)["a"].outcome is Outcome.REGRESSED
    throttled = judge(before, {"a": timing(1.05 * 1.05, cycles=1.05 * 1714e6, mhz=1714.0 / 1.05)}, STAMPS)["a"]
    assert (throttled.outcome, throttled.reason) == (Outcome.SAME, "lower_clock")
    assert "SM clock 1714 MHz then, 1632 now" in throttled.detail
    # Of an unknown card: that of the cards' means, as the time is, not of the runs.
    unknown = judge(before.on("GPU-9"), {"a": timing(1.6, cycles=1.02 * 1757e6, mhz=1150.0)}, STAMPS)["a"]
    assert "SM clock 1756 MHz then, 1150 now" in unknown.detail


def test_runs_of_one_day_do_not_show_how_days_differ():
    def before(days):
        offsets = (-1.26, -0.64, -0.2, 0.2, 0.64, 1.26)
        runs = [{f"c{i}": timing(50 * US * exp(0.0002 * o)) for i in range(20)} for o in offsets]
        return baseline(*runs, sessions=[f"GPU-1 day-{i % days}" for i in range(6)])

    drifting = replace(STAMPS, floor=0.0, drift=0.004)
    one, two, six = (detectable(before(days), drifting)["c0"] for days in (1, 2, 6))
    assert one > two > six
    # Next to nothing but drift: a day against the mean of so many.
    assert log1p(one) / log1p(six) == pytest.approx((2 / (1 + 1 / 6)) ** 0.5, rel=0.02)
    still = replace(STAMPS, floor=0.0, drift=0.0)
    assert detectable(before(1), still)["c0"] == pytest.approx(detectable(before(6), still)["c0"])


def test_looks_that_scatter_more_than_was_known_raise_the_bar():
    now = {f"c{i}": timing(50 * US * 1.03) for i in range(20)}
    calm = judge(quiet(), now, STAMPS, seen={"c0": (1e-8, 1e-8)})
    assert calm["c0"] == judge(quiet(), now, STAMPS)["c0"]
    for seen in ((4e-4, 1e-8), (1e-8, 4e-4)):  # either witness
        verdicts = judge(quiet(), now, STAMPS, seen={"c0": seen})
        assert verdicts["c0"].outcome is Outcome.INCONCLUSIVE
        assert verdicts["c1"].outcome is Outcome.REGRESSED


def test_the_interval_holds_the_change_and_the_mde_lies_beyond_the_floor():
    verdict = judged(timing(50 * US * 1.03))
    low, high = verdict.interval
    assert low < 0.03 < high
    assert high - low < 0.01
    assert STAMPS.floor < verdict.mde < 0.02


def test_more_runs_see_smaller_slowdowns():
    mdes = [detectable(quiet(runs, sd=0.004), STAMPS)["c0"] for runs in (2, 3, 4, 6, 12)]
    assert mdes == sorted(mdes, reverse=True)
    assert mdes[0] > 1.2 * mdes[-1]


def test_few_runs_are_judged_by_the_allowance_however_well_they_agree():
    few, many = quiet(runs=2, sd=0.00001), quiet(runs=6, sd=0.00001)
    slower, floors = timing(50 * US * 1.008), {"c0": 0.005}
    assert judged(slower, few, floors=floors).outcome is Outcome.INCONCLUSIVE
    assert judged(slower, many, floors=floors).outcome is Outcome.REGRESSED


@pytest.mark.parametrize("runs", [1, 6, 20])
def test_one_card_is_judged_by_the_cards_allowance_however_often_it_ran(runs):
    """How its runs agree says nothing of other cards."""
    known = quiet(runs=runs, sd=0.0001)
    assert judged(timing(50 * US * 1.04), known).outcome is Outcome.REGRESSED
    unknown = known.on("GPU-9")
    assert judged(timing(50 * US * 1.04), unknown).outcome is Outcome.INCONCLUSIVE
    assert detectable(unknown, STAMPS)["c0"] > 4 * STAMPS.card_allowance


def test_cases_of_other_clocks_say_nothing_of_a_case():
    offsets = (-1.26, -0.64, -0.2, 0.2, 0.64, 1.26)

    def run(offset, wild):
        steady = {f"c{i}": timing(50 * US * exp(0.002 * offset)) for i in range(10)}
        return steady | {f"w{i}": cpu_timing(exp(0.2 * offset)) for i in range(wild)}

    alone, beside = (detectable(baseline(*(run(o, wild) for o in offsets)), POLICIES)["c0"] for wild in (0, 10))
    assert beside == pytest.approx(alone, rel=0.1)  # the correction over twice as many cases is all


def test_cases_of_other_cards_say_nothing_of_how_runs_of_this_one_differ():
    offsets = (-1.26, -0.64, -0.2, 0.2, 0.64, 1.26)
    own = [{f"c{i}": timing(50 * US * exp(0.003 * o)) for i in range(10)} for o in offsets]
    sessions = [f"GPU-1 2026-11-{day:02}" for day in range(1, 7)] + [f"GPU-{card} 2026-11-01" for card in range(2, 8)]

    def before(others):
        elsewhere = [{f"o{i}": timing(1e-3 * exp(0.05 * o)) for i in range(others)} for o in offsets]
        return baseline(*own, *elsewhere, sessions=sessions)

    alone, beside = (detectable(before(others), STAMPS)["c0"] for others in (0, 30))
    assert beside == pytest.approx(alone, rel=0.15)  # the correction over four times as many cases is all


def test_young_cases_say_nothing_of_how_runs_differ():
    offsets = (-1.26, -0.64, -0.2, 0.2, 0.64, 1.26)

    def run(offset, young):
        return {f"c{i}": timing(50 * US * exp(0.003 * offset)) for i in range(10)} | {
            f"y{i}": timing(1e-3) for i in range(young)
        }

    def before(young):
        return baseline(*(run(o, young) if i > 3 else run(o, 0) for i, o in enumerate(offsets)))

    alone, beside = (detectable(before(young), STAMPS)["c0"] for young in (0, 30))
    assert beside == pytest.approx(alone, rel=0.15)  # the correction over four times as many cases is all


@pytest.mark.parametrize("runs", [2, 6])
@pytest.mark.parametrize("cases", [1, 20])
def test_an_assumption_never_hides_that_a_case_scatters(runs, cases):
    """By 5 %, where 0.2 % is allowed: a further 5 % is nothing to act on, whatever is known of the other cases."""
    before = quiet(runs, sd=0.05, cases=cases)
    now = {f"c{i}": timing(50 * US * exp(0.05)) for i in range(cases)}
    assert {verdict.outcome for verdict in judge(before, now, STAMPS).values()} == {Outcome.INCONCLUSIVE}


def test_a_suite_of_few_cases_learns_from_its_runs():
    """Too few cases to say what is usual among them: the case's own runs count, and the allowance no more than they do."""
    sds = (0.004, 0.001)
    first, later = (detectable(quiet(12, sd=sd, cases=2), STAMPS)["c0"] for sd in sds)
    assert later < 0.75 * first


def test_more_cases_ask_for_stronger_evidence():
    few, many = (detectable(quiet(3, sd=0.004, cases=n), STAMPS)["c0"] for n in (5, 500))
    assert many > few


def test_the_worst_tenth_of_cases_does_not_blind_the_others():
    def run(offset):
        quiet_ones = {f"c{i}": timing(50 * US * exp(0.001 * offset)) for i in range(1, 20)}
        return quiet_ones | {"c0": timing(50 * US * exp(0.02 * offset))}

    mde = detectable(baseline(*map(run, (-1.26, -0.64, -0.2, 0.2, 0.64, 1.26))), STAMPS)
    assert mde["c0"] > 0.05
    assert mde["c1"] < 0.02


def test_a_case_may_have_a_floor_of_its_own():
    slower = timing(50 * US * 1.03)
    assert judged(slower).outcome is Outcome.REGRESSED
    assert judged(slower, floors={"c0": 0.05}).outcome is Outcome.SAME
    assert judged(timing(50 * US * 1.006), floors={"c0": 0.002}).outcome is Outcome.REGRESSED


def test_cases_of_different_clocks_are_judged_by_their_own_policies():
    def run(factor):
        return {f"c{i}": timing(50 * US * factor) for i in range(10)} | {f"e{i}": cpu_timing(1.0 * factor) for i in range(10)}

    verdicts = judge(baseline(*[run(1.0)] * 4), run(1.05), POLICIES)
    assert {verdicts[f"c{i}"].outcome for i in range(10)} == {Outcome.REGRESSED}
    assert {verdicts[f"e{i}"].outcome for i in range(10)} == {Outcome.SAME}


def test_a_clock_without_a_policy_is_refused():
    before = baseline({"a": timing(1.0, clock="sundial")})
    with pytest.raises(ValueError, match="no policy for the clock 'sundial'"):
        judge(before, {"a": timing(1.0, clock="sundial")}, POLICIES)


def test_a_case_without_a_baseline_is_new():
    assert judge(quiet(), {"other": timing(1.0)}, STAMPS) == {"other": Verdict(Outcome.NEW, "not_in_baseline")}


@pytest.mark.parametrize(
    "change",
    [
        {"clock": "perf_counter"},
        {"l2": "warm"},
        {"flops": 2},
        {"bytes": 2},
        {"scale_rule": "even"},
        {"pace": "sustained"},
        {"provider_variant": "nopdl"},
    ],
    ids=str,
)
def test_other_work_or_another_clock_is_never_compared(change):
    verdict = judged(timing(9.0, **change))
    assert (verdict.outcome, verdict.reason) == (Outcome.NEW, "not_comparable")
    (key, value) = next(iter(change.items()))
    assert verdict.detail.startswith(f"{key} was ")
    assert verdict.detail.endswith(f", is {value}")


def test_another_version_of_the_same_provider_is_compared():
    assert judged(timing(9.0, provider_version="2.0")).outcome is Outcome.REGRESSED


@pytest.mark.parametrize(
    ("then", "now"),
    [
        ("cuda_graph_stamps", "cuda_events"),
        ("cuda_graph_stamps", "cuda_graph_events"),
        ("cuda_graph_events", "cuda_events"),
    ],
)
def test_a_case_that_can_no_longer_be_timed_alike_is_missing(then, now):
    before = baseline({"a": timing(1.0, clock=then)})
    # Events flush the L2 where graphs rotate copies.
    found = judge(before, {"a": timing(9.0, clock=now, l2="cold_flush", copies=1)}, POLICIES)["a"]
    assert (found.outcome, found.reason, found.change) == (Outcome.MISSING, "clock_changed", None)
    assert found.detail.startswith(f"clock was {then}, is {now}: it can no longer be timed alike, for a kernel that waits for")
    back = judge(baseline({"a": timing(1.0, clock=now)}), {"a": timing(1.0, clock=then)}, POLICIES)["a"]
    assert (back.outcome, back.reason) == (Outcome.NEW, "not_comparable")


@pytest.mark.parametrize("change", [{"flops": 2}, {"bytes": 2}, {"scale_rule": "even"}, {"pace": "sustained"}, {"l2": "warm"}])
def test_other_work_on_a_worse_clock_is_new(change):
    found = judge(baseline({"a": timing(1.0)}), {"a": timing(1.0, clock="cuda_events", **change)}, POLICIES)["a"]
    assert (found.outcome, found.reason) == (Outcome.NEW, "not_comparable")


def test_what_was_expected_and_is_not_there_is_missing():
    now = {"c0": timing(50 * US)}
    verdicts = judge(quiet(), now, STAMPS, expected={"c1": "skipped: out of memory", "c0": "is there", "unknown": "never was"})
    assert list(verdicts) == ["c0", "c1"]
    assert verdicts["c0"].outcome is Outcome.SAME
    assert verdicts["c1"] == Verdict(Outcome.MISSING, "not_timed", detail="skipped: out of memory")


def test_other_kernels_are_said_first():
    before = baseline(*[{"a": timing(1.0, kernels=["old<64>"])}] * 3)
    detail = judge(before, {"a": timing(1.5, kernels=["new<64>", "reduce"])}, STAMPS)["a"].detail
    assert detail.startswith("kernels were old<64>, are new<64>, reduce; time +50.0%")
    assert "kernels" not in judge(before, {"a": timing(1.5, kernels=("old<64>",))}, STAMPS)["a"].detail
    assert "kernels" not in judge(before, {"a": timing(1.5)}, STAMPS)["a"].detail


def test_an_invalid_run_judges_nothing_and_keeps_its_numbers():
    verdicts = invalid({"a": Verdict(Outcome.REGRESSED, "slower", 0.05, (0.04, 0.06), 0.02, "x")}, ["too hot", "busy"])
    assert verdicts == {"a": Verdict(Outcome.INVALID, "invalid_run", 0.05, (0.04, 0.06), 0.02, "too hot; busy")}


def test_nothing_timed_has_no_verdicts():
    assert judge(quiet(), {}, STAMPS) == {}


MIRROR = {Outcome.REGRESSED: Outcome.FASTER, Outcome.FASTER: Outcome.REGRESSED}
EFFECT = st.floats(-0.6, 0.6)


@settings(deadline=None, max_examples=150)
@given(
    st.lists(st.tuples(EFFECT, EFFECT, st.floats(1000, 2000), st.floats(1000, 2000)), min_size=1, max_size=6),
    st.sampled_from(["GPU-1", "GPU-9"]),
)
def test_swapping_the_sides_of_two_runs_swaps_the_outcome(cases, card):
    """In log space; the same for the reason, where `lower_clock` mirrors `higher_clock`."""
    one = {f"c{i}": timing(1e-3, cycles=1e6, mhz=then) for i, (_, _, then, _) in enumerate(cases)}
    other = {
        f"c{i}": timing(1e-3 * exp(time), cycles=1e6 * exp(cycles), mhz=now) for i, (time, cycles, _, now) in enumerate(cases)
    }
    forth = judge(baseline(one, card=card), other, STAMPS)
    back = judge(baseline(other, card=card), one, STAMPS)
    for case_id, verdict in forth.items():
        assert back[case_id].outcome is MIRROR.get(verdict.outcome, verdict.outcome)
        mirrored = {"slower": "faster", "faster": "slower", "lower_clock": "higher_clock", "higher_clock": "lower_clock"}
        assert back[case_id].reason == mirrored.get(verdict.reason, verdict.reason)
        assert 1 + back[case_id].change == pytest.approx(1 / (1 + verdict.change))
        assert back[case_id].mde == pytest.approx(verdict.mde)


@pytest.mark.parametrize("ratio", [0.3, 0.5, 0.79, 0.81, 1.0, 1.24, 1.26, 2.0, 3.0])
def test_swapping_the_sides_swaps_the_outcome_on_a_cpu(ratio):
    one, other = {"a": cpu_timing(1.0)}, {"a": cpu_timing(ratio)}
    forth = judge(baseline(one), other, CPU)["a"].outcome
    assert judge(baseline(other), one, CPU)["a"].outcome is MIRROR.get(forth, forth)


# Recorded runs with planted edits


@pytest.fixture(scope="module")
def recorded(tmp_path_factory):
    """Six runs of a card on three days, read from their files."""
    folder = tmp_path_factory.mktemp("baselines")
    for number in range(1, 7):
        write(folder / f"{number:04}_run.json", stored_run(number, day=(number + 1) // 2))
    return accepted(folder, MACHINE).on("GPU-1")


def outcomes(before, run, **options):
    return {case_id: verdict.outcome for case_id, verdict in judge(before, timings(run), STAMPS, **options).items()}


@pytest.mark.parametrize("number", range(7, 17))
def test_an_unchanged_run_is_the_same(recorded, number):
    assert set(outcomes(recorded, stored_run(number)).values()) == {Outcome.SAME}


@pytest.mark.parametrize("factor", [1.02, 1.05])
@pytest.mark.parametrize("case_id", CASES[::4])
def test_a_case_scaled_up_is_regressed_and_no_other(recorded, factor, case_id):
    found = outcomes(recorded, scaled(stored_run(7), factor, case_id))
    assert {c for c, outcome in found.items() if outcome is Outcome.REGRESSED} == {case_id}
    assert found[case_id] is Outcome.REGRESSED
    assert outcomes(recorded, scaled(stored_run(7), 1 / factor, case_id))[case_id] is Outcome.FASTER


def test_a_case_taken_away_is_missing_if_it_was_expected(recorded):
    run = stored_run(7, cases=CASES[1:])
    assert CASES[0] not in outcomes(recorded, run)
    assert outcomes(recorded, run, expected={CASES[0]: "skipped: no such provider"})[CASES[0]] is Outcome.MISSING


def test_a_case_put_in_is_new(recorded):
    assert outcomes(recorded, stored_run(7, cases=(*CASES, "another")))["another"] is Outcome.NEW


def test_a_swapped_kernel_is_named(recorded):
    swapped = edited(scaled(stored_run(7), 1.3), lambda bench: bench["extra_info"].update(kernels=["fallback<32>"]))
    verdict = judge(recorded, timings(swapped), STAMPS)[CASES[0]]
    assert verdict.outcome is Outcome.REGRESSED
    assert verdict.detail.startswith("kernels were decode<64, 128>, are fallback<32>")


def test_a_throttled_case_is_the_machines_and_not_the_kernels(recorded):
    def throttle(bench):
        bench["stats"]["median"] *= 1.06
        bench["stats"]["min"] *= 1.06
        bench["extra_info"]["sm_mhz"] /= 1.06

    verdict = judge(recorded, timings(edited(stored_run(7), throttle)), STAMPS)[CASES[0]]
    assert (verdict.outcome, verdict.reason) == (Outcome.SAME, "lower_clock")


def test_every_clock_has_a_policy():
    assert set(POLICIES) == {"cuda_graph_stamps", "cuda_graph_events", "cuda_events", "perf_counter"}
    assert all(isinstance(policy, Policy) and policy.floor < policy.blind for policy in POLICIES.values())
