"""The second product of a MoE layer for a few tokens an expert where its k is short, as that of experts cut for many GPUs is.

`grouped` gives a CTA a few tiles of 16 rows, and shares their k among its warps. With four units of k that is 8 KB of weights
a CTA, hardly more than it takes to find out which: DeepSeek-R1 at TP 8 reads them at half of the memory's bandwidth (k = 256,
m = 64: 116 us for 228 MB, `baselines/NVIDIA-H200/moe/2026-11-27_deepseek-r1-tp8.json`). Here a warp holds its block's x for all
of k in registers, and walks along a strip of tiles, the next ones of which are on their way. It has all of k, so sums meet
nowhere, and they are stored as the tensor cores leave them. That takes 70 us
(`20261127T173902-deepseek-r1-tp8.jsonl`, same folder).
"""

from dataclasses import dataclass
from math import ceil

import torch
from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from fp4bench.kernels.experts import PreparedExperts
from fp4bench.kernels.grouped import check_down, load_x, multiply, rows_of_x
from fp4bench.kernels.overlap import LAUNCH, WAIT
from fp4bench.kernels.weights import UNIT_K

# Units of 64 columns times rows of a block, which is how many registers of a thread hold x. 64 more hold weights.
MOST_X = 64


@dataclass(frozen=True)
class ShortConfig:
    """How to launch. Right for any product whose k is as short as `fits` says.

    block: the most pairs of a block, 8 or 16. strip: tiles of 16 weight rows that a warp computes one after another.
    ahead: tiles that are on their way while one is computed. warps: of a CTA, 4 or 8, each with tiles of its own.
    """

    block: int = 8
    strip: int = 7
    ahead: int = 1
    warps: int = 4

    def __post_init__(self) -> None:
        if self.block not in (8, 16) or self.ahead not in (1, 2, 3) or self.strip < self.ahead or self.warps not in (4, 8):
            raise ValueError(f"{self}: block is 8 or 16, ahead 1 to 3 and no more than strip, warps 4 or 8")


def fits(k: int, block: int) -> bool:
    """Whether the registers of a warp hold x of all of k, for blocks of so many pairs."""
    return ceil(k / UNIT_K) * block <= MOST_X


def down(
    x: torch.Tensor,
    weight: PreparedExperts,
    positions: torch.Tensor,
    blocks: torch.Tensor,
    out: torch.Tensor,
    *,
    config: ShortConfig,
    bias: torch.Tensor | None = None,
    pdl: bool = False,
) -> None:
    """out[pair at a position] = x[position] weight^T + bias, rounded once: `grouped.down`, whose arguments these are.

    Raises ValueError for what that raises it for, and for a k that is too long.
    """
    check_down(x, weight, positions, blocks, out, config.block, bias)
    if not fits(weight.k, config.block):
        raise ValueError(f"x of {weight.k} columns and {config.block} rows takes more than {MOST_X} registers")
    if not blocks.shape[0]:
        return
    _short[(ceil(weight.tiles / (config.strip * config.warps)), blocks.shape[0])](
        x,
        positions,
        blocks,
        weight.words,
        weight.scales,
        weight.row_scale,
        weight.row_scale if bias is None else bias,
        out,
        weight.n,
        x.shape[1],
        weight.tiles,
        x.stride(0),
        out.stride(0),
        UNITS=weight.units,
        STRIP=config.strip,
        AHEAD=config.ahead,
        WARPS=config.warps,
        BLOCK=config.block,
        TWO_LEVEL=weight.format.has_tensor_scale,
        HAS_BIAS=bias is not None,
        num_warps=config.warps,
        launch_pdl=pdl,
    )


@gluon.jit(do_not_specialize=["columns", "k", "tiles"])
def _short(
    x,
    positions,
    blocks,
    words,
    scales,
    row_scale,
    bias,
    out,
    columns,
    k,
    tiles,
    x_stride,
    out_stride,
    UNITS: gl.constexpr,
    STRIP: gl.constexpr,
    AHEAD: gl.constexpr,
    WARPS: gl.constexpr,
    BLOCK: gl.constexpr,
    TWO_LEVEL: gl.constexpr,
    HAS_BIAS: gl.constexpr,
):  # type: ignore[no-untyped-def]
    # Four registers a thread: a lane's words of a unit, its x of 32 columns, or its sums.
    FOUR: gl.constexpr = gl.BlockedLayout([1, 4], [32, 1], [WARPS, 1], [1, 0])
    thread = gl.arange(0, 32 * WARPS, layout=gl.SliceLayout(1, FOUR))
    lane = thread % 32
    four = gl.arange(0, 4, layout=gl.SliceLayout(0, FOUR))[None, :]
    block = blocks + gl.program_id(1) * 4
    # The kernel before has waited for the one that wrote the blocks. Past the L1, which may remember those of an earlier call.
    expert = gl.load(block, cache_modifier=".cg")
    at = gl.load(block + 1, cache_modifier=".cg")
    pairs = gl.load(block + 2, cache_modifier=".cg")
    if pairs > 0:
        of_expert = expert.to(gl.int64) * tiles
        PER_G: gl.constexpr = 2 if TWO_LEVEL else 1
        weights = (
            words + of_expert * (UNITS * 128) + (lane * 4)[:, None] + four,
            scales + of_expert * (UNITS * 8 * PER_G) + lane // 4 * PER_G + lane % 4 * PER_G // 4,
            row_scale + of_expert * 16 + lane // 4,
            bias + of_expert * 16 + lane // 4,
            gl.program_id(0) * (STRIP * WARPS) + thread // 32,  # the warp's first tile; the next is WARPS further
            tiles,
        )
        queue = ()  # type: ignore[var-annotated]
        for i in gl.static_range(AHEAD):
            queue = queue + _load_tile(weights, i, UNITS, WARPS, TWO_LEVEL, HAS_BIAS)
        # Everything above is the weight's. x is of the kernel before.
        gl.inline_asm_elementwise(WAIT, "=r,r,~{memory}", [thread], dtype=gl.int32, is_pure=False, pack=1)
        gl.inline_asm_elementwise(LAUNCH, "=r,r,~{memory}", [thread], dtype=gl.int32, is_pure=False, pack=1)
        source = (x, x_stride, k, positions, at, pairs)
        results = (out, out_stride, columns)
        # The narrowest product that holds the block's pairs.
        for width in gl.static_range(8, BLOCK + 1, 8):
            if (pairs > width - 8) & (pairs <= width):
                _walk(queue, weights, source, results, lane, UNITS, STRIP, AHEAD, WARPS, width, TWO_LEVEL, HAS_BIAS, FOUR)
    else:
        # So that no kernel after this one is ahead of the one before.
        gl.inline_asm_elementwise(WAIT, "=r,r,~{memory}", [thread], dtype=gl.int32, is_pure=False, pack=1)


@gluon.jit
def _load_tile(weights, step, UNITS: gl.constexpr, WARPS: gl.constexpr, TWO_LEVEL: gl.constexpr, HAS_BIAS: gl.constexpr):  # type: ignore[no-untyped-def]
    """The warp's tile of a step, one that is there where it has none: for each unit int32 [threads, 4], the lane's words, and
    int32 [threads], the scales of rows g and g + 8; then float32 [threads], the scales of these rows, and their bias, if any.
    """
    words_at, scales_at, row_scale_at, bias_at, first, tiles = weights
    PER_UNIT: gl.constexpr = 16 if TWO_LEVEL else 8
    tile = gl.minimum(first + step * WARPS, tiles - 1)
    loaded = ()  # type: ignore[var-annotated]
    for unit in gl.static_range(UNITS):
        w = gl.load(words_at + (tile * (UNITS * 128) + unit * 128)[:, None], eviction_policy="evict_first")
        s = gl.load(scales_at + tile * (UNITS * PER_UNIT) + unit * PER_UNIT)
        loaded = loaded + (w, s)
    loaded = loaded + (gl.load(row_scale_at + tile * 16), gl.load(row_scale_at + tile * 16 + 8))
    if HAS_BIAS:
        loaded = loaded + (gl.load(bias_at + tile * 16), gl.load(bias_at + tile * 16 + 8))
    return loaded


@gluon.jit
def _walk(
    queue,
    weights,
    source,
    results,
    lane,
    UNITS: gl.constexpr,
    STRIP: gl.constexpr,
    AHEAD: gl.constexpr,
    WARPS: gl.constexpr,
    COLUMNS: gl.constexpr,
    TWO_LEVEL: gl.constexpr,
    HAS_BIAS: gl.constexpr,
    FOUR: gl.constexpr,
):  # type: ignore[no-untyped-def]
    """A block of up to COLUMNS pairs by the warp's tiles."""
    x, x_stride, k, positions, at, pairs = source
    out, out_stride, columns = results
    first = weights[4]
    OF_A_TILE: gl.constexpr = len(queue) // AHEAD
    HALF: gl.constexpr = x.dtype.element_ty == gl.float16
    of_x = rows_of_x(x, x_stride, 0, positions, at, pairs, lane, COLUMNS)
    b = ()  # type: ignore[var-annotated]
    for unit in gl.static_range(UNITS):
        b = b + load_x(of_x, pairs, unit, lane, lane * 0, k, UNITS, 1, COLUMNS, True, True, FOUR)
    four = gl.arange(0, 4, layout=gl.SliceLayout(0, FOUR))[None, :]
    rows = ()  # type: ignore[var-annotated]
    stored = ()  # type: ignore[var-annotated]
    for i in gl.static_range(COLUMNS // 8):
        column = (8 * i + lane % 4 * 2)[:, None] + four % 2
        there = column < pairs
        pair = gl.load(positions + at + column, mask=there, other=0, cache_modifier=".cg")
        rows = rows + (out + pair.to(gl.int64) * out_stride,)
        stored = stored + (there,)
    sinks = (rows, stored, (first * 16 + lane // 4)[:, None] + four // 2 * 8, columns, four)
    for step in range(0, STRIP - AHEAD):
        queue = queue + _load_tile(weights, step + AHEAD, UNITS, WARPS, TWO_LEVEL, HAS_BIAS)
        _tile(queue, b, sinks, step, UNITS, WARPS, COLUMNS, TWO_LEVEL, HAS_BIAS, HALF, FOUR)
        queue = queue[OF_A_TILE:]
    for i in gl.static_range(AHEAD):
        _tile(queue[i * OF_A_TILE :], b, sinks, STRIP - AHEAD + i, UNITS, WARPS, COLUMNS, TWO_LEVEL, HAS_BIAS, HALF, FOUR)


@gluon.jit
def _tile(
    loaded,
    b,
    sinks,
    step,
    UNITS: gl.constexpr,
    WARPS: gl.constexpr,
    COLUMNS: gl.constexpr,
    TWO_LEVEL: gl.constexpr,
    HAS_BIAS: gl.constexpr,
    HALF: gl.constexpr,
    FOUR: gl.constexpr,
):  # type: ignore[no-untyped-def]
    """The first tile of `loaded` by all of x, stored. A thread has rows g and g + 8, and two columns of each 8."""
    out_rows, stored, row, columns, four = sinks
    acc = ()  # type: ignore[var-annotated]
    for _ in gl.static_range(COLUMNS // 8):
        acc = acc + (gl.zeros([32 * WARPS, 4], gl.float32, FOUR),)
    for unit in gl.static_range(UNITS):
        of_unit = b[unit * (COLUMNS // 4) : (unit + 1) * (COLUMNS // 4)]
        acc = multiply(loaded[2 * unit : 2 * unit + 2], of_unit, acc, 1, COLUMNS, TWO_LEVEL, HALF)
    scale = gl.where(four < 2, loaded[2 * UNITS][:, None], loaded[2 * UNITS + 1][:, None])
    row = row + step * (WARPS * 16)
    for i in gl.static_range(COLUMNS // 8):
        y = acc[i] * scale
        if HAS_BIAS:
            y = y + gl.where(four < 2, loaded[2 * UNITS + 2][:, None], loaded[2 * UNITS + 3][:, None])
        gl.store(out_rows[i] + row, y.to(out_rows[i].dtype.element_ty), mask=stored[i] & (row < columns))
