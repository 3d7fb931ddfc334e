"""gemlite's Triton kernels: FP4 weights times bfloat16 or FP8 activations, autotuned at the first call of a shape.

Weights are quantized by this package's rules and handed over packed, as gemlite's `from_packed_weights` takes them (0.6.0):
row-major codes with the even one in the low nibble, row-major scales, and NVFP4's tensor scale in the encode sense, S, of which
gemlite keeps the reciprocal. FP8 activations get a float32 scale a row, amax / 448 and at least 1e-6, within the call.

The first call of a layer and m compiles some twenty launches and times them: 12 to 21 s, or 1 to 4 s where Triton's cache has
them (16 cores, Llama-3.3-70B, NVIDIA H200).

For few rows gemlite splits k and adds the parts up in bfloat16, by atomics: outputs are less exact than float32 sums (NVIDIA
H200, n = 384, k = 256, m = 1: 68 of 384 elements beyond their bound), and may differ from call to call.

Its FP4 activations are left out: gemlite rounds ties toward zero, which no rule of `fp4bench.formats` does, so that outputs
would be compared with those of other codes.
"""

from collections.abc import Mapping
from typing import Any

import torch

from fp4bench.devices import Device
from fp4bench.formats import MXFP4, NVFP4, ScaleRule
from fp4bench.problems import Accumulation, GemmProblem, Problem
from fp4bench.providers import Runner, import_optional, installed_version
from fp4bench.quantize import Quantized, quantize

# gemlite's class by format and activations; its names say A<bits of activations>W<bits of weights>.
_CLASSES = {
    (MXFP4.name, "bf16"): "A16W4_MXFP",
    (NVFP4.name, "bf16"): "A16W4_NVFP",
    (MXFP4.name, "fp8"): "A8W4_MXFP_dynamic",
}

# Its tiles are at most so large, and loads of scales have no mask where a tile leaves the weight (0.5.1 and 0.6.0).
_TILE_N, _TILE_K = 128, 256


class GemliteProvider:
    """MXFP4 (FLOOR) and NVFP4 (TWO_LEVEL) weights by `gemlite.helper`; activations of 4 bits are not offered."""

    name = "gemlite"
    ops = ("gemm",)
    modes = ("w4a16", "w4a8")
    rules: Mapping[str, tuple[ScaleRule, ...]] = {MXFP4.name: (ScaleRule.FLOOR,), NVFP4.name: (ScaleRule.TWO_LEVEL,)}

    def __init__(self) -> None:
        self.version = installed_version("gemlite")

    def why_not(self, problem: Problem, device: Device) -> str | None:
        assert isinstance(problem, GemmProblem)
        assert problem.format is not None
        if self.version is None:
            return "gemlite is not installed"
        if device.capability is None or device.capability < (8, 0):
            return f"gemlite needs a CUDA GPU of compute capability 8.0 or later for bfloat16, which {device.name} is not"
        if (problem.format.name, problem.mode.activations) not in _CLASSES:
            return "gemlite has no NVFP4 weights beside FP8 activations"
        if problem.format is NVFP4 and device.capability < (10, 0):
            return (
                f"Triton's tl.dot_scaled takes E4M3 scales on Blackwell alone (3.6), which {device.name} is not: "
                "https://github.com/triton-lang/triton/pull/9772"
            )
        if problem.n % _TILE_N or problem.k % _TILE_K:
            return f"gemlite reads whole tiles: n a multiple of {_TILE_N} and k of {_TILE_K}, not {problem.n} and {problem.k}"
        return None

    def accumulation(self, problem: GemmProblem, device: Device) -> Accumulation:
        """As of Humming, for the same two reasons: parts added up in bfloat16, and FP8 values that round the other way."""
        return Accumulation(bits=8 if problem.mode.activations == "fp8" else 9, terms=problem.k)

    def prepare(self, problem: Any, inputs: Any) -> Runner:
        helper = import_optional("gemlite.helper")
        assert helper is not None  # why_not has asked
        w = quantize(inputs.w, problem.format, rule=self.rules[problem.format.name][0])
        make = getattr(helper, _CLASSES[problem.format.name, problem.mode.activations])
        layer = _packed(make(device=str(inputs.x.device), dtype=torch.bfloat16), w)
        return lambda: layer(inputs.x)


def _packed(maker: Any, w: Quantized) -> Any:
    """The layer that `maker` makes of weights; versions differ in the name of the first argument."""
    tensor_scale = {} if w.tensor_scale is None else {"meta_scale": w.tensor_scale}
    return maker.from_packed_weights(w.codes, scales=w.scales, **tensor_scale)
