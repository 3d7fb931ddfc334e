"""vLLM's Marlin: FP4 weights times bfloat16 activations, decoded in registers, on GPUs from Ampere on.

Weights are quantized by this package's rules (Marlin takes any scales) and laid out once, as `prepare_fp4_layer_for_marlin` of
vLLM 0.26.0 does; the call is the operator of its `apply_fp4_marlin_linear`, with its defaults: sums in float32, no atomics.

MXFP4 scales stay E8M0 bytes. NVFP4 scales become S0E5M3, which has no room for a scale below 2**-6 of a tensor whose largest is
448: Marlin makes those blocks zero. The tensor's scale is a factor of the result, in the decode sense, 1 / S.
"""

from collections.abc import Mapping
from typing import Any

import torch

from fp4bench.devices import Device
from fp4bench.formats import MXFP4, NVFP4, ScaleRule
from fp4bench.problems import GemmProblem, Problem
from fp4bench.providers import Runner, vllm_ops
from fp4bench.quantize import Quantized, quantize

_GEMM = ("gptq_marlin_gemm", "marlin_gemm")
_REPACK = "gptq_marlin_repack"

_FLOAT4_E2M1 = 562949953487106  # vLLM's ScalarType.id of it, the same since 0.10

# Within 64 output columns, and then within 4, a thread's fragments want this order of scales.
_COLUMNS_64 = [i + 8 * j for i in range(8) for j in range(8)]
_COLUMNS_4 = [0, 2, 1, 3]


class VllmMarlinProvider:
    """MXFP4 (FLOOR) and NVFP4 (TWO_LEVEL) weights by `torch.ops._C.marlin_gemm`."""

    name = "vllm_marlin"
    ops = ("gemm",)
    modes = ("w4a16",)
    rules: Mapping[str, tuple[ScaleRule, ...]] = {MXFP4.name: (ScaleRule.FLOOR,), NVFP4.name: (ScaleRule.TWO_LEVEL,)}

    def __init__(self) -> None:
        self.version = vllm_ops.MAIN.version()

    def why_not(self, problem: Problem, device: Device) -> str | None:
        assert isinstance(problem, GemmProblem)
        if device.capability is None or device.capability < (8, 0):
            return f"Marlin needs a CUDA GPU of compute capability 8.0 or later for bfloat16, which {device.name} is not"
        if reason := vllm_ops.MAIN.why_not(device.capability, _GEMM, _REPACK):
            return reason
        if not _fits(problem.n, problem.k):
            return (
                "Marlin takes n that is a multiple of 64 and k of 128, or n of 128 and k of 64, "
                f"not {problem.n} and {problem.k}; vLLM pads such layers on each call"
            )
        return None

    def prepare(self, problem: Any, inputs: Any) -> Runner:
        fmt, n, k = problem.format, problem.n, problem.k
        w = quantize(inputs.w, fmt, rule=self.rules[fmt.name][0])
        scales, tensor_scale = marlin_scales(w)
        gemm = vllm_ops.MAIN.operator(*_GEMM)
        given = {
            "a": inputs.x,
            "b_q_weight": _repacked(w, n, k),
            "b_scales": scales,
            "global_scale": tensor_scale,
            "workspace": torch.zeros(_processors(inputs.x.device), dtype=torch.int32, device=inputs.x.device),
            "b_type_id": _FLOAT4_E2M1,
            "size_m": problem.m,
            "size_n": n,
            "size_k": k,
            "use_atomic_add": False,
            "use_fp32_reduce": True,
        }
        nothing = dict.fromkeys(("c", "b_bias", "a_scales", "b_zeros", "g_idx", "perm"))
        arguments = vllm_ops.arguments(gemm, given, nothing | {"is_k_full": True, "is_zp_float": False})
        return lambda: gemm(*arguments)


def marlin_scales(w: Quantized) -> tuple[torch.Tensor, torch.Tensor | None]:
    """The scales of (n, k) weights as Marlin reads them: (k / block, n) in its order, and NVFP4's float32 (1) factor.

    Raises ValueError for NVFP4 scales that are negative or NaN, which S0E5M3 cannot say.
    """
    by_block = w.scales.view(torch.uint8).T.contiguous()  # (k / block, n)
    blocks, n = by_block.shape
    ordered = by_block.reshape(-1, 64)[:, _COLUMNS_64].reshape(-1, 4)[:, _COLUMNS_4].reshape(blocks, n).contiguous()
    if w.tensor_scale is None:
        return ordered.view(w.format.scale_dtype), None
    return _s0e5m3(ordered.view(w.format.scale_dtype), w.tensor_scale)


def _s0e5m3(scales: torch.Tensor, encode_scale: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """E4M3 scales as the upper byte of a float16 shifted left by one, which drops its sign, and what the result is scaled by.

    2**7 times a scale of 448 still is a float16. Scales are first moved up by a power of two where all are small.
    """
    values = scales.half()
    if not (values >= 0).all():
        raise ValueError("Marlin takes no block scales that are negative or NaN")
    largest = values.float().max()
    shift = torch.where(largest > 0, (448.0 / largest).log2().floor().exp2(), 1.0)
    values = (values.float() * shift).half() * 2.0**7
    values = torch.where(values < 2, 0, values)
    upper = (values.view(torch.int16) << 1).view(torch.uint8)[:, 1::2]  # little endian
    # The kernel reads E2M1 and S0E5M3 as bfloat16 with the exponent of another bias: 2**(126 - 7).
    factor = (2.0**119 / encode_scale / shift).reshape(1)
    return upper.contiguous().view(scales.dtype), factor


def _repacked(w: Quantized, n: int, k: int) -> torch.Tensor:
    """Codes in the order of Marlin's fragments. uint8 (n, k / 2) -> int32 (k / 16, 2 n)."""
    repack = vllm_ops.MAIN.operator(_REPACK)
    given = {"b_q_weight": w.codes.view(torch.int32).T.contiguous(), "size_k": k, "size_n": n, "num_bits": 4}
    no_order = torch.empty(0, dtype=torch.int32, device=w.codes.device)
    return repack(*vllm_ops.arguments(repack, given, {"perm": no_order, "is_a_8bit": False}))


def _fits(n: int, k: int) -> bool:
    return (n % 64 == 0 and k % 128 == 0) or (n % 128 == 0 and k % 64 == 0)


def _processors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count
