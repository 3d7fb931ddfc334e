"""vLLM's Marlin: FP4 weights times bfloat16 activations, decoded in registers, on GPUs from Ampere on; MoE layers too. NVFP4
weights times float16 activations from Turing on.

Weights are quantized by this package's rules (Marlin takes any scales) and laid out once (`marlin_layout`), as vLLM 0.26.0 has
it in `prepare_fp4_layer_for_marlin`; the call is the operator of its `apply_fp4_marlin_linear`, with its defaults: sums in
float32, no atomics. NVFP4 blocks whose scale is below 2**-6 of a tensor whose largest is 448 become zero.
"""

from collections.abc import Mapping
from typing import Any

import torch

from fp4bench.devices import Device
from fp4bench.formats import MXFP4, NVFP4, ScaleRule
from fp4bench.problems import W4A16_FP16, GemmProblem, MoeProblem, Problem
from fp4bench.providers import Runner, marlin_layout, vllm_ops
from fp4bench.providers.vllm_marlin_moe import prepare_moe, why_not_moe
from fp4bench.quantize import quantize

_GEMM = ("gptq_marlin_gemm", "marlin_gemm")


class VllmMarlinProvider:
    """MXFP4 (FLOOR) and NVFP4 (TWO_LEVEL) weights by `_C.marlin_gemm` and `_moe_C.moe_wna16_marlin_gemm`."""

    name = "vllm_marlin"
    ops = ("gemm", "moe")
    modes = ("w4a16", "w4a16_fp16")
    moe_modes = ("w4a16",)
    rules: Mapping[str, tuple[ScaleRule, ...]] = {MXFP4.name: (ScaleRule.FLOOR,), NVFP4.name: (ScaleRule.TWO_LEVEL,)}

    def __init__(self) -> None:
        self.version = vllm_ops.MAIN.version()

    def why_not(self, problem: Problem, device: Device) -> str | None:
        half = isinstance(problem, GemmProblem) and problem.mode is W4A16_FP16
        dtype, oldest = ("float16", (7, 5)) if half else ("bfloat16", (8, 0))
        if device.capability is None or device.capability < oldest:
            needed = "{}.{}".format(*oldest)
            return f"Marlin needs a CUDA GPU of compute capability {needed} or later for {dtype}, which {device.name} is not"
        if reason := vllm_ops.MAIN.why_not(device.capability, _GEMM, marlin_layout.REPACK):
            return reason
        if isinstance(problem, MoeProblem):
            return why_not_moe(problem, device.capability)
        assert isinstance(problem, GemmProblem)
        if half and problem.format is MXFP4:
            return "Marlin has no MXFP4 weights beside float16 activations"
        if not marlin_layout.fits(problem.n, problem.k):
            return (
                "Marlin takes n that is a multiple of 64 and k of 128, or n of 128 and k of 64, "
                f"not {problem.n} and {problem.k}; vLLM pads such layers on each call"
            )
        return None

    def prepare(self, problem: Any, inputs: Any) -> Runner:
        fmt = problem.format
        rule = self.rules[fmt.name][0]
        if isinstance(problem, MoeProblem):
            return prepare_moe(problem, inputs, rule)
        w = quantize(inputs.w, fmt, rule=rule)
        scales, tensor_scale = marlin_layout.marlin_scales(w, inputs.x.dtype)
        gemm = vllm_ops.MAIN.operator(*_GEMM)
        device = inputs.x.device
        given = {
            "a": inputs.x,
            "b_q_weight": marlin_layout.repacked(w, problem.n, problem.k),
            "b_scales": scales,
            "global_scale": tensor_scale,
            "workspace": torch.zeros(marlin_layout.processors(device), dtype=torch.int32, device=device),
            "b_type_id": marlin_layout.FLOAT4_E2M1,
            "size_m": problem.m,
            "size_n": problem.n,
            "size_k": problem.k,
            "use_atomic_add": False,
            "use_fp32_reduce": True,
        }
        nothing = dict.fromkeys(("c", "b_bias", "a_scales", "b_zeros", "g_idx", "perm"))
        arguments = vllm_ops.arguments(gemm, given, nothing | {"is_k_full": True, "is_zp_float": False})
        return lambda: gemm(*arguments)
