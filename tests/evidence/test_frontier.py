"""Who is fastest, within which pool, and the dispatch table of that."""

import json

import pytest
from products import moe, product, quantization, results_of, run_of

from fp4bench.evidence import frontier
from fp4bench.evidence.results import ResultsError


def rows(lines, pool):
    """The cells of a pool's table."""
    start = lines.index(f"### {pool}") + 4
    table = lines[start:]
    end = next((i for i, line in enumerate(table) if not line.startswith("|")), len(table))
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in table[:end]]


def of_pool(told, pool):
    (table,) = [table for table in told["tables"] if table["pool"] == pool]
    return table


def test_the_fastest_of_an_answer_and_its_lead(tmp_path):
    run = run_of(
        product("torch", "bf16", 1, 40),
        *(product(name, "w4a16", 1, us) for name, us in (("b", 15), ("a", 12), ("c", 30))),
        product("c", "w4a8", 1, 5),
    )
    lines = frontier.lines(results_of(tmp_path, run))
    assert lines[0] == "The fastest right providers, NVIDIA H200, 2026-11-01, 0001_run (paced, cold L2)"
    layer = "tiny.qkv.tp1 1024x2048"
    assert rows(lines, "mxfp4 w4a16") == [[layer, "a", "1", "12.00 us", "3.33x", "b", "1.25x", "1.7e-03"]]
    assert rows(lines, "mxfp4 w4a8") == [[layer, "c", "1", "5.000 us", "8.00x", "nobody", "", "1.7e-03"]]
    both = ["c mxfp4 w4a8", "1", "5.000 us", "8.00x", "a mxfp4 w4a16", "2.40x", "1.7e-03"]
    assert rows(lines, "mxfp4 any") == [[layer, *both]]
    assert "### bf16" not in lines


def test_in_the_pool_of_a_format_everything_whole_competes(tmp_path):
    run = run_of(
        product("torch", "bf16", 1, 40),
        product("torch", "bf16", 1024, 40),
        product("torch", "fp8", 1, 30),
        product("a", "w4a4_noquant", 1, 1),
        product("a", "w4a16_fp16", 1, 2),
        product("torch", "fp16", 1, 3),
        product("a", "w4a4", 1, 20, hadamard=64),
        product("a", "w4a4", 1, 25),
        product("a", "w4a4", 1, 3, fmt="nvfp4"),
        product("a", "w4a16", 1024, 50),
    )
    table = of_pool(frontier.as_json(results_of(tmp_path, run)), "mxfp4 any")
    (layer,) = table["layers"]
    small, large = layer["ranges"]
    assert (small["provider"], small["mode"], small["hadamard"]) == ("a", "w4a4", 64)
    assert (large["provider"], large["mode"], large["scale_rule"]) == ("torch", "bf16", None)
    assert (table["mode"], table["format"]) == (None, "mxfp4")
    assert large["measured"][0]["second"] == {
        "provider": "a",
        "mode": "w4a16",
        "hadamard": None,
        "scale_rule": "floor",
        "ratio": pytest.approx(1.25),
        "same_run": True,
    }


def test_yardsticks_have_a_table_where_several_compute_them(tmp_path):
    run = run_of(product("torch", "fp8", 1, 30), product("b", "fp8", 1, 20), product("torch", "bf16", 1, 40))
    lines = frontier.lines(results_of(tmp_path, run))
    assert [line for line in lines if line.startswith("###")] == ["### fp8"]
    assert of_pool(frontier.as_json(results_of(tmp_path, run)), "fp8")["format"] is None


def test_ranges_touch_at_the_geometric_mean(tmp_path):
    winners = {1: "a", 4: "a", 16: "b", 64: "b", 65: "a"}
    run = run_of(
        *(product(name, "w4a16", m, 10 if name == winner else 12) for m, winner in winners.items() for name in "ab"),
        *(product("a", "w4a16", m, 10, layer="o", n=512) for m in (8, 16)),
    )
    table = of_pool(frontier.as_json(results_of(tmp_path, run)), "mxfp4 w4a16")
    qkv, o = table["layers"]
    ranges = [(at["m_min"], at["m_max"], at["provider"], [one["m"] for one in at["measured"]]) for at in qkv["ranges"]]
    assert ranges == [(1, 8, "a", [1, 4]), (9, 64, "b", [16, 64]), (65, 65, "a", [65])]
    assert [(at["m_min"], at["m_max"]) for at in o["ranges"]] == [(8, 16)]
    assert (o["n"], o["k"], o["names"]) == (512, 2048, ["tiny.o.tp1"])


def test_who_is_faster_within_runs_is_the_faster_one(tmp_path):
    """`a` was also timed on a card half as fast, so that its median over all runs is the larger one."""
    runs = (
        run_of(product("a", "w4a16", 1, 10), product("b", "w4a16", 1, 11), number=1),
        run_of(product("a", "w4a16", 1, 20), number=2, card="GPU-2"),
    )
    results = results_of(tmp_path, *runs)
    (found,) = frontier.best(results, frontier.pools(results)[0])
    assert found.result.work.provider == "a"
    assert str(found.lead) == "1.10x"


def test_the_json_says_what_it_stands_on(tmp_path):
    run = run_of(product("torch", "bf16", 1, 40), product("a", "w4a16", 1, 12), product("b", "w4a16", 1, 13))
    told = frontier.as_json(results_of(tmp_path, run))
    assert json.loads(json.dumps(told, allow_nan=False)) == told
    assert told["schema"] == frontier.SCHEMA == 1
    assert told["machine"]["machine"] == "NVIDIA-H200"
    assert told["machine"]["torch"] == "2.11.0"
    assert told["timing"] == {"pace": "paced", "l2": "cold"}
    assert told["runs"] == [{"name": "0001_run", "datetime": "2026-11-01T01:00:00", "card": "GPU-1"}]
    assert told["providers"] == {"a": "1.0"}
    (at,) = of_pool(told, "mxfp4 w4a16")["layers"][0]["ranges"]
    (measured,) = at["measured"]
    assert measured["seconds"] == pytest.approx(12e-6)
    assert measured["speedup_vs_bf16"] == pytest.approx(40 / 12)
    assert measured["error"] == 0.0017


def test_a_run_without_products_has_no_frontier(tmp_path):
    for make in (frontier.lines, frontier.as_json):
        with pytest.raises(ResultsError, match="there is no gemm"):
            make(results_of(tmp_path, run_of(quantization("a", 1, 10))))


def test_moe_layers_compete_with_moe_layers_of_their_routing(tmp_path):
    run = run_of(
        product("a", "w4a16", 4, 1),
        moe("torch", "bf16", 4, 90),
        moe("a", "w4a16", 4, 30),
        moe("b", "w4a16", 4, 20),
        moe("c", "fp8", 4, 25, fp8_scaling="token_channel"),
        moe("a", "w4a16", 4, 40, routing="zipf"),
        moe("a", "w4a16", 4, 10, experts=16),
    )
    results = results_of(tmp_path, run)
    lines = frontier.lines(results)
    assert [row[1:5] for row in rows(lines, "moe mxfp4 w4a16")] == [
        ["b", "4", "20.00 us", "4.50x"],
        ["a", "4", "10.00 us", "9.00x"],
    ]
    assert next(row[1:6] for row in rows(lines, "moe mxfp4 any")) == [
        *("b moe mxfp4 w4a16", "4", "20.00 us", "4.50x", "c moe fp8 token_channel"),
    ]
    assert [row[1] for row in rows(lines, "moe mxfp4 any zipf")] == ["a moe mxfp4 w4a16 zipf"]
    told = of_pool(frontier.as_json(results), "moe mxfp4 w4a16")
    assert (told["op"], told["routing"]) == ("moe", "uniform")
    assert [(layer["n"], layer["k"], layer["experts"]) for layer in told["layers"]] == [(128, 256, [8, 2]), (128, 256, [16, 2])]
    assert "op" not in of_pool(frontier.as_json(results), "mxfp4 w4a16")
