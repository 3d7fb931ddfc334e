"""x <-> Quantized(codes, scales, tensor_scale): the eager truth, in plain torch, for both formats and every named rule.

MXFP4: e = rule(extent of 32, mostly their amax), codes = E2M1(x / 2**e). OCP Microscaling Formats v1.0, section 6.3.
NVFP4, in the order of Transformer Engine: encode scale S = 2688 / amax(x) (2688 = 448 * 6, so that the largest block scale is
448), block scale s = E4M3(amax of 16 * (S * (1 / 6))), codes = E2M1(x * (1 / (s * (1 / S)))), all in float32.

Also FP8 activations with one scale a row, for the W4A8 mode.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from math import lcm, prod

import torch
from torch.nn.functional import pad

from fp4bench.formats import BlockFormat, ScaleRule, e2m1, scales
from fp4bench.hadamard import check_size, rotate, unrotate

# Values handled at once: the float32 temporaries of a chunk stay in a CPU's cache, and far below 6x the input in memory.
# 8192x8192 bfloat16 to MXFP4 on 2 cores (AMD EPYC, AVX-512): 0.83 s by 2**14, 0.30 s by 2**18, 1.13 s by 2**26.
_CHUNK_CPU = 1 << 18
_CHUNK_GPU = 1 << 25

_FLOAT_MAX = torch.finfo(torch.float32).max


@dataclass(frozen=True, eq=False)
class Quantized:
    """A tensor of shape (..., k) in a block format. k is padded with zeros to whole blocks (and whole Hadamard blocks).

    codes: uint8 (..., k padded / 2), the even code in the low nibble.
    scales: the format's scale dtype (..., k padded / block size), row-major.
    tensor_scale: float32 (), the *encode* scale S of NVFP4 (a value is code * scale / S); None for MXFP4.
    hadamard: the size of the rotation along k that the codes are under, or None.
    """

    codes: torch.Tensor
    scales: torch.Tensor
    tensor_scale: torch.Tensor | None
    format: BlockFormat
    rule: ScaleRule
    hadamard: int | None
    k: int

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the tensor that was quantized."""
        return (*self.codes.shape[:-1], self.k)


def quantize(
    x: torch.Tensor,
    format: BlockFormat,
    *,
    rule: ScaleRule | None = None,
    hadamard: int | None = None,
    tensor_scale: torch.Tensor | float | None = None,
    scale_floor: float = 0.0,
) -> Quantized:
    """Quantize along the last axis. float32, bfloat16 or float16 (..., k), CPU or GPU -> Quantized.

    rule: one of `format.rules`; default the first (MXFP4: FLOOR, the OCP rule).
    hadamard: rotate blocks of this size along k first; `dequantize` rotates back.
    tensor_scale: NVFP4's encode scale S, where it is known beforehand (static quantization); default 2688 / amax(x).
    scale_floor: smallest NVFP4 block scale, 0 as in Transformer Engine; torchao uses 2**-6.

    A block that holds NaN or infinity gets the NaN scale and decodes to NaN; its codes mean nothing. Under a rotation this
    holds for all blocks that are rotated together.
    Raises TypeError for other dtypes, ValueError for a rule, rotation or scale that the format does not have.
    """
    rule = rule or format.default_rule
    check_arguments(x, format, rule, hadamard, tensor_scale, scale_floor)
    x = x.detach()
    k = x.shape[-1]
    group = lcm(format.block_size, hadamard or 1)
    groups = pad(x, (0, -k % group)).reshape(-1, group) if k % group else x.reshape(prod(x.shape) // group, group)
    encode_scale = _encode_scale(groups, hadamard, tensor_scale) if format.has_tensor_scale else None
    codes = torch.empty(groups.shape[0], group // 2, dtype=torch.uint8, device=x.device)
    block_scales = torch.empty(groups.shape[0], group // format.block_size, dtype=format.scale_dtype, device=x.device)
    for part in _chunks(groups):
        blocks = _values(groups[part], hadamard).unflatten(-1, (-1, format.block_size))
        extent = scales.block_extents(blocks, rule)
        if encode_scale is None:
            chunk_scales = scales.e8m0_encode(extent, rule)
            elements = _scaled_by_power_of_two(blocks, chunk_scales, rule)
        else:
            chunk_scales = _two_level_scales(extent, encode_scale, scale_floor)
            elements = blocks * _two_level_multiplier(chunk_scales, encode_scale)[..., None]
        codes[part] = e2m1.pack(e2m1.encode(elements.flatten(-2)))
        block_scales[part] = chunk_scales
    lead, k_padded = x.shape[:-1], k + -k % group
    return Quantized(
        codes.reshape(*lead, k_padded // 2),
        block_scales.reshape(*lead, k_padded // format.block_size),
        encode_scale,
        format,
        rule,
        hadamard,
        k,
    )


def decode(q: Quantized, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """The values that codes and scales stand for, padding dropped, still rotated where `q.hadamard` is set.

    Quantized (..., k) -> dtype (..., k), or (..., k padded) when rotated: rotation spreads values into the padding. Computed in
    `dtype`, float32 or float64. In float32 MXFP4's own rules are exact (but for products beyond its range); NVFP4 rounds
    code * scale / S once, and QUTLASS_ABS_MAX code / 3.
    """
    blocks, block_size = q.scales.numel(), q.format.block_size
    codes, block_scales = q.codes.reshape(blocks, block_size // 2), scale_values(q).reshape(blocks, 1)
    values = torch.empty(blocks, block_size, dtype=dtype, device=q.codes.device)
    # Divisors on the device of the codes: torch divides by a number of the CPU through its reciprocal, which rounds twice.
    gain = torch.full((), q.rule.gain, dtype=dtype, device=q.codes.device)
    encode_scale = None if q.tensor_scale is None else q.tensor_scale.to(q.codes.device)
    for part in _chunks(values):
        elements = e2m1.decode(e2m1.unpack(codes[part])).to(dtype)
        if q.rule.gain != 1.0:
            elements /= gain
        chunk = torch.mul(elements, block_scales[part], out=values[part])
        if encode_scale is not None:
            chunk /= encode_scale
    values = values.reshape(*q.codes.shape[:-1], q.codes.shape[-1] * 2)
    return values if q.hadamard else values[..., : q.k]


def dequantize(q: Quantized, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Inverse of `quantize` up to rounding: decoded and rotated back. Quantized (..., k) -> dtype (..., k)."""
    values = decode(q)
    if q.hadamard:
        values = unrotate(values, q.hadamard)[..., : q.k]
    return values.to(dtype)


def scale_values(q: Quantized) -> torch.Tensor:
    """Block scales as numbers, without the tensor scale. -> float32 (..., k padded / block size)."""
    return scales.e4m3_decode(q.scales) if q.format.has_tensor_scale else scales.e8m0_decode(q.scales)


@dataclass(frozen=True, eq=False)
class RowQuantized:
    """FP8 activations with one float32 scale a row: values float8_e4m3fn (..., k), scales float32 (..., 1)."""

    values: torch.Tensor
    scales: torch.Tensor


def quantize_fp8_rows(x: torch.Tensor) -> RowQuantized:
    """Each row to E4M3 by its own scale amax / 448. float (..., k) -> RowQuantized."""
    x = x.float()
    amax = x.abs().amax(dim=-1, keepdim=True)
    # A quotient of tensors is correctly rounded; by a Python number it may be a product with the reciprocal.
    row_scales = (amax / torch.full_like(amax, scales.E4M3_MAX)).clamp(min=torch.finfo(torch.float32).tiny)
    return RowQuantized(scales.e4m3_encode(x / row_scales), row_scales)


def decode_fp8_rows(q: RowQuantized) -> torch.Tensor:
    """Values of `quantize_fp8_rows`. -> float32 (..., k), one rounding."""
    return q.values.float() * q.scales


@dataclass(frozen=True, eq=False)
class TileQuantized:
    """FP8 with a scale a tile: values float8_e4m3fn (rows, k), scales float32 (tiles along rows, tiles along k).

    tile: its rows and columns; the last ones may be smaller.
    """

    values: torch.Tensor
    scales: torch.Tensor
    tile: tuple[int, int]


def quantize_fp8_tiles(x: torch.Tensor, rows: int | None, columns: int | None) -> TileQuantized:
    """Each tile to E4M3 by its own scale amax / 448. float (any, k) -> TileQuantized.

    rows, columns: of a tile; None for all. (None, None) is the scaling by tensors, (1, None) that of `quantize_fp8_rows`.
    """
    tile = max(1, rows or x.shape[0]), max(1, columns or x.shape[1])
    tiles = pad(x.float(), (0, -x.shape[1] % tile[1], 0, -x.shape[0] % tile[0]))
    tiles = tiles.unflatten(1, (-1, tile[1])).unflatten(0, (-1, tile[0]))  # (row tiles, rows, column tiles, columns)
    amax = (
        tiles.abs().amax(dim=(1, 3), keepdim=True) if tiles.numel() else tiles.new_zeros(tiles.shape[0], 1, tiles.shape[2], 1)
    )
    tile_scales = (amax / torch.full_like(amax, scales.E4M3_MAX)).clamp(min=torch.finfo(torch.float32).tiny)
    values = scales.e4m3_encode(tiles / tile_scales).flatten(2, 3).flatten(0, 1)[: x.shape[0], : x.shape[1]]
    return TileQuantized(values.contiguous(), tile_scales[:, 0, :, 0], tile)


def decode_fp8_tiles(q: TileQuantized, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Values of `quantize_fp8_tiles`. -> dtype (rows, k), computed in it."""
    rows, columns = q.tile
    by_value = q.scales.to(dtype).repeat_interleave(rows, dim=0).repeat_interleave(columns, dim=1)
    return q.values.to(dtype) * by_value[: q.values.shape[0], : q.values.shape[1]]


def check_arguments(
    x: torch.Tensor,
    format: BlockFormat,
    rule: ScaleRule,
    hadamard: int | None,
    tensor_scale: torch.Tensor | float | None,
    scale_floor: float = 0.0,
) -> None:
    """Raise TypeError or ValueError where `quantize` cannot quantize x so."""
    if x.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        raise TypeError(f"quantize takes float32, bfloat16 or float16, not {x.dtype}")
    if x.dim() == 0:
        raise ValueError("quantize takes a tensor with at least one axis, and got a scalar")
    if rule not in format.rules:
        raise ValueError(f"{format} has no scale rule {rule}; it has {', '.join(map(str, format.rules))}")
    if not format.has_tensor_scale and (tensor_scale is not None or scale_floor):
        raise ValueError(f"{format} has no tensor scale: leave tensor_scale and scale_floor out")
    if hadamard is not None:
        check_size(hadamard)
    if isinstance(tensor_scale, torch.Tensor) and tensor_scale.numel() != 1:
        raise ValueError(f"tensor_scale is one number, not a tensor of shape {tuple(tensor_scale.shape)}")
    # A tensor's value is the caller's to answer for: reading it would stop a GPU's stream.
    if isinstance(tensor_scale, float | int) and not 0 < torch.tensor(tensor_scale, dtype=torch.float32) < float("inf"):
        raise ValueError(f"tensor_scale is a positive and finite float32, not {tensor_scale}")
    if not 0 <= scale_floor <= scales.E4M3_MAX:
        raise ValueError(f"scale_floor is between 0 and {scales.E4M3_MAX:g}, not {scale_floor}")


def _chunks(groups: torch.Tensor) -> Iterator[slice]:
    size = _CHUNK_CPU if groups.device.type == "cpu" else _CHUNK_GPU
    step = max(1, size // groups.shape[1])
    return (slice(start, start + step) for start in range(0, groups.shape[0], step))


def _values(part: torch.Tensor, hadamard: int | None) -> torch.Tensor:
    return rotate(part, hadamard).float() if hadamard else part.float()


def _scaled_by_power_of_two(blocks: torch.Tensor, block_scales: torch.Tensor, rule: ScaleRule) -> torch.Tensor:
    elements = blocks * scales.e8m0_decode_inverse(block_scales)[..., None]
    return elements * rule.gain if rule.gain != 1.0 else elements


def _encode_scale(groups: torch.Tensor, hadamard: int | None, given: torch.Tensor | float | None) -> torch.Tensor:
    """NVFP4's encode scale S. Transformer Engine: 1 where amax is 0 or infinite; here also where it is NaN."""
    if given is not None:
        return torch.as_tensor(given, dtype=torch.float32, device=groups.device).reshape(())
    amax = torch.zeros((), dtype=torch.float32, device=groups.device)
    for part in _chunks(groups):
        amax = torch.maximum(amax, _values(groups[part], hadamard).abs().amax())
    usable = (amax > 0) & amax.isfinite()
    # A quotient of tensors: number / tensor is number * reciprocal in torch, which rounds twice.
    scale = torch.full_like(amax, scales.E4M3_MAX * e2m1.MAX) / amax
    return torch.where(usable, scale.clamp(max=_FLOAT_MAX), 1.0)


def _two_level_scales(amax: torch.Tensor, encode_scale: torch.Tensor, floor: float) -> torch.Tensor:
    wanted = (amax * (encode_scale * (1.0 / e2m1.MAX))).clamp(min=floor)
    # An infinite block would saturate to a finite scale, as it does in Transformer Engine: it becomes a NaN block, like one
    # that holds NaN.
    return scales.e4m3_encode(torch.where(amax.isfinite(), wanted, torch.nan))


def _two_level_multiplier(block_scales: torch.Tensor, encode_scale: torch.Tensor) -> torch.Tensor:
    return (1.0 / (scales.e4m3_decode(block_scales) * (1.0 / encode_scale))).clamp(max=_FLOAT_MAX)
