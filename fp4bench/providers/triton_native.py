"""Kernels of this package, in Triton: FP4 weights read in the order of tensor core fragments, and quantization in one pass."""

import os
from collections.abc import Mapping
from typing import Any

import torch

from fp4bench.devices import Device, find_device
from fp4bench.formats import FORMATS, ScaleRule
from fp4bench.problems import (
    W4A16,
    W4A16_FP16,
    Accumulation,
    GemmInputs,
    GemmProblem,
    Mode,
    MoeProblem,
    Problem,
    QuantizeProblem,
)
from fp4bench.providers import Runner, import_optional, installed_version, triton_moe
from fp4bench.quantize import quantize

# Programmatic dependent launch: a kernel reads its first weights while the one before it still runs. Kernels of a server follow
# each other as those of a timed graph do, so it is on; "0" times without it, and the record says so.
PDL_VARIABLE = "FP4BENCH_TRITON_PDL"

_HOPPER = (9, 0)
# The wgmma kernel is written in Gluon as Triton 3.6 has it; 3.9 refuses its partition into warps.
_DECODE_ROWS, _GLUON = 16, "3.6."


class TritonProvider:
    """FP4 weights in every mode, quantization by every rule but QUTLASS_QUEST; MoE layers of FP4 experts.

    On Hopper FP4 activations are multiplied as what they stand for, as `fp4bench.kernels.gemm` says.
    """

    name = "triton"
    ops = ("quantize", "gemm", "moe")
    modes = ("w4a16", "w4a16_fp16", "w4a8", "w4a4", "w4a4_noquant")
    moe_modes = triton_moe.MODES
    # Its kernels take a block's scale from the largest magnitude alone.
    rules: Mapping[str, tuple[ScaleRule, ...]] = {
        name: tuple(rule for rule in fmt.rules if rule is not ScaleRule.QUTLASS_QUEST) for name, fmt in FORMATS.items()
    }

    def __init__(self) -> None:
        # Launches overlap by default, as in a server.
        self._pdl = os.environ.get(PDL_VARIABLE, "1") != "0"
        self.variant = None if self._pdl else "nopdl"
        version = installed_version("triton")
        self.version = version if version is None or self._pdl else f"{version}+nopdl"

    def why_not(self, problem: Problem, device: Device) -> str | None:
        if import_optional("triton") is None:
            return "Triton is not installed"
        if isinstance(problem, GemmProblem):
            return self._why_no_gemm(problem, device)
        if device.capability != _HOPPER:
            return f"its kernels are measured on Hopper alone (compute capability 9.0), which {device.name} is not"
        if isinstance(problem, MoeProblem):
            return triton_moe.why_not_moe(problem, str(self.version), _GLUON)
        return None

    def accumulation(self, problem: GemmProblem, device: Device) -> Accumulation | None:
        from fp4bench.kernels import gemm

        assert problem.format is not None
        return gemm.accumulation(_mode(problem), problem.format, problem.m, device)

    def prepare(self, problem: Problem, inputs: Any) -> Runner:
        """The runner writes to one output, the same on each call."""
        if isinstance(problem, QuantizeProblem):
            return _quantize(problem, inputs)
        if isinstance(problem, MoeProblem):
            return triton_moe.prepare_moe(problem, inputs, self._pdl)
        return _product(problem, inputs, self._pdl)

    def _why_no_gemm(self, problem: GemmProblem, device: Device) -> str | None:
        if device.capability is None:
            return f"its kernels need a CUDA GPU, not {device.name}"
        from fp4bench.kernels import gemm

        assert problem.format is not None
        reason = gemm.why_not(_mode(problem), problem.format, problem.m, problem.k, problem.hadamard, device)
        decodes = _mode(problem) is W4A16 and problem.m <= _DECODE_ROWS
        if reason or decodes or device.capability != _HOPPER or str(self.version).startswith(_GLUON):
            return reason
        return f"its wgmma kernel needs Triton 3.6, and {self.version} is installed"


def _mode(problem: GemmProblem) -> Mode:
    """As the kernels know it: theirs follows x, which is bfloat16 or float16."""
    return W4A16 if problem.mode is W4A16_FP16 else problem.mode


def _product(problem: GemmProblem, inputs: GemmInputs, pdl: bool) -> Runner:
    from fp4bench.kernels import gemm

    assert problem.format is not None
    mode, x = _mode(problem), inputs.x
    device = find_device(str(x.device))
    weight = gemm.lay_out(quantize(inputs.w, problem.format, hadamard=problem.hadamard), mode, device)
    operand = x if mode.quantizes or mode.activations == "bf16" else gemm.activations(x, weight, mode)
    size = gemm.workspace_bytes(mode, weight, problem.m, device=device, quantized=operand is not x)
    workspace = gemm.new_workspace(size, x.device)
    out = torch.empty(problem.m, problem.n, dtype=x.dtype, device=x.device)
    return lambda: gemm.gemm(operand, weight, mode, out=out, workspace=workspace, pdl=pdl)


def _quantize(problem: QuantizeProblem, x: torch.Tensor) -> Runner:
    from fp4bench.kernels import quantize as kernel

    fmt, rule, hadamard = problem.format, problem.rule, problem.hadamard
    out = kernel.empty(x, fmt, rule=rule, hadamard=hadamard)
    return lambda: kernel.quantize(x, fmt, rule=rule, hadamard=hadamard, out=out)
