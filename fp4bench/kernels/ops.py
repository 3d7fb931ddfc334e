"""The kernels as torch operators: for torch.compile, CUDA graphs and autograd's dispatch, with fakes that need no GPU.

`torch.ops.fp4bench.gemm`, `quantize_mxfp4`, `quantize_nvfp4` and `quantize_fp8_rows`. They allocate their results and, for a
product, the workspace that `fp4bench.kernels.gemm.workspace_bytes` tells; they wait for nothing. An operator takes tensors:
`flatten` makes a weight a list of tensors and a text, which a module keeps as buffers and as a constant.
"""

import json
from collections.abc import Sequence
from functools import lru_cache
from math import lcm, prod
from typing import Any

import torch

from fp4bench.formats import FORMATS, MXFP4, NVFP4, ScaleRule, layouts
from fp4bench.kernels import gemm as products
from fp4bench.kernels import quantize as quantizers
from fp4bench.kernels.gemm import Weight
from fp4bench.kernels.quantize import BlockedQuantized
from fp4bench.kernels.weights import WINDOWS, PreparedWeight, WordOrder
from fp4bench.problems import MODES

_TENSORS = ("words", "scales", "row_scale", "base", "tensor_scale")  # of a PreparedWeight


def flatten(weight: Weight) -> tuple[list[torch.Tensor], str]:
    """A weight as tensors and the text that says what they are."""
    form: dict[str, Any] = {"format": str(weight.format), "rule": str(weight.rule), "hadamard": weight.hadamard, "k": weight.k}
    if isinstance(weight, BlockedQuantized):
        form["n"] = weight.codes.shape[0]
        tensors = [weight.codes, weight.scales, *([] if weight.tensor_scale is None else [weight.tensor_scale])]
        return tensors, json.dumps(form)
    form |= {"n": weight.n, "operand": str(weight.operand), "order": str(weight.order), "parts": 0}
    tensors, part = [], weight
    while part is not None:
        tensors += [tensor for name in _TENSORS if (tensor := getattr(part, name)) is not None]
        form["parts"] += 1
        part = part.rest  # type: ignore[assignment]
    return tensors, json.dumps(form)


def unflatten(tensors: Sequence[torch.Tensor], form: str) -> Weight:
    """Inverse of `flatten`. Raises ValueError where the tensors are not those of the form."""
    what = _parsed(form)
    fmt, rule = FORMATS[what["format"]], ScaleRule(what["rule"])
    if "operand" not in what:
        codes, scales, *rest = tensors
        return BlockedQuantized(codes, scales, rest[0] if rest else None, fmt, rule, what["hadamard"], what["k"])
    operand, order = next(dtype for dtype in WINDOWS if str(dtype) == what["operand"]), WordOrder(what["order"])
    names = [name for name in _TENSORS if name != ("base" if fmt.has_tensor_scale else "tensor_scale")]
    if len(tensors) != what["parts"] * len(names):
        raise ValueError(f"{len(tensors)} tensors are no {fmt} weight of {what['parts']} parts")
    weight: PreparedWeight | None = None
    for start in reversed(range(0, len(tensors), len(names))):
        named: dict[str, Any] = dict.fromkeys(_TENSORS) | dict(zip(names, tensors[start:], strict=False))
        shape = {"n": what["n"], "k": what["k"], "hadamard": what["hadamard"]}
        weight = PreparedWeight(**named, **shape, format=fmt, rule=rule, operand=operand, rest=weight, order=order)
    assert weight is not None
    return weight


@lru_cache
def _parsed(form: str) -> dict[str, Any]:
    return dict(json.loads(form))


@torch.library.custom_op("fp4bench::gemm", mutates_args=())
def gemm(
    x: torch.Tensor, weight: list[torch.Tensor], form: str, mode: str, alpha: float = 1.0, bias: torch.Tensor | None = None
) -> torch.Tensor:
    """`fp4bench.kernels.gemm.gemm` of bfloat16 or float16 x (m, k) -> (m, n) of its dtype. mode: w4a16, w4a8 or w4a4."""
    return products.gemm(x, unflatten(weight, form), MODES[mode], alpha=alpha, bias=bias)


@gemm.register_fake
def _(
    x: torch.Tensor, weight: list[torch.Tensor], form: str, mode: str, alpha: float = 1.0, bias: torch.Tensor | None = None
) -> torch.Tensor:
    return x.new_empty(x.shape[0], _parsed(form)["n"])


@torch.library.custom_op("fp4bench::quantize_mxfp4", mutates_args=())
def quantize_mxfp4(
    x: torch.Tensor, rule: str, hadamard: int | None = None, blocked: bool = False
) -> tuple[torch.Tensor, torch.Tensor]:
    """`fp4bench.kernels.quantize.quantize` to MXFP4: codes and scales of x (m, k)."""
    q = quantizers.quantize(x, MXFP4, rule=ScaleRule(rule), hadamard=hadamard, blocked=blocked)
    return q.codes, q.scales


@quantize_mxfp4.register_fake
def _(x: torch.Tensor, rule: str, hadamard: int | None = None, blocked: bool = False) -> tuple[torch.Tensor, torch.Tensor]:
    return _fake_quantized(x, MXFP4, hadamard, blocked)


@torch.library.custom_op("fp4bench::quantize_nvfp4", mutates_args=())
def quantize_nvfp4(
    x: torch.Tensor, hadamard: int | None = None, tensor_scale: torch.Tensor | None = None, blocked: bool = False
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """`fp4bench.kernels.quantize.quantize` to NVFP4: codes, scales and encode scale of x (m, k)."""
    q = quantizers.quantize(x, NVFP4, hadamard=hadamard, tensor_scale=tensor_scale, blocked=blocked)
    return q.codes, q.scales, q.tensor_scale


@quantize_nvfp4.register_fake
def _(
    x: torch.Tensor, hadamard: int | None = None, tensor_scale: torch.Tensor | None = None, blocked: bool = False
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return *_fake_quantized(x, NVFP4, hadamard, blocked), x.new_empty((), dtype=torch.float32)


@torch.library.custom_op("fp4bench::quantize_fp8_rows", mutates_args=())
def quantize_fp8_rows(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """`fp4bench.kernels.quantize.quantize_fp8_rows`: values and scales of x (m, k)."""
    q = quantizers.quantize_fp8_rows(x)
    return q.values, q.scales


@quantize_fp8_rows.register_fake
def _(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    return x.new_empty(x.shape, dtype=torch.float8_e4m3fn), x.new_empty((x.shape[0], 1), dtype=torch.float32)


def _fake_quantized(x: torch.Tensor, fmt: Any, hadamard: int | None, blocked: bool) -> tuple[torch.Tensor, torch.Tensor]:
    rows, k = x.shape
    padded = k + -k % lcm(fmt.block_size, hadamard or 1)
    columns = padded // fmt.block_size
    scales = (prod(layouts.padded_shape(rows, columns)),) if blocked else (rows, columns)
    return x.new_empty((rows, padded // 2), dtype=torch.uint8), x.new_empty(scales, dtype=fmt.scale_dtype)
