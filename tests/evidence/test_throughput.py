"""TFLOP/s as tables and as CSV."""

import csv

import pytest
from products import product, quantization, results_of, run_of

from fp4bench.evidence import throughput
from fp4bench.evidence.results import ResultsError


def rows(lines):
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if line.startswith("| ")]


def titles(lines):
    return [line for line in lines if line.startswith("### ")]


def test_providers_by_row_and_batch_sizes_by_column(tmp_path):
    # 2 m n k is 4.194 MFLOP at m = 1: in 10 us 0.4194 TFLOP/s, the slow fifth takes 2 % longer and the fast one 1 % less.
    run = run_of(product("a", "w4a16", 1, 10), product("a", "w4a16", 256, 10), product("torch", "bf16", 1, 40))
    lines = throughput.lines(results_of(tmp_path, run))
    assert lines[0] == "TFLOP/s, NVIDIA H200, 2026-11-01, 0001_run (paced, cold L2)"
    assert titles(lines) == ["### mxfp4, n = 1024, k = 2048, no rotation (tiny.qkv.tp1)"]
    head, _, *table = rows(lines)
    assert head == ["provider, mode", "percentile", "1", "256"]
    assert table == [
        ["torch bf16", "50 %", "0.1049", ""],
        ["", "20 %", "0.1028", ""],
        ["", "80 %", "0.1059", ""],
        ["a w4a16", "50 %", "0.4194", "107.4"],
        ["", "20 %", "0.4112", "105.3"],
        ["", "80 %", "0.4237", "108.5"],
    ]


def test_a_table_for_each_format_shape_and_hadamard_size(tmp_path):
    run = run_of(
        product("torch", "bf16", 1, 40),
        product("torch", "bf16", 1, 80, layer="down", n=4096),
        product("a", "w4a4", 1, 10, fmt="nvfp4"),
        *(product("a", "w4a4", 1, 10, hadamard=size) for size in (128, None, 32)),
        product("a", "w4a16", 1, 10, layer="down", n=4096),
    )
    lines = throughput.lines(results_of(tmp_path, run))
    assert titles(lines) == [
        "### mxfp4, n = 1024, k = 2048, no rotation (tiny.qkv.tp1)",
        "### mxfp4, n = 1024, k = 2048, Hadamard 32 (tiny.qkv.tp1)",
        "### mxfp4, n = 1024, k = 2048, Hadamard 128 (tiny.qkv.tp1)",
        "### mxfp4, n = 4096, k = 2048, no rotation (tiny.down.tp1)",
        "### nvfp4, n = 1024, k = 2048, no rotation (tiny.qkv.tp1)",
    ]
    names = [row[0] for row in rows(lines) if row[1] == "50 %"]
    assert names == ["torch bf16", "a w4a4"] * 3 + ["torch bf16", "a w4a16", "torch bf16", "a w4a4"]


def test_a_run_without_fp4_has_a_table_too(tmp_path):
    lines = throughput.lines(results_of(tmp_path, run_of(product("torch", "bf16", 1, 40))))
    assert titles(lines) == ["### n = 1024, k = 2048 (tiny.qkv.tp1)"]


def test_a_run_without_products_has_none(tmp_path):
    with pytest.raises(ResultsError, match="there is no gemm"):
        throughput.lines(results_of(tmp_path, run_of(quantization("a", 1, 10))))


def test_the_csv_holds_every_product(tmp_path):
    run = run_of(
        product("torch", "bf16", 1, 40),
        product("a", "w4a4", 256, 10, hadamard=64),
        product("a", "w4a4", 1, 8),
        quantization("a", 1, 1),
    )
    throughput.write_csv(results_of(tmp_path, run), tmp_path / "all.csv")
    with (tmp_path / "all.csv").open(newline="") as file:
        first, second, third = csv.DictReader(file)
    assert tuple(first) == throughput.COLUMNS
    told = {key: second[key] for key in ("gpu", "format", "mode", "hadamard", "provider", "provider_version", "m", "n", "k")}
    assert list(told.values()) == ["NVIDIA H200", "mxfp4", "w4a4", "64", "a", "1.0", "256", "1024", "2048"]
    assert float(second["seconds"]) == pytest.approx(10e-6)
    assert second["speedup_vs_bf16"] == ""  # BF16 was not timed at 256
    assert float(third["speedup_vs_bf16"]) == pytest.approx(5.0)
    # 256 tokens are bound by 200 TFLOP/s, one by the copy: 1.12 MB at 1000 GB/s.
    assert float(second["roof_tflops"]) == pytest.approx(200.0)
    moved = 1024 * 2048 * 4.25 / 8 + 2048 * 2 + 2 * 1024
    assert float(third["roof_tflops"]) == pytest.approx(2 * 1024 * 2048 / (moved / 1e12) * 1e-12, rel=1e-6)
    assert float(third["roofline_fraction"]) == pytest.approx(float(third["tflops"]) / float(third["roof_tflops"]))
    assert (first["format"], first["hadamard"], first["scale_rule"], first["exact"]) == ("bf16", "", "", "False")


def test_roofs_are_empty_where_a_ceiling_is_unknown(tmp_path):
    run = run_of(product("a", "w4a16", 1, 8), product("a", "w4a4", 1, 8), ceilings={"copy_gbps": 1.0, "bf16_tflops": 1.0})
    of16, of4 = throughput.rows(results_of(tmp_path, run))
    assert of16["roof_tflops"] > 0
    assert of4["roof_tflops"] is None


def test_a_file_that_is_there_is_left_alone(tmp_path):
    results = results_of(tmp_path, run_of(product("a", "w4a16", 1, 8)))
    (tmp_path / "mine.csv").write_text("mine")
    with pytest.raises(ValueError, match=r"mine.csv exists: name a new file for --csv"):
        throughput.write_csv(results, tmp_path / "mine.csv")
    assert (tmp_path / "mine.csv").read_text() == "mine"
    with pytest.raises(ValueError, match=r"cannot write .*x.csv: No such file or directory"):
        throughput.write_csv(results, tmp_path / "absent" / "x.csv")
