"""FlashInfer's FP4 products on Blackwell: `mm_fp4` by a provider a backend, `nvfp4_quantize` and `mxfp4_quantize`; experts of
NVFP4 by CUTLASS.

Weights are quantized by this package's rules, TWO_LEVEL for NVFP4 and RCEIL for MXFP4, with scales in the 128 x 4 blocked
layout; FlashInfer takes them transposed. In mode w4a4 activations are quantized within the call, by FlashInfer, NVFP4 with an
encode scale that is known beforehand; in w4a4_noquant before, by this package. Alpha is 1 / (S of x * S of w) for NVFP4, and
none for MXFP4, which the backend cute-dsl alone is given. Rows of weights for the backend trtllm, and of their scales, are put
in its order by FlashInfer's own functions.

FlashInfer (0.6.14) is compiled at the first call of a shape. Not run on a GPU so far.
"""

from collections.abc import Callable, Mapping
from typing import Any

import torch

from fp4bench.devices import Device
from fp4bench.formats import MXFP4, NVFP4, ScaleRule, layouts
from fp4bench.problems import Accumulation, GemmProblem, MoeProblem, Problem
from fp4bench.providers import Runner, import_optional, installed_version
from fp4bench.providers.flashinfer_moe import prepare_moe, why_not_moe
from fp4bench.providers.vllm_cutlass import alpha
from fp4bench.quantize import Quantized, quantize

_EPILOGUE_ROWS = 128  # of the tile whose rows trtllm has in another order

_NVFP4: Mapping[str, tuple[ScaleRule, ...]] = {NVFP4.name: (ScaleRule.TWO_LEVEL,)}


class FlashInferCutlassProvider:
    """NVFP4 by the backend cutlass, on compute capability 10 to 12; experts too."""

    name, backend = "flashinfer_cutlass", "cutlass"
    majors: tuple[int, ...] = (10, 11, 12)
    multiples: tuple[int, int] = (32, 128)  # of n and k
    ops: tuple[str, ...] = ("gemm", "moe")
    modes = ("w4a4", "w4a4_noquant")
    moe_modes = ("w4a4",)
    rules = _NVFP4

    def __init__(self) -> None:
        self.version = installed_version("flashinfer-python")

    def why_not(self, problem: Problem, device: Device) -> str | None:
        assert isinstance(problem, GemmProblem | MoeProblem)
        if self.version is None:
            return "flashinfer-python is not installed"
        if device.capability is None or device.capability[0] not in self.majors:
            majors = ", ".join(map(str, self.majors))
            return f"FlashInfer's {self.backend} FP4 needs compute capability {majors}, which {device.name} is not"
        if isinstance(problem, MoeProblem):
            return why_not_moe(problem, device)
        if problem.hadamard:
            return "FlashInfer has no rotation"
        n, k = self.multiples
        if problem.n % n or problem.k % k:
            return f"FlashInfer is given n that is a multiple of {n} and k of {k}, not {problem.n} and {problem.k}"
        return None

    def accumulation(self, problem: GemmProblem | MoeProblem, device: Device) -> Accumulation | None:
        """Its quantizers use approximate reciprocals, so that some scales are the neighbours of the right ones."""
        return Accumulation(bits=9, terms=problem.k) if problem.mode.quantizes else None

    def prepare(self, problem: Any, inputs: Any) -> Runner:
        if isinstance(problem, MoeProblem):
            return prepare_moe(problem, inputs)
        flashinfer = import_optional("flashinfer")
        assert flashinfer is not None  # why_not has asked
        rule = self.rules[problem.format.name][0]
        x, w = (quantize(operand, problem.format, rule=rule) for operand in (inputs.x, inputs.w))
        multiply = _multiplier(flashinfer, self.backend, x, w, *self._laid_out(flashinfer, w))
        if problem.mode.quantizes:
            quantize_x = _quantizer(flashinfer, inputs.x, x.tensor_scale)
            return lambda: multiply(*quantize_x())
        scales = _blocked(x)
        return lambda: multiply(x.codes, scales)

    def _laid_out(self, flashinfer: Any, w: Quantized) -> tuple[torch.Tensor, torch.Tensor]:
        """Codes (n, k / 2) and scales (n in tiles, k / block in tiles) of a weight."""
        return w.codes, _blocked(w)


class FlashInferTrtllmProvider(FlashInferCutlassProvider):
    """NVFP4 by the backend trtllm, on compute capability 10."""

    name, backend, majors, multiples, ops = "flashinfer_trtllm", "trtllm", (10,), (128, 128), ("gemm",)

    def _laid_out(self, flashinfer: Any, w: Quantized) -> tuple[torch.Tensor, torch.Tensor]:
        scales = w.scales.view(torch.uint8)
        shuffled = flashinfer.shuffle_matrix_sf_a(scales, _EPILOGUE_ROWS).reshape(scales.shape)
        return flashinfer.shuffle_matrix_a(w.codes, _EPILOGUE_ROWS), shuffled


class FlashInferB12xProvider(FlashInferCutlassProvider):
    """NVFP4 by the backend b12x, on compute capability 12, from CUDA 13 on."""

    name, backend, majors, ops = "flashinfer_b12x", "b12x", (12,), ("gemm",)


class FlashInferCudnnProvider(FlashInferCutlassProvider):
    """NVFP4 by the backend cudnn."""

    name, backend, ops = "flashinfer_cudnn", "cudnn", ("gemm",)


class FlashInferCuteDslProvider(FlashInferCutlassProvider):
    """NVFP4 and MXFP4 by the backend cute-dsl, on compute capability 10."""

    name, backend, majors, ops = "flashinfer_cute_dsl", "cute-dsl", (10,), ("gemm",)
    rules = {**_NVFP4, MXFP4.name: (ScaleRule.RCEIL,)}


def _multiplier(
    flashinfer: Any, backend: str, x: Quantized, w: Quantized, codes: torch.Tensor, scales: torch.Tensor
) -> Callable[[torch.Tensor, torch.Tensor], torch.Tensor]:
    factor = None
    if x.tensor_scale is not None and w.tensor_scale is not None:
        factor = alpha(x.tensor_scale, w.tensor_scale)
    return lambda x_codes, x_scales: flashinfer.mm_fp4(
        a=x_codes,
        b=codes.T,
        a_descale=x_scales,
        b_descale=scales.T,
        alpha=factor,
        out_dtype=torch.bfloat16,
        block_size=w.format.block_size,
        use_8x4_sf_layout=False,
        backend=backend,
        use_nvfp4=w.format is NVFP4,
    )


def _quantizer(flashinfer: Any, x: torch.Tensor, encode_scale: torch.Tensor | None) -> Callable[[], Any]:
    """What quantizes x: -> codes, and scales in the 128 x 4 layout."""
    if encode_scale is None:
        return lambda: flashinfer.mxfp4_quantize(x, backend="cute-dsl")
    layout, scale = flashinfer.SfLayout.layout_128x4, encode_scale.reshape(1)
    return lambda: flashinfer.nvfp4_quantize(x, scale, sfLayout=layout, do_shuffle=False)


def _blocked(q: Quantized) -> torch.Tensor:
    rows, columns = layouts.padded_shape(*q.scales.shape)
    return layouts.to_blocked(q.scales).view(torch.uint8).reshape(rows, columns)
