"""CUTLASS' NVFP4 experts: operators in plain torch that read their layouts, the order of launches, and why not."""

from dataclasses import replace

import moe_contract
import pytest
import torch
from cuda_library import SASS
from vllm_moe_stand_in import STEPS, silu_and_mul
from vllm_stand_in import CUTLASS, CUTLASS_MOE, MOE, MOE_STEPS, operators

from fp4bench.checking import WrongResultError, checker
from fp4bench.devices import Device
from fp4bench.formats import NVFP4, e2m1, layouts
from fp4bench.problems import W4A4, Accumulation, MoeProblem
from fp4bench.providers import vllm_cutlass_moe, vllm_ops, why_not
from fp4bench.providers.vllm_cutlass import VllmCutlassProvider
from fp4bench.quantize import quantize

H200 = Device("cuda:0", "NVIDIA H200", (9, 0), 132, 60 << 20)
B200 = Device("cuda:0", "NVIDIA B200", (10, 0), 148, 126 << 20)
CALLS: list[str] = []


def moe(m=19, **changed):
    return replace(MoeProblem("tiny", "experts", 1, m, 256, 128, 8, 2, W4A4, NVFP4), **changed)


def data(topk_ids, expert_offsets, problem_sizes1, problem_sizes2, input_permutation, output_permutation, num_experts, n, k,
         blockscale_offsets, is_gated):  # fmt: skip
    CALLS.append("data")
    assert is_gated
    pairs, topk = topk_ids.flatten().long(), topk_ids.shape[1]
    counts = torch.bincount(pairs, minlength=num_experts)
    order = pairs.argsort(stable=True)
    input_permutation.copy_(order // topk)
    output_permutation.copy_(order.argsort())
    expert_offsets[0] = blockscale_offsets[0] = 0
    expert_offsets[1:] = counts.cumsum(0)
    blockscale_offsets[1:] = (-(-counts // 128) * 128).cumsum(0)
    for sizes, columns, depth in ((problem_sizes1, 2 * n, k), (problem_sizes2, k, n)):
        sizes.copy_(torch.stack([counts, torch.full_like(counts, columns), torch.full_like(counts, depth)], dim=1))


def shuffle(input_tensor, dst2src_map, output_tensor):
    CALLS.append("shuffle")
    output_tensor.copy_(input_tensor[dst2src_map.long()])


def experts_quant(output, output_scale, input, input_global_scale, input_offset_by_experts, output_scale_offset_by_experts):
    CALLS.append("quantize")
    all_scales = output_scale.view(torch.uint8)
    for expert, scale in enumerate(input_global_scale):
        rows = slice(*input_offset_by_experts[expert : expert + 2].tolist())
        if rows.start == rows.stop:
            continue
        q = quantize(input[rows], NVFP4, tensor_scale=scale)
        output[rows] = q.codes
        shape = layouts.padded_shape(*q.scales.shape)
        blocked = layouts.to_blocked(q.scales).view(torch.uint8).reshape(shape)
        all_scales[output_scale_offset_by_experts[expert] :][: shape[0]] = blocked


def silu_quant(output, output_scale, input, **rest):
    hidden = input.new_empty(len(input), input.shape[1] // 2)
    silu_and_mul(hidden, input)
    experts_quant(output, output_scale, hidden, **rest)


def decoded(codes, blocked):
    codes = e2m1.unpack(codes)
    scales = layouts.from_blocked(blocked.flatten(), codes.shape[0], codes.shape[1] // 16)
    return e2m1.decode(codes).double() * scales.view(torch.float8_e4m3fn).double().repeat_interleave(16, dim=1)


def group_mm(out, a, b, a_blockscale, b_blockscales, alphas, problem_sizes, expert_offsets, sf_offsets):
    CALLS.append("multiply")
    out.fill_(float("nan"))
    for expert, (m, n, k) in enumerate(problem_sizes.tolist()):
        if not m:
            continue
        assert (b[expert].shape, a.shape[1], out.shape[1]) == ((n, k // 2), k // 2, n)
        rows = slice(int(expert_offsets[expert]), int(expert_offsets[expert]) + m)
        scales = a_blockscale[int(sf_offsets[expert]) :][: -(-m // 128) * 128].view(torch.uint8)
        product = decoded(a[rows], scales) @ decoded(b[expert], b_blockscales[expert].view(torch.uint8)).T
        out[rows] = (alphas[expert].double() * product).to(out.dtype)


BEHIND = {
    **STEPS,
    "get_cutlass_moe_mm_data": data,
    "shuffle_rows": shuffle,
    "scaled_fp4_experts_quant": experts_quant,
    "silu_and_mul_scaled_fp4_experts_quant": silu_quant,
    "cutlass_fp4_group_mm": group_mm,
}


@pytest.fixture
def vllm(tmp_path, monkeypatch):
    targets = ((SASS, 90), (SASS, 100, 1 << 21))
    with (
        operators(MOE, BEHIND, "MOE", monkeypatch, tmp_path, targets=targets) as moe_folder,
        operators((*CUTLASS, *CUTLASS_MOE, *MOE_STEPS), BEHIND, "MAIN", monkeypatch, tmp_path, targets=targets) as folder,
    ):
        (moe_folder / vllm_ops.MOE.files[-1]).rename(folder / vllm_ops.MOE.files[-1])
        yield folder


def check(problem, seed=0):
    provider, inputs = VllmCutlassProvider(), problem.inputs(seed=seed)
    assert why_not(provider, problem, B200) is None
    run = provider.prepare(problem, inputs)
    right = checker(problem, inputs, provider.rules[NVFP4.name][0], Accumulation(bits=24, terms=1))
    right(run())
    return right(run()), run


@pytest.mark.parametrize("m", [1, 19, 140])
def test_it_is_right(m, vllm):
    """By float32 sums: the stand-ins quantize as the reference does."""
    assert check(moe(m))[0].rows == m


def test_clamped_gates_and_sizes_that_fill_no_tile(vllm):
    check(moe(hidden=192, intermediate=96, experts=3, topk=2, activation=moe_contract.GPT_OSS))


def test_a_layer_is_these_launches(vllm):
    _, run = check(moe(m=3))
    CALLS.clear()
    run()
    assert CALLS == ["data", "shuffle", "quantize", "multiply", "quantize", "multiply", "shuffle"]
    assert list(run.phases) == ["route", "gather", "quantize", "gemm1", "activation", "gemm2", "combine"]


def test_an_encode_scale_that_saturates_would_be_found(vllm, monkeypatch):
    monkeypatch.setattr(vllm_cutlass_moe, "_LARGEST", 448.0 * 6.0 * 8)
    with pytest.raises(WrongResultError):
        check(moe())


def test_why_not(vllm):
    provider = VllmCutlassProvider()
    assert "needs Blackwell" in why_not(provider, moe(), H200)
    assert why_not(provider, moe(bias=True), B200) == "vLLM's NVFP4 experts by CUTLASS have no bias"
    assert "multiples of 32, not 200 and 128" in why_not(provider, moe(hidden=200), B200)
    assert provider.prepare(moe(m=0), moe(m=0).inputs())().shape == (0, 256)
