"""An FP4 weight as the kernels read it: in the order of tensor core fragments, and scaled so that every path is exact.

W (n, k) is padded with zeros to tiles of 16 rows and units of 64 columns. One tile by one unit is 512 contiguous bytes of
codes: 16 bytes for each of a warp's 32 lanes, which is what the lane holds of the A operand of four `mma` of depth 16 (the PTX
ISA's figures of the A fragment of mma.m16n8k16, and of wgmma m64k16 for the 16 rows of a warp). So a warp's load is one
LDG.128, no layout is changed on the way, and nothing about a launch is part of the layout: a CTA may take any number of tiles.

With lane = 4 g + t, word j of a lane holds eight codes of columns 16 j .. 16 j + 15, as four pairs of neighbours in k:

    pair 0: row g,     columns 2t, 2t + 1           pair 1: row g + 8, the same columns
    pair 2: row g,     columns 2t + 8, 2t + 9       pair 3: row g + 8, the same columns

Within the word the even column of each pair is in the low half, the odd one in the high half, and the bits of a code (sign,
two of exponent, one of mantissa) are where `CODE_BITS` says. The order makes a pair of bfloat16 (value * 2**-126, exactly:
code 1 is a subnormal) cost two or three integer operations, nine for eight codes:

    M = 0x81C081C0: sign, the two low bits of the exponent and the first of the mantissa in both halves
    a0 = (w << 6) & M    a1 = (w << 2) & M    a2 = rotate_right(w, 4) & M    a3 = (w & 0x81808180) | ((w >> 8) & 0x00400040)

That is the order `HALVES`. Taken apart to E4M3 it costs 18 operations, as many as leave the tensor cores waiting at twice the
rate of bfloat16. So a weight that is multiplied as E4M3 alone has its words in the order `BYTES`, which costs seven: the three
bits of a magnitude are a nibble of the word, those of row g in its low half, and pick one of eight bytes by `prmt`.

    v = w & 0x77777777
    row g: prmt(table, v) | ((w << 4) & 0x80808080)    row g + 8: prmt(table, v >> 16) | (w & 0x80808080)

Scales are stored so that one shift, or a shift and an addition, makes the bfloat16 or float16 that a pair is multiplied with:

MXFP4: a row's scales relative to the largest of them, `base`: with delta = base - scale the byte is 254 - delta, as the
exponent of a bfloat16 2**(127 - delta). The product value * 2**(1 - delta) is exact in bfloat16 up to delta = 126, in float16
(where the exponent is the byte's low 5 bits) up to 24, as E4M3 (value * 2**(6 - delta)) up to 11. Blocks further below do not
fit: `prepare` moves them to a second weight, `rest`, whose product is added. The epilogue multiplies row n by `row_scale[n]` =
2**(base - 128).

NVFP4: E4M3 with one more bit of exponent, E5M3 of bias 22, in which E4M3's subnormals are normal and 448 has exponent 30. As
0x7000 + (byte << 4) it is the bfloat16 scale * 2**119, as byte << 7 the float16 scale * 2**7; both leave value * scale *
2**-7, exactly, and `row_scale` is 2**7 / S. The codes of a block of scale 0 are stored as zeros: they mean 0 in any case.

A row that has a NaN block has the row scale NaN: its product with anything is NaN.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from enum import Enum
from functools import lru_cache
from math import lcm

import torch
from torch.nn.functional import pad

from fp4bench.formats import BlockFormat, ScaleRule, scales
from fp4bench.quantize import Quantized

TILE_N = 16  # rows of a tile
UNIT_K = 64  # columns of a unit


class WordOrder(Enum):
    """Where the bits of eight codes are in a word: for pairs of 16-bit values, or for four E4M3 values."""

    HALVES = "halves"
    BYTES = "bytes"

    def __str__(self) -> str:
        return str(self.value)


# Bits of a code (mantissa, two of exponent, sign) in a word: [pair][column of the pair]. HALVES: the sign of pair 2 is in the
# other half, from where the rotation by 4 brings it to its place. BYTES: byte b = h + 2 e is column e of pair 2 h or 2 h + 1.
CODE_BITS = {
    WordOrder.HALVES: (
        ((0, 1, 2, 9), (16, 17, 18, 25)),
        ((4, 5, 6, 13), (20, 21, 22, 29)),
        ((10, 11, 12, 19), (26, 27, 28, 3)),
        ((14, 7, 8, 15), (30, 23, 24, 31)),
    ),
    WordOrder.BYTES: (
        ((0, 1, 2, 3), (8, 9, 10, 19)),
        ((16, 17, 18, 7), (24, 25, 26, 23)),
        ((4, 5, 6, 11), (12, 13, 14, 27)),
        ((20, 21, 22, 15), (28, 29, 30, 31)),
    ),
}

# Largest delta of an MXFP4 scale (see above) by the type that the weight is multiplied in.
WINDOWS = {torch.bfloat16: 126, torch.float16: 24, torch.float8_e4m3fn: 11}

# FP8 activations for these words: position p of each 16 columns holds logical column E4M3_ORDER[p] of the 16. Position 4 t + b
# is byte b of lane t's register; b = h + 2 e holds column 8 h + 2 t + e: masking a word's pairs gives bytes in that order.
E4M3_ORDER = tuple(8 * (byte % 2) + 2 * t + byte // 2 for t in range(4) for byte in range(4))

# What `row_scale` undoes: the power of two that the multiplied weight has too much.
_MX_GAIN_BITS = 1
_NV_GAIN_BITS = -7

_EMPTY_ROW = 127  # base of a row without any code: its row scale is then 1/2
_SAME_SCALE = 254  # stored byte of delta 0
_NAN = 0xFF  # stored byte of a NaN scale, in both formats

# Bytes of codes laid out at once: temporaries are some ten times as large. On a GPU that is small beside the weight.
_CHUNK = 1 << 24


@dataclass(frozen=True, eq=False)
class PreparedWeight:
    """A weight (n, k) in the layout above; tiles = n / 16 and units = k / 64, rounded up.

    words: int32 (tiles, units, 32 lanes, 4), the codes.
    scales: int32 (tiles, units, 8 g) for MXFP4, bytes (columns 0-31, row g), (columns 0-31, row g + 8), (columns 32-63, row g),
        ...; int32 (tiles, units, 8 g, 2) for NVFP4, bytes (columns 0-15, row g), (columns 0-15, row g + 8), ...
    row_scale: float32 (16 tiles), what the float32 sum over k of row n is multiplied by; NaN for a row with a NaN block.
    base: uint8 (16 tiles), the E8M0 byte that a row's scales are relative to; None for NVFP4.
    tensor_scale: float32 (), NVFP4's encode scale S, which `row_scale` has in it; None for MXFP4.
    operand: the type of `WINDOWS` with the smallest window that the scales are sure to fit in.
    order: that of the words. BYTES is for E4M3 alone.
    rest: the blocks that did not fit, as a second weight of the same shape: y is the sum of both products. Usually None.
    """

    words: torch.Tensor
    scales: torch.Tensor
    row_scale: torch.Tensor
    base: torch.Tensor | None
    tensor_scale: torch.Tensor | None
    format: BlockFormat
    rule: ScaleRule
    hadamard: int | None
    n: int
    k: int
    operand: torch.dtype
    rest: "PreparedWeight | None" = None
    order: WordOrder = WordOrder.HALVES

    def __post_init__(self) -> None:
        tiles, units = -(-self.n // TILE_N), -(-_padded_k(self) // UNIT_K)
        per_g = (2,) if self.format.has_tensor_scale else ()
        for name, tensor, shape, dtype in (
            ("words", self.words, (tiles, units, 32, 4), torch.int32),
            ("scales", self.scales, (tiles, units, 8, *per_g), torch.int32),
            ("row_scale", self.row_scale, (TILE_N * tiles,), torch.float32),
            ("base", self.base, (TILE_N * tiles,), torch.uint8),
            ("tensor_scale", self.tensor_scale, (), torch.float32),
        ):
            if tensor is None:
                if (name == "tensor_scale") == self.format.has_tensor_scale:
                    raise ValueError(f"a prepared {self.format} weight has a {name}")
            elif tensor.shape != shape or tensor.dtype != dtype or not tensor.is_contiguous():
                raise ValueError(
                    f"{name} of a {self.n} x {self.k} weight is {dtype} {shape}, contiguous, not {_describe(tensor)}"
                )
            elif tensor.device != self.words.device:
                raise ValueError(f"{name} is on {tensor.device}, the words on {self.words.device}")

    @property
    def shape(self) -> tuple[int, int]:
        """(n, k) of the tensor that was quantized."""
        return self.n, self.k

    @property
    def tiles(self) -> int:
        """Tiles of 16 rows."""
        return self.words.shape[0]

    @property
    def units(self) -> int:
        """Units of 64 columns."""
        return self.words.shape[1]

    def fits(self, operand: torch.dtype) -> bool:
        """Whether the weight can be multiplied as `operand`, exactly: it was prepared for it, or for a narrower one."""
        if self.order is WordOrder.BYTES and operand is not torch.float8_e4m3fn:
            return False
        return self.format.has_tensor_scale or WINDOWS[self.operand] <= WINDOWS[operand]


def prepare(q: Quantized, operand: torch.dtype = torch.bfloat16, order: WordOrder = WordOrder.HALVES) -> PreparedWeight:
    """Lay a quantized weight (n, k) out for the kernels, on its device. Codes under a rotation stay rotated.

    operand: the narrowest type of `WINDOWS` that the weight will be multiplied in. It decides what goes to `rest`.
    order: of the words; BYTES for a weight that will be multiplied as E4M3 alone.

    Waits for the GPU: what does not fit must be known. Takes some 0.2 GB beside the weight and its copy.
    Raises ValueError for a tensor that is no matrix, a negative NVFP4 scale, NVFP4 as E4M3 (its scale has no room there), or
    words in bytes for another type.
    """
    if len(q.shape) != 2:
        raise ValueError(f"a weight is a matrix (n, k), not a tensor of shape {q.shape}")
    if operand not in WINDOWS or (q.format.has_tensor_scale and operand is torch.float8_e4m3fn):
        raise ValueError(f"a {q.format} weight cannot be multiplied as {operand}")
    if order is WordOrder.BYTES and operand is not torch.float8_e4m3fn:
        raise ValueError(f"words in bytes are for E4M3, not for {operand}")
    return _prepare_two_level(q, operand) if q.format.has_tensor_scale else _prepare_e8m0(q, operand, order)


def restore(weight: PreparedWeight) -> Quantized:
    """Inverse of `prepare`, without `base` and the like: PreparedWeight -> Quantized (n, k).

    The same bytes as a `Quantized` that `quantize` made, but for codes that mean nothing: those of NVFP4 blocks of scale 0 come
    back as 0. (An MXFP4 block of zeros that came with another scale than its rule gives comes back with the rule's.)
    """
    parts = list(_parts(weight))
    codes, scale_bytes = _restored(parts[0])
    for part in parts[1:]:
        more_codes, more_bytes = _restored(part)
        own = _blocks_in_use(more_codes, weight.format)
        codes |= more_codes
        scale_bytes = torch.where(own, more_bytes, scale_bytes)
    return Quantized(
        codes.contiguous(),
        scale_bytes.contiguous().view(weight.format.scale_dtype),
        weight.tensor_scale,
        weight.format,
        weight.rule,
        weight.hadamard,
        weight.k,
    )


# --- Codes ------------------------------------------------------------------------------------------------------------------


def to_words(codes: torch.Tensor, order: WordOrder = WordOrder.HALVES) -> torch.Tensor:
    """Codes in fragment order. uint8 (16 tiles, 32 units), two a byte -> int32 (tiles, units, 32 lanes, 4)."""
    rows, row_bytes = codes.shape
    tiles, units = rows // TILE_N, row_bytes // (UNIT_K // 2)
    # tile, high row, g, unit, j, high column, t: a byte is a pair of neighbours in k.
    words = torch.empty(tiles, units, 32, 4, dtype=torch.int32, device=codes.device)
    for part in _chunks(tiles, TILE_N * row_bytes):
        pairs = codes[TILE_N * part.start : TILE_N * part.stop].reshape(-1, 2, 8, units, 4, 2, 4)
        in_order = pairs.permute(0, 3, 2, 6, 4, 5, 1).contiguous().flatten(-2).view(torch.int32)
        words[part] = _move_bits(in_order, _moves(order)).reshape(-1, units, 32, 4)
    return words


def from_words(words: torch.Tensor, order: WordOrder = WordOrder.HALVES) -> torch.Tensor:
    """Inverse of `to_words`. int32 (tiles, units, 32 lanes, 4) -> uint8 (16 tiles, 32 units)."""
    tiles, units = words.shape[:2]
    pairs = _move_bits(words, _moves(order, back=True)).view(torch.uint8).reshape(tiles, units, 8, 4, 4, 2, 2)
    return pairs.permute(0, 6, 2, 1, 4, 5, 3).reshape(TILE_N * tiles, UNIT_K // 2 * units)


@lru_cache
def _moves(order: WordOrder, back: bool = False) -> tuple[tuple[int, int], ...]:
    """(mask, shift to the left) for each distance that bits move, from a word whose byte p is pair p, the even column low."""
    masks: dict[int, int] = {}
    for pair, columns in enumerate(CODE_BITS[order]):
        for column, bits in enumerate(columns):
            for bit, new in enumerate(bits):
                old = 8 * pair + 4 * column + bit
                start, end = (new, old) if back else (old, new)
                masks[end - start] = masks.get(end - start, 0) | 1 << start
    return tuple((mask, shift) for shift, mask in masks.items())


def _move_bits(x: torch.Tensor, moves: tuple[tuple[int, int], ...]) -> torch.Tensor:
    """int32 (...) -> int32 (...). Bit 31 only ever stays, so that no shift meets the sign."""
    moved = torch.zeros_like(x)
    for mask, shift in moves:
        part = x & (mask - (mask >> 31 << 32))
        moved |= part << shift if shift >= 0 else part >> -shift
    return moved


# --- Scales -----------------------------------------------------------------------------------------------------------------


def _prepare_e8m0(q: Quantized, operand: torch.dtype, order: WordOrder) -> PreparedWeight:
    codes, scale_bytes = _padded(q)
    nan_rows = (scale_bytes == scales.E8M0_NAN).any(dim=1)
    return _prepare_in_window(q, codes, scale_bytes, nan_rows, operand, order)


def _prepare_in_window(
    q: Quantized,
    codes: torch.Tensor,
    scale_bytes: torch.Tensor,
    nan_rows: torch.Tensor,
    operand: torch.dtype,
    order: WordOrder,
) -> PreparedWeight:
    """The weight of all blocks within the window below their row's largest scale; the others are its `rest`."""
    is_nan = scale_bytes == scales.E8M0_NAN
    in_use = _blocks_in_use(codes, q.format) & ~is_nan
    base = torch.where(in_use, scale_bytes.short(), -1).amax(dim=1)
    base = torch.where(base < 0, _EMPTY_ROW, base)
    delta = torch.where(in_use, base[:, None] - scale_bytes, 0)
    outside = delta > WINDOWS[operand]
    rest = None
    if outside.any():
        far = _only(codes, outside, q.format)
        far_scales = torch.where(outside, scale_bytes, 0)
        rest = _prepare_in_window(q, far, far_scales, torch.zeros_like(nan_rows), operand, order)
        codes = codes ^ far
    stored = torch.where(is_nan, _NAN, _SAME_SCALE - torch.where(outside, 0, delta)).to(torch.uint8)
    row_scale = scales.e8m0_decode(base.to(torch.uint8)) * 2.0**-_MX_GAIN_BITS
    row_scale /= torch.full((), q.rule.gain, device=codes.device)  # by a number of the CPU it would round twice
    return PreparedWeight(
        to_words(codes, order),
        _to_scale_words(stored, UNIT_K // q.format.block_size),
        row_scale.masked_fill(nan_rows, torch.nan),
        base.to(torch.uint8),
        None,
        q.format,
        q.rule,
        q.hadamard,
        q.codes.shape[0],
        q.k,
        operand,
        rest,
        order,
    )


def _prepare_two_level(q: Quantized, operand: torch.dtype) -> PreparedWeight:
    assert q.tensor_scale is not None
    codes, scale_bytes = _padded(q)
    magnitude = scale_bytes & 0x7F
    if ((scale_bytes > 0x80) & (magnitude != scales.E4M3_NAN)).any():
        raise ValueError("an NVFP4 scale is negative: the sign belongs to the codes")
    nan_rows = (magnitude == scales.E4M3_NAN).any(dim=1)
    encode_scale = q.tensor_scale.to(codes.device)
    row_scale = torch.full_like(encode_scale, 2.0**-_NV_GAIN_BITS) / encode_scale
    return PreparedWeight(
        to_words(_only(codes, magnitude != 0, q.format)),
        _to_scale_words(_lookup(_e5m3_of_e4m3(), magnitude), UNIT_K // q.format.block_size),
        row_scale.expand(codes.shape[0]).masked_fill(nan_rows, torch.nan),
        None,
        encode_scale,
        q.format,
        q.rule,
        q.hadamard,
        q.codes.shape[0],
        q.k,
        operand,
    )


def _restored(part: PreparedWeight) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes and scale bytes of one weight without its `rest` or padding. -> uint8 (n, k padded / 2), uint8 (n, blocks)."""
    codes = from_words(part.words, part.order)[: part.n, : _padded_k(part) // 2]
    stored = _from_scale_words(part.scales)[: part.n, : _padded_k(part) // part.format.block_size]
    if part.base is None:
        return codes, _lookup(_e4m3_of_e5m3(), stored)
    byte = (part.base[: part.n, None].short() - (_SAME_SCALE - stored.short())).to(torch.uint8)
    unused = scales.e8m0_encode(torch.zeros(()), part.rule).view(torch.uint8).to(codes.device)
    byte = torch.where(_blocks_in_use(codes, part.format), byte, unused)
    return codes, torch.where(stored == _NAN, scales.E8M0_NAN, byte)


def _to_scale_words(stored: torch.Tensor, per_unit: int) -> torch.Tensor:
    """uint8 (16 tiles, per_unit units) -> int32 (tiles, units, 8), or (tiles, units, 8, 2) of 4 blocks a unit."""
    blocks = stored.reshape(stored.shape[0] // TILE_N, 2, 8, -1, per_unit)  # tile, high row, g, unit, block
    words = blocks.permute(0, 3, 2, 4, 1).contiguous().flatten(-2).view(torch.int32)
    return words.squeeze(-1) if per_unit == 2 else words


def _from_scale_words(words: torch.Tensor) -> torch.Tensor:
    """Inverse of `_to_scale_words`."""
    tiles, units = words.shape[:2]
    blocks = words.view(torch.uint8).reshape(tiles, units, 8, -1, 2)
    return blocks.permute(0, 4, 2, 1, 3).reshape(TILE_N * tiles, -1)


def _e5m3_of_e4m3() -> torch.Tensor:
    """Stored byte by the E4M3 byte without its sign. -> uint8 (128,)."""
    byte = torch.arange(128, dtype=torch.uint8)
    mantissa, exponent = torch.frexp(scales.e4m3_decode(byte))  # a value is mantissa * 2**exponent, mantissa in [0.5, 1)
    stored = (exponent - 1 + 22) * 8 + (mantissa * 16 - 8)
    stored = torch.where(byte == 0, 0.0, torch.where(byte == scales.E4M3_NAN, float(_NAN), stored))
    return stored.to(torch.uint8)


def _e4m3_of_e5m3() -> torch.Tensor:
    """Inverse of `_e5m3_of_e4m3`. -> uint8 (256,), 0 for bytes that are never stored."""
    byte = torch.zeros(256, dtype=torch.uint8)
    byte[_e5m3_of_e4m3().long()] = torch.arange(128, dtype=torch.uint8)
    return byte


def _lookup(table: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    return table.to(index.device)[index.int()]


# --- Shapes -----------------------------------------------------------------------------------------------------------------


def _padded_k(q: Quantized | PreparedWeight) -> int:
    """k as `quantize` pads it: to whole blocks, and whole Hadamard blocks."""
    return q.k + -q.k % lcm(q.format.block_size, q.hadamard or 1)


def _padded(q: Quantized) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes and scale bytes of whole tiles and units. -> uint8 (16 tiles, 32 units), uint8 (16 tiles, blocks)."""
    more_rows, more_columns = -q.codes.shape[0] % TILE_N, -q.codes.shape[1] * 2 % UNIT_K
    codes = pad(q.codes, (0, more_columns // 2, 0, more_rows))
    return codes, pad(q.scales.view(torch.uint8), (0, more_columns // q.format.block_size, 0, more_rows))


def _blocks_in_use(codes: torch.Tensor, format: BlockFormat) -> torch.Tensor:
    """Which blocks hold a code that is not a zero. uint8 (rows, k / 2) -> bool (rows, blocks)."""
    blocks = codes.reshape(codes.shape[0], -1, format.block_size // 2).view(torch.int64)
    return ((blocks & 0x7777777777777777) != 0).any(dim=-1)


def _only(codes: torch.Tensor, blocks: torch.Tensor, format: BlockFormat) -> torch.Tensor:
    """Codes of the selected blocks, zeros elsewhere. uint8 (rows, k / 2), bool (rows, blocks) -> uint8 (rows, k / 2)."""
    return torch.where(blocks[..., None], codes.reshape(*blocks.shape, format.block_size // 2), 0).reshape(codes.shape)


def _parts(weight: PreparedWeight | None) -> Iterator[PreparedWeight]:
    while weight is not None:
        yield weight
        weight = weight.rest


def _chunks(tiles: int, tile_bytes: int) -> Iterator[slice]:
    step = max(1, _CHUNK // tile_bytes)
    return (slice(start, min(tiles, start + step)) for start in range(0, tiles, step))


def _describe(tensor: torch.Tensor) -> str:
    contiguous = "contiguous" if tensor.is_contiguous() else "strided"
    return f"{tensor.dtype} {tuple(tensor.shape)}, {contiguous}"
