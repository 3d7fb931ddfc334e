"""Tables of times over batch sizes, with and without a CUDA graph, and of phases."""

import pytest
from products import moe, product, results_of, run_of

from fp4bench.evidence import comparison
from fp4bench.evidence.results import ResultsError


def table(lines, title, number=0):
    """The cells of one of the tables under a title."""
    start = next(i for i, line in enumerate(lines) if line.startswith("**") and title in line)
    end = next((i for i in range(start + 1, len(lines)) if lines[i].startswith("**")), len(lines))
    blocks = [block.split("\n") for block in "\n".join(lines[start + 2 : end]).split("\n\n")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in blocks[number] if line]


def test_the_fastest_of_each_batch_size_is_marked(tmp_path):
    run = run_of(product("torch", "bf16", 1, 40), product("torch", "bf16", 64, 44), product("a", "w4a16", 64, 12))
    lines = comparison.lines(results_of(tmp_path, run))
    assert lines[0] == "us, NVIDIA H200, 2026-11-01, 0001_run (paced, cold L2)"
    rows = table(lines, "gemm tiny.qkv.tp1, n = 1024, k = 2048")
    assert rows[0] == ["provider, mode", "", "m = 1", "m = 64"]
    assert rows[2:] == [["torch bf16", "graph", "* 40.00", "44.00"], ["a mxfp4 w4a16", "graph", "", "* 12.00"]]


def test_launches_stand_below_their_graph_and_phases_below_the_table(tmp_path):
    phases = {"routing": 2e-6, "gemm1": 11e-6}
    run = run_of(
        moe("a", "w4a16", 4, 20, experts_hit=7, eager_seconds=95e-6, launch_seconds=75e-6, phases=phases),
        moe("b", "fp8", 4, 30, experts_hit=7),
        moe("b", "fp8", 4, 33, experts_hit=7, fp8_scaling="token_channel"),
        moe("b", "fp8", 64, 50, experts_hit=8),
    )
    results = results_of(tmp_path, run)
    lines = comparison.lines(results, phases=True)
    title = "moe tiny.experts.tp1, 2 of 8 experts, intermediate = 128, hidden = 256"
    assert table(lines, title)[2:] == [
        ["experts hit", "", "7", "8"],
        ["a mxfp4 w4a16", "graph", "* 20.00", ""],
        ["", "eager", "95.00", ""],
        ["", "launching", "75.00", ""],
        ["b fp8", "graph", "30.00", "* 50.00"],
        ["b fp8 token_channel", "graph", "33.00", ""],
    ]
    assert table(lines, title, 1)[2:] == [["a mxfp4 w4a16", "routing", "2.00", ""], ["", "gemm1", "11.00", ""]]
    without = comparison.lines(results)
    assert without == lines[: len(without)]
    assert not any("gemm1" in line for line in without)


def test_routings_and_layers_have_tables_of_their_own(tmp_path):
    run = run_of(
        moe("a", "w4a16", 4, 20, routing="zipf"), moe("a", "w4a16", 4, 30), moe("a", "w4a16", 4, 50, experts=16, topk=4)
    )
    lines = comparison.lines(results_of(tmp_path, run))
    assert [line for line in lines if line.startswith("**")] == [
        "**moe tiny.experts.tp1, 2 of 8 experts, intermediate = 128, hidden = 256, zipf routing**",
        "**moe tiny.experts.tp1, 2 of 8 experts, intermediate = 128, hidden = 256**",
        "**moe tiny.experts.tp1, 4 of 16 experts, intermediate = 128, hidden = 256**",
    ]
    assert table(lines, "zipf routing")[-1] == ["a mxfp4 w4a16", "graph", "* 20.00"]


def test_what_was_timed_by_events_is_not_called_a_graph(tmp_path):
    run = run_of(moe("a", "w4a16", 4, 20, clock="cuda_events"))
    assert table(comparison.lines(results_of(tmp_path, run)), "moe")[-1] == ["a mxfp4 w4a16", "", "* 20.00"]


def test_a_record_without_what_a_moe_layer_tells_is_refused(tmp_path):
    run = run_of(moe("a", "w4a16", 4, 20))
    del run["benchmarks"][0]["extra_info"]["routing"]
    with pytest.raises(ResultsError, match="does not say the 'routing' of moe-"):
        results_of(tmp_path, run)
