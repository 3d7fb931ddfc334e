"""vLLM's CUTLASS product of two NVFP4 operands, for Blackwell: `scaled_fp4_quant` and `cutlass_scaled_fp4_mm`; experts of MXFP4
too.

Weights are quantized by this package's TWO_LEVEL rule, their scales in the 128 x 4 blocked layout, padded with zeros. In mode
w4a4 activations are quantized within the call, by vLLM's kernel, with an encode scale that is known beforehand, as vLLM serves
it; in w4a4_noquant before, by this package. Alpha is 1 / (S of x * S of w), applied to the float32 sums.

vLLM fills the buffer of the activations' scales with zeros in each call, because its kernel leaves out the padding; here the
buffer stays, and its padding zero. Not run on a GPU so far: the calls are compared with the schemas of the libraries.
"""

from collections.abc import Callable, Mapping
from typing import Any

import torch

from fp4bench.devices import Device
from fp4bench.formats import MXFP4, NVFP4, ScaleRule, layouts
from fp4bench.problems import Accumulation, GemmProblem, MoeProblem, Problem
from fp4bench.providers import Runner, vllm_ops
from fp4bench.providers.vllm_cutlass_moe import prepare_moe, why_not_moe
from fp4bench.quantize import Quantized, quantize

_SUPPORTS, _MULTIPLY, _QUANTIZE = "cutlass_scaled_mm_supports_fp4", "cutlass_scaled_fp4_mm", "scaled_fp4_quant"


class VllmCutlassProvider:
    """NVFP4 (TWO_LEVEL) by `torch.ops._C.cutlass_scaled_fp4_mm`, which does not rotate; experts of NVFP4 and MXFP4 (EVEN)."""

    name = "vllm_cutlass"
    ops = ("gemm", "moe")
    modes = ("w4a4", "w4a4_noquant")
    moe_modes = ("w4a4",)
    rules: Mapping[str, tuple[ScaleRule, ...]] = {NVFP4.name: (ScaleRule.TWO_LEVEL,), MXFP4.name: (ScaleRule.EVEN,)}

    def __init__(self) -> None:
        self.version = vllm_ops.MAIN.version()

    def why_not(self, problem: Problem, device: Device) -> str | None:
        if device.capability is None or device.capability < (10, 0):
            return f"vLLM's CUTLASS FP4 needs Blackwell (compute capability 10.0 or later), which {device.name} is not"
        if isinstance(problem, MoeProblem):
            return why_not_moe(problem, device.capability)
        assert isinstance(problem, GemmProblem)
        if problem.format is MXFP4:
            return "vLLM's CUTLASS has MXFP4 for experts alone"
        if problem.hadamard:
            return "vLLM's CUTLASS FP4 has no rotation"
        if problem.n % 32 or problem.k % 32:
            return f"vLLM's CUTLASS FP4 takes n and k that are multiples of 32, not {problem.n} and {problem.k}"
        if reason := vllm_ops.MAIN.why_not(device.capability, _SUPPORTS, _MULTIPLY, _QUANTIZE):
            return reason
        major, minor = device.capability
        if not vllm_ops.MAIN.operator(_SUPPORTS)(10 * major + minor):
            return f"this vLLM says that its FP4 kernels do not run on compute capability {major}.{minor}"
        return None

    def accumulation(self, problem: GemmProblem | MoeProblem, device: Device) -> Accumulation | None:
        """NVFP4's quantizer divides by an approximate reciprocal, so that some scales are the neighbours of the right ones."""
        return Accumulation(bits=9, terms=problem.k) if problem.mode.quantizes and problem.format is NVFP4 else None

    def prepare(self, problem: Any, inputs: Any) -> Runner:
        if isinstance(problem, MoeProblem):
            assert problem.format is not None
            return prepare_moe(problem, inputs, self.rules[problem.format.name][0])
        x, w = (quantize(operand, NVFP4) for operand in (inputs.x, inputs.w))
        multiply = _multiplier(problem, x, w)
        if not problem.mode.quantizes:
            scales = _blocked(x)
            return lambda: multiply(x.codes, scales)
        quantize_x, codes, scales = _quantizer(problem, inputs.x, x.tensor_scale)

        def run() -> torch.Tensor:
            quantize_x()
            return multiply(codes, scales)

        return run


def _multiplier(problem: GemmProblem, x: Quantized, w: Quantized) -> Callable[[torch.Tensor, torch.Tensor], torch.Tensor]:
    """Codes and blocked scales of x -> bfloat16 (m, n), into one buffer."""
    operator = vllm_ops.MAIN.operator(_MULTIPLY)
    assert x.tensor_scale is not None
    assert w.tensor_scale is not None
    out = torch.empty(problem.m, problem.n, dtype=torch.bfloat16, device=x.codes.device)
    given = {"out": out, "b": w.codes, "block_scale_b": _blocked(w), "alpha": alpha(x.tensor_scale, w.tensor_scale)}

    def multiply(codes: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
        operator(*vllm_ops.arguments(operator, given | {"a": codes, "block_scale_a": scales}, {}))
        return out

    return multiply


def _quantizer(
    problem: GemmProblem, x: torch.Tensor, encode_scale: torch.Tensor | None
) -> tuple[Callable[[], None], torch.Tensor, torch.Tensor]:
    """What quantizes x by vLLM's kernel, and the buffers that it fills: codes, and scales blocked, as float8_e4m3fn."""
    assert encode_scale is not None
    operator = vllm_ops.MAIN.operator(_QUANTIZE)
    rows, columns = layouts.padded_shape(problem.m, problem.k // NVFP4.block_size)
    codes = torch.empty(problem.m, problem.k // 2, dtype=torch.uint8, device=x.device)
    scales = torch.zeros(rows, columns // 4, dtype=torch.int32, device=x.device)
    given, scale = {"output": codes, "output_scale": scales}, encode_scale.reshape(1)
    return lambda: operator.out(x, scale, True, **given), codes, scales.view(torch.float8_e4m3fn)


def alpha(x_encode_scale: torch.Tensor, w_encode_scale: torch.Tensor) -> torch.Tensor:
    """What the sum of code * scale products is multiplied by, 1 / (S of x * S of w). float32 () each -> float32 (1)."""
    return (1.0 / (x_encode_scale.double() * w_encode_scale.double())).float().reshape(1)


def _blocked(q: Quantized) -> torch.Tensor:
    rows, columns = layouts.padded_shape(*q.scales.shape)
    return layouts.to_blocked(q.scales).reshape(rows, columns)
