"""Products of a MoE layer for a few tokens an expert: each block of up to 32 pairs (`routing`) times its expert's FP4 weight.

At these sizes the time is that of reading each used expert once, and the kernel is `decode`'s for each block: weights go from
memory into the registers of `mma.sync` in the order they are stored, the warps of a CTA split k, and their sums meet in shared
memory in a fixed order. A CTA computes one block by a few tiles; those of blocks that are not there leave at once.

The first product gathers its rows of x by the order of pairs, and applies the gated activation to sums in float32 before they
are rounded: rows g and g + 8 of a tile are a gate and what it gates (`experts`). Its rows stay in the order of the pairs. The
second product reads them as they stand and stores each where its pair belongs.
"""

from dataclasses import dataclass
from math import ceil

import torch
from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from fp4bench.kernels import fragments
from fp4bench.kernels.experts import PreparedExperts
from fp4bench.kernels.overlap import LAUNCH, WAIT
from fp4bench.kernels.routing import BLOCK_FIELDS, most_blocks
from fp4bench.kernels.weights import UNIT_K, WordOrder
from fp4bench.models import Activation

ACTIVATIONS = ("silu", "swiglu")  # of `fp4bench.models.Activation`


@dataclass(frozen=True)
class GroupedConfig:
    """How to launch. Any is right for any problem.

    block: the most pairs of a block, a multiple of 8 up to 32. Smaller blocks are multiplied as the next multiple of 8.
    tiles: of 16 weight rows, that a CTA computes, 1 to 8. Each warp holds one unit of 64 columns of each in registers.
    warps: of a CTA, 4 or 8. split: how many of them share k, a power of two, None for all; the others have tiles of their own,
        so that `tiles` are those of each. For a k of few units, where a warp of many would have next to nothing to do.
    ahead: hold x of the next unit while one is computed.
    depth: units of each tile that are on their way or computed, and with more than one of them, of x. For few CTAs, whose bytes
        on the way are not what the memory's latency takes; not with `ahead`.
    max_registers: of a thread, None for the compiler's choice.
    """

    block: int = 8
    tiles: int = 4
    warps: int = 4
    split: int | None = None
    ahead: bool = False
    max_registers: int | None = None
    depth: int = 1

    def __post_init__(self) -> None:
        if self.block not in (8, 16, 24, 32) or not 1 <= self.tiles <= 8 or self.warps not in (4, 8):
            raise ValueError(f"{self}: block is 8, 16, 24 or 32, tiles is 1 to 8, warps 4 or 8")
        if self.split is not None and self.warps % self.split:
            raise ValueError(f"{self}: split divides warps")
        if self.depth < 1 or (self.depth > 1 and self.ahead):
            raise ValueError(f"{self}: depth is at least 1, and 1 with ahead")


def activation_arguments(activation: Activation | None) -> tuple[str, float, float]:
    """-> the kernels' name of an activation ("" of none), alpha and limit. Raises ValueError for one that they have not."""
    if activation is None:
        return "", 1.0, 1.0
    if activation.name not in ACTIVATIONS:
        raise ValueError(f"there is no activation {activation}")
    return activation.name, activation.alpha, torch.finfo(torch.float32).max if activation.limit is None else activation.limit


def padded(k: int) -> int:
    """Columns of a row that is read as k columns: whole units."""
    return -(-k // UNIT_K) * UNIT_K


def gate_up(
    x: torch.Tensor,
    weight: PreparedExperts,
    positions: torch.Tensor,
    blocks: torch.Tensor,
    out: torch.Tensor,
    *,
    topk: int,
    activation: Activation,
    config: GroupedConfig,
    bias: torch.Tensor | None = None,
    pdl: bool = False,
) -> None:
    """out[position] = activation(x[token of the pair there] weight^T + bias), rounded once, for each position of each block.

    x: bfloat16 or float16 (m, k), k even, rows of an even stride. weight: gated. out: x's type (pairs, padded(n / 2)), of which
    the first n / 2 columns are written. bias: float32 (experts, 16 tiles), in the order of the tiles (`experts.gated_rows`).
    positions, blocks: of `routing.order`, with blocks of `config.block`.
    """
    _check_operand(weight)
    if not weight.gated or x.shape[1] != weight.k or out.shape != (positions.shape[0], padded(weight.n // 2)):
        raise ValueError(f"x {tuple(x.shape)} and out {tuple(out.shape)} do not fit gated weights {weight.n, weight.k}")
    if x.shape[1] % 2 or x.stride(0) % 2 or x.data_ptr() % 4 or x.stride(1) != 1:
        raise ValueError("rows of x are contiguous pairs of elements")
    _check_blocks(weight, positions, blocks, config.block, bias)
    _launch(x, weight, positions, blocks, out, weight.n // 2, topk, activation, config, bias, pdl)


def down(
    x: torch.Tensor,
    weight: PreparedExperts,
    positions: torch.Tensor,
    blocks: torch.Tensor,
    out: torch.Tensor,
    *,
    config: GroupedConfig,
    bias: torch.Tensor | None = None,
    pdl: bool = False,
) -> None:
    """out[pair at a position] = x[position] weight^T + bias, rounded once, for each position of each block.

    x: bfloat16 or float16 (pairs, padded(k)), contiguous, zero (or any finite number) from column k on.
    out: x's type or float32 (pairs, n), contiguous. The others as those of `gate_up`.
    """
    check_down(x, weight, positions, blocks, out, config.block, bias)
    _launch(x, weight, positions, blocks, out, weight.n, 0, None, config, bias, pdl)


def check_down(
    x: torch.Tensor,
    weight: PreparedExperts,
    positions: torch.Tensor,
    blocks: torch.Tensor,
    out: torch.Tensor,
    block: int,
    bias: torch.Tensor | None,
) -> None:
    """Raise ValueError for arguments that are none of `down` with blocks of `block`."""
    _check_operand(weight)
    if weight.gated or x.shape != (positions.shape[0], padded(weight.k)) or out.shape != (x.shape[0], weight.n):
        raise ValueError(f"x {tuple(x.shape)} and out {tuple(out.shape)} do not fit weights {weight.n, weight.k}")
    if not x.is_contiguous() or not out.is_contiguous():
        raise ValueError("x and out are contiguous")
    _check_blocks(weight, positions, blocks, block, bias)


def _check_blocks(
    weight: PreparedExperts, positions: torch.Tensor, blocks: torch.Tensor, block: int, bias: torch.Tensor | None
) -> None:
    most = most_blocks(positions.shape[0], weight.experts, block)
    if blocks.shape != (most, BLOCK_FIELDS):
        raise ValueError(f"{positions.shape[0]} pairs make up to {most} blocks of {block}, not {blocks.shape[0]}")
    if bias is not None and (bias.shape != weight.row_scale.shape or bias.dtype != torch.float32 or not bias.is_contiguous()):
        raise ValueError(f"bias is float32 {tuple(weight.row_scale.shape)}, contiguous")


def _check_operand(weight: PreparedExperts) -> None:
    if weight.order is not WordOrder.HALVES:
        raise ValueError(f"weights prepared for {weight.operand} are for grouped_prefill alone")


def _launch(
    x: torch.Tensor,
    weight: PreparedExperts,
    positions: torch.Tensor,
    blocks: torch.Tensor,
    out: torch.Tensor,
    columns: int,
    topk: int,
    activation: Activation | None,
    config: GroupedConfig,
    bias: torch.Tensor | None,
    pdl: bool,
) -> None:
    if not blocks.shape[0]:
        return
    k = x.shape[1]
    split = config.split or config.warps
    if weight.tiles * split < config.warps:  # fewer tiles than there would be groups of warps
        split = config.warps
    groups = config.warps // split
    tiles = min(config.tiles, weight.tiles // groups)
    steps = ceil(weight.units / split)
    name, alpha, limit = activation_arguments(activation)
    _grouped[(ceil(weight.tiles / (tiles * groups)), blocks.shape[0])](
        x,
        positions,
        blocks,
        weight.words,
        weight.scales,
        weight.row_scale,
        weight.row_scale if bias is None else bias,
        out,
        columns,
        k,
        weight.tiles,
        topk,
        x.stride(0),
        out.stride(0),
        alpha,
        limit,
        UNITS=weight.units,
        STEPS=steps,
        TILES=tiles,
        SPLIT=split,
        WARPS=config.warps,
        BLOCK=config.block,
        TWO_LEVEL=weight.format.has_tensor_scale,
        HAS_BIAS=bias is not None,
        ACTIVATION=name,
        ALL_COLUMNS=k % UNIT_K == 0,
        ALIGNED=k % 8 == 0 and x.stride(0) % 8 == 0 and x.data_ptr() % 16 == 0,
        AHEAD=config.ahead,
        DEPTH=min(config.depth, steps),
        num_warps=config.warps,
        launch_pdl=pdl,
        maxnreg=config.max_registers,
    )


# --- PTX --------------------------------------------------------------------------------------------------------------------


@gluon.constexpr_function
def _product(columns: int, two_level: bool, half: bool) -> str:
    """acc += A B for one unit of a tile: 4 words, the lane's scales, and x for `columns` columns.

    Operands, four registers each: columns / 8 accumulators; words; four copies of the scales; x of columns 0 to 31 and 32 to 63
    of the unit, for each 8 columns; the accumulators again.
    """
    words = columns // 2
    x = words + 8
    text = fragments.SLAB_REGISTERS + fragments.multipliers(f"${words + 4}", two_level=two_level, half=half)
    text += "".join(fragments.slab_product(slab, slab // 2, columns, words, x, half=half) for slab in range(4))
    return "{\n" + text + "}"


@gluon.constexpr_function
def _product_constraints(columns: int) -> str:
    registers = columns // 2
    return ",".join(["=&f"] * registers + ["r"] * (8 + columns) + [str(i) for i in range(registers)])


# --- Kernel -----------------------------------------------------------------------------------------------------------------


@gluon.jit(do_not_specialize=["columns", "k", "tiles", "topk"])
def _grouped(
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
    topk,
    x_stride,
    out_stride,
    alpha,
    limit,
    UNITS: gl.constexpr,
    STEPS: gl.constexpr,
    TILES: gl.constexpr,
    WARPS: gl.constexpr,
    SPLIT: gl.constexpr,
    BLOCK: gl.constexpr,
    TWO_LEVEL: gl.constexpr,
    HAS_BIAS: gl.constexpr,
    ACTIVATION: gl.constexpr,
    ALL_COLUMNS: gl.constexpr,
    ALIGNED: gl.constexpr,
    AHEAD: gl.constexpr,
    DEPTH: gl.constexpr,
):  # type: ignore[no-untyped-def]
    # Four registers a thread: a lane's words of a unit, its x of 32 columns, or its accumulators.
    FOUR: gl.constexpr = gl.BlockedLayout([1, 4], [32, 1], [WARPS, 1], [1, 0])
    thread = gl.arange(0, 32 * WARPS, layout=gl.SliceLayout(1, FOUR))
    lane = thread % 32
    # Warps that share k, and groups of them with tiles of their own.
    GROUPS: gl.constexpr = WARPS // SPLIT
    warp = thread // 32 % SPLIT
    group = thread // 32 // SPLIT
    four = gl.arange(0, 4, layout=gl.SliceLayout(0, FOUR))[None, :]
    if ACTIVATION != "":
        # The blocks are those of the kernel before. It is done when the kernel after may start: that one reads blocks at once.
        gl.inline_asm_elementwise(WAIT, "=r,r,~{memory}", [thread], dtype=gl.int32, is_pure=False, pack=1)
        gl.inline_asm_elementwise(LAUNCH, "=r,r,~{memory}", [thread], dtype=gl.int32, is_pure=False, pack=1)
    block = blocks + gl.program_id(1) * 4
    # Past the L1, which may remember those of an earlier call.
    expert = gl.load(block, cache_modifier=".cg")
    at = gl.load(block + 1, cache_modifier=".cg")
    pairs = gl.load(block + 2, cache_modifier=".cg")
    if pairs > 0:
        # The last CTA of a block computes rows of the one before it again where the tiles do not divide: the same bits, twice.
        first = gl.minimum(gl.program_id(0) * (TILES * GROUPS), tiles - TILES * GROUPS)
        tile = expert.to(gl.int64) * tiles + first + group * TILES
        words_at = words + (tile * (UNITS * 128))[:, None] + (warp * 128 + lane * 4)[:, None] + four
        # NVFP4's scale is of the lane's columns of 32: the first 16 of them or the others.
        PER_G: gl.constexpr = 2 if TWO_LEVEL else 1
        scales_at = scales + tile * (UNITS * 8 * PER_G) + (warp * 8 + lane // 4) * PER_G + lane % 4 * PER_G // 4
        queue = ()  # type: ignore[var-annotated]
        for step in gl.static_range(DEPTH):
            queue = queue + _load_unit(words_at, scales_at, step, warp, UNITS, SPLIT, TILES, TWO_LEVEL)
        if ACTIVATION == "":
            # Everything above is the weight's. x is of the kernel before.
            gl.inline_asm_elementwise(WAIT, "=r,r,~{memory}", [thread], dtype=gl.int32, is_pure=False, pack=1)
            gl.inline_asm_elementwise(LAUNCH, "=r,r,~{memory}", [thread], dtype=gl.int32, is_pure=False, pack=1)
        scale_at = row_scale + expert.to(gl.int64) * tiles * 16
        bias_at = bias + expert.to(gl.int64) * tiles * 16
        operands = (x, x_stride, topk, k, positions, words_at, scales_at, queue)
        results = (scale_at, bias_at, out, out_stride, columns, alpha, limit)
        # The narrowest product that holds the block's pairs.
        for width in gl.static_range(8, BLOCK + 1, 8):
            if (pairs > width - 8) & (pairs <= width):
                _compute(
                    operands,
                    results,
                    at,
                    pairs,
                    first,
                    thread,
                    UNITS,
                    STEPS,
                    TILES,
                    WARPS,
                    SPLIT,
                    width,
                    TWO_LEVEL,
                    HAS_BIAS,
                    ACTIVATION,
                    ALL_COLUMNS,
                    ALIGNED,
                    AHEAD,
                    DEPTH,
                    FOUR,
                )
    else:
        if ACTIVATION == "":
            # So that no kernel after this one is ahead of the one before.
            gl.inline_asm_elementwise(WAIT, "=r,r,~{memory}", [thread], dtype=gl.int32, is_pure=False, pack=1)


@gluon.jit
def _compute(
    operands,
    results,
    at,
    pairs,
    first,
    thread,
    UNITS: gl.constexpr,
    STEPS: gl.constexpr,
    TILES: gl.constexpr,
    WARPS: gl.constexpr,
    SPLIT: gl.constexpr,
    COLUMNS: gl.constexpr,
    TWO_LEVEL: gl.constexpr,
    HAS_BIAS: gl.constexpr,
    ACTIVATION: gl.constexpr,
    ALL_COLUMNS: gl.constexpr,
    ALIGNED: gl.constexpr,
    AHEAD: gl.constexpr,
    DEPTH: gl.constexpr,
    FOUR: gl.constexpr,
):  # type: ignore[no-untyped-def]
    """A block of up to COLUMNS pairs by the tiles of this CTA."""
    acc = _sums(
        operands,
        at,
        pairs,
        thread,
        UNITS,
        STEPS,
        TILES,
        WARPS,
        SPLIT,
        COLUMNS,
        TWO_LEVEL,
        ALL_COLUMNS,
        ALIGNED,
        AHEAD,
        DEPTH,
        FOUR,
    )
    _store(acc, results, operands[4], at, pairs, first, TILES, WARPS, SPLIT, COLUMNS, HAS_BIAS, ACTIVATION)


@gluon.jit
def _sums(
    operands,
    at,
    pairs,
    thread,
    UNITS: gl.constexpr,
    STEPS: gl.constexpr,
    TILES: gl.constexpr,
    WARPS: gl.constexpr,
    SPLIT: gl.constexpr,
    COLUMNS: gl.constexpr,
    TWO_LEVEL: gl.constexpr,
    ALL_COLUMNS: gl.constexpr,
    ALIGNED: gl.constexpr,
    AHEAD: gl.constexpr,
    DEPTH: gl.constexpr,
    FOUR: gl.constexpr,
):  # type: ignore[no-untyped-def]
    """Each warp's share of the sums over k. -> for each tile COLUMNS / 8 float32 [threads, 4]."""
    x, x_stride, topk, k, positions, words_at, scales_at, queue = operands
    lane = thread % 32
    warp = thread // 32 % SPLIT
    rows = rows_of_x(x, x_stride, topk, positions, at, pairs, lane, COLUMNS)
    acc = ()  # type: ignore[var-annotated]
    for _ in gl.static_range(TILES * (COLUMNS // 8)):
        acc = acc + (gl.zeros([32 * WARPS, 4], gl.float32, FOUR),)
    HALF: gl.constexpr = x.dtype.element_ty == gl.float16
    # x of each step in the queue.
    b = ()  # type: ignore[var-annotated]
    for step in gl.static_range(DEPTH):
        b = b + load_x(rows, pairs, step, lane, warp, k, UNITS, SPLIT, COLUMNS, ALL_COLUMNS, ALIGNED, FOUR)
    OF_X: gl.constexpr = COLUMNS // 4
    for step in range(DEPTH, STEPS):
        if AHEAD:
            next_b = load_x(rows, pairs, step, lane, warp, k, UNITS, SPLIT, COLUMNS, ALL_COLUMNS, ALIGNED, FOUR)
        acc = multiply(queue, b[:OF_X], acc, TILES, COLUMNS, TWO_LEVEL, HALF)
        queue = queue[2 * TILES :] + _load_unit(words_at, scales_at, step, warp, UNITS, SPLIT, TILES, TWO_LEVEL)
        if not AHEAD:
            next_b = load_x(rows, pairs, step, lane, warp, k, UNITS, SPLIT, COLUMNS, ALL_COLUMNS, ALIGNED, FOUR)
        b = b[OF_X:] + next_b
    for i in gl.static_range(DEPTH):
        acc = multiply(queue[2 * TILES * i :], b[OF_X * i : OF_X * (i + 1)], acc, TILES, COLUMNS, TWO_LEVEL, HALF)
    return acc


@gluon.jit
def _load_unit(
    words_at,
    scales_at,
    step,
    warp,
    UNITS: gl.constexpr,
    SPLIT: gl.constexpr,
    TILES: gl.constexpr,
    TWO_LEVEL: gl.constexpr,
):  # type: ignore[no-untyped-def]
    """A unit of each tile: int32 [threads, 4], the lane's words, and int32 [threads], the scales of rows g and g + 8.

    Beyond the last unit zeros.
    """
    PER_UNIT: gl.constexpr = 16 if TWO_LEVEL else 8
    unit = ()  # type: ignore[var-annotated]
    for tile in gl.static_range(TILES):
        word = words_at + tile * (UNITS * 128) + step * (SPLIT * 128)
        scale = scales_at + tile * (UNITS * PER_UNIT) + step * (SPLIT * PER_UNIT)
        if UNITS % SPLIT == 0:
            w = gl.load(word, eviction_policy="evict_first")
            s = gl.load(scale)
        else:
            inside = step * SPLIT + warp < UNITS
            w = gl.load(word, mask=inside[:, None], other=0, eviction_policy="evict_first")
            s = gl.load(scale, mask=inside, other=0)
        unit = unit + (w, s)
    return unit


@gluon.jit
def rows_of_x(x, x_stride, topk, positions, at, pairs, lane, COLUMNS: gl.constexpr):  # type: ignore[no-untyped-def]
    """Where the row of x begins that is a lane's column of each 8. -> for each 8 columns pointers to int32 [threads, 1]."""
    rows = ()  # type: ignore[var-annotated]
    for i in gl.static_range(COLUMNS // 8):
        column = lane // 4 + 8 * i
        row = at + column
        if topk > 0:
            row = gl.load(positions + row, mask=column < pairs, other=0, cache_modifier=".cg") // topk
        row_at = x + row.to(gl.int64) * x_stride
        rows = rows + (row_at.to(gl.pointer_type(gl.int32), bitcast=True)[:, None],)
    return rows


@gluon.jit
def load_x(
    rows,
    pairs,
    step,
    lane,
    warp,
    k,
    UNITS: gl.constexpr,
    SPLIT: gl.constexpr,
    COLUMNS: gl.constexpr,
    ALL_COLUMNS: gl.constexpr,
    ALIGNED: gl.constexpr,
    FOUR: gl.constexpr,
):  # type: ignore[no-untyped-def]
    """x as the B operand of a unit. -> for each 8 rows of x two int32 [threads, 4], of 32 columns of the unit each."""
    unit = step * SPLIT + warp
    four = gl.arange(0, 4, layout=gl.SliceLayout(0, FOUR))[None, :]
    b = ()  # type: ignore[var-annotated]
    for i in gl.static_range(COLUMNS // 4):
        inside = lane // 4 + 8 * (i // 2) < pairs
        if UNITS % SPLIT != 0:
            inside = inside & (unit < UNITS)
        two_columns = unit[:, None] * 32 + 16 * (i % 2) + 4 * (lane % 4)[:, None] + four
        mask = inside[:, None]
        if not ALL_COLUMNS:
            # Where k is a multiple of 8 a lane's 16 bytes are inside or not.
            first_of_lane = (unit * 64 + 32 * (i % 2) + 8 * (lane % 4))[:, None]
            mask = mask & ((first_of_lane if ALIGNED else 2 * two_columns) < k)
        b = b + (gl.load(rows[i // 2] + two_columns, mask=mask, other=0),)
    return b


@gluon.jit
def multiply(unit, b, acc, TILES: gl.constexpr, COLUMNS: gl.constexpr, TWO_LEVEL: gl.constexpr, HALF: gl.constexpr):  # type: ignore[no-untyped-def]
    """A unit of each tile, added to its accumulators. -> for each tile COLUMNS / 8 float32 [threads, 4]."""
    BLOCKS: gl.constexpr = COLUMNS // 8
    sums = ()  # type: ignore[var-annotated]
    for tile in gl.static_range(TILES):
        w = unit[2 * tile]
        s = unit[2 * tile + 1]
        scales = s[:, None] + gl.zeros_like(w)
        product = gl.inline_asm_elementwise(
            _product(COLUMNS, TWO_LEVEL, HALF),
            _product_constraints(COLUMNS),
            (w, scales) + b + acc[tile * BLOCKS : (tile + 1) * BLOCKS],
            dtype=gl.float32 if BLOCKS == 1 else (gl.float32,) * BLOCKS,
            is_pure=True,
            pack=4,
        )
        sums = sums + ((product,) if BLOCKS == 1 else product)
    return sums


@gluon.constexpr_function
def _sums_at_once(count, warps):
    """How many the warps add up in a round: one each, if there are so many."""
    return min(warps, 1 << (count - 1).bit_length())


@gluon.jit
def _store(
    acc,
    results,
    positions,
    at,
    pairs,
    first,
    TILES: gl.constexpr,
    WARPS: gl.constexpr,
    SPLIT: gl.constexpr,
    COLUMNS: gl.constexpr,
    HAS_BIAS: gl.constexpr,
    ACTIVATION: gl.constexpr,
):  # type: ignore[no-untyped-def]
    """Sum over the warps that share k, scale, and store. A thread adds up one lane of all of them: four elements of a sum."""
    row_scale, bias, out, out_stride, columns, alpha, limit = results
    BLOCKS: gl.constexpr = COLUMNS // 8
    GROUPS: gl.constexpr = WARPS // SPLIT
    COUNT: gl.constexpr = TILES * BLOCKS * GROUPS
    AT_ONCE: gl.constexpr = _sums_at_once(COUNT, WARPS)
    ROUNDS: gl.constexpr = (COUNT + AT_ONCE - 1) // AT_ONCE
    shared = gl.allocate_shared_memory(gl.float32, [ROUNDS, AT_ONCE, SPLIT, 128], gl.SwizzledSharedLayout(1, 1, 1, [2, 1, 0]))
    # Accumulator i of all groups, then the next.
    for i in gl.static_range(TILES * BLOCKS):
        part = shared.index(i * GROUPS // AT_ONCE).slice(i * GROUPS % AT_ONCE, GROUPS, dim=0)
        part.store(gl.reshape(acc[i], [GROUPS, SPLIT, 128]))
    BY_LANE: gl.constexpr = gl.BlockedLayout([1, SPLIT, 4], [1, 1, 32], [AT_ONCE, 1, WARPS // AT_ONCE], [2, 1, 0])
    SUMS: gl.constexpr = gl.SliceLayout(1, BY_LANE)
    slot = gl.arange(0, AT_ONCE, layout=gl.SliceLayout(1, SUMS))[:, None]
    element = gl.arange(0, 128, layout=gl.SliceLayout(0, SUMS))[None, :]
    lane = element // 4
    for i in gl.static_range(ROUNDS):
        which = (i * AT_ONCE + slot) // GROUPS
        tile = first + slot % GROUPS * TILES + which // BLOCKS
        row = tile * 16 + lane // 4 + 8 * (element % 4 // 2)
        there = which < TILES * BLOCKS
        y = gl.sum(shared.index(i).load(BY_LANE), 1) * gl.load(row_scale + row, mask=there, other=0.0)
        if HAS_BIAS:
            y += gl.load(bias + row, mask=there, other=0.0)
        column = 8 * (which % BLOCKS) + 2 * (lane % 4) + element % 2
        if ACTIVATION == "":
            inside = there & (column < pairs) & (row < columns)
            pair = gl.load(positions + at + column, mask=inside, other=0, cache_modifier=".cg")
            gl.store(out + pair.to(gl.int64) * out_stride + row, y.to(out.dtype.element_ty), mask=inside)
        else:
            gate, up = _sides(y, AT_ONCE)
            h = activated(gate, up, alpha, limit, ACTIVATION)
            # Rows g of a tile are columns of the result; where there is no row, none of them is.
            column, _ = _sides(column, AT_ONCE)
            place, _ = _sides(gl.where(there, row // 16 * 8 + row % 16, columns), AT_ONCE)
            inside = (column < pairs) & (place < columns)
            gl.store(out + (at + column).to(gl.int64) * out_stride + place, h.to(out.dtype.element_ty), mask=inside)


@gluon.jit
def _sides(y, GROUP: gl.constexpr):  # type: ignore[no-untyped-def]
    """Elements of rows g and of rows g + 8. [GROUP, 128] -> [GROUP, 32 lanes, 2], twice."""
    return gl.split(gl.permute(gl.reshape(y, [GROUP, 32, 2, 2]), (0, 1, 3, 2)))


@gluon.jit
def activated(gate, up, alpha, limit, ACTIVATION: gl.constexpr):  # type: ignore[no-untyped-def]
    if ACTIVATION == "swiglu":
        gate = gl.where(gate > limit, limit, gate)  # NaN stays NaN
        up = gl.where(up > limit, limit, gl.where(up < -limit, -limit, up)) + 1.0
        h = gate / (1.0 + gl.exp(-alpha * gate)) * up
    else:
        h = gate / (1.0 + gl.exp(-gate)) * up
    return h
