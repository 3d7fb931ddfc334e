"""Humming (humming-kernels): FP4 weights times bfloat16, float16 or FP8 activations, compiled at the first call of a layer.

Weights are quantized by this package's rules and handed over as checkpoints hold them, MXFP4 row-major and NVFP4 as ModelOpt
stores it, which versions read alike (0.1.10 and 0.1.19); NVFP4's tensor scale has the decode sense, 1 / S. Humming lays them
out once, padded as vLLM pads them, and chooses its launch for each m.

The first call of a layer compiles every launch that Humming may choose for it, on all cores: 7 to 24 s with 16 of them, beside
which a case takes 0.2 to 0.8 s (0.1.19, Llama-3.3-70B, NVIDIA H200). Machines with few cores need a longer `--case-timeout`.

FP8 activations get a float32 scale a row, amax / 448, within the call. MXFP4 weights then become E4M3 by one scale a tensor:
exact while the block scales of a tensor lie within 11 binades; Humming rounds the blocks below.

Beside float16 activations MXFP4 scales have 5 bits of exponent: exact while those of a tensor lie within 29 binades; a block
below becomes zero (NVIDIA H100).

Where several thread blocks share an output, they add their parts up in its own type, in memory: outputs are less exact than
float32 sums, and the less the fewer tiles there are for all of them (NVIDIA H200, n = 128, k = 1344, where 21 blocks can share
a tile, x with outliers, bfloat16: 0.24 of the spread; n = 384, k = 256: 0.01; https://github.com/inclusionAI/humming/issues/31).
FP8 activations are multiplied by the reciprocal of their scale, where the reference divides: ties round either way
(`fp4bench.checking.ties`).
"""

import os
from collections.abc import Mapping
from math import ceil
from typing import Any

import torch

from fp4bench.devices import Device
from fp4bench.formats import MXFP4, NVFP4, ScaleRule
from fp4bench.problems import Accumulation, GemmProblem, MoeProblem, Problem
from fp4bench.providers import Runner, import_optional, installed_version
from fp4bench.providers.humming_moe import prepare_moe, why_not_moe
from fp4bench.quantize import Quantized, quantize

_CHECKPOINTS = {
    MXFP4.name: {"quant_method": "mxfp4"},
    NVFP4.name: {"quant_method": "modelopt", "quant_algo": "nvfp4"},
}
_ACTIVATIONS = {"bf16": None, "fp16": None, "fp8": {"dtype": "float8e4m3"}}

# vLLM's choice (0.26.0). Humming's tiles are powers of two, and its kernels skip the padding.
_PAD = {"pad_n_to_multiple": 256, "pad_k_to_multiple": 128}

_WIDEST_TILE, _STEP, _LONGEST_UNSHARED = 256, 64, 1024
_SMS = 132  # of Hopper


class HummingProvider:
    """MXFP4 (FLOOR) and NVFP4 (TWO_LEVEL) weights by `humming.layer.HummingLayer`."""

    name = "humming"
    ops = ("gemm", "moe")
    modes = ("w4a16", "w4a16_fp16", "w4a8")
    moe_modes = ("w4a16", "w4a8")
    rules: Mapping[str, tuple[ScaleRule, ...]] = {MXFP4.name: (ScaleRule.FLOOR,), NVFP4.name: (ScaleRule.TWO_LEVEL,)}

    def __init__(self) -> None:
        self.version = installed_version("humming-kernels")

    def why_not(self, problem: Problem, device: Device) -> str | None:
        assert isinstance(problem, GemmProblem | MoeProblem)
        if self.version is None:
            return "humming-kernels is not installed"
        dtype, oldest = ("float16", (7, 5)) if problem.mode.dtype is torch.float16 else ("bfloat16", (8, 0))
        if device.capability is None or device.capability < oldest:
            needed = "{}.{}".format(*oldest)
            return f"Humming needs a CUDA GPU of compute capability {needed} or later for {dtype}, which {device.name} is not"
        fp8 = problem.mode.activations == "fp8"
        if fp8 and not device.has_fp8:
            return f"{device.name} has no FP8 tensor cores (compute capability 8.9 or later)"
        if fp8 and problem.format is NVFP4:
            return "Humming takes at least 32 weights a scale beside FP8 activations, and NVFP4 has 16"
        block = 32 if problem.format is MXFP4 else 16
        if isinstance(problem, MoeProblem):
            if problem.hidden % 64 or problem.intermediate % 64:
                sizes = f"{problem.hidden} and {problem.intermediate}"
                return f"Humming is given experts with sizes that are multiples of 64, not {sizes}"
            return why_not_moe(problem, device.capability)
        if problem.n % 8 or problem.k % block:
            return f"Humming takes n that is a multiple of 8 and k of {block}, not {problem.n} and {problem.k}"
        return None

    def accumulation(self, problem: GemmProblem | MoeProblem, device: Device) -> Accumulation:
        """Roundings to the output's type of partial sums within 6 times the spread, one of each part of k.

        bfloat16 errs by 6 * 2**-9 each; six of them are one addition of 9 bits (36 * 2**-9), as `fp4bench.checking` counts, and
        p of them are (p / 6)**2. float16 has three bits more.
        """
        bits = 12 if problem.mode.dtype is torch.float16 else 9
        parts = _parts(problem, device) if isinstance(problem, GemmProblem) else 1
        return Accumulation(bits=bits, terms=max(1, int(problem.k / max(1.0, parts / 6) ** 2)))

    def prepare(self, problem: Any, inputs: Any) -> Runner:
        rule = self.rules[problem.format.name][0]
        if isinstance(problem, MoeProblem):
            return prepare_moe(problem, inputs, rule, _options(problem))
        w = quantize(inputs.w, problem.format, rule=rule)
        layer = _layer(problem, inputs.x)
        layer.load_from_tensors(_checkpoint(w))
        layer.transform()
        return lambda: layer(inputs.x)


def _parts(problem: GemmProblem, device: Device) -> int:
    """The most thread blocks that share an output: one an SM, steps of 64 columns; up to k = 1024 it is one (0.1.19)."""
    if problem.k <= _LONGEST_UNSHARED:
        return 1
    tiles = ceil(problem.n / _WIDEST_TILE)
    return min(ceil(problem.k / _STEP), ceil((device.sm_count or _SMS) / tiles))


def _layer(problem: GemmProblem, x: torch.Tensor) -> Any:
    module = import_optional("humming.layer")
    assert module is not None  # why_not has asked
    # It allocates where torch does by default.
    with torch.device(x.device), torch.cuda.device_of(x):
        return module.HummingLayer(shape_n=problem.n, shape_k=problem.k, **_options(problem))


def _options(problem: GemmProblem | MoeProblem) -> dict[str, Any]:
    """Of a layer. It writes defaults into its configurations, which therefore are copies."""
    assert problem.format is not None
    # Where PYTEST_CURRENT_TEST is set, Humming takes itself to be under test, and chooses other kernels on Blackwell (0.1.19).
    os.environ.setdefault("HUMMING_TEST_TUNING_SOURCE", "")
    activations = _ACTIVATIONS[problem.mode.activations]
    return {
        "weight_config": dict(_CHECKPOINTS[problem.format.name]),
        "input_config": activations and dict(activations),
        "torch_dtype": problem.mode.dtype,
        **_PAD,
    }


def _checkpoint(w: Quantized) -> dict[str, torch.Tensor]:
    if w.tensor_scale is None:
        return {"weight": w.codes, "weight_scale": w.scales.view(torch.uint8)}
    return {"weight": w.codes, "weight_scale": w.scales, "weight_scale_2": (1.0 / w.tensor_scale).reshape(1)}
