"""x -> FP4 on any GPU, and what its codes stand for, in one pass: a thread rotates, scales and rounds runs of its own.

Of the bandwidth of a copy (4.1 TB/s, NVIDIA H200), bytes read and written, bfloat16 at m = 16384, k = 8192: MXFP4 0.82, by
Hadamard 64 0.62; NVFP4 of a given tensor scale 0.73. A value takes some 16 instructions without a rotation and 22 with (SASS of
sm_90a), which is most of what the SMs issue in that time: `mxfp4_lanes` does with fewer.
"""

import triton
import triton.language as tl

from fp4bench.kernels.overlap import begin
from fp4bench.kernels.rounding import encode_scale, packed, power_of_two, rounded, scale_value, two_level
from fp4bench.kernels.runs import (
    blocked_places,
    largest_of_blocks,
    load_runs,
    pairs,
    rotated,
    runs_of_tile,
    side_by_side,
    spread,
)


@triton.jit(do_not_specialize=["parts", "m", "scale_rows", "scale_columns", "tiles_across"])
def quantize_tiles(  # type: ignore[no-untyped-def]
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
    PDL: tl.constexpr,
):
    """One tile a program: codes as words of eight, and scales; or the bfloat16 image."""
    if PDL:
        begin()
    tile = tl.program_id(0)
    row, column = runs_of_tile(tile, tiles_across, ROWS, RUNS, RUN)
    v = rotated(load_runs(x, row, column, m, k, stride, RUN, WIDTH, WHOLE), HADAMARD)
    even, odd = pairs(v)
    largest = largest_of_blocks(even, odd, BLOCK)
    if GIVEN != "none":
        s = encode_scale(source, parts, GIVEN)
        tl.store(tensor_scale, s, mask=tile == 0)
        scale, multiplier = two_level(largest, s)
    else:
        scale, multiplier = power_of_two(largest, RULE)
    even, odd = even * spread(multiplier, even.shape[1]), odd * spread(multiplier, odd.shape[1])
    if RULE == "qutlass_abs_max":
        even, odd = even * 3.0, odd * 3.0
    row_offset = row.to(tl.int64)[:, None]
    if IMAGE:
        image = spread(scale_value(scale, GIVEN), RUN) * side_by_side(rounded(even), rounded(odd), 1)
        offsets = column[:, None] + tl.arange(0, RUN)[None, :]
        inside = (row < m)[:, None] & (offsets < k_padded)
        tl.store(values + row_offset * k_padded + offsets, image.to(tl.bfloat16), mask=inside)
    else:
        words = packed(even, odd, HAS_CVT)
        offsets = (column // 8)[:, None] + tl.arange(0, RUN // 8)[None, :]
        inside = (row < m)[:, None] & (offsets < k_padded // 8)
        tl.store(values + row_offset * (k_padded // 8) + offsets, words, mask=inside)
        block = (column // BLOCK)[:, None] + tl.arange(0, RUN // BLOCK)[None, :]
        if BLOCKED:
            scale = tl.where((row < m)[:, None] & (block < k_padded // BLOCK), scale, 0)
            places = blocked_places(row_offset, block, scale_columns)
        else:
            places = row_offset * scale_columns + block
        inside = (row < scale_rows)[:, None] & (block < scale_columns)
        tl.store(scales + places, scale.to(tl.uint8), mask=inside)


@triton.jit(do_not_specialize=["m", "tiles", "tiles_across"])
def largest_of_tiles(  # type: ignore[no-untyped-def]
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
    PDL: tl.constexpr,
):
    """The largest magnitude of a program's tiles, as the bits of a float32: NaN is above infinity, infinity above all."""
    if PDL:
        begin()
    largest = tl.zeros((ROWS * RUNS, 1), dtype=tl.int32)
    for tile in range(tl.program_id(0), tiles, tl.num_programs(0)):
        row, column = runs_of_tile(tile, tiles_across, ROWS, RUNS, RUN)
        even, odd = pairs(rotated(load_runs(x, row, column, m, k, stride, RUN, WIDTH, WHOLE), HADAMARD))
        largest = tl.maximum(largest, largest_of_blocks(even, odd, RUN).to(tl.int32, bitcast=True))
    tl.store(parts + tl.program_id(0), tl.max(tl.max(largest, axis=1), axis=0))
