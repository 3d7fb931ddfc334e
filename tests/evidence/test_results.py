"""Runs joined into results: what counts where a case was timed twice, and which runs cannot stand together."""

import pytest
from products import product, quantization, results_of, run_of

from fp4bench.evidence.results import Answer, Choice, ResultsError, Shape, ratio

W4A16 = Answer("gemm", "mxfp4", "w4a16")


def one(results, provider, **where):
    (found,) = results.where(provider=provider, **where)
    return found


def test_a_case_of_several_runs_takes_the_median_of_medians(tmp_path):
    runs = [run_of(product("a", "w4a16", 1, us), number=i) for i, us in enumerate((10, 30, 11), start=1)]
    found = one(results_of(tmp_path, *runs), "a")
    assert found.seconds == pytest.approx(11e-6)
    assert found.value("tflops") == pytest.approx(2 * 1024 * 2048 / 11e-6 * 1e-12)
    assert [run.name for run, _ in found.readings] == ["0001_run", "0002_run", "0003_run"]


def test_runs_are_in_the_order_of_their_dates_whatever_order_they_come_in(tmp_path):
    runs = [run_of(product("a", "w4a16", 1, 10), number=number) for number in (3, 1, 2)]
    assert [run.datetime[:10] for run in results_of(tmp_path, *runs).runs] == ["2026-11-01", "2026-11-02", "2026-11-03"]


def test_a_ratio_is_taken_within_runs(tmp_path):
    """The second card is half as fast, and timed `fast` alone once more: across runs it would seem the slower one."""
    both = run_of(product("fast", "w4a16", 1, 10), product("slow", "w4a16", 1, 12), number=1)
    slow_card = run_of(product("fast", "w4a16", 1, 20), number=2, card="GPU-2")
    slower_card = run_of(product("fast", "w4a16", 1, 21), number=3, card="GPU-3")
    results = results_of(tmp_path, both, slow_card, slower_card)
    fast, slow = one(results, "fast"), one(results, "slow")
    assert fast.seconds > slow.seconds
    assert str(ratio(slow, fast)) == "1.20x"
    assert results.notes() == ["the runs are of 3 cards, and cards differ by percents"]


def test_a_ratio_across_runs_says_so(tmp_path):
    runs = run_of(product("a", "w4a16", 1, 10), number=1), run_of(product("b", "w4a16", 1, 15), number=2)
    results = results_of(tmp_path, *runs)
    assert str(ratio(one(results, "b"), one(results, "a"))) == "~1.50x"


def test_layers_of_one_shape_are_one_work(tmp_path):
    results = results_of(tmp_path, run_of(product("a", "w4a16", 1, 10), product("a", "w4a16", 1, 12, layer="o")))
    assert one(results, "a").seconds == pytest.approx(11e-6)
    assert results.label(Shape(1024, 2048)) == "tiny.qkv.tp1, tiny.o.tp1 1024x2048"


def test_answers_differ_by_mode_and_rotation(tmp_path):
    run = run_of(
        *(product("a", "w4a4", 1, 10, hadamard=size) for size in (None, 64)),
        *(product("a", mode, 1, 10) for mode in ("w4a4_noquant", "bf16")),
        quantization("a", 1, 10),
    )
    names = [str(answer) for answer in results_of(tmp_path, run).answers]
    assert names == ["bf16", "mxfp4 w4a4", "mxfp4 w4a4 had64", "mxfp4 w4a4_noquant", "quantize mxfp4 floor"]


def test_a_choice_keeps_bf16(tmp_path):
    run = run_of(*(product("a", mode, m, 10) for mode in ("bf16", "fp8", "w4a16", "w4a8") for m in (1, 16)))
    results = results_of(tmp_path, run, choice=Choice(modes=("w4a8",), batch_sizes=(16,)))
    assert [(work.answer.mode, work.m) for work in results.by_work] == [("bf16", 16), ("w4a8", 16)]
    results = results_of(tmp_path, run, choice=Choice(formats=("mxfp4",)))
    assert len(results.by_work) == 8


@pytest.mark.parametrize(
    ("choice", "message"),
    [
        (Choice(formats=("nvfp4",)), "0001_run: there is no format nvfp4, there are mxfp4"),
        (Choice(modes=("w4a16", "w4a61")), "0001_run: there is no mode w4a61, there are bf16, w4a16"),
        (Choice(batch_sizes=(3,)), "0001_run: there is no batch size 3, there are 1"),
    ],
)
def test_what_is_not_there_cannot_be_chosen(tmp_path, choice, message):
    run = run_of(product("a", "bf16", 1, 10), product("a", "w4a16", 1, 10))
    with pytest.raises(ResultsError) as raised:
        results_of(tmp_path, run, choice=choice)
    assert str(raised.value) == message


def test_ceilings_are_the_medians_of_those_that_were_measured(tmp_path):
    told = [{"copy_gbps": 10.0, "bf16_tflops": None}, {"copy_gbps": 12.0}, None]
    runs = [run_of(product("a", "w4a16", 1, 10), number=i, ceilings=c) for i, c in enumerate(told, start=1)]
    assert results_of(tmp_path, *runs).ceilings == {"copy_gbps": 11.0, "bf16_tflops": None, "fp8_tflops": None}


def test_the_caption_and_the_notes_say_what_must_be_known(tmp_path):
    runs = (
        run_of(product("a", "w4a16", 1, 10), number=1, complete=False),
        run_of(product("b", "w4a16", 1, 10, clock="cuda_events"), number=3, failed=["x", "y"]),
    )
    results = results_of(tmp_path, *runs)
    assert results.caption() == "NVIDIA H200, 2026-11-01 to 2026-11-03, 0001_run, 0002_run (paced, cold L2)"
    assert results.notes() == [
        "0001_run is incomplete: not all that was selected is in it",
        "0002_run has 2 failed cases, which are not here",
        "timed by CUDA events, launches included, in some cases: b",
    ]


def test_runs_of_a_cpu_say_neither_pace_nor_cache(tmp_path):
    run = run_of(product("a", "w4a16", 1, 10, clock="perf_counter", l2="warm", pace=None))
    assert results_of(tmp_path, run).caption().endswith("(by an unknown clock)")
    assert results_of(tmp_path, run).timing == {"pace": None, "l2": None}


def refusal(tmp_path, *runs):
    with pytest.raises(ResultsError) as raised:
        results_of(tmp_path, *runs)
    return str(raised.value).replace(f"{tmp_path}/", "")


def test_runs_that_cannot_stand_together_are_refused(tmp_path):
    good = run_of(product("a", "w4a16", 1, 10))
    other = run_of(product("a", "w4a16", 1, 10), number=2)
    other["machine_info"] = good["machine_info"] | {"machine": "NVIDIA-B200"}
    together = "0002_run.json is of NVIDIA-B200, and 0001_run.json of NVIDIA-H200: report one machine at a time"
    assert refusal(tmp_path, good, other) == together
    assert refusal(tmp_path, good, good) == "0001_run.json and 0002_run.json are the same run: give it once"
    sustained = run_of(product("b", "w4a16", 1, 10, pace="sustained"), number=2)
    paces = (
        "0001_run.json has cases timed paced and 0002_run.json has cases timed sustained: report one way of timing at a time"
    )
    assert refusal(tmp_path, good, sustained) == paces
    warm = run_of(product("b", "w4a16", 1, 10, l2="warm"), number=2)
    assert "timed with a cold one and 0002_run.json has cases timed with a warm L2" in refusal(tmp_path, good, warm)
    rule = run_of(product("a", "w4a16", 1, 10, scale_rule="even"), number=2)
    did = "gemm-mxfp4-w4a16-a-tiny.qkv.tp1-m1: scale_rule was floor, is even; give one of them"
    assert refusal(tmp_path, good, rule) == f"0001_run.json and 0002_run.json did not do the same for {did}"


def test_runs_that_say_nothing_are_refused(tmp_path):
    assert refusal(tmp_path) == "there is no run: name the files of finished runs"
    bad = run_of(product("a", "w4a16", 1, 10), invalid=["too hot"])
    assert refusal(tmp_path, bad) == "0001_run.json is invalid (too hot): record it anew"
    slowed = run_of(product("a", "w4a16", 1, 10, injected=0.05))
    assert refusal(tmp_path, slowed).startswith("0001_run.json is a drill's, with cases slowed down on purpose (gemm-")
    lacking = run_of(product("a", "w4a16", 1, 10))
    del lacking["benchmarks"][0]["extra_info"]["hadamard"]
    told = "0001_run.json does not say the 'hadamard' of gemm-mxfp4-w4a16-a-tiny.qkv.tp1-m1: record it anew"
    assert refusal(tmp_path, lacking) == told
    for size in (0, "1", None, 2.0, True):
        odd = run_of(product("a", "w4a16", 1, 10))
        odd["benchmarks"][0]["extra_info"]["k"] = size
        assert "sizes of gemm-mxfp4-w4a16-a-tiny.qkv.tp1-m1 that are none" in refusal(tmp_path, odd)


def test_an_operation_that_was_not_timed(tmp_path):
    with pytest.raises(ResultsError, match="0001_run: there is no gemm in what was asked for"):
        results_of(tmp_path, run_of(quantization("a", 1, 10))).of("gemm")
