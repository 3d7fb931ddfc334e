"""torch's own block-scaled FP4 product, `torch.nn.functional.scaled_mm`, on Blackwell (cuBLAS).

Both operands are quantized by this package's rules, in plain torch, which for activations is timed in mode w4a4: torch has a
product and no quantizer. MXFP4 by RCEIL, the rule of cuBLAS and Transformer Engine; NVFP4 by TWO_LEVEL. Scales go in the
128 x 4 blocked layout; NVFP4's tensor scales in the decode sense, 1 / S each, beside the block scales.

torch's FP8 product with a scale a row is mode fp8 of the provider `torch`.
"""

from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as functional

from fp4bench.devices import Device
from fp4bench.formats import MXFP4, NVFP4, ScaleRule, layouts
from fp4bench.problems import GemmProblem, Problem
from fp4bench.providers import Runner
from fp4bench.quantize import Quantized, quantize


class TorchScaledMmProvider:
    """MXFP4 by blocks of 1 x 32, NVFP4 by blocks of 1 x 16 and a scale a tensor."""

    name = "torch_scaled_mm"
    version: str = torch.__version__
    ops = ("gemm",)
    modes = ("w4a4", "w4a4_noquant")
    rules: Mapping[str, tuple[ScaleRule, ...]] = {MXFP4.name: (ScaleRule.RCEIL,), NVFP4.name: (ScaleRule.TWO_LEVEL,)}

    def why_not(self, problem: Problem, device: Device) -> str | None:
        assert isinstance(problem, GemmProblem)
        if not hasattr(functional, "scaled_mm"):
            return f"torch {torch.__version__} has no torch.nn.functional.scaled_mm"
        if device.capability is None or device.capability < (10, 0):
            return f"{device.name} has no FP4 tensor cores (Blackwell, compute capability 10.0 or later)"
        if problem.format is MXFP4 and device.capability >= (11, 0):
            return f"torch takes MXFP4 on compute capability 10 alone (2.11), which {device.name} is not"
        # cuBLAS: rows of an operand start at multiples of 16 bytes; so do those of the output.
        if problem.k % 32 or problem.n % 16:
            return f"torch's scaled_mm takes FP4 with k a multiple of 32 and n of 16, not {problem.k} and {problem.n}"
        if problem.hadamard and problem.k % problem.hadamard:
            return f"k = {problem.k} is not a multiple of the rotation of {problem.hadamard}"
        return None

    def prepare(self, problem: Any, inputs: Any) -> Runner:
        rule = self.rules[problem.format.name][0]

        def operand(x: torch.Tensor) -> Quantized:
            return quantize(x, problem.format, rule=rule, hadamard=problem.hadamard)

        w = operand(inputs.w)
        multiply = _product(w)
        if problem.mode.quantizes:
            return lambda: multiply(*_as_torch_takes(operand(inputs.x)))
        x = _as_torch_takes(operand(inputs.x))
        return lambda: multiply(*x)


def _product(w: Quantized) -> Callable[[torch.Tensor, list[torch.Tensor]], torch.Tensor]:
    """x @ w.T of operands as torch takes them."""
    kinds, plain = functional.ScalingType, functional.SwizzleType.NO_SWIZZLE
    blocked = functional.SwizzleType.SWIZZLE_32_4_4
    if w.tensor_scale is None:
        recipe, swizzles = [kinds.BlockWise1x32], [blocked]
    else:
        recipe, swizzles = [kinds.BlockWise1x16, kinds.TensorWise], [blocked, plain]
    codes, scales = _as_torch_takes(w)

    def multiply(x: torch.Tensor, x_scales: list[torch.Tensor]) -> torch.Tensor:
        return functional.scaled_mm(
            mat_a=x,
            mat_b=codes.T,
            scale_a=x_scales,
            scale_recipe_a=recipe,
            scale_b=scales,
            scale_recipe_b=recipe,
            swizzle_a=swizzles,
            swizzle_b=swizzles,
            output_dtype=torch.bfloat16,
        )

    return multiply


def _as_torch_takes(q: Quantized) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """Codes as float4_e2m1fn_x2 (rows, k / 2); scales blocked and flat, and the decode scale of the tensor, float32 ()."""
    scales = [layouts.to_blocked(q.scales)]
    if q.tensor_scale is not None:
        scales.append(1.0 / q.tensor_scale)
    return q.codes.view(torch.float4_e2m1fn_x2), scales
