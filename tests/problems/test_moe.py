"""MoE problems: ids, bytes and flops multiplied out by hand, inputs from a seed, and copies that move on to other experts."""

from dataclasses import FrozenInstanceError, replace
from itertools import combinations, product

import pytest
import torch

from fp4bench.formats import MXFP4, NVFP4
from fp4bench.models import Activation, get_model, rank_experts
from fp4bench.problems import (
    BF16,
    FP8,
    FP8_SCALINGS,
    PER_BLOCK,
    PER_TENSOR,
    PER_TOKEN_CHANNEL,
    W4A4,
    W4A4_NOQUANT,
    W4A8,
    W4A16,
    MoeProblem,
    Routing,
)

R1 = MoeProblem("deepseek-r1", "experts", 1, 64, 7168, 2048, 256, 8, W4A16, NVFP4)
TINY = MoeProblem("tiny", "experts", 1, 5, 48, 32, 8, 2, BF16)


@pytest.mark.parametrize(
    ("changes", "provider", "case_id"),
    [
        ({}, "vllm_marlin", "moe-nvfp4-w4a16-vllm_marlin-deepseek-r1.experts.tp1-m64"),
        ({"mode": BF16, "format": None}, "torch", "moe-bf16-torch-deepseek-r1.experts.tp1-m64"),
        ({"mode": FP8, "format": None, "fp8": PER_TENSOR}, "vllm_triton", "moe-fp8-vllm_triton-deepseek-r1.experts.tp1-m64"),
        (
            {"mode": FP8, "format": None, "fp8": PER_TOKEN_CHANNEL, "tp": 8, "intermediate": 256},
            "vllm_triton",
            "moe-fp8-token_channel-vllm_triton-deepseek-r1.experts.tp8-m64",
        ),
        (
            {"routing": Routing("zipf", 2), "format": MXFP4, "mode": W4A8, "m": 1},
            "triton",
            "moe-mxfp4-w4a8-triton-deepseek-r1.experts.tp1-m1-zipf_s2",
        ),
    ],
)
def test_case_id(changes, provider, case_id):
    problem = replace(R1, **changes)
    assert problem.case_id(provider) == case_id
    assert str(problem) == case_id.replace(f"-{provider}", "")


def test_case_ids_are_unique():
    problems = [
        replace(TINY, m=m, mode=mode, format=fmt, routing=routing, fp8=fp8)
        for m, routing in product((1, 16), (Routing(), Routing("zipf"), Routing("uniform", 1), Routing("r", counts=(1,) * 8)))
        for mode, fmt, fp8 in [
            (BF16, None, None),
            *((FP8, None, scaling) for scaling in FP8_SCALINGS.values()),
            *((mode, fmt, None) for mode in (W4A16, W4A8, W4A4) for fmt in (MXFP4, NVFP4)),
        ]
    ]
    assert len({str(problem) for problem in problems}) == len(problems) == 2 * 4 * 12


def test_flops_are_those_of_the_products_of_all_pairs():
    # 64 tokens, 8 experts each, 3 products of 7168 by 2048.
    assert R1.flops == 64 * 8 * 3 * 2 * 7168 * 2048 == 45_097_156_608
    assert replace(R1, routing=Routing("one_hot")).flops == R1.flops


# One of 8 experts of 48 and 32: w13 64 x 48, w2 48 x 32. MXFP4: 64 * (24 + 2) + 48 * (16 + 1). NVFP4: 64 * (24 + 3) + 4 +
# 48 * (16 + 2) + 4. FP8: a scale each for w13 and w2, or 64 + 48, or 1 x 1 tiles of 128 in both.
EXPERT_BYTES = [
    (BF16, None, None, 6144 + 3072),
    (W4A16, MXFP4, None, 1664 + 816),
    (W4A8, MXFP4, None, 1664 + 816),
    (W4A4, NVFP4, None, 1732 + 868),
    (FP8, None, PER_TENSOR, 3072 + 1536 + 8),
    (FP8, None, PER_TOKEN_CHANNEL, 3072 + 1536 + 4 * 112),
    (FP8, None, PER_BLOCK, 3072 + 1536 + 8),
]


@pytest.mark.parametrize(("mode", "fmt", "fp8", "expected"), EXPERT_BYTES, ids=str)
def test_bytes_are_those_of_the_experts_hit(mode, fmt, fp8, expected):
    problem = replace(TINY, mode=mode, format=fmt, fp8=fp8)
    assert problem.expert_bytes == expected
    assert replace(problem, bias=True).expert_bytes == expected + 2 * (64 + 48)
    # 5 tokens: x and y of 48 in bfloat16, 2 ids and 2 weights of 4 bytes.
    around = 5 * (2 * 48 * 2 + 2 * 8)
    assert 2 <= problem.experts_hit < 8
    assert problem.bytes == problem.experts_hit * expected + around
    one = replace(problem, topk=1, routing=Routing("one_hot"))
    assert one.bytes == expected + 5 * (2 * 48 * 2 + 8)
    assert replace(problem, m=0).bytes == 0


def test_scales_of_blocks_count_those_begun():
    # w13 320 x 200: 3 x 2 blocks; w2 200 x 160: 2 x 2.
    problem = replace(TINY, hidden=200, intermediate=160, mode=FP8, fp8=PER_BLOCK)
    assert problem.expert_bytes == 320 * 200 + 200 * 160 + 4 * (6 + 4)


def test_an_expert_of_deepseek_r1_has_25_megabytes_in_nvfp4():
    # 3 * 7168 * 2048 values of 4.5 bits, and a float32 each for w13 and w2.
    assert R1.expert_bytes == 3 * 7168 * 2048 * 9 // 16 + 8 == 24_772_616
    assert replace(R1, m=1).experts_hit == 8
    assert replace(R1, m=2048).experts_hit == 256


def test_inputs_are_of_the_problem_shape_and_follow_from_the_seed():
    problem = replace(TINY, bias=True)
    inputs, again, other = problem.inputs(seed=3), problem.inputs(seed=3), problem.inputs(seed=4)
    assert (inputs.x.shape, inputs.x.dtype) == ((5, 48), torch.bfloat16)
    assert (inputs.w13.shape, inputs.w13.dtype) == ((8, 64, 48), torch.bfloat16)
    assert (inputs.w2.shape, inputs.w2.dtype) == ((8, 48, 32), torch.bfloat16)
    assert (inputs.b13.shape, inputs.b2.shape) == ((8, 64), (8, 48))
    assert inputs.b13.dtype == inputs.b2.dtype == torch.bfloat16
    assert (inputs.topk_ids.dtype, inputs.topk_weights.dtype) == (torch.int32, torch.float32)
    for name in ("x", "w13", "w2", "b13", "b2"):
        assert torch.equal(getattr(inputs, name), getattr(again, name))
        assert (getattr(inputs, name) == getattr(other, name)).double().mean() < 0.05
    # The choices are the problem's own: its bytes count the experts hit.
    assert torch.equal(inputs.topk_ids, other.topk_ids)
    assert problem.experts_hit == len(inputs.topk_ids.unique())
    assert TINY.inputs().b13 is None
    assert TINY.inputs().weights.b2(0) is None


def test_stacked_weights_are_those_by_expert():
    inputs = replace(TINY, bias=True).inputs()
    w = inputs.weights
    for expert in range(8):
        assert torch.equal(inputs.w13[expert], w.w13(expert))
        assert torch.equal(inputs.w2[expert], w.w2(expert))
        assert torch.equal(inputs.b13[expert], w.b13(expert))
        assert torch.equal(inputs.b2[expert], w.b2(expert))


def test_no_two_tensors_of_a_layer_are_alike():
    w = replace(TINY, hidden=64, intermediate=32).inputs().weights
    # Both are 64 x 64 and 64 x 32: their first 2048 draws would be equal, were their seeds.
    parts = [part.flatten()[:2048].sign() for e in range(4) for part in (w.w13(e), w.w2(e), w.other(1).w13(e))]
    for a, b in combinations(parts, 2):
        assert 0.4 < (a == b).double().mean() < 0.6


def test_every_tensor_has_a_seed_of_its_own():
    sets = [TINY.inputs(seed=seed).weights.other(number) for seed, number in product(range(3), range(3))]
    seeds = [w.seed_of(expert, part) for w, expert, part in product(sets, range(8), range(5))]
    assert len(set(seeds)) == len(seeds)


def test_outputs_stay_near_one():
    w = replace(TINY, hidden=512, intermediate=256).inputs().weights
    assert w.w13(0).double().std().item() == pytest.approx(512**-0.5, rel=0.05)
    assert w.w2(0).double().std().item() == pytest.approx(256**-0.5, rel=0.05)


def test_a_bias_lets_some_gates_reach_the_limit():
    problem = replace(TINY, m=64, hidden=256, intermediate=128, bias=True)
    inputs = problem.inputs()
    gates = inputs.x.float() @ inputs.weights.w13(0)[:128].float().T + inputs.weights.b13(0)[:128].float()
    assert 0.002 < (gates.abs() > 7).double().mean() < 0.2


# Copies


def test_copies_use_other_experts_until_all_had_their_turn():
    problem = replace(R1, m=1)
    inputs = problem.inputs()
    seen = [set(problem.copy(inputs, number).topk_ids.flatten().tolist()) for number in range(4)]
    assert seen[0] == set(inputs.topk_ids.flatten().tolist())
    for number, ids in enumerate(seen):
        assert ids == {(expert + 8 * number) % 256 for expert in seen[0]}


def test_copies_share_weights_and_nothing_else():
    problem = replace(R1, m=4)
    inputs = problem.inputs()
    copy = problem.copy(inputs, 1)
    assert copy.weights is inputs.weights
    assert torch.equal(copy.x, inputs.x)
    for name in ("x", "topk_ids", "topk_weights"):
        assert getattr(copy, name).data_ptr() != getattr(inputs, name).data_ptr()
    loads = [one.topk_ids.flatten().bincount(minlength=256).sort().values for one in (inputs, copy)]
    assert torch.equal(*loads)


def test_small_layers_have_several_sets_of_weights():
    # 32 experts of gpt-oss-20b at TP 8 are 53 MB in MXFP4: eleven sets are 512 MiB.
    experts = rank_experts(get_model("gpt-oss-20b"), 8)
    problem = MoeProblem("gpt-oss-20b", "experts", 8, 1, 2880, experts.intermediate, 32, 4, W4A16, MXFP4)
    inputs = problem.inputs()
    sets = -(-(1 << 29) // (32 * problem.expert_bytes))
    copies = [problem.copy(inputs, number) for number in range(sets + 1)]
    assert sets > 5
    assert len({id(copy.weights) for copy in copies}) == sets
    assert copies[sets].weights is inputs.weights
    assert not torch.equal(copies[0].topk_ids, copies[sets].topk_ids)
    assert not torch.equal(copies[0].weights.w2(0), copies[1].weights.w2(0))


def test_what_is_made_of_weights_is_made_once_for_all_copies():
    problem = replace(R1, m=4)
    inputs, made = problem.inputs(), []
    for one in (inputs, problem.copy(inputs, 1), problem.copy(inputs, 2)):
        one.weights.keep("layout", lambda: made.append(1))
    assert len(made) == 1
    inputs.weights.keep("other", lambda: made.append(2))
    assert made == [1, 2]


# What is refused


def test_problems_are_frozen_values():
    with pytest.raises(FrozenInstanceError):
        R1.m = 2
    assert {R1: 1}[replace(R1)] == 1
    assert replace(R1, routing=Routing("zipf")) != R1


@pytest.mark.parametrize("size", [{"m": -1}, {"hidden": 0}, {"intermediate": 0}, {"topk": 0}, {"topk": 257}], ids=str)
def test_a_layer_of_nothing_is_refused(size):
    with pytest.raises(ValueError, match=r"that is no MoE layer$"):
        replace(R1, **size)


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"format": None}, "needs an FP4 format"),
        ({"mode": BF16}, "has no FP4 format"),
        ({"mode": FP8, "format": None}, "needs FP8 scaling"),
        ({"fp8": PER_TENSOR}, "has no FP8 scaling"),
        ({"mode": W4A4_NOQUANT}, "a MoE layer has no mode w4a4_noquant"),
    ],
)
def test_a_mode_that_does_not_fit_is_refused(changes, why):
    with pytest.raises(ValueError, match=why):
        replace(R1, **changes)


def test_an_activation_is_a_value():
    gpt_oss = rank_experts(get_model("gpt-oss-120b")).activation
    assert gpt_oss == Activation("swiglu", alpha=1.702, limit=7.0)
    assert str(replace(R1, activation=gpt_oss)) == str(R1)  # the model names it
