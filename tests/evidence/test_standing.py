"""One provider beside BF16, the roof and its peers."""

import pytest
from products import product, quantization, results_of, run_of

from fp4bench.evidence import frontier, standing
from fp4bench.evidence.results import ResultsError


def rows(lines):
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if line.startswith("| ")]


def test_a_row_for_each_layer_and_batch_size(tmp_path):
    # 1024 x 2048 at 4.25 bits, x and y: 1.1203 MB, 1.1203 us at 1000 GB/s; 2 * 4096 * 1024 * 2048 at 100 TFLOP/s: 171.8 us.
    run = run_of(
        product("torch", "bf16", 1, 6),
        product("triton", "w4a16", 4096, 200),
        product("triton", "w4a16", 1, 2),
        product("slow", "w4a16", 1, 5),
        product("fast", "w4a16", 1, 3),
        product("other", "w4a8", 1, 1),
        product("triton", "w4a4", 1, 4, hadamard=64),
    )
    lines = standing.lines(results_of(tmp_path, run), "triton")
    assert lines[0] == "triton 1.0, NVIDIA H200, 2026-11-01, 0001_run (paced, cold L2)"
    assert [line for line in lines if line.startswith("**")] == ["**mxfp4 w4a16**", "**mxfp4 w4a4 had64**"]
    head, _, first, second, _, _, rotated = rows(lines)
    assert head == ["layer", "m", "time", "over BF16", "of the roof", "best peer", "its time", "over it"]
    layer = "tiny.qkv.tp1 1024x2048"
    assert first == [layer, "1", "2.000 us", "3.00x", "56%", "fast", "3.000 us", "1.50x"]
    assert second == [layer, "4096", "200.0 us", "", "86%", "nobody", "", ""]
    assert rotated == [layer, "1", "4.000 us", "1.50x", "28%", "nobody", "", ""]


def test_an_answer_in_float16_stands_beside_fp16(tmp_path):
    run = run_of(
        product("torch", "bf16", 1, 6),
        product("torch", "fp16", 1, 8),
        product("other", "fp16", 1, 7),
        product("triton", "w4a16_fp16", 1, 2),
        product("triton", "w4a16_fp16", 2, 2),
    )
    lines = standing.lines(results_of(tmp_path, run), "triton")
    head, _, first, second = rows(lines)
    assert head[3] == "over FP16"
    assert [first[3], second[3]] == ["3.50x", ""]
    assert "| over FP16 |" in "\n".join(frontier.lines(results_of(tmp_path, run)))


def test_quantizations_stand_beside_the_copy(tmp_path):
    # 64 x 2048 values of 2 bytes in and 4.25 bits out: 0.3318 us at 1000 GB/s.
    run = run_of(quantization("triton", 64, 0.5), quantization("eager", 64, 5), quantization("eager", 64, 4, rule="even"))
    lines = standing.lines(results_of(tmp_path, run), "triton")
    assert rows(lines)[2] == ["tiny.qkv.tp1 k 2048", "64", "0.5000 us", "", "66%", "eager", "5.000 us", "10.00x"]
    assert "**quantize mxfp4 floor**" in lines


def test_layers_are_in_the_order_of_the_runs_and_batch_sizes_ascend(tmp_path):
    places = [("qkv", 1024, 64), ("qkv", 1024, 1), ("down", 512, 1)]
    run = run_of(*(product("triton", "w4a16", m, 2, layer=layer, n=n) for layer, n, m in places))
    cells = [row[:2] for row in rows(standing.lines(results_of(tmp_path, run), "triton"))[2:]]
    assert cells == [["tiny.qkv.tp1 1024x2048", "1"], ["tiny.qkv.tp1 1024x2048", "64"], ["tiny.down.tp1 512x2048", "1"]]


def test_an_unknown_provider_is_refused(tmp_path):
    results = results_of(tmp_path, run_of(product("b", "w4a16", 1, 2), product("a", "w4a16", 1, 2)))
    with pytest.raises(
        ResultsError, match=r"there is nothing by triton in what was asked for, only by a, b: name one with --provider"
    ):
        standing.lines(results, "triton")
