"""x -> E4M3 with a scale for each row: FP8, or FP4's codes under the largest scale of their row."""

from enum import Enum

import triton
import triton.language as tl

from fp4bench.kernels.overlap import begin
from fp4bench.kernels.rounding import FLOAT_TINY, INF, power_of_two, rounded
from fp4bench.kernels.runs import largest_of_blocks, load_runs, pairs, rotated, side_by_side, spread


class Columns(Enum):
    """The order that the columns of a quantized row are stored in: as they come; each 16 in the order of the tensor cores'
    fragments, `weights.E4M3_ORDER`; or each 32 in that of `experts.COLUMNS` first.
    """

    NATURAL = "natural"
    FRAGMENTS = "fragments"
    EXPERTS = "experts"


@triton.jit
def quantize_row(  # type: ignore[no-untyped-def]
    x,
    values,
    scales,
    k,
    stride,
    k_out,
    RUNS: tl.constexpr,
    READ_RUNS: tl.constexpr,
    RUN: tl.constexpr,
    WIDTH: tl.constexpr,
    WHOLE: tl.constexpr,
    BLOCK: tl.constexpr,
    RULE: tl.constexpr,
    HADAMARD: tl.constexpr,
    FP4: tl.constexpr,
    COLUMNS: tl.constexpr,
    ONCE: tl.constexpr,
    PDL: tl.constexpr,
):
    """One row a program, to E4M3 under one scale: of FP8, or of its FP4 codes.

    ONCE: the row stays in registers between its largest magnitude and its codes. Else it is read twice, READ_RUNS and then RUNS
    runs at a time. The first reading keeps no float32 (ptxas takes the largest of bfloat16 pairs), the second finds most of the
    row in the L1: so more rows are on their way.
    """
    if PDL:
        begin()
    column = tl.arange(0, RUNS) * RUN
    row = tl.program_id(0) + tl.zeros((RUNS,), dtype=tl.int32)
    if ONCE:
        v = rotated(load_runs(x, row, column, row + 1, k, stride, RUN, WIDTH, WHOLE), HADAMARD)
        top = _top_of_row(v, BLOCK, RULE, FP4)
        _store_row(values, scales, v, top, row, column, k_out, BLOCK, RULE, FP4, COLUMNS)
    else:
        top = tl.program_id(0) * 0
        read_row = tl.program_id(0) + tl.zeros((READ_RUNS,), dtype=tl.int32)
        for start in range(0, k, READ_RUNS * RUN):
            read_column = start + tl.arange(0, READ_RUNS) * RUN
            v = rotated(load_runs(x, read_row, read_column, read_row + 1, k, stride, RUN, WIDTH, WHOLE), HADAMARD)
            top = tl.maximum(top, _top_of_row(v, BLOCK, RULE, FP4))
        for start in range(0, k_out, RUNS * RUN):
            v = rotated(load_runs(x, row, start + column, row + 1, k, stride, RUN, WIDTH, WHOLE), HADAMARD)
            _store_row(values, scales, v, top, row, start + column, k_out, BLOCK, RULE, FP4, COLUMNS)


@triton.jit
def _top_of_row(v, BLOCK: tl.constexpr, RULE: tl.constexpr, FP4: tl.constexpr):  # type: ignore[no-untyped-def]
    """What the scale of a row follows from: the largest scale byte of FP4, else the bits of the largest magnitude."""
    even, odd = pairs(v)
    if FP4:
        of_blocks, _ = power_of_two(largest_of_blocks(even, odd, BLOCK), RULE)
    else:
        of_blocks = largest_of_blocks(even, odd, v.shape[1]).to(tl.int32, bitcast=True)
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
    COLUMNS: tl.constexpr,
):
    n: tl.constexpr = v.shape[0]
    width: tl.constexpr = v.shape[1]
    if FP4:
        even, odd = pairs(v)
        byte, multiplier = power_of_two(largest_of_blocks(even, odd, BLOCK), RULE)
        # 2**(6 - (base - e)), 0 where it is below float32's normal numbers.
        lift = (tl.maximum(133 + byte - top, 0) << 23).to(tl.float32, bitcast=True)
        even = rounded(even * spread(multiplier, width // 2)) * spread(lift, width // 2)
        odd = rounded(odd * spread(multiplier, width // 2)) * spread(lift, width // 2)
        y = side_by_side(even, odd, 1)
        # 2**(base - 133) in two factors: it is a subnormal number where base is below 7.
        half = (top >> 1) + 60
        scale = (half << 23).to(tl.float32, bitcast=True) * ((top - half + 121) << 23).to(tl.float32, bitcast=True)
        scale = tl.where(top == 255, float("nan"), scale)
    else:
        largest = top.to(tl.float32, bitcast=True)
        scale = tl.where(top > INF, largest, tl.maximum(tl.div_rn(largest, 448.0), FLOAT_TINY))
        y = _quotient(v, scale)
    if COLUMNS == "fragments":
        # Column 8 h + 2 t + e of 16 goes to 4 t + 2 e + h: E4M3_ORDER.
        y = tl.reshape(tl.permute(tl.reshape(y, (n, width // 16, 2, 8)), (0, 1, 3, 2)), (n, width))
    if COLUMNS == "experts":
        # Column 8 t + 4 j + 2 h + e of 32 goes to 16 j + 4 t + 2 e + h.
        y = tl.permute(tl.reshape(y, (n, width // 32, 4, 2, 2, 2)), (0, 1, 3, 2, 5, 4))
        y = tl.reshape(y, (n, width))
    offsets = column[:, None] + tl.arange(0, width)[None, :]
    at = values + row.to(tl.int64)[:, None] * k_out + offsets
    tl.store(at, y.to(tl.float8e4nv), mask=offsets < k_out)
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
