"""torch's own matrix products without FP4: BF16, the baseline of every speed-up, FP16, and FP8 with a scale a row."""

from collections.abc import Mapping
from typing import Any

import torch

from fp4bench.devices import Device
from fp4bench.formats import ScaleRule
from fp4bench.problems import CUT_FP8_SUMS, Accumulation, GemmInputs, GemmProblem, MoeProblem, Problem
from fp4bench.providers import Runner
from fp4bench.providers.torch_moe import prepare_moe, why_not_moe
from fp4bench.quantize import quantize_fp8_rows


class TorchProvider:
    """BF16 and FP16 by `x @ w.T`; FP8 E4M3 by `torch._scaled_mm`, row-wise, both operands quantized before."""

    name = "torch"
    version: str = torch.__version__
    ops: tuple[str, ...] = ("gemm", "moe")
    modes: tuple[str, ...] = ("bf16", "fp16", "fp8")
    moe_modes = ("bf16",)
    rules: Mapping[str, tuple[ScaleRule, ...]] = {}
    _fast = False

    def why_not(self, problem: Problem, device: Device) -> str | None:
        if isinstance(problem, MoeProblem):
            return why_not_moe(problem, device)
        if not isinstance(problem, GemmProblem) or problem.mode.name != "fp8":
            return None
        if not device.has_fp8:
            return f"{device.name} has no FP8 tensor cores (compute capability 8.9 or later)"
        if problem.n % 16 or problem.k % 16:
            return f"torch._scaled_mm takes n and k that are multiples of 16, not {problem.n} and {problem.k}"
        return None

    def prepare(self, problem: Problem, inputs: Any) -> Runner:
        if isinstance(problem, MoeProblem):
            return prepare_moe(problem, inputs)
        assert isinstance(problem, GemmProblem)
        if problem.mode.name != "fp8":
            return lambda: inputs.x @ inputs.w.T
        return _scaled_mm(inputs, self._fast)


class TorchFastFp8Provider(TorchProvider):
    """FP8 as `torch`, with `use_fast_accum`: sums stay in the tensor cores, which keep 14 bits of them on Hopper.

    Servers use it (vLLM's FP8 products sum so), and with few rows of activations it is much faster. Without it, as `torch` is
    timed, every few steps along k are added to float32 sums. A provider of its own, as accepted runs belong to the exact ones.
    """

    name = "torch_fast_fp8"
    ops = ("gemm",)
    modes = ("fp8",)
    _fast = True

    def accumulation(self, problem: GemmProblem, device: Device) -> Accumulation:
        """Nothing but the tensor cores adds up."""
        return CUT_FP8_SUMS


def _scaled_mm(inputs: GemmInputs, fast: bool) -> Runner:
    x, w = quantize_fp8_rows(inputs.x), quantize_fp8_rows(inputs.w)
    return lambda: torch._scaled_mm(
        x.values, w.values.T, scale_a=x.scales, scale_b=w.scales.T, out_dtype=torch.bfloat16, use_fast_accum=fast
    )
