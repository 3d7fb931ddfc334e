"""Kernels of this package, in Triton: FP4 weights read once, in the order of tensor core fragments (`fp4bench.kernels`)."""

import os
from collections.abc import Mapping
from typing import Any

import torch

from fp4bench.devices import Device, find_device
from fp4bench.formats import MXFP4, NVFP4, ScaleRule
from fp4bench.problems import GemmProblem, Problem
from fp4bench.providers import Runner, import_optional, installed_version
from fp4bench.quantize import quantize

# Programmatic dependent launch: a kernel reads its first weights while the one before it still runs. Kernels of a server follow
# each other as those of a timed graph do, so it is on; "0" times without it, and the recorded version says so.
PDL_VARIABLE = "FP4BENCH_TRITON_PDL"

_HOPPER = (9, 0)
_MOST_ROWS = 16  # of `fp4bench.kernels.decode`, which needs Triton to be asked


class TritonProvider:
    """MXFP4 (FLOOR) and NVFP4 (TWO_LEVEL) weights times bfloat16 activations of up to 16 rows, on Hopper."""

    name = "triton"
    ops = ("gemm",)
    modes = ("w4a16",)
    rules: Mapping[str, tuple[ScaleRule, ...]] = {MXFP4.name: (ScaleRule.FLOOR,), NVFP4.name: (ScaleRule.TWO_LEVEL,)}

    def __init__(self) -> None:
        self._pdl = os.environ.get(PDL_VARIABLE, "1") != "0"
        version = installed_version("triton")
        self.version = version if version is None or self._pdl else f"{version}+nopdl"

    def why_not(self, problem: Problem, device: Device) -> str | None:
        assert isinstance(problem, GemmProblem)
        if device.capability != _HOPPER:
            return f"its kernels are measured on Hopper alone (compute capability 9.0), which {device.name} is not"
        if import_optional("triton") is None:
            return "Triton is not installed"
        if problem.m > _MOST_ROWS:
            return f"it has no kernel yet for more than {_MOST_ROWS} rows of activations"
        return None

    def prepare(self, problem: Problem, inputs: Any) -> Runner:
        """The runner writes to one output, the same on each call. Raises ValueError for a weight that is a sum of weights."""
        from fp4bench.kernels import configs, decode, weights

        assert isinstance(problem, GemmProblem)
        assert problem.format is not None
        q = quantize(inputs.w, problem.format)
        weight = weights.prepare(q)
        if not decode.fits(problem.m, weight):
            raise ValueError(f"{problem}: block scales of one row lie further apart than bfloat16's exponents reach")
        work = configs.Work("bf16", problem.format.name, problem.m, problem.n, problem.k)
        launch = configs.choose(work, find_device(str(inputs.x.device)))
        assert isinstance(launch, decode.DecodeConfig)
        out = torch.empty(problem.m, problem.n, dtype=inputs.x.dtype, device=inputs.x.device)
        pdl = self._pdl
        return lambda: decode.gemm(inputs.x, weight, out, config=launch, pdl=pdl)
