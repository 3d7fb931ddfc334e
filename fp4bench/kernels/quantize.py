"""x -> FP4 in one pass: block rotation, scales and codes, with the bits of `fp4bench.quantize`; FP8 rows; FP4 as FP8 or BF16.

A thread owns a *run*: 32 or more neighbours along k, whole blocks and whole rotations. So the largest magnitude of a block, the
butterfly and the packing of codes need registers only, and nothing is shared between threads but the way out to memory.

The roundings are those of `fp4bench.quantize`, in its order, on float32. Kernels are compiled without contraction of products
and sums (enable_fp_fusion=False): each fma here is written out, and its product is exact or its single rounding meant.

Of the bandwidth of a copy (4.2 TB/s, NVIDIA H200, torch.neg between buffers beyond L2), bytes read and written, bfloat16 at
m = 16384, k = 8192: MXFP4 0.82, by Hadamard 64 0.62; NVFP4 of a given tensor scale 0.73 and 0.60; FP8 rows 0.94. A value takes
some 16 instructions without a rotation and 22 with (SASS of sm_90a), by count 70 % of what the SMs issue at those rates. FP8
rows of k = 28672 reach 0.64 (m = 4096): 1024 threads of 54 registers, of which one block fits an SM. No profile says more yet.
"""

from dataclasses import dataclass
from math import lcm, prod
from typing import Any

import torch
import triton
import triton.language as tl

from fp4bench.formats import MXFP4, BlockFormat, ScaleRule, layouts
from fp4bench.quantize import Quantized, RowQuantized, check_arguments

# The largest rotation: a run of 128 values is 128 registers of a thread, of at most 255.
MAX_HADAMARD = 128

# E4M3 rows are padded with zeros to whole units of a prepared weight (`fp4bench.kernels.weights`).
_UNIT = 64

# Largest magnitudes that the first kernel of a computed tensor scale leaves to the second one, 4 bytes each.
_MOST_PARTS = 1024

# A row of at most so many values stays in registers between its largest magnitude and its codes; a longer one is read twice.
# Many rows keep the memory busy while one waits, and are better read twice: 4096 rows of 28672 to FP8 take 108 us instead of
# 131 (NVIDIA H200, `baselines/NVIDIA-H200/kernels/2026-11-27_quantize-launches.jsonl`). Of few rows only the first is timed.
_LONGEST_ROW, _LONGEST_OF_MANY, _MANY_ROWS = 32768, 16384, 4096


@dataclass(frozen=True, eq=False)
class BlockedQuantized:
    """A matrix (m, k) in a block format, its scales as tensor cores of Blackwell read them.

    codes: uint8 (m, k padded / 2), as in `Quantized`.
    scales: the format's scale dtype, flat, in the 128x4 blocked layout (`fp4bench.formats.layouts`), padding bytes zero.
    tensor_scale, format, rule, hadamard, k: as in `Quantized`.
    """

    codes: torch.Tensor
    scales: torch.Tensor
    tensor_scale: torch.Tensor | None
    format: BlockFormat
    rule: ScaleRule
    hadamard: int | None
    k: int

    def row_major(self) -> Quantized:
        """The same with its scales in the order of rows."""
        rows, row_bytes = self.codes.shape
        scales = layouts.from_blocked(self.scales, rows, 2 * row_bytes // self.format.block_size)
        return Quantized(self.codes, scales, self.tensor_scale, self.format, self.rule, self.hadamard, self.k)


@dataclass(frozen=True)
class Image:
    """Quantized values in a wider type, rotated where `hadamard` was given: x ~ values / tensor_scale.

    values: bfloat16 (..., k padded). tensor_scale: float32 (), the encode scale of NVFP4, or None.
    """

    values: torch.Tensor
    tensor_scale: torch.Tensor | None


@dataclass(frozen=True)
class Launch:
    """A program's tile: `rows` x `runs` runs of `run` values, a run a thread."""

    rows: int
    runs: int
    run: int

    @property
    def warps(self) -> int:
        return max(1, min(32, self.rows * self.runs // 32))


def launch(m: int, k: int, run: int) -> Launch:
    """The tile for m rows of k values cut into runs: 128 runs, of one row where it has as many; 32 where that fills no GPU."""
    runs = triton.next_power_of_2(triton.cdiv(k, run))
    threads = 128 if m * runs >= 128 * 256 else 32
    columns = min(runs, threads)
    return Launch(threads // columns, columns, run)


def quantize(
    x: torch.Tensor,
    format: BlockFormat,
    *,
    rule: ScaleRule | None = None,
    hadamard: int | None = None,
    tensor_scale: torch.Tensor | float | None = None,
    blocked: bool = False,
    out: Quantized | BlockedQuantized | None = None,
) -> Any:
    """`fp4bench.quantize.quantize` in one pass, with its bits. float32, bfloat16 or float16 (..., k) of a GPU -> Quantized.

    rule, hadamard (to 128), tensor_scale: as there. A computed tensor scale takes a pass over x before, and no synchronization.
    blocked: x (m, k) -> BlockedQuantized.
    out: what `empty` made for these arguments, written and given back; else allocated. Beside it a computed tensor scale takes
    a workspace of at most 4 KiB.
    Raises TypeError and ValueError as `fp4bench.quantize.quantize` does.
    """
    rule = rule or format.default_rule
    out = out or empty(x, format, rule=rule, hadamard=hadamard, tensor_scale=tensor_scale, blocked=blocked)
    _quantize(x, out.codes, out, tensor_scale)
    return out


def empty(
    x: torch.Tensor,
    format: BlockFormat,
    *,
    rule: ScaleRule | None = None,
    hadamard: int | None = None,
    tensor_scale: torch.Tensor | float | None = None,
    blocked: bool = False,
) -> Any:
    """What `quantize` of these arguments returns, not yet written. -> Quantized, or BlockedQuantized where `blocked`."""
    rule = rule or format.default_rule
    _check(x, format, rule, hadamard, tensor_scale)
    if blocked and x.dim() != 2:
        raise ValueError(f"blocked scales are those of a matrix, not of a tensor of shape {tuple(x.shape)}")
    *lead, k = x.shape
    k_padded = _padded(k, format, hadamard)
    columns = k_padded // format.block_size
    shape = [prod(map(int, layouts.padded_shape(lead[0], columns)))] if blocked else [*lead, columns]
    return (BlockedQuantized if blocked else Quantized)(
        torch.empty(*lead, k_padded // 2, dtype=torch.uint8, device=x.device),
        torch.empty(shape, dtype=format.scale_dtype, device=x.device),
        torch.empty((), dtype=torch.float32, device=x.device) if format.has_tensor_scale else None,
        format,
        rule,
        hadamard,
        k,
    )


def fp4_as_bf16(
    x: torch.Tensor,
    format: BlockFormat,
    *,
    rule: ScaleRule | None = None,
    hadamard: int | None = None,
    tensor_scale: torch.Tensor | float | None = None,
    out: Image | None = None,
) -> Image:
    """The values that `quantize` of these arguments stands for, in bfloat16 and exact. float (..., k) -> Image (..., k padded).

    MXFP4: code * 2**e; 2**128, which CEIL reaches at the end of float32, is infinite. NVFP4: code * scale, 2 + 4 significant
    bits of bfloat16's 8, and the encode scale S is left to the epilogue. NaN blocks are NaN.
    Raises ValueError for a rule whose codes hold more than x / scale.
    """
    rule = rule or format.default_rule
    _check(x, format, rule, hadamard, tensor_scale)
    _check_gain(rule)
    if out is None:
        shape = (*x.shape[:-1], _padded(x.shape[-1], format, hadamard))
        s = torch.empty((), dtype=torch.float32, device=x.device) if format.has_tensor_scale else None
        out = Image(torch.empty(shape, dtype=torch.bfloat16, device=x.device), s)
    unscaled = Quantized(out.values, out.values, out.tensor_scale, format, rule, hadamard, x.shape[-1])
    _quantize(x, out.values, unscaled, tensor_scale)
    return out


def quantize_fp8_rows(x: torch.Tensor, *, fragments: bool = False, out: RowQuantized | None = None) -> RowQuantized:
    """`fp4bench.quantize.quantize_fp8_rows` in one pass, with its bits. float (..., k) of a GPU -> RowQuantized.

    fragments: columns in the order of `fp4bench.kernels.weights.E4M3_ORDER`, and k padded to a multiple of 64, with zeros but
    in rows whose scale is NaN.
    out: values and scales to write: float8_e4m3fn (..., k or k padded), float32 (..., 1). The values may be bfloat16, which
        holds every E4M3 value.
    """
    k = x.shape[-1]
    out = out or _empty_rows(x, k + -k % _UNIT if fragments else k)
    _quantize_rows(x, out, MXFP4.default_rule, None, fp4=False, fragments=fragments)
    return out


def fp4_as_e4m3(
    x: torch.Tensor, *, rule: ScaleRule | None = None, hadamard: int | None = None, out: RowQuantized | None = None
) -> RowQuantized:
    """MXFP4 codes of x under the scale of their row, as E4M3 in fragment order. float (..., k) -> RowQuantized (..., k padded).

    With e the exponent of a block and base the largest of the row, a value is code * 2**(6 - (base - e)), and the row's scale
    2**(base - 6): the largest, 6 * 2**6 = 384, is below E4M3's 448. Blocks up to 11 binades below base are exact, those of 12
    to 14 where their codes are multiples of 2**(base - e - 15). What is below is rounded to multiples of 2**-9: it errs by at
    most 2**-10 * 2**(base - 6), which is 2**-18 of the row's largest magnitude (at least 4 * 2**base by the default rule).
    A NaN block makes the scale of its row NaN. k is padded with zeros to a multiple of 64 and of the rotation.
    Raises ValueError for a rule whose codes hold more than x / scale.
    """
    rule = rule or MXFP4.default_rule
    _check(x, MXFP4, rule, hadamard, None)
    _check_gain(rule)
    k = x.shape[-1]
    out = out or _empty_rows(x, k + -k % lcm(_UNIT, hadamard or 1))
    _quantize_rows(x, out, rule, hadamard, fp4=True, fragments=True)
    return out


# --- Launches ---------------------------------------------------------------------------------------------------------------


def _quantize(
    x: torch.Tensor, values: torch.Tensor, q: Quantized | BlockedQuantized, tensor_scale: torch.Tensor | float | None
) -> None:
    """Write `values`, codes or the bfloat16 image, and q's scales (of an image: none) and tensor scale."""
    if not values.numel():
        _set_empty_tensor_scale(q, tensor_scale)
        return
    image, blocked = values.dtype == torch.bfloat16, isinstance(q, BlockedQuantized)
    k, block = x.shape[-1], q.format.block_size
    k_padded = _padded(k, q.format, q.hadamard)
    matrix = _matrix(x)
    m, columns = matrix.shape[0], k_padded // block
    scale_rows, scale_columns = layouts.padded_shape(m, columns) if blocked else (m, columns)
    tile = launch(scale_rows, scale_columns * block, max(32, q.hadamard or 1))
    tiles_across = triton.cdiv(scale_columns * block, tile.runs * tile.run)
    source, parts, given = _encode_scale_source(matrix, q, tensor_scale)
    _quantize_tiles[(triton.cdiv(scale_rows, tile.rows) * tiles_across,)](
        matrix,
        values if image else values.view(torch.int32),
        q.scales.view(torch.uint8),
        q.tensor_scale,
        source,
        parts,
        m,
        k,
        matrix.stride(0),
        k_padded,
        scale_rows,
        scale_columns,
        tiles_across,
        ROWS=tile.rows,
        RUNS=tile.runs,
        RUN=tile.run,
        WIDTH=16 // x.element_size(),
        WHOLE=k % tile.run == 0,
        BLOCK=block,
        RULE=q.rule.value,
        HADAMARD=q.hadamard or 1,
        GIVEN=given,
        BLOCKED=blocked,
        IMAGE=image,
        HAS_CVT=_has_cvt(x.device),
        num_warps=tile.warps,
        enable_fp_fusion=False,
    )


def _encode_scale_source(
    matrix: torch.Tensor, q: Quantized | BlockedQuantized, tensor_scale: torch.Tensor | float | None
) -> tuple[torch.Tensor | float | None, int, str]:
    """What the kernel makes the encode scale of: the source, how many numbers it has, and what they are."""
    if not q.format.has_tensor_scale:
        return None, 0, "none"
    if isinstance(tensor_scale, torch.Tensor):
        return tensor_scale.to(matrix.device, torch.float32), 1, "tensor"
    if tensor_scale is not None:
        return float(tensor_scale), 1, "number"
    m, k = matrix.shape
    tile = launch(m, k, max(32, q.hadamard or 1))
    tiles_across = triton.cdiv(k, tile.runs * tile.run)
    tiles = triton.cdiv(m, tile.rows) * tiles_across
    parts = torch.empty(min(tiles, _MOST_PARTS), dtype=torch.int32, device=matrix.device)
    _largest[(parts.numel(),)](
        matrix,
        parts,
        m,
        k,
        matrix.stride(0),
        tiles,
        tiles_across,
        ROWS=tile.rows,
        RUNS=tile.runs,
        RUN=tile.run,
        WIDTH=16 // matrix.element_size(),
        WHOLE=k % tile.run == 0,
        HADAMARD=q.hadamard or 1,
        num_warps=tile.warps,
        enable_fp_fusion=False,
    )
    return parts, parts.numel(), "largest"


def _quantize_rows(
    x: torch.Tensor, out: RowQuantized, rule: ScaleRule, hadamard: int | None, *, fp4: bool, fragments: bool
) -> None:
    if not out.scales.numel():
        return
    matrix, k, k_out = _matrix(x), x.shape[-1], out.values.shape[-1]
    run, longest = max(32, hadamard or 1), _LONGEST_OF_MANY if matrix.shape[0] >= _MANY_ROWS else _LONGEST_ROW
    runs = triton.next_power_of_2(max(1, triton.cdiv(min(k_out, longest), run)))
    _quantize_row[(matrix.shape[0],)](
        matrix,
        out.values,
        out.scales,
        k,
        matrix.stride(0),
        k_out,
        RUNS=runs,
        RUN=run,
        WIDTH=16 // x.element_size(),
        WHOLE=k % run == 0,
        BLOCK=MXFP4.block_size,
        RULE=rule.value,
        HADAMARD=hadamard or 1,
        FP4=fp4,
        FRAGMENTS=fragments,
        ONCE=k_out <= longest,
        num_warps=max(1, min(32, runs // 32)),
        enable_fp_fusion=False,
    )


def _check(
    x: torch.Tensor, format: BlockFormat, rule: ScaleRule, hadamard: int | None, tensor_scale: torch.Tensor | float | None
) -> None:
    check_arguments(x, format, rule, hadamard, tensor_scale)
    if hadamard is not None and hadamard > MAX_HADAMARD:
        raise ValueError(f"this kernel rotates by at most {MAX_HADAMARD}, not {hadamard}")


def _check_gain(rule: ScaleRule) -> None:
    if rule.gain != 1.0:
        raise ValueError(f"codes by the rule {rule} are {rule.gain:g} times too large for their scale: use another rule")


def _padded(k: int, format: BlockFormat, hadamard: int | None) -> int:
    return k + -k % lcm(format.block_size, hadamard or 1)


def _matrix(x: torch.Tensor) -> torch.Tensor:
    """x as rows, without a copy where its last axis is contiguous and its leading axes are one. (..., k) -> (m, k)."""
    x = x.detach()
    if x.stride(-1) != 1:
        x = x.contiguous()
    return x.reshape(prod(x.shape[:-1]), x.shape[-1])


def _empty_rows(x: torch.Tensor, k: int) -> RowQuantized:
    *lead, _ = x.shape
    return RowQuantized(
        torch.empty(*lead, k, dtype=torch.float8_e4m3fn, device=x.device),
        torch.empty(*lead, 1, dtype=torch.float32, device=x.device),
    )


def _set_empty_tensor_scale(q: Quantized | BlockedQuantized, tensor_scale: torch.Tensor | float | None) -> None:
    if q.tensor_scale is not None:
        q.tensor_scale.copy_(torch.as_tensor(1.0 if tensor_scale is None else tensor_scale).reshape(()))


def _has_cvt(device: torch.device) -> bool:
    """Whether the GPU converts float32 to E2M1 itself: sm_100a and sm_120a."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= (10, 0)


# --- Kernels ----------------------------------------------------------------------------------------------------------------

# float32: 1.5 * 2**22 has a unit of 1/2 in its last place. Added to |v| < 2 it rounds to halves, ties to even; times a power of
# two to halves of that.
_HALVES: tl.constexpr = tl.constexpr(6291456.0)
_CODE_BIAS: tl.constexpr = tl.constexpr((22 << 23) + 0x400000 + 254)
_SIGN: tl.constexpr = tl.constexpr(-0x80000000)
_INF: tl.constexpr = tl.constexpr(0x7F800000)
_FLOAT_MAX: tl.constexpr = tl.constexpr(torch.finfo(torch.float32).max)
_FLOAT_TINY: tl.constexpr = tl.constexpr(torch.finfo(torch.float32).tiny)


@triton.jit(do_not_specialize=["parts", "m", "scale_rows", "scale_columns", "tiles_across"])
def _quantize_tiles(  # type: ignore[no-untyped-def]
    x,
    values,
    scales,
    tensor_scale,
    source,
    parts,
    m,
    k,
    stride,
    k_padded,
    scale_rows,
    scale_columns,
    tiles_across,
    ROWS: tl.constexpr,
    RUNS: tl.constexpr,
    RUN: tl.constexpr,
    WIDTH: tl.constexpr,
    WHOLE: tl.constexpr,
    BLOCK: tl.constexpr,
    RULE: tl.constexpr,
    HADAMARD: tl.constexpr,
    GIVEN: tl.constexpr,
    BLOCKED: tl.constexpr,
    IMAGE: tl.constexpr,
    HAS_CVT: tl.constexpr,
):
    """One tile a program: codes as words of eight, and scales; or the bfloat16 image."""
    tile = tl.program_id(0)
    row, column = _place(tile, tiles_across, ROWS, RUNS, RUN)
    v = _rotated(_runs(x, row, column, m, k, stride, RUN, WIDTH, WHOLE), HADAMARD)
    even, odd = _pairs(v)
    largest = _largest_of_blocks(even, odd, BLOCK)
    if GIVEN != "none":
        s = _encode_scale(source, parts, GIVEN)
        tl.store(tensor_scale, s, mask=tile == 0)
        scale, multiplier = _two_level(largest, s)
    else:
        scale, multiplier = _power_of_two(largest, RULE)
    even, odd = even * _spread(multiplier, even.shape[1]), odd * _spread(multiplier, odd.shape[1])
    if RULE == "qutlass_abs_max":
        even, odd = even * 3.0, odd * 3.0
    row_offset = row.to(tl.int64)[:, None]
    if IMAGE:
        image = _spread(_scale_value(scale, GIVEN), RUN) * _side_by_side(_rounded(even), _rounded(odd), 1)
        offsets = column[:, None] + tl.arange(0, RUN)[None, :]
        inside = (row < m)[:, None] & (offsets < k_padded)
        tl.store(values + row_offset * k_padded + offsets, image.to(tl.bfloat16), mask=inside)
    else:
        words = _words(even, odd, HAS_CVT)
        offsets = (column // 8)[:, None] + tl.arange(0, RUN // 8)[None, :]
        inside = (row < m)[:, None] & (offsets < k_padded // 8)
        tl.store(values + row_offset * (k_padded // 8) + offsets, words, mask=inside)
        block = (column // BLOCK)[:, None] + tl.arange(0, RUN // BLOCK)[None, :]
        if BLOCKED:
            scale = tl.where((row < m)[:, None] & (block < k_padded // BLOCK), scale, 0)
            places = _blocked_places(row_offset, block, scale_columns)
        else:
            places = row_offset * scale_columns + block
        inside = (row < scale_rows)[:, None] & (block < scale_columns)
        tl.store(scales + places, scale.to(tl.uint8), mask=inside)


@triton.jit(do_not_specialize=["m", "tiles", "tiles_across"])
def _largest(  # type: ignore[no-untyped-def]
    x,
    parts,
    m,
    k,
    stride,
    tiles,
    tiles_across,
    ROWS: tl.constexpr,
    RUNS: tl.constexpr,
    RUN: tl.constexpr,
    WIDTH: tl.constexpr,
    WHOLE: tl.constexpr,
    HADAMARD: tl.constexpr,
):
    """The largest magnitude of a program's tiles, as the bits of a float32: NaN is above infinity, infinity above all."""
    largest = tl.zeros((ROWS * RUNS, 1), dtype=tl.int32)
    for tile in range(tl.program_id(0), tiles, tl.num_programs(0)):
        row, column = _place(tile, tiles_across, ROWS, RUNS, RUN)
        even, odd = _pairs(_rotated(_runs(x, row, column, m, k, stride, RUN, WIDTH, WHOLE), HADAMARD))
        largest = tl.maximum(largest, _largest_of_blocks(even, odd, RUN).to(tl.int32, bitcast=True))
    tl.store(parts + tl.program_id(0), tl.max(tl.max(largest, axis=1), axis=0))


@triton.jit
def _quantize_row(  # type: ignore[no-untyped-def]
    x,
    values,
    scales,
    k,
    stride,
    k_out,
    RUNS: tl.constexpr,
    RUN: tl.constexpr,
    WIDTH: tl.constexpr,
    WHOLE: tl.constexpr,
    BLOCK: tl.constexpr,
    RULE: tl.constexpr,
    HADAMARD: tl.constexpr,
    FP4: tl.constexpr,
    FRAGMENTS: tl.constexpr,
    ONCE: tl.constexpr,
):
    """One row a program, to E4M3 under one scale: of FP8, or of its FP4 codes."""
    row = tl.program_id(0) + tl.zeros((RUNS,), dtype=tl.int32)
    column = tl.arange(0, RUNS) * RUN
    if ONCE:
        v = _rotated(_runs(x, row, column, row + 1, k, stride, RUN, WIDTH, WHOLE), HADAMARD)
        top = _top_of_row(v, BLOCK, RULE, FP4)
        _store_row(values, scales, v, top, row, column, k_out, BLOCK, RULE, FP4, FRAGMENTS)
    else:
        top = tl.program_id(0) * 0
        for start in range(0, k, RUNS * RUN):
            v = _rotated(_runs(x, row, start + column, row + 1, k, stride, RUN, WIDTH, WHOLE), HADAMARD)
            top = tl.maximum(top, _top_of_row(v, BLOCK, RULE, FP4))
        for start in range(0, k_out, RUNS * RUN):
            v = _rotated(_runs(x, row, start + column, row + 1, k, stride, RUN, WIDTH, WHOLE), HADAMARD)
            _store_row(values, scales, v, top, row, start + column, k_out, BLOCK, RULE, FP4, FRAGMENTS)


@triton.jit
def _top_of_row(v, BLOCK: tl.constexpr, RULE: tl.constexpr, FP4: tl.constexpr):  # type: ignore[no-untyped-def]
    """What the scale of a row follows from: the largest scale byte of FP4, else the bits of the largest magnitude."""
    even, odd = _pairs(v)
    if FP4:
        of_blocks, _ = _power_of_two(_largest_of_blocks(even, odd, BLOCK), RULE)
    else:
        of_blocks = _largest_of_blocks(even, odd, v.shape[1]).to(tl.int32, bitcast=True)
    return tl.max(tl.max(of_blocks, axis=1), axis=0)


@triton.jit
def _store_row(  # type: ignore[no-untyped-def]
    values,
    scales,
    v,
    top,
    row,
    column,
    k_out,
    BLOCK: tl.constexpr,
    RULE: tl.constexpr,
    FP4: tl.constexpr,
    FRAGMENTS: tl.constexpr,
):
    n: tl.constexpr = v.shape[0]
    width: tl.constexpr = v.shape[1]
    if FP4:
        even, odd = _pairs(v)
        byte, multiplier = _power_of_two(_largest_of_blocks(even, odd, BLOCK), RULE)
        # 2**(6 - (base - e)), 0 where it is below float32's normal numbers.
        lift = (tl.maximum(133 + byte - top, 0) << 23).to(tl.float32, bitcast=True)
        even = _rounded(even * _spread(multiplier, width // 2)) * _spread(lift, width // 2)
        odd = _rounded(odd * _spread(multiplier, width // 2)) * _spread(lift, width // 2)
        y = _side_by_side(even, odd, 1)
        # 2**(base - 133) in two factors: it is a subnormal number where base is below 7.
        half = (top >> 1) + 60
        scale = (half << 23).to(tl.float32, bitcast=True) * ((top - half + 121) << 23).to(tl.float32, bitcast=True)
        scale = tl.where(top == 255, float("nan"), scale)
    else:
        largest = top.to(tl.float32, bitcast=True)
        scale = tl.where(top > _INF, largest, tl.maximum(tl.div_rn(largest, 448.0), _FLOAT_TINY))
        y = _quotient(v, scale)
    if FRAGMENTS:
        # Column 8 h + 2 t + e of 16 goes to 4 t + 2 e + h: E4M3_ORDER.
        y = tl.reshape(tl.permute(tl.reshape(y, (n, width // 16, 2, 8)), (0, 1, 3, 2)), (n, width))
    offsets = column[:, None] + tl.arange(0, width)[None, :]
    place = values + row.to(tl.int64)[:, None] * k_out + offsets
    tl.store(place, y.to(tl.float8e4nv).to(values.dtype.element_ty), mask=offsets < k_out)
    tl.store(scales + tl.program_id(0), scale)


@triton.jit
def _quotient(v, divisor):  # type: ignore[no-untyped-def]
    """v / divisor, correctly rounded, for one divisor >= 2**-126 that is at least |v| / 448 or so.

    A product with the reciprocal and one correction by the remainder (Markstein, IBM J. Res. Dev. 34(1), 1990): three
    operations of full rate. Powers of two keep the remainder of small numbers within float32. By infinity it is 0, or NaN.
    """
    lift = tl.where(divisor < 2.0**-60, 2.0**64, 1.0)
    divisor = tl.where(divisor == float("inf"), 0.0, divisor * lift)
    reciprocal = tl.where(divisor == 0.0, 0.0, tl.div_rn(1.0, divisor))
    v = v * lift
    q = v * reciprocal
    # In this sense of signs -0 stays -0. Triton's -v is 0 - v, which makes it 0.
    return tl.fma(tl.fma(q, divisor, v * -1.0), reciprocal * -1.0, q)


@triton.jit
def _place(tile, tiles_across, ROWS: tl.constexpr, RUNS: tl.constexpr, RUN: tl.constexpr):  # type: ignore[no-untyped-def]
    """Row and first column of each run of a tile. -> int32 (ROWS * RUNS), twice."""
    thread = tl.arange(0, ROWS * RUNS)
    row = (tile // tiles_across) * ROWS + thread // RUNS
    return row, ((tile % tiles_across) * RUNS + thread % RUNS) * RUN


@triton.jit
def _runs(x, row, column, m, k, stride, RUN: tl.constexpr, WIDTH: tl.constexpr, WHOLE: tl.constexpr):  # type: ignore[no-untyped-def]
    """Runs of x as float32, 0 outside of it. -> (N, RUN).

    Loaded in parts of 16 bytes a thread and joined: loaded at once, Triton would deal a run out over threads.
    """
    place = x + (row.to(tl.int64) * stride + column)[:, None] + tl.arange(0, WIDTH)[None, :]
    inside = ((row < m) & (column < k))[:, None]
    parts = ()
    for i in tl.static_range(RUN // WIDTH):
        if not WHOLE:
            inside = (row < m)[:, None] & (column[:, None] + (i * WIDTH + tl.arange(0, WIDTH)[None, :]) < k)
        parts = parts + (tl.load(place + i * WIDTH, mask=inside, other=0.0).to(tl.float32),)
    for _ in tl.static_range(6):
        if len(parts) > 1:
            wider = ()
            for i in tl.static_range(len(parts) // 2):
                wider = wider + (_side_by_side(parts[2 * i], parts[2 * i + 1], parts[0].shape[1]),)
            parts = wider
    return parts[0]  # type: ignore[misc]  # a tuple that has grown


@triton.jit
def _side_by_side(a, b, WIDTH: tl.constexpr):  # type: ignore[no-untyped-def]
    """Columns of a and b in turn, WIDTH of each. (N, W), (N, W) -> (N, 2 W)."""
    shape: tl.constexpr = (a.shape[0], a.shape[1] // WIDTH, WIDTH)
    joined = tl.join(tl.reshape(a, shape), tl.reshape(b, shape))
    return tl.reshape(tl.permute(joined, (0, 1, 3, 2)), (a.shape[0], 2 * a.shape[1]))


@triton.jit
def _pairs(v):  # type: ignore[no-untyped-def]
    """Even and odd columns. (N, W) -> (N, W / 2), twice."""
    return tl.split(tl.reshape(v, (v.shape[0], v.shape[1] // 2, 2)))


@triton.jit
def _rotated(v, SIZE: tl.constexpr):  # type: ignore[no-untyped-def]
    """`fp4bench.hadamard.rotate` in the same order of the same additions. float32 (N, W) -> (N, W)."""
    n: tl.constexpr = v.shape[0]
    width: tl.constexpr = v.shape[1]
    for i in tl.static_range(7):
        if (2 << i) <= SIZE:
            a, b = tl.split(tl.permute(tl.reshape(v, (n, width // (2 << i), 2, 1 << i)), (0, 1, 3, 2)))
            v = tl.reshape(tl.permute(tl.join(a + b, a - b), (0, 1, 3, 2)), (n, width))
    if SIZE > 1:
        v = v * (SIZE**-0.5)
    return v


@triton.jit
def _largest_of_blocks(even, odd, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    """Largest magnitude of each block, NaN if it holds one. float32 (N, W / 2), twice -> (N, W / BLOCK)."""
    blocks: tl.constexpr = 2 * even.shape[1] // BLOCK
    largest = tl.maximum(tl.abs(even), tl.abs(odd), propagate_nan=tl.PropagateNan.ALL)
    for _ in tl.static_range(7):
        if largest.shape[1] > blocks:
            a, b = _pairs(largest)
            largest = tl.maximum(a, b, propagate_nan=tl.PropagateNan.ALL)
    return largest


@triton.jit
def _spread(of_blocks, WIDTH: tl.constexpr):  # type: ignore[no-untyped-def]
    """A number of each block for each of its columns. (N, B) -> (N, WIDTH)."""
    shape: tl.constexpr = (of_blocks.shape[0], of_blocks.shape[1], WIDTH // of_blocks.shape[1])
    return tl.reshape(tl.broadcast_to(of_blocks[:, :, None], shape), (of_blocks.shape[0], WIDTH))


@triton.jit
def _power_of_two(largest, RULE: tl.constexpr):  # type: ignore[no-untyped-def]
    """`scales.e8m0_encode` and `e8m0_decode_inverse`. float32 -> int32 scale bytes, and what elements are multiplied by."""
    bits = largest.to(tl.int32, bitcast=True)
    if RULE == "floor":
        byte = (bits >> 23) - 2
    elif RULE == "ceil":
        byte = ((bits + 0x7FFFFF) >> 23) - 2
    elif RULE == "even":
        byte = ((bits + (1 << 21)) >> 23) - 2
    elif RULE == "rceil":
        sixth = (largest * (1.0 / 6.0)).to(tl.int32, bitcast=True)
        # A subnormal is mantissa * 2**-149: up to 2**-127 (mantissa 0x400000) it is byte 0, above it byte 1.
        byte = tl.where(sixth < 0x800000, tl.where(sixth > 0x400000, 1, 0), (sixth + 0x7FFFFF) >> 23)
    else:
        tl.static_assert(RULE == "qutlass_abs_max")
        byte = (largest + 1e-8).to(tl.int32, bitcast=True) >> 23
    byte = tl.where(bits < _INF, tl.minimum(tl.maximum(byte, 0), 254), 255)
    # 2**-127 is a subnormal number.
    inverse = tl.where(byte < 254, (254 - byte) << 23, 0x400000).to(tl.float32, bitcast=True)
    return byte, inverse


@triton.jit
def _two_level(largest, s):  # type: ignore[no-untyped-def]
    """NVFP4's block scales under the encode scale s. float32 -> int32 scale bytes, and what elements are multiplied by."""
    wanted = tl.minimum(largest * (s * (1.0 / 6.0)), 448.0)
    scale = wanted.to(tl.float8e4nv)
    multiplier = tl.minimum(tl.div_rn(1.0, scale.to(tl.float32) * tl.div_rn(1.0, s)), _FLOAT_MAX)
    finite = largest.to(tl.int32, bitcast=True) < _INF
    return tl.where(finite, scale.to(tl.uint8, bitcast=True).to(tl.int32), 0x7F), multiplier


@triton.jit
def _encode_scale(source, parts, GIVEN: tl.constexpr):  # type: ignore[no-untyped-def]
    """NVFP4's encode scale: the given one, or 2688 over the largest magnitude, 1 where that is 0 or not finite."""
    if GIVEN == "number":
        s = source
    elif GIVEN == "tensor":
        s = tl.load(source)
    else:
        part = tl.arange(0, 1024)
        bits = tl.max(tl.load(source + part, mask=part < parts, other=0), axis=0)
        s = tl.minimum(tl.div_rn(2688.0, bits.to(tl.float32, bitcast=True)), _FLOAT_MAX)
        s = tl.where((bits > 0) & (bits < _INF), s, 1.0)
    return s


@triton.jit
def _scale_value(byte, GIVEN: tl.constexpr):  # type: ignore[no-untyped-def]
    """Values of scale bytes. int32 -> float32."""
    if GIVEN != "none":
        value = byte.to(tl.uint8).to(tl.float8e4nv, bitcast=True).to(tl.float32)
    else:
        bits = tl.where(byte == 0, 0x400000, byte << 23)
        value = tl.where(byte == 255, 0x7FC00000, bits).to(tl.float32, bitcast=True)
    return value


@triton.jit
def _clamped(v):  # type: ignore[no-untyped-def]
    """|v| up to 6, and the power of two that its code steps by halves of: the exponent of |v|, at least 1."""
    magnitude = tl.minimum(tl.abs(v), 6.0)
    return magnitude, tl.maximum(magnitude.to(tl.int32, bitcast=True) & 0x7F800000, 0x3F800000)


@triton.jit
def _biased_codes(v):  # type: ignore[no-untyped-def]
    """E2M1 codes of float32 values as `e2m1.encode` rounds them, plus _CODE_BIAS. float32 -> int32.

    With the power of two p a sum p * 1.5 * 2**22 + |v| ends in the number of halves of p, rounded to even; a code is that plus
    twice the exponent of p. A negative v gets 4 p, which is 8 halves, more: the sign bit.
    """
    magnitude, p = _clamped(v)
    two = ((v.to(tl.int32, bitcast=True) & _SIGN) | 0x40000000).to(tl.float32, bitcast=True)
    total = tl.fma(p.to(tl.float32, bitcast=True), (_HALVES + 2.0) - two, magnitude)
    return total.to(tl.int32, bitcast=True) - (p >> 22) * ((1 << 22) - 1)


@triton.jit
def _rounded(v):  # type: ignore[no-untyped-def]
    """Values of the E2M1 codes of v. float32 -> float32."""
    magnitude, p = _clamped(v)
    p = p.to(tl.float32, bitcast=True)
    rounded = tl.fma(p, -_HALVES, tl.fma(p, _HALVES, magnitude)).to(tl.int32, bitcast=True)
    return (rounded | (v.to(tl.int32, bitcast=True) & _SIGN)).to(tl.float32, bitcast=True)


@triton.jit
def _words(even, odd, HAS_CVT: tl.constexpr):  # type: ignore[no-untyped-def]
    """Eight codes a word, the first in the lowest bits. float32 (N, W / 2), twice -> int32 (N, W / 8)."""
    if HAS_CVT:
        pairs = tl.inline_asm_elementwise(
            "{ .reg .b8 pair; cvt.rn.satfinite.e2m1x2.f32 pair, $2, $1; cvt.u32.u8 $0, pair; }",
            "=r,f,f",
            [even, odd],
            dtype=tl.int32,
            is_pure=True,
            pack=1,
        )
    else:
        pairs = _biased_codes(even) + 16 * _biased_codes(odd)
    a, b = _pairs(pairs)
    a, b = _pairs(a + 256 * b)
    words = a + 65536 * b
    if not HAS_CVT:
        # Eight biases, modulo 2**32.
        words = words - ((_CODE_BIAS * 0x11111111 + 0x80000000) % (1 << 32) - 0x80000000)
    return words


@triton.jit
def _blocked_places(row, column, columns):  # type: ignore[no-untyped-def]
    """Offsets of scales in the 128x4 blocked layout of `columns` padded columns."""
    tile = (row // 128) * (columns // 4) + column // 4
    return tile * 512 + (row % 32) * 16 + (row % 128 // 32) * 4 + column % 4
