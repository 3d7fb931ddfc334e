"""QuTLASS in vLLM: rotation and quantization in one kernel, and FP4 products, as its benchmarks put them together.

MXFP4 has two methods, a provider each. Codes of abs_max hold 3 * x / scale: alpha is 1 / 9 for two operands, which its own
benchmarks leave at 1. Those of quest hold x / scale: alpha is 1. NVFP4 takes an encode scale that is known beforehand; alpha is
1 / (S of x * S of w). Both operands go through its quantizer, so that they are rotated by the same matrix; weights once,
activations within the call in mode w4a4. Without a rotation the matrix is the identity. Scales come row-major in a padded
buffer, and are brought into the 128 x 4 blocked layout by this package.

The matrix is bfloat16, in which 32**-0.5 and 128**-0.5 are off by 1e-4, and reciprocals are approximate: some codes and scales
are the neighbours of the reference's. NVFP4's quest is left out: `fp4bench.formats` has no rule for it. Not run on a GPU so
far: the calls are compared with the schemas of the libraries.
"""

from collections.abc import Callable, Mapping
from typing import Any

import torch

from fp4bench.devices import Device
from fp4bench.formats import MXFP4, NVFP4, BlockFormat, ScaleRule, layouts
from fp4bench.hadamard import hadamard_matrix
from fp4bench.problems import Accumulation, GemmProblem, Problem
from fp4bench.providers import Runner, vllm_ops
from fp4bench.providers.vllm_cutlass import alpha
from fp4bench.quantize import quantize

_MULTIPLY = {MXFP4.name: "matmul_mxf4_bf16_tn", NVFP4.name: "matmul_nvf4_bf16_tn"}
# Until 0.26.0 there was one NVFP4 quantizer; 0.33.0 has one a method.
_QUANTIZE = {
    ScaleRule.QUTLASS_ABS_MAX: ("fusedQuantizeMxAbsMax",),
    ScaleRule.QUTLASS_QUEST: ("fusedQuantizeMxQuest",),
    ScaleRule.TWO_LEVEL: ("fusedQuantizeNv", "fusedQuantizeNvAbsMax"),
}
_ROTATIONS = {MXFP4.name: (32, 64, 128), NVFP4.name: (16, 32, 64, 128)}
# Scales are written as one row after the other, which is the padded matrix where a row fills whole tiles.
_K_MULTIPLE = {MXFP4.name: 128, NVFP4.name: 64}


class VllmQutlassProvider:
    """MXFP4 (QUTLASS_ABS_MAX) and NVFP4 (TWO_LEVEL) by `torch.ops._qutlass_C`, with rotations."""

    name = "vllm_qutlass"
    ops = ("gemm",)
    modes = ("w4a4", "w4a4_noquant")
    rules: Mapping[str, tuple[ScaleRule, ...]] = {MXFP4.name: (ScaleRule.QUTLASS_ABS_MAX,), NVFP4.name: (ScaleRule.TWO_LEVEL,)}

    def __init__(self) -> None:
        self.version = vllm_ops.QUTLASS.version()

    def why_not(self, problem: Problem, device: Device) -> str | None:
        assert isinstance(problem, GemmProblem)
        assert problem.format is not None
        name = problem.format.name
        if device.capability is None or device.capability < (10, 0):
            return f"QuTLASS needs Blackwell (compute capability 10.0 or later), which {device.name} is not"
        if problem.hadamard and problem.hadamard not in _ROTATIONS[name]:
            return f"QuTLASS rotates {name} by {', '.join(map(str, _ROTATIONS[name]))}, not by {problem.hadamard}"
        if problem.n % 8 or problem.k % _K_MULTIPLE[name] or (problem.hadamard and problem.k % problem.hadamard):
            return (
                f"QuTLASS takes {name} with n a multiple of 8 and k of {_K_MULTIPLE[name]} and of the rotation, "
                f"not {problem.n} and {problem.k}"
            )
        return vllm_ops.QUTLASS.why_not(device.capability, _MULTIPLY[name], _QUANTIZE[self.rules[name][0]])

    def accumulation(self, problem: GemmProblem, device: Device) -> Accumulation:
        """Its rotation is off by 1e-4, so that some codes are the neighbours of the right ones, up to a third of their value.

        Two such codes beside large ones are 0.27 of the spread at k = 256, and less at a larger k: one addition of 7 bits.
        """
        return Accumulation(bits=7, terms=problem.k)

    def prepare(self, problem: Any, inputs: Any) -> Runner:
        fmt, rule = problem.format, self.rules[problem.format.name][0]
        matrix = _rotation(problem, inputs.x.device)
        scales = [_encode_scale(operand, problem) for operand in (inputs.x, inputs.w)]
        quantize_x = _quantizer(inputs.x, matrix, fmt, rule, scales[0])
        w_codes, w_scales = _quantizer(inputs.w, matrix, fmt, rule, scales[1])()
        factor = _alpha(rule, scales[0], scales[1], inputs.x.device)
        multiply = vllm_ops.QUTLASS.operator(_MULTIPLY[fmt.name])

        def product(codes: torch.Tensor, x_scales: torch.Tensor) -> torch.Tensor:
            given = {"A": codes, "B": w_codes, "A_sf": x_scales, "B_sf": w_scales, "alpha": factor}
            return multiply(*vllm_ops.arguments(multiply, given, {}))

        if problem.mode.quantizes:
            return lambda: product(*quantize_x())
        x = quantize_x()
        return lambda: product(*x)


class VllmQutlassQuestProvider(VllmQutlassProvider):
    """MXFP4 by QUTLASS_QUEST, with the same product."""

    # A provider of its own, as FlashInfer's backends are: the GEMMs of a provider have one rule, which case ids do not name.
    name = "vllm_qutlass_quest"
    rules: Mapping[str, tuple[ScaleRule, ...]] = {MXFP4.name: (ScaleRule.QUTLASS_QUEST,)}

    def accumulation(self, problem: GemmProblem, device: Device) -> Accumulation:
        """That rotation gives one block in 6500 the scale below the right one, which cuts off every seventh of its values.

        One such block in a row moves an output by 0.09 of the spread at k = 256 (its root mean square for normal values), and
        less at a larger k. One addition of 6 bits is six times that.
        """
        return Accumulation(bits=6, terms=problem.k)


def _rotation(problem: GemmProblem, device: torch.device) -> torch.Tensor:
    """The matrix that QuTLASS multiplies blocks of k by. -> bfloat16 (size, size)."""
    if problem.hadamard:
        return hadamard_matrix(problem.hadamard, torch.bfloat16, device)
    assert problem.format is not None
    return torch.eye(_ROTATIONS[problem.format.name][0], dtype=torch.bfloat16, device=device)


def _encode_scale(operand: torch.Tensor, problem: GemmProblem) -> torch.Tensor | None:
    assert problem.format is not None
    return (
        quantize(operand, problem.format, hadamard=problem.hadamard).tensor_scale if problem.format.has_tensor_scale else None
    )


def _alpha(
    rule: ScaleRule, x_encode_scale: torch.Tensor | None, w_encode_scale: torch.Tensor | None, device: torch.device
) -> torch.Tensor:
    if x_encode_scale is None or w_encode_scale is None:
        return torch.full((1,), rule.gain**-2, device=device)
    return alpha(x_encode_scale, w_encode_scale)


def _quantizer(
    operand: torch.Tensor, matrix: torch.Tensor, fmt: BlockFormat, rule: ScaleRule, encode_scale: torch.Tensor | None
) -> Callable[[], tuple[torch.Tensor, torch.Tensor]]:
    """What rotates and quantizes `operand` (rows, k): -> codes uint8 (rows, k / 2), and scales blocked and flat."""
    rows, k = operand.shape
    codes = torch.empty(rows, k // 2, dtype=torch.uint8, device=operand.device)
    padded = layouts.padded_shape(rows, k // fmt.block_size)
    scales = torch.zeros(padded, dtype=torch.uint8, device=operand.device).view(fmt.scale_dtype)
    operator = vllm_ops.QUTLASS.operator(*_QUANTIZE[rule])
    given = {"A": operand, "R": matrix, "OUT": codes, "OUT_sf": scales}
    if encode_scale is not None:
        given["global_scale"] = encode_scale
    arguments = vllm_ops.arguments(operator, given, {})

    def run() -> tuple[torch.Tensor, torch.Tensor]:
        operator(*arguments)  # fills both
        return codes, layouts.to_blocked(scales)

    return run
