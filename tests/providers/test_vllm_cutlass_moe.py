"""CUTLASS' FP4 experts: operators in plain torch that find bytes where the real ones do, the order of launches, and why not.

Where: `__get_group_gemm_starts` of vLLM's csrc, and the offsets of its quantizers of experts (0.26.0).
"""

from dataclasses import replace

import moe_contract
import pytest
import torch
from cuda_library import SASS
from vllm_moe_stand_in import STEPS, silu_and_mul
from vllm_stand_in import CUTLASS, CUTLASS_MOE, MOE, MOE_STEPS, operators

from fp4bench.checking import WrongResultError, checker
from fp4bench.devices import Device
from fp4bench.formats import MXFP4, NVFP4, ScaleRule, e2m1, layouts
from fp4bench.problems import W4A4, Accumulation, GemmProblem, MoeProblem
from fp4bench.providers import nvfp4_moe, vllm_cutlass_moe, vllm_ops, why_not
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


def experts_quant(output, output_scale, input, input_offset_by_experts, output_scale_offset_by_experts,
                  input_global_scale=None, n_experts=None):  # fmt: skip
    CALLS.append("quantize")
    experts = len(input_offset_by_experts) - 1
    assert n_experts in (None, experts)
    all_scales = output_scale.view(torch.uint8)
    for expert in range(experts):
        rows = slice(*input_offset_by_experts[expert : expert + 2].tolist())
        if rows.start == rows.stop:
            continue
        if input_global_scale is None:
            q = quantize(input[rows], MXFP4, rule=ScaleRule.EVEN)
        else:
            q = quantize(input[rows], NVFP4, tensor_scale=input_global_scale[expert])
        output[rows] = q.codes
        shape = layouts.padded_shape(*q.scales.shape)
        assert output_scale.shape[1] * 4 == shape[1]
        blocked = layouts.to_blocked(q.scales).view(torch.uint8).reshape(shape)
        all_scales[output_scale_offset_by_experts[expert] :][: shape[0]] = blocked


def silu_quant(output, output_scale, input, **rest):
    hidden = input.new_empty(len(input), input.shape[1] // 2)
    silu_and_mul(hidden, input)
    experts_quant(output, output_scale, hidden, **rest)


def decoded(codes, scales, start, block):
    """What codes (rows, k / 2) stand for with the blocked scales from byte `start` on."""
    codes = e2m1.unpack(codes)
    rows, columns = codes.shape[0], codes.shape[1] // block
    padded_rows, padded_columns = layouts.padded_shape(rows, columns)
    there = scales.view(torch.uint8).flatten()[start : start + padded_rows * padded_columns]
    plain = layouts.from_blocked(there, rows, columns)
    values = torch.exp2(plain.double() - 127) if block == 32 else plain.view(torch.float8_e4m3fn).double()
    return e2m1.decode(codes).double() * values.repeat_interleave(block, dim=1)


def group_mm(out, a, b, a_blockscale, b_blockscales, problem_sizes, expert_offsets, sf_offsets, alphas=None):
    CALLS.append("multiply")
    block = 32 if alphas is None else 16
    assert a_blockscale.dtype == b_blockscales.dtype == (torch.uint8 if alphas is None else torch.float8_e4m3fn)
    assert (a_blockscale.dim(), b_blockscales.dim()) == (2, 3)
    out.fill_(float("nan"))
    for expert, (m, n, k) in enumerate(problem_sizes.tolist()):
        if not m:
            continue
        assert (b[expert].shape, a.shape[1], out.shape[1]) == ((n, k // 2), k // 2, n)
        rows = slice(int(expert_offsets[expert]), int(expert_offsets[expert]) + m)
        x = decoded(a[rows], a_blockscale, int(sf_offsets[expert]) * (k // block), block)
        product = x @ decoded(b[expert], b_blockscales, expert * n * (k // block), block).T
        out[rows] = (product if alphas is None else alphas[expert].double() * product).to(out.dtype)


BEHIND = {
    **STEPS,
    "get_cutlass_moe_mm_data": data,
    "shuffle_rows": shuffle,
    "scaled_fp4_experts_quant": experts_quant,
    "silu_and_mul_scaled_fp4_experts_quant": silu_quant,
    "cutlass_fp4_group_mm": group_mm,
    "mxfp4_experts_quant": experts_quant,
    "silu_and_mul_mxfp4_experts_quant": silu_quant,
    "cutlass_mxfp4_group_mm": group_mm,
    "mxfp4_experts_quant_supported": lambda cuda_device_capability: 100 <= cuda_device_capability < 120,
}
FORMATS = pytest.mark.parametrize("fmt", [NVFP4, MXFP4], ids=str)


@pytest.fixture
def vllm(tmp_path, monkeypatch):
    targets = ((SASS, 90), (SASS, 100, 1 << 21), (SASS, 120, 1 << 21))
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
    right = checker(problem, inputs, provider.rules[problem.format.name][0], Accumulation(bits=24, terms=1))
    right(run())
    return right(run()), run


@FORMATS
@pytest.mark.parametrize("m", [1, 19, 140])
def test_it_is_right(m, fmt, vllm):
    """By float32 sums: the stand-ins quantize as the reference does."""
    assert check(moe(m, format=fmt))[0].rows == m


@FORMATS
def test_clamped_gates(fmt, vllm):
    check(moe(hidden=384, experts=3, topk=2, activation=moe_contract.GPT_OSS, format=fmt))


def test_the_smallest_nvfp4_experts(vllm):
    check(moe(hidden=128, intermediate=64))


@pytest.mark.parametrize(
    ("fmt", "sizes"),
    [(NVFP4, {"hidden": 192}), (NVFP4, {"intermediate": 96}), (MXFP4, {"hidden": 192}), (MXFP4, {"intermediate": 64})],
    ids=str,
)
def test_experts_that_fill_no_tile_get_scales_of_others(fmt, sizes, vllm):
    problem = moe(format=fmt, **sizes)
    reason = why_not(VllmCutlassProvider(), problem, B200)
    assert reason.startswith(f"vLLM's CUTLASS would take other experts' {fmt} scales where ")
    assert reason.endswith(": https://github.com/vllm-project/vllm/pull/35497")
    inputs = problem.inputs()
    rule = VllmCutlassProvider.rules[fmt.name][0]
    with pytest.raises(WrongResultError):
        checker(problem, inputs, rule)(vllm_cutlass_moe.prepare_moe(problem, inputs, rule)())


@FORMATS
def test_a_layer_is_these_launches(fmt, vllm):
    _, run = check(moe(m=3, format=fmt))
    CALLS.clear()
    run()
    assert CALLS == ["data", "shuffle", "quantize", "multiply", "quantize", "multiply", "shuffle"]
    assert list(run.phases) == ["route", "gather", "quantize", "gemm1", "activation", "gemm2", "combine"]


def test_an_encode_scale_that_saturates_would_be_found(vllm, monkeypatch):
    monkeypatch.setattr(nvfp4_moe, "_LARGEST", 448.0 * 6.0 * 8)
    with pytest.raises(WrongResultError):
        check(moe())


def test_why_not(vllm):
    provider = VllmCutlassProvider()
    assert "needs Blackwell" in why_not(provider, moe(), H200)
    assert why_not(provider, moe(bias=True), B200) == "vLLM's FP4 experts by CUTLASS have no bias"
    reason = "this vLLM says that its MXFP4 experts do not run on compute capability 12.0"
    assert why_not(provider, moe(format=MXFP4), replace(B200, capability=(12, 0))) == reason
    gemm = GemmProblem("tiny", "fc", 1, 16, 256, 256, W4A4, MXFP4)
    assert why_not(provider, gemm, B200) == "vLLM's CUTLASS has MXFP4 for experts alone"
    assert provider.prepare(moe(m=0), moe(m=0).inputs())().shape == (0, 256)
