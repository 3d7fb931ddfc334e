"""Products with FP4 weights: which kernel computes which of them here, and the function that does.

| mode | Hopper (9.0) | Blackwell (10.x, 12.x), compiled and not measured |
|---|---|---|
| w4a16 | `decode` to 16 rows of x or `prefill`, as tuned | `decode` to 16 rows |
| w4a8, MXFP4 | rows of x to FP8, then `prefill` as E4M3 | - |
| w4a4 | x to FP4, then what its codes stand for: from `E4M3_ROWS` rows on as E4M3 (MXFP4), else as bfloat16 | `blackwell` |

`w4a4_noquant` is `w4a4` on what `activations` made before. bfloat16 operands are exact, and summed in float32. E4M3 operands
are exact but for blocks of x some 2**-12 below the largest of their row (`quantize.fp4_as_e4m3`), and summed by FP8 tensor
cores, which cut sums to 14 bits: `accumulation` says where.

A weight whose scales spread too far for a path is a sum of weights (`PreparedWeight.rest`). Then products of all of them are
added in float32: rare, right, and slow.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import lru_cache
from math import lcm, prod

import torch

from fp4bench.devices import Device, find_device
from fp4bench.formats import BlockFormat, layouts
from fp4bench.kernels import blackwell, configs, decode, prefill, quantize
from fp4bench.kernels.blackwell import BlackwellConfig
from fp4bench.kernels.configs import Launch, Work
from fp4bench.kernels.decode import DecodeConfig
from fp4bench.kernels.fp8_rows import Columns
from fp4bench.kernels.prefill_launch import PrefillConfig
from fp4bench.kernels.quantize import BlockedQuantized, Image
from fp4bench.kernels.weights import UNIT_K, PreparedWeight, WordOrder, prepare
from fp4bench.problems import CUT_FP8_SUMS, W4A8, W4A16, Accumulation, Mode
from fp4bench.quantize import Quantized, RowQuantized

Weight = PreparedWeight | BlockedQuantized

# So many rows of MXFP4 activations are multiplied as E4M3, at twice the rate of bfloat16 and with 14 bits of each sum. Fewer
# are bound by the weight's bytes, of which bfloat16 is decoded faster from words in halves, and exact: gate_up of Llama-3.3-70B
# takes 83.6 us as bfloat16 instead of 104.5 at m = 32, 113.0 instead of 117.2 at 64, 167.3 instead of 144.4 at 128 (NVIDIA
# H200).
E4M3_ROWS = 128

_HOPPER = (9, 0)
_ALIGNMENT = 256  # of each part of a workspace, in bytes


@dataclass(frozen=True, eq=False)
class Activations:
    """Rows of x as `prefill` takes them.

    values: bfloat16 or float16 (m, k), or float8_e4m3fn (m, k padded to 64) in E4M3_ORDER.
    scale: float32 (m), what the sums of a row are multiplied by, or None.
    """

    values: torch.Tensor
    scale: torch.Tensor | None = None


Operand = Activations | BlockedQuantized


# --- Which kernel -----------------------------------------------------------------------------------------------------------


def why_not(mode: Mode, format: BlockFormat, m: int, k: int, hadamard: int | None, device: Device) -> str | None:
    """What keeps a product of this kind from running on `device`, in one sentence, or None."""
    if device.capability == _HOPPER:
        if mode is W4A8 and format.has_tensor_scale:
            return f"an E4M3 operand has no room for the scales of {format}"
        return None
    if device.capability is None or device.capability[0] not in blackwell.MAJORS:
        return f"its kernels are for Hopper and Blackwell (compute capability 9.0, 10.x and 12.x), not for {device.name}"
    if mode is W4A16:
        return None if m <= decode.MOST_ROWS else f"beyond {decode.MOST_ROWS} rows of x it needs Hopper's wgmma"
    if mode is W4A8:
        return "FP8 activations need Hopper's wgmma"
    if _padded(k, format, hadamard) % blackwell.ALIGNMENT:
        return f"TMA reads FP4 rows of a multiple of {blackwell.ALIGNMENT} values, and k is {k}"
    return None


def operand_of(mode: Mode, format: BlockFormat, m: int, device: Device) -> str:
    """What the weight is multiplied as: one of `configs.OPERANDS`."""
    if mode is W4A16:
        return "bf16"
    if device.capability != _HOPPER:
        return "fp4"
    return "e4m3" if mode is W4A8 or (m >= E4M3_ROWS and not format.has_tensor_scale) else "bf16"


def accumulation(mode: Mode, format: BlockFormat, m: int, device: Device) -> Accumulation | None:
    """How products are added up where that is less exact than `mode` allows."""
    return CUT_FP8_SUMS if operand_of(mode, format, m, device) == "e4m3" else None


@lru_cache(maxsize=4096)
def launch_of(mode: Mode, format: BlockFormat, m: int, n: int, k: int, device: Device) -> Launch:
    """The launch that the tables have for a product. Looked up once a process."""
    return configs.choose(work_of(mode, format, m, n, k, device), device)


def work_of(mode: Mode, format: BlockFormat, m: int, n: int, k: int, device: Device) -> Work:
    """A product as launches know it. Rows of x have scales where they are FP8, or FP4 with a tensor scale."""
    operand = operand_of(mode, format, m, device)
    scaled = operand == "e4m3" or (mode is not W4A16 and format.has_tensor_scale)
    return Work(operand, str(format), m, n, k, x_scaled=scaled)


# --- Operands ---------------------------------------------------------------------------------------------------------------


def lay_out(w: Quantized, mode: Mode, device: Device) -> Weight:
    """A quantized weight (n, k) as the kernels of `mode` read it. Done once: it waits for the GPU.

    On Hopper one layout serves every m. Modes differ in how far below the largest scale of its row a block may be before it
    becomes a part of `rest`, 24 binades for w4a16 and 11 where MXFP4 may be multiplied as E4M3; and in the order of a word's
    bits, which for w4a8 is that of E4M3 alone.
    """
    if operand_of(mode, w.format, 1, device) == "fp4":
        return blackwell.blocked(w)
    if mode is W4A8:
        return prepare(w, torch.float8_e4m3fn, WordOrder.BYTES)
    return prepare(w, torch.float16 if mode is W4A16 or w.format.has_tensor_scale else torch.float8_e4m3fn)


def activations(x: torch.Tensor, weight: Weight, mode: Mode) -> Operand:
    """x (m, k) as products of `mode` take it, in memory of its own."""
    made = _activation_buffers(mode, weight, x.shape[0], device_of(x))
    buffers = {name: torch.empty(shape, dtype=dtype, device=x.device) for name, (shape, dtype) in made.items()}
    return _activations(x, weight, mode, buffers, pdl=False)


def _activations(x: torch.Tensor, weight: Weight, mode: Mode, buffers: Mapping[str, torch.Tensor], pdl: bool) -> Operand:
    if mode is W4A16:
        return Activations(x)
    if "codes" in buffers:
        codes, scales, s = buffers["codes"], buffers["scales"], buffers.get("tensor_scale")
        out = BlockedQuantized(codes, scales, s, weight.format, weight.rule, weight.hadamard, x.shape[1])
        quantize.quantize(x, weight.format, rule=weight.rule, hadamard=weight.hadamard, blocked=True, out=out)
        return out
    values, scale = buffers["values"], buffers.get("scale")
    if values.dtype == torch.float8_e4m3fn:
        assert scale is not None
        rows = RowQuantized(values, scale[:, None])
        if mode is W4A8:
            quantize.quantize_fp8_rows(x, columns=Columns.FRAGMENTS, out=rows, pdl=pdl)
        else:
            quantize.fp4_as_e4m3(x, rule=weight.rule, hadamard=weight.hadamard, out=rows, pdl=pdl)
        return Activations(values, scale)
    image = Image(values, buffers.get("tensor_scale"))
    quantize.fp4_as_bf16(x, weight.format, rule=weight.rule, hadamard=weight.hadamard, out=image, pdl=pdl)
    if scale is not None and image.tensor_scale is not None:
        torch.reciprocal(image.tensor_scale.expand(len(scale)), out=scale)
    return Activations(values, scale)


Made = tuple[tuple[int, ...], torch.dtype]  # shape and dtype of a buffer


def _activation_buffers(mode: Mode, weight: Weight, m: int, device: Device) -> dict[str, Made]:
    """What `_activations` writes to."""
    operand = operand_of(mode, weight.format, m, device)
    k = _padded(weight.k, weight.format, weight.hadamard)
    tensor_scale: dict[str, Made] = {"tensor_scale": ((), torch.float32)} if weight.format.has_tensor_scale else {}
    if mode is W4A16:
        return {}
    if operand == "fp4":
        scales = prod(layouts.padded_shape(m, k // weight.format.block_size))
        return {"codes": ((m, k // 2), torch.uint8), "scales": ((scales,), weight.format.scale_dtype), **tensor_scale}
    if operand == "e4m3":
        columns = weight.k if mode is W4A8 else _up(weight.k, weight.hadamard or 1)
        return {"values": ((m, _up(columns, UNIT_K)), torch.float8_e4m3fn), "scale": ((m,), torch.float32)}
    scale: dict[str, Made] = {"scale": ((m,), torch.float32)} if tensor_scale else {}
    return {"values": ((m, k), torch.bfloat16), **tensor_scale, **scale}


# --- The product ------------------------------------------------------------------------------------------------------------


def gemm(
    x: torch.Tensor | Operand,
    weight: Weight,
    mode: Mode,
    *,
    alpha: float = 1.0,
    bias: torch.Tensor | None = None,
    out: torch.Tensor | None = None,
    workspace: torch.Tensor | None = None,
    launch: Launch | None = None,
    pdl: bool = True,
) -> torch.Tensor:
    """y (m, n) = x (m, k) @ W^T * alpha + bias: sums in float32, rounded once. Returns `out`.

    x: bfloat16 or float16, its rows contiguous; in w4a4_noquant what `activations` made of it. weight: by `lay_out` for `mode`.
    bias: float (n). out: bfloat16 or float16 (m, n), contiguous; default a new one of x's dtype.
    workspace: uint8, of `workspace_bytes`, its first `prefill.COUNTER_BYTES` zero before its first use, as they are afterwards
    (`new_workspace`), not used by anything else meanwhile; default a new one.
    launch: default that of the tables. pdl: let the kernels of a call begin while those before them run, as `overlap` says; the
    weight must have been complete before the first kernel that overlaps with this call.

    Launches on the current stream, and waits for nothing. Beside out and workspace a computed NVFP4 tensor scale takes at most
    4 KiB from torch's allocator. Raises TypeError and ValueError for operands that do not fit together.
    """
    quantized = not isinstance(x, torch.Tensor)
    m, n = _rows(x), _columns(weight)
    device = device_of(weight)
    _check(x, weight, mode)
    if out is None:
        out = torch.empty(m, n, dtype=x.dtype if isinstance(x, torch.Tensor) else torch.bfloat16, device=device.torch_name)
    if not m:
        return out
    launch = _launch(mode, weight, m, device, launch)
    buffers = _buffers(mode, weight, m, device, launch, quantized)
    if workspace is None:
        workspace = new_workspace(_size(buffers), device.torch_name)
    parts = dict(_cut(workspace, buffers))
    operand = _activations(x, weight, mode, parts, pdl) if isinstance(x, torch.Tensor) else x
    if isinstance(weight, BlockedQuantized):
        assert isinstance(operand, BlockedQuantized)
        assert isinstance(launch, BlackwellConfig)
        blackwell.gemm(operand, weight, out, config=launch, alpha=alpha, bias=bias)
        return out
    assert isinstance(operand, Activations)
    if weight.rest is None:
        _multiply(operand, weight, out, launch, parts.get("partials"), alpha, bias, pdl)
    else:
        _multiply_parts(operand, weight, out, launch, parts, alpha, bias)
    return out


def workspace_bytes(
    mode: Mode, weight: Weight, m: int, *, device: Device | None = None, launch: Launch | None = None, quantized: bool = False
) -> int:
    """Bytes of workspace that `gemm` of m rows needs: activations as they are multiplied, and partial sums.

    launch, quantized: as `gemm` is called, with a launch of one's own, or with activations that are quantized already.
    """
    device = device or device_of(weight)
    launch = _launch(mode, weight, m, device, launch)
    return _size(_buffers(mode, weight, m, device, launch, quantized))


def new_workspace(size: int, device: torch.device | str) -> torch.Tensor:
    """A workspace of so many bytes, its counters zero."""
    workspace = torch.empty(size, dtype=torch.uint8, device=device)
    workspace[: prefill.COUNTER_BYTES].zero_()
    return workspace


def _multiply(
    x: Activations,
    weight: PreparedWeight,
    out: torch.Tensor,
    launch: Launch,
    partials: torch.Tensor | None,
    alpha: float,
    bias: torch.Tensor | None,
    pdl: bool,
) -> None:
    if isinstance(launch, DecodeConfig):
        decode.gemm(x.values, weight, out, config=launch, alpha=alpha, bias=bias, pdl=pdl)
    else:
        assert isinstance(launch, PrefillConfig)
        scale = x.scale
        prefill.gemm(x.values, weight, out, config=launch, workspace=partials, x_scale=scale, alpha=alpha, bias=bias, pdl=pdl)


def _multiply_parts(
    x: Activations,
    weight: PreparedWeight,
    out: torch.Tensor,
    launch: Launch,
    parts: Mapping[str, torch.Tensor],
    alpha: float,
    bias: torch.Tensor | None,
) -> None:
    """The products of a weight and its rests, added in float32 before the one rounding. `prefill` alone writes float32."""
    total, product = parts["total"], parts["product"]
    part: PreparedWeight | None = weight
    while part is not None:
        alone, into = replace(part, rest=None), total if part is weight else product
        _multiply(x, alone, into, launch, parts.get("partials"), alpha, bias if part is weight else None, False)
        if part is not weight:
            total += product
        part = part.rest
    out.copy_(total)


def _buffers(mode: Mode, weight: Weight, m: int, device: Device, launch: Launch, quantized: bool) -> dict[str, Made]:
    """The parts of a workspace, in their order: the one with counters first, where every product finds it."""
    activations = {} if quantized else _activation_buffers(mode, weight, m, device)
    if isinstance(weight, BlockedQuantized):
        return activations
    # Room for counters even where this product has none: its activations must not lie where those of another one are.
    made: dict[str, Made] = {"partials": ((prefill.COUNTER_BYTES,), torch.uint8)} if activations or weight.rest else {}
    if isinstance(launch, PrefillConfig):
        assert device.sm_count is not None
        dtype = torch.float8_e4m3fn if operand_of(mode, weight.format, m, device) == "e4m3" else torch.bfloat16
        if partials := prefill.workspace_bytes(m, weight, dtype, launch, device.sm_count):
            made["partials"] = (partials,), torch.uint8
    made |= activations
    if weight.rest is not None:
        made |= dict.fromkeys(("total", "product"), ((m, weight.n), torch.float32))
    return made


def _launch(mode: Mode, weight: Weight, m: int, device: Device, launch: Launch | None) -> Launch:
    """The launch of a product: that of a weight in parts has room for float32 results."""
    if isinstance(weight, PreparedWeight) and weight.rest is not None:
        depth = 128 if operand_of(mode, weight.format, m, device) == "e4m3" else 64
        return PrefillConfig(columns=64, depth=depth, stages=3)
    return launch or launch_of(mode, weight.format, m, _columns(weight), weight.k, device)


def _size(buffers: Mapping[str, Made]) -> int:
    return sum(_up(prod(shape) * dtype.itemsize, _ALIGNMENT) for shape, dtype in buffers.values())


def _cut(workspace: torch.Tensor, buffers: Mapping[str, Made]) -> Iterator[tuple[str, torch.Tensor]]:
    if workspace.dtype != torch.uint8 or workspace.numel() < _size(buffers):
        raise ValueError(
            f"the workspace is uint8 ({_size(buffers)},) or larger, not {workspace.dtype} {tuple(workspace.shape)}"
        )
    start = 0
    for name, (shape, dtype) in buffers.items():
        size = prod(shape) * dtype.itemsize
        yield name, workspace[start : start + size].view(dtype).view(shape)
        start += _up(size, _ALIGNMENT)


def _check(x: torch.Tensor | Operand, weight: Weight, mode: Mode) -> None:
    if isinstance(x, torch.Tensor):
        if x.dtype not in (torch.bfloat16, torch.float16):
            raise TypeError(f"activations are bfloat16 or float16, not {x.dtype}")
        if x.dim() != 2 or x.shape[1] != weight.k or (x.numel() and x.stride(1) != 1):
            raise ValueError(f"x is (m, {weight.k}) with contiguous rows, not {tuple(x.shape)}")
        if not mode.quantizes and mode is not W4A16:
            raise ValueError(f"{mode} takes what `activations` made of x")
    elif mode.quantizes or mode is W4A16:
        raise ValueError(f"{mode} takes x as a tensor")
    if isinstance(weight, PreparedWeight):
        if mode is W4A16 and isinstance(x, torch.Tensor) and not weight.fits(x.dtype):
            raise ValueError(f"this weight was laid out to be multiplied as {weight.operand}, not as {x.dtype}")
        if (mode is W4A8) != (weight.order is WordOrder.BYTES):
            raise ValueError(f"this weight was not laid out for {mode}")


def _rows(x: torch.Tensor | Operand) -> int:
    if isinstance(x, torch.Tensor):
        return x.shape[0]
    return (x.codes if isinstance(x, BlockedQuantized) else x.values).shape[0]


def _columns(weight: Weight) -> int:
    return weight.n if isinstance(weight, PreparedWeight) else weight.codes.shape[0]


def device_of(tensor: torch.Tensor | Weight) -> Device:
    """The device of a tensor, as a value."""
    if isinstance(tensor, torch.Tensor):
        where = tensor.device
    else:
        where = (tensor.words if isinstance(tensor, PreparedWeight) else tensor.codes).device
    return _device(where.type, where.index or 0)


@lru_cache
def _device(kind: str, index: int) -> Device:
    return find_device(f"cuda:{index}" if kind == "cuda" else kind)


def _padded(k: int, format: BlockFormat, hadamard: int | None) -> int:
    return _up(k, lcm(format.block_size, hadamard or 1))


def _up(value: int, multiple: int) -> int:
    return -(-value // multiple) * multiple
