"""Kernels of this package, in Triton: FP4 weights read in the order of tensor core fragments, and quantization in one pass."""

import os
from collections.abc import Mapping
from typing import Any

import torch

from fp4bench.devices import Device, find_device
from fp4bench.formats import FORMATS, ScaleRule
from fp4bench.problems import GemmProblem, MoeProblem, Problem, QuantizeProblem
from fp4bench.providers import Runner, import_optional, installed_version, triton_moe
from fp4bench.quantize import quantize

# Programmatic dependent launch: a kernel reads its first weights while the one before it still runs. Kernels of a server follow
# each other as those of a timed graph do, so it is on; "0" times without it, and the record says so.
PDL_VARIABLE = "FP4BENCH_TRITON_PDL"

_HOPPER = (9, 0)
# The wgmma kernel of more rows is written in Gluon as Triton 3.6 has it; 3.9 refuses its partition into warps.
_DECODE_ROWS, _GLUON = 16, "3.6."


class TritonProvider:
    """FP4 weights times bfloat16 activations, and quantization by every rule with and without rotation, on Hopper."""

    name = "triton"
    ops = ("quantize", "gemm", "moe")
    modes = ("w4a16",)
    moe_modes = triton_moe.MODES
    rules: Mapping[str, tuple[ScaleRule, ...]] = {name: fmt.rules for name, fmt in FORMATS.items()}

    def __init__(self) -> None:
        self._pdl = os.environ.get(PDL_VARIABLE, "1") != "0"
        self.variant = None if self._pdl else "nopdl"
        version = installed_version("triton")
        self.version = version if version is None or self._pdl else f"{version}+nopdl"

    def why_not(self, problem: Problem, device: Device) -> str | None:
        if device.capability != _HOPPER:
            return f"its kernels are measured on Hopper alone (compute capability 9.0), which {device.name} is not"
        if import_optional("triton") is None:
            return "Triton is not installed"
        if isinstance(problem, GemmProblem) and problem.m > _DECODE_ROWS and not str(self.version).startswith(_GLUON):
            return f"beyond {_DECODE_ROWS} rows of activations its kernel needs Triton 3.6, and {self.version} is installed"
        if isinstance(problem, MoeProblem):
            return triton_moe.why_not_moe(problem, str(self.version), _GLUON)
        return None

    def prepare(self, problem: Problem, inputs: Any) -> Runner:
        """The runner writes to one output, the same on each call. Raises ValueError for a weight that is a sum of weights."""
        if isinstance(problem, QuantizeProblem):
            return _quantize(problem, inputs)
        if isinstance(problem, MoeProblem):
            return triton_moe.prepare_moe(problem, inputs, self._pdl)
        from fp4bench.kernels import configs, decode, prefill, weights

        assert isinstance(problem, GemmProblem)
        assert problem.format is not None
        x: torch.Tensor = inputs.x
        weight = weights.prepare(quantize(inputs.w, problem.format))
        if weight.rest is not None:
            raise ValueError(f"{problem}: block scales of one row lie further apart than bfloat16's exponents reach")
        device = find_device(str(x.device))
        launch = configs.choose(configs.Work("bf16", problem.format.name, problem.m, problem.n, problem.k), device)
        out = torch.empty(problem.m, problem.n, dtype=x.dtype, device=x.device)
        if isinstance(launch, decode.DecodeConfig):
            pdl = self._pdl
            return lambda: decode.gemm(x, weight, out, config=launch, pdl=pdl)
        assert isinstance(launch, prefill.PrefillConfig)
        assert device.sm_count is not None
        size = prefill.workspace_bytes(problem.m, weight, x.dtype, launch, device.sm_count)
        workspace = torch.zeros(size, dtype=torch.uint8, device=x.device)
        return lambda: prefill.gemm(x, weight, out, config=launch, workspace=workspace)


def _quantize(problem: QuantizeProblem, x: torch.Tensor) -> Runner:
    from fp4bench.kernels import quantize as kernel

    fmt, rule, hadamard = problem.format, problem.rule, problem.hadamard
    out = kernel.empty(x, fmt, rule=rule, hadamard=hadamard)
    return lambda: kernel.quantize(x, fmt, rule=rule, hadamard=hadamard, out=out)
