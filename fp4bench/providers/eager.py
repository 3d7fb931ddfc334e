"""FP4 by the eager quantization and decoding of this package, in float32: slow, right, on any device."""

from collections.abc import Callable
from typing import Any

import torch

from fp4bench import __version__
from fp4bench.devices import Device
from fp4bench.formats import FORMATS
from fp4bench.problems import GemmInputs, GemmProblem, MoeProblem, Problem, QuantizeProblem
from fp4bench.providers import Runner
from fp4bench.providers.eager_moe import prepare_moe
from fp4bench.quantize import Quantized, RowQuantized, decode, decode_fp8_rows, quantize, quantize_fp8_rows

Operand = torch.Tensor | Quantized | RowQuantized


class EagerProvider:
    """Quantizes by every rule of `fp4bench.formats`, and multiplies what it decodes on each call."""

    name = "eager"
    version = __version__
    ops = ("quantize", "gemm", "moe")
    modes = ("w4a16", "w4a16_fp16", "w4a8", "w4a4", "w4a4_noquant")
    moe_modes = ("w4a16", "w4a8", "w4a4")
    rules = {name: fmt.rules for name, fmt in FORMATS.items()}

    def why_not(self, problem: Problem, device: Device) -> str | None:
        return None

    def prepare(self, problem: Problem, inputs: Any) -> Runner:
        if isinstance(problem, QuantizeProblem):
            return lambda: quantize(inputs, problem.format, rule=problem.rule, hadamard=problem.hadamard)
        if isinstance(problem, MoeProblem):
            return prepare_moe(problem, inputs)
        return _gemm(problem, inputs)


def _gemm(problem: GemmProblem, inputs: GemmInputs) -> Runner:
    assert problem.format is not None
    w = quantize(inputs.w, problem.format, hadamard=problem.hadamard)
    activations = _activation_quantizer(problem)
    if problem.mode.quantizes:
        return lambda: _matmul(activations(inputs.x), w, inputs.x.dtype)
    x = activations(inputs.x)
    return lambda: _matmul(x, w, inputs.x.dtype)


def _activation_quantizer(problem: GemmProblem) -> Callable[[torch.Tensor], Operand]:
    fmt = problem.format
    assert fmt is not None
    if problem.mode.activations == "fp4":
        return lambda x: quantize(x, fmt, hadamard=problem.hadamard)
    return quantize_fp8_rows if problem.mode.activations == "fp8" else torch.Tensor.float


def _matmul(x: Operand, w: Operand, dtype: torch.dtype) -> torch.Tensor:
    return (_decoded(x) @ _decoded(w).T).to(dtype)


def _decoded(operand: Operand) -> torch.Tensor:
    if isinstance(operand, Quantized):
        return decode(operand)
    return decode_fp8_rows(operand) if isinstance(operand, RowQuantized) else operand.float()
