"""Marlin's MoE layers: operators that read its layouts back, padding, the launch, and why not."""

from dataclasses import replace

import moe_contract
import pytest
import torch
from marlin_reading import repack, weights
from vllm_moe_stand_in import CALLS, STEPS, tile_products
from vllm_stand_in import MARLIN, MOE, MOE_STEPS, operators

from fp4bench.checking import WrongResultError
from fp4bench.devices import Device
from fp4bench.formats import FORMATS, MXFP4, NVFP4
from fp4bench.problems import W4A16, MoeProblem
from fp4bench.providers import marlin_layout, vllm_marlin_moe, vllm_ops, why_not
from fp4bench.providers.vllm_marlin import VllmMarlinProvider

H200 = Device("cuda:0", "NVIDIA H200", (9, 0), 132, 60 << 20)
SEEN: list[dict] = []


def moe(fmt=MXFP4, m=7, **changed):
    problem = MoeProblem("tiny", "experts", 1, m, 128, 128, 4, 2, W4A16, fmt)
    return replace(problem, **changed)


def in_column_order(bias):
    """A bias in Marlin's order back in that of columns: in each 32, column 8 * a + 2 * i + b lies at 8 * i + 2 * a + b."""
    column = torch.arange(len(bias))
    within = column % 32
    return bias[column // 32 * 32 + within % 8 // 2 * 8 + within // 8 * 2 + within % 2]


def marlin_moe(a, c_or_none, b_q_weight, b_bias_or_none, b_scales, global_scale, topk_weights, **rest):
    """What Marlin computes, from its layouts, tile by tile."""
    CALLS.append("marlin")
    SEEN.append(rest | {"n": c_or_none.shape[1]})
    assert {"use_atomic_add": False, "use_fp32_reduce": True, "is_zp_float": False, "is_full_k": True}.items() <= rest.items()
    assert (rest["size_m"], rest["size_n"], rest["size_k"]) == (len(a), c_or_none.shape[1], a.shape[1])
    assert rest["b_type_id"] == 562949953487106
    assert len(rest["workspace"]) == 4 * 132
    factor = None if global_scale is None else global_scale.__getitem__
    tile_products(
        lambda rows: a[rows],
        lambda expert: weights(b_q_weight[expert], b_scales[expert], factor and factor(expert).view(1)),
        c_or_none,
        rest["sorted_token_ids"],
        rest["expert_ids"],
        int(rest["num_tokens_past_padded"]),
        rest["moe_block_size"],
        rest["top_k"],
        topk_weights,
        rest["mul_topk_weights"],
        None if b_bias_or_none is None else lambda expert: in_column_order(b_bias_or_none[expert]),
    )
    return c_or_none


BEHIND = {**STEPS, "moe_wna16_marlin_gemm": marlin_moe, "gptq_marlin_repack": repack, "marlin_gemm": lambda **_: None}


@pytest.fixture
def vllm(tmp_path, monkeypatch):
    monkeypatch.setattr(marlin_layout, "processors", lambda device: 132)
    with (
        operators(MOE, BEHIND, "MOE", monkeypatch, tmp_path) as moe_folder,
        operators((*MARLIN["0.26.0"], *MOE_STEPS), BEHIND, "MAIN", monkeypatch, tmp_path) as folder,
    ):
        (moe_folder / vllm_ops.MOE.files[-1]).rename(folder / vllm_ops.MOE.files[-1])
        yield folder


def on_the_cpu(problem, monkeypatch):
    monkeypatch.setattr(moe_contract, "why_not", lambda provider, problem, device: why_not(provider, problem, H200))
    return moe_contract.check_moe(VllmMarlinProvider(), problem, Device("cpu", "Some CPU"))


@pytest.mark.parametrize("fmt", FORMATS.values(), ids=str)
def test_it_keeps_the_contract(fmt, vllm, monkeypatch):
    on_the_cpu(moe(fmt), monkeypatch)


@pytest.mark.parametrize("fmt", FORMATS.values(), ids=str)
def test_biases_clamped_gates_and_padding_keep_it(fmt, vllm, monkeypatch):
    problem = moe(
        fmt, bias=fmt is MXFP4, hidden=192, intermediate=72, experts=3, topk=2, activation=moe_contract.GPT_OSS
    )  # 72 is no multiple of a block
    on_the_cpu(problem, monkeypatch)
    assert {(seen["n"], seen["size_k"]) for seen in SEEN[-2:]} == {(256, 192), (192, 128)}


def test_a_bias_in_another_order_would_be_found(vllm, monkeypatch):
    monkeypatch.setattr(marlin_layout, "_COLUMNS_32", list(range(32)))
    with pytest.raises(WrongResultError):
        on_the_cpu(moe(bias=True), monkeypatch)


def test_a_layer_is_these_launches(vllm):
    problem = moe(m=3)
    run = VllmMarlinProvider().prepare(problem, problem.inputs())
    CALLS.clear()
    run()
    assert CALLS == ["align", "marlin", "silu", "marlin", "sum"]
    assert [(seen["top_k"], seen["mul_topk_weights"], seen["moe_block_size"]) for seen in SEEN[-2:]] == [
        (2, False, 8),
        (1, True, 8),
    ]
    assert list(run.phases) == ["route", "gemm1", "activation", "gemm2", "combine"]


@pytest.mark.parametrize(("pairs", "rows"), [(8, 8), (8 * 256, 16), (14 * 256, 16), (16 * 256, 32), (10**6, 64)])
def test_tiles_have_the_rows_that_vllm_gives_them(pairs, rows):
    assert vllm_marlin_moe.rows_of_a_tile(pairs, 256) == rows


@pytest.mark.parametrize(
    ("hidden", "intermediate", "padded"), [(7168, 2048, 2048), (7168, 192, 192), (2880, 2880, 2944), (2880, 360, 384)]
)
def test_intermediate_sizes_are_padded_where_marlin_has_no_tiles(hidden, intermediate, padded):
    assert vllm_marlin_moe.padded_intermediate(moe(hidden=hidden, intermediate=intermediate)) == padded


def test_no_tokens_are_no_work(vllm):
    problem = moe(m=0)
    assert VllmMarlinProvider().prepare(problem, problem.inputs())().shape == (0, 128)


def test_why_not(vllm):
    provider = VllmMarlinProvider()
    assert why_not(provider, moe(NVFP4), H200) is None
    assert "multiplies a bias by NVFP4's tensor scale" in why_not(provider, moe(NVFP4, bias=True), H200)
    assert "hidden size that is a multiple of 64, not 200" in why_not(provider, moe(hidden=200), H200)
    (vllm / vllm_ops.MOE.files[-1]).unlink()
    assert "has no _moe_C.abi3.so or _moe_C_stable_libtorch.abi3.so of vLLM" in why_not(provider, moe(), H200)
