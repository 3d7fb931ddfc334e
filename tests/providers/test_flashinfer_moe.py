"""FlashInfer's NVFP4 experts: a function with the signature and the checks of the real one (0.6.14), that reads its layouts."""

import sys
import types
from dataclasses import replace
from enum import IntEnum
from inspect import signature

import moe_contract
import pytest
import torch

from fp4bench import providers as registry
from fp4bench.checking import WrongResultError, checker
from fp4bench.devices import Device
from fp4bench.formats import NVFP4, ScaleRule, e2m1, layouts
from fp4bench.problems import FLOAT32_SUMS, W4A4, MoeProblem
from fp4bench.providers import nvfp4_moe, why_not
from fp4bench.providers.flashinfer import FlashInferCudnnProvider, FlashInferCutlassProvider
from fp4bench.quantize import decode, quantize

H200 = Device("cuda:0", "NVIDIA H200", (9, 0), 132, 60 << 20)
B200 = Device("cuda:0", "NVIDIA B200", (10, 0), 148, 126 << 20)
THOR = Device("cuda:0", "NVIDIA Thor", (11, 0), 20, 32 << 20)


class ActivationType(IntEnum):
    Swiglu = 3


def moe(m=19, **changed):
    return replace(MoeProblem("tiny", "experts", 1, m, 256, 128, 8, 2, W4A4, NVFP4), **changed)


def decoded(codes, scales):
    """Of one expert: int64 (n, k / 16), int32 (n in tiles, k / 64)."""
    codes = e2m1.unpack(codes.view(torch.uint8))
    n, k = codes.shape
    assert (4 * scales.shape[1], scales.shape[0]) == (k // 16, -(-n // 128) * 128)
    plain = layouts.from_blocked(scales.view(torch.uint8).flatten(), n, k // 16)
    return e2m1.decode(codes).double() * plain.view(torch.float8_e4m3fn).double().repeat_interleave(16, dim=1)


def quantized(x, scale):
    """By a known encode scale, as the multiplier of alpha sees it."""
    return decode(quantize(x, NVFP4, tensor_scale=scale), torch.float64) * scale.double()


def cutlass_fused_moe(
    input, token_selected_experts, token_final_scales, fc1_expert_weights, fc2_expert_weights, output_dtype, quant_scales,
    fc1_expert_biases=None, fc2_expert_biases=None, input_sf=None, swiglu_alpha=None, swiglu_beta=None, swiglu_limit=None,
    tp_size=1, tp_rank=0, ep_size=1, ep_rank=0, cluster_size=1, cluster_rank=0, output=None, enable_alltoall=False,
    use_deepseek_fp8_block_scale=False, use_w4_group_scaling=False, use_mxfp8_act_scaling=False, min_latency_mode=False,
    use_packed_weights=False, tune_max_num_tokens=8192, enable_pdl=None, activation_type=ActivationType.Swiglu,
    swizzled_input_sf=True,
):  # fmt: skip
    experts, n, words = fc1_expert_weights.shape
    hidden, intermediate = 16 * words, 16 * fc2_expert_weights.shape[2]
    assert fc1_expert_weights.dtype == fc2_expert_weights.dtype == torch.int64
    assert (n, fc2_expert_weights.shape[:2]) == (2 * intermediate, (experts, hidden))
    assert (input.dtype, input.shape[1], token_selected_experts.dtype) == (torch.bfloat16, hidden, torch.int32)
    assert token_final_scales.dtype == torch.float32
    assert (output.shape, output.dtype, output_dtype) == (input.shape, torch.bfloat16, torch.bfloat16)
    x_scale, first_scales, first_alphas, between_scale, second_scales, second_alphas = quant_scales
    assert x_scale.shape == between_scale.shape == ()
    assert first_alphas.shape == second_alphas.shape == (experts,)
    assert all(part.dtype == torch.float32 for part in (x_scale, between_scale, first_alphas, second_alphas))
    assert first_scales.dtype == second_scales.dtype == torch.int32
    # The binding asks for rows aligned to 64, times two, and the kernel finds experts at rows aligned to 128: both must agree.
    assert first_scales.shape == (experts, -(-intermediate // 64) * 64 * 2, -(-hidden // 64))
    assert second_scales.shape == (experts, -(-hidden // 128) * 128, -(-intermediate // 64))
    x = quantized(input, x_scale)
    output.zero_()
    for pair, expert in enumerate(token_selected_experts.flatten().tolist()):
        token = pair // token_selected_experts.shape[1]
        sums = first_alphas[expert].double() * (decoded(fc1_expert_weights[expert], first_scales[expert]) @ x[token])
        if fc1_expert_biases is not None:
            sums = sums + fc1_expert_biases[expert].double()
        up, gate = sums.chunk(2)
        if swiglu_limit is None:
            hidden_values = gate * torch.sigmoid(gate) * up
        else:
            limit, alpha, beta = (part[expert].double() for part in (swiglu_limit, swiglu_alpha, swiglu_beta))
            gate, up = gate.clamp(max=limit), up.clamp(-limit, limit) + beta
            hidden_values = gate * torch.sigmoid(alpha * gate) * up
        between = quantized(hidden_values[None].bfloat16(), between_scale)[0]
        part = second_alphas[expert].double() * (decoded(fc2_expert_weights[expert], second_scales[expert]) @ between)
        if fc2_expert_biases is not None:
            part = part + fc2_expert_biases[expert].double()
        output[token] += (token_final_scales.flatten()[pair].double() * part).bfloat16()
    return output


@pytest.fixture
def flashinfer(monkeypatch):
    package, module = types.ModuleType("flashinfer"), types.ModuleType("flashinfer.fused_moe")
    module.cutlass_fused_moe = package.fused_moe = cutlass_fused_moe
    monkeypatch.setitem(sys.modules, "flashinfer", package)
    monkeypatch.setitem(sys.modules, "flashinfer.fused_moe", module)
    monkeypatch.setattr(registry, "_version", lambda name: "0.6.14")
    return FlashInferCutlassProvider()


def check(provider, problem, inputs):
    assert why_not(provider, problem, B200) is None
    run, right = provider.prepare(problem, inputs), checker(problem, inputs, ScaleRule.TWO_LEVEL, FLOAT32_SUMS)
    right(run())
    return right(run())


@pytest.mark.parametrize("m", [1, 19])
def test_it_is_right(m, flashinfer):
    """By float32 sums: the stand-in quantizes as the reference does."""
    problem = moe(m)
    assert check(flashinfer, problem, problem.inputs()).rows == m


def test_gates_of_gpt_oss_with_biases_and_sizes_that_fill_no_tile(flashinfer):
    problem = moe(m=5, hidden=192, intermediate=192, experts=3, topk=2, activation=moe_contract.GPT_OSS, bias=True)
    check(flashinfer, problem, problem.inputs(seed=1))


def test_experts_of_unequal_tensor_scales(flashinfer):
    problem = moe(m=7)
    inputs = problem.inputs(seed=3)
    unequal = moe_contract.Unequal(**moe_contract._fields(inputs.weights))
    check(flashinfer, problem, replace(inputs, weights=unequal))


def test_gates_before_what_they_gate_are_found(flashinfer, monkeypatch):
    problem = moe()
    monkeypatch.setattr(torch.Tensor, "roll", lambda tensor, shifts, dims: tensor)
    with pytest.raises(WrongResultError):
        check(flashinfer, problem, problem.inputs())


def test_an_encode_scale_that_saturates_is_found(flashinfer, monkeypatch):
    monkeypatch.setattr(nvfp4_moe, "_LARGEST", 448.0 * 6.0 * 8)
    problem = moe()
    with pytest.raises(WrongResultError):
        check(flashinfer, problem, problem.inputs())


def test_no_tokens(flashinfer):
    problem = moe(m=0)
    assert flashinfer.prepare(problem, problem.inputs())().shape == (0, 256)


def test_the_stand_in_has_the_arguments_of_the_real_function():
    """As `flashinfer/fused_moe/core.py` of 0.6.14 declares them, in their order."""
    assert " ".join(signature(cutlass_fused_moe).parameters) == (
        "input token_selected_experts token_final_scales fc1_expert_weights fc2_expert_weights output_dtype quant_scales "
        "fc1_expert_biases fc2_expert_biases input_sf swiglu_alpha swiglu_beta swiglu_limit tp_size tp_rank ep_size ep_rank "
        "cluster_size cluster_rank output enable_alltoall use_deepseek_fp8_block_scale use_w4_group_scaling "
        "use_mxfp8_act_scaling min_latency_mode use_packed_weights tune_max_num_tokens enable_pdl activation_type "
        "swizzled_input_sf"
    )


def test_why_not(flashinfer):
    told = why_not(flashinfer, moe(), H200)
    assert told == "FlashInfer's cutlass FP4 needs compute capability 10, 11, 12, which NVIDIA H200 is not"
    assert why_not(flashinfer, moe(), THOR) == (
        "FlashInfer's experts by CUTLASS have no kernels for NVIDIA Thor, compute capability 11: "
        "https://github.com/flashinfer-ai/flashinfer/issues/3134"
    )
    told = why_not(flashinfer, moe(hidden=160), B200)
    assert told == "FlashInfer's experts by CUTLASS take a hidden size that is a multiple of 64, not 160"
    assert why_not(flashinfer, moe(intermediate=96), B200) == (
        "FlashInfer's experts by CUTLASS take an intermediate size that is a multiple of 64, not 96: "
        "https://github.com/flashinfer-ai/flashinfer/issues/4653"
    )
    assert why_not(FlashInferCudnnProvider(), moe(), B200) == "flashinfer_cudnn has no moe"
