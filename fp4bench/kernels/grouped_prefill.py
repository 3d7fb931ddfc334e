"""Products of a MoE layer for many tokens an expert, on Hopper's `wgmma`: blocks of up to 64 pairs times their expert's weight.

What a CTA does is what `prefill` does: one warp brings words, scales and rows of x by TMA into a ring of stages, one or two
warpgroups decode words in registers as the left operand and multiply. TMA reads rows that stand together, so both products
take rows in the order of pairs (`routing.gather`); rows beyond a block's last are those of the next block, and are not stored.
A block of no more than 16 or 32 pairs is multiplied as one of 16 or 32.

CTAs are persistent and take tiles in turn, those of a block one after another: its rows, and the weights of an expert with
several blocks, are in the L2 the next time.

Results are transposed in shared memory and stored 16 bytes at a time, for which Triton must see that neighbours are stored
together or not at all. Stored 2 bytes at a time, as they were, the second product of DeepSeek-R1 at TP 8 and m = 2048 in w4a8
took 483 us, now 185 (two NVIDIA H200s, `2026-11-28_deepseek-r1-tp8.json` and `2026-11-28_deepseek-r1-tp8-2.json` in
`baselines/NVIDIA-H200/moe/`).

Rows come from shared memory in the order of the fragments, so columns of x are in the order that the weights have them in
(`experts.COLUMNS`): `routing.gather` brings them into it, and the first product leaves its results in it for the second.
"""

from math import ceil

import torch
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia import hopper
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, tma

from fp4bench.kernels.experts import PreparedExperts
from fp4bench.kernels.grouped import activated, activation_arguments, padded
from fp4bench.kernels.prefill import count_sms, descriptor
from fp4bench.kernels.prefill_kernel import as_operand, powers, release, words_layout
from fp4bench.kernels.prefill_launch import SHARED_BYTES, PrefillConfig
from fp4bench.kernels.routing import BLOCK_FIELDS, most_blocks
from fp4bench.kernels.unpack import assembly
from fp4bench.kernels.weights import TILE_N, UNIT_K
from fp4bench.models import Activation

_BOX = 32  # rows of x that are brought at a time: as many boxes as a block needs


def why_not(weight: PreparedExperts, x_dtype: torch.dtype, config: PrefillConfig) -> str | None:
    """Why this configuration cannot compute these products exactly, or None."""
    if config.columns not in (16, 32, 64, 128):
        return f"blocks are of up to 16, 32, 64 or 128 pairs, not {config.columns}"
    if config.along_k or config.tail:
        return f"there is neither shared k nor a tail: {config}"
    if x_dtype not in (torch.bfloat16, torch.float8_e4m3fn):
        return f"x is bfloat16 or float8_e4m3fn, not {x_dtype}"
    if (x_dtype is torch.float8_e4m3fn) != (weight.operand is torch.float8_e4m3fn):
        return f"{weight.format} weights prepared for {weight.operand} are not for {x_dtype}"
    if x_dtype.itemsize * config.depth % 128:
        return (
            f"a step of {config.depth} columns of {x_dtype} is no multiple of the 128 bytes that the tensor cores' layout has"
        )
    if config.shared_bytes(x_dtype.itemsize, 2 if weight.format.has_tensor_scale else 1) > SHARED_BYTES // config.ctas:
        return f"{config.ctas} CTAs of {config} do not fit the shared memory of an SM"
    return None


def product(
    x: torch.Tensor,
    weight: PreparedExperts,
    positions: torch.Tensor,
    blocks: torch.Tensor,
    out: torch.Tensor,
    *,
    activation: Activation | None,
    config: PrefillConfig,
    x_scale: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
) -> None:
    """The product of each position's row with its expert's weight, plus bias, rounded once.

    With an activation, of a gated weight: out[position] = activation(...), out (pairs, padded(n / 2)), of which n / 2 columns
    are written, in the order that x has. Without: out[pair at the position], out (pairs, n).
    x: (pairs, padded(k)), contiguous, as `routing.gather` makes it; bfloat16, or float8_e4m3fn with x_scale, float32 (pairs).
    out: bfloat16 or float32, contiguous. bias: float32 (experts, 16 tiles), in the tiles' order.
    positions, blocks: of `routing.order`, with blocks of `config.columns`.
    """
    pairs = positions.shape[0]
    columns = weight.n // 2 if activation else weight.n
    reason = why_not(weight, x.dtype, config)
    if reason:
        raise ValueError(reason)
    if bool(activation) != weight.gated or x.shape != (pairs, padded(weight.k)):
        raise ValueError(f"x {tuple(x.shape)} does not fit weights {weight.n, weight.k}")
    if out.shape != (pairs, padded(columns) if activation else columns) or not (x.is_contiguous() and out.is_contiguous()):
        raise ValueError(f"out {tuple(out.shape)} is not for {pairs} x {columns}, or is not contiguous")
    most = most_blocks(pairs, weight.experts, config.columns)
    if blocks.shape != (most, BLOCK_FIELDS):
        raise ValueError(f"{pairs} pairs make up to {most} blocks of {config.columns}, not {blocks.shape[0]}")
    if not most:
        return
    two_level = weight.format.has_tensor_scale
    n_tiles = ceil(weight.tiles * TILE_N / config.rows)
    tiles_per_cta, units_per_step = config.rows // TILE_N, config.depth // UNIT_K
    per_unit = 16 if two_level else 8
    name, alpha, limit = activation_arguments(activation)
    _kernel[(min(count_sms(x.device) * config.ctas, most * n_tiles),)](
        descriptor(x, [min(config.columns, _BOX), config.depth], 128),
        descriptor(weight.words.view(weight.experts * weight.tiles, -1), [tiles_per_cta, 128 * units_per_step], 0),
        descriptor(weight.scales.view(weight.experts * weight.tiles, -1), [tiles_per_cta, per_unit * units_per_step], 0),
        out,
        weight.row_scale,
        weight.row_scale if x_scale is None else x_scale,
        weight.row_scale if bias is None else bias,
        positions,
        blocks,
        columns,
        weight.tiles,
        n_tiles,
        ceil(weight.units / units_per_step),
        out.stride(0),
        alpha,
        limit,
        REPEATS=config.rows // (64 * config.warpgroups),
        WARPGROUPS=config.warpgroups,
        COLUMNS=config.columns,
        UNITS=units_per_step,
        STAGES=config.stages,
        FORM="e4m3" if x.dtype is torch.float8_e4m3fn else "bf16",
        TWO_LEVEL=two_level,
        HAS_X_SCALE=x_scale is not None,
        HAS_BIAS=bias is not None,
        ACTIVATION=name,
        WHOLE=columns % 32 == 0,
        REGISTERS=config.consumer_registers,
        num_warps=4,
        maxnreg=config.registers,
    )


# --- Device code: decoding --------------------------------------------------------------------------------------------------

_BF16_MX, _SIXTEEN = (gl.constexpr(text) for text in assembly("bf16", False))
_BF16_NV = gl.constexpr(assembly("bf16", True, of_lane=True)[0])
_E4M3_MX, _EIGHT = (gl.constexpr(text) for text in assembly("e4m3", False, in_bytes=True))
_AS_BF16 = gl.constexpr((gl.bfloat16,) * 8)
_AS_E4M3 = gl.constexpr((gl.float8e4nv,) * 8)


@gluon.constexpr_function
def _scales_layout(repeats, units, per_g):
    """int32 (4 repeats, 8 per_g units): a lane has the word of its g = lane // 4, of two that of its half of t = lane % 4."""
    registers = [[0, 8 * per_g * p] for p in powers(units)] + [[4 * p, 0] for p in powers(repeats)]
    lanes = [[0, 0], [0, per_g - 1]] + [[0, per_g << i] for i in range(3)]
    return gl.DistributedLinearLayout(registers, lanes, [[1, 0], [2, 0]], [], [4 * repeats, 8 * per_g * units])


@gluon.jit
def _decode(
    words,
    scales,
    REPEATS: gl.constexpr,
    UNITS: gl.constexpr,
    FORM: gl.constexpr,
    TWO_LEVEL: gl.constexpr,
    OPERAND: gl.constexpr,
):
    """Shared memory of words and scales -> (64 REPEATS, 64 UNITS) in the registers of the A operand. No data moves."""
    PER_G: gl.constexpr = 2 if TWO_LEVEL else 1
    WORDS: gl.constexpr = words_layout(REPEATS, UNITS)
    SCALES: gl.constexpr = _scales_layout(REPEATS, UNITS, PER_G)
    w = words.load(WORDS).reshape([4 * REPEATS, UNITS, 8, PER_G, 4 // PER_G, 4])
    LANES: gl.constexpr = w.type.layout
    s = scales.load(SCALES).reshape([4 * REPEATS, UNITS, 8, PER_G])
    s = gl.convert_layout(s, gl.SliceLayout(4, gl.SliceLayout(5, LANES)), assert_trivial=True)
    s, w = gl.broadcast(gl.expand_dims(gl.expand_dims(s, 4), 5), w)
    # Volatile, so that it stays before the wgmma that it is written before.
    if FORM == "e4m3":
        q0, q1, q2, q3, q4, q5, q6, q7 = gl.inline_asm_elementwise(_E4M3_MX, _EIGHT, [w, s], _AS_E4M3, False, 4)
    else:
        CODE: gl.constexpr = _BF16_NV if TWO_LEVEL else _BF16_MX
        q0, q1, q2, q3, q4, q5, q6, q7 = gl.inline_asm_elementwise(CODE, _SIXTEEN, [w, s], _AS_BF16, False, 4)
    return as_operand((q0, q1, q2, q3, q4, q5, q6, q7), REPEATS, UNITS, FORM, OPERAND)


# --- Device code: who does what ---------------------------------------------------------------------------------------------


_WIDTHS = ((16, 0), (32, 0), (64, 0), (64, 16), (64, 32), (128, 0))


@gluon.constexpr_function
def _widths(columns):
    """As what a block of up to `columns` pairs may be multiplied: columns of one product, and of a second."""
    return [width for width in _WIDTHS if sum(width) <= columns]


@gluon.constexpr_function
def _up_to(columns, i):
    """The most pairs of a block that takes width i; of no width, 0."""
    return sum(_widths(columns)[i]) if i >= 0 else 0


@gluon.jit
def _work(blocks, number, n_tiles):
    """-> (expert, first position, pairs, n tile) of a CTA's tile."""
    block = blocks + number // n_tiles * 4
    return gl.load(block), gl.load(block + 1), gl.load(block + 2), number % n_tiles


@gluon.jit
def _produce(descriptors, buffers, barriers, blocks, sizes, STAGES: gl.constexpr):
    """One warp: fill free stages."""
    x_tiles, words, scales = descriptors
    x_buffer, words_buffer, scales_buffer = buffers
    full, empty = barriers
    columns, tiles, n_tiles, steps, numbers = sizes
    BOX: gl.constexpr = x_tiles.block_type.shape[0]
    BOXES: gl.constexpr = x_buffer.shape[1] // BOX
    DEPTH: gl.constexpr = x_tiles.block_type.shape[1]
    TILES: gl.constexpr = words.block_type.shape[0]
    WORDS: gl.constexpr = words.block_type.shape[1]
    SCALES: gl.constexpr = scales.block_type.shape[1]
    WEIGHT_BYTES: gl.constexpr = words.block_type.nbytes + scales.block_type.nbytes
    count = 0
    for number in range(gl.program_id(0), numbers, gl.num_programs(0)):
        expert, first, pairs, at_n = _work(blocks, number, n_tiles)
        tile = expert * tiles + at_n * TILES
        for step in range(0, steps):
            stage = count % STAGES
            mbarrier.wait(empty.index(stage), (count // STAGES & 1) ^ 1)
            ready = full.index(stage)
            boxes = (pairs + BOX - 1) // BOX
            for i in gl.static_range(1, BOXES + 1):
                mbarrier.expect(ready, i * x_tiles.block_type.nbytes + WEIGHT_BYTES, pred=boxes == i)
            tma.async_copy_global_to_shared(words, [tile, step * WORDS], ready, words_buffer.index(stage))
            tma.async_copy_global_to_shared(scales, [tile, step * SCALES], ready, scales_buffer.index(stage))
            for i in gl.static_range(BOXES):
                box = x_buffer.index(stage).slice(BOX * i, BOX, 0)
                tma.async_copy_global_to_shared(x_tiles, [first + BOX * i, step * DEPTH], ready, box, pred=i < boxes)
            count += 1


@gluon.constexpr_function
def _sums_layout(columns, form):
    return gl.NVMMADistributedLayout([3, 0], [4, 1], [16, columns, 32 if form == "e4m3" else 16])


@gluon.constexpr_function
def _operand_layout(columns, form):
    """Of decoded weights: the same registers whatever the columns."""
    return gl.DotOperandLayout(0, _sums_layout(columns, form), 4 if form == "e4m3" else 2)


@gluon.jit
def _multiply(
    buffers,
    barriers,
    count,
    sums,
    WARPGROUP: gl.constexpr,
    REPEATS: gl.constexpr,
    COLUMNS: gl.constexpr,
    MORE: gl.constexpr,
    UNITS: gl.constexpr,
    STAGES: gl.constexpr,
    FORM: gl.constexpr,
    TWO_LEVEL: gl.constexpr,
):
    """Decode a step and issue its products with the first COLUMNS rows of x, and with MORE after them, without waiting."""
    x_buffer, words_buffer, scales_buffer = buffers
    full, empty = barriers
    stage = count % STAGES
    mbarrier.wait(full.index(stage), count // STAGES & 1)
    words = words_buffer.index(stage).slice(4 * REPEATS * WARPGROUP, 4 * REPEATS, 0)
    scales = scales_buffer.index(stage).slice(4 * REPEATS * WARPGROUP, 4 * REPEATS, 0)
    w = _decode(words, scales, REPEATS, UNITS, FORM, TWO_LEVEL, _operand_layout(COLUMNS, FORM))
    x = x_buffer.index(stage)
    products = (hopper.warpgroup_mma(w, x.slice(0, COLUMNS, 0).permute((1, 0)), sums[0], is_async=True),)
    if MORE > 0:
        w = gl.convert_layout(w, _operand_layout(MORE, FORM), assert_trivial=True)
        products = products + (hopper.warpgroup_mma(w, x.slice(COLUMNS, MORE, 0).permute((1, 0)), sums[1], is_async=True),)
    return products


@gluon.jit
def _waited(sums, STEPS: gl.constexpr, MORE: gl.constexpr):
    """Sums of all products but those of the last STEPS steps."""
    if MORE > 0:
        a, b = hopper.warpgroup_mma_wait(2 * STEPS, deps=sums)
        return (a, b)
    else:
        return (hopper.warpgroup_mma_wait(STEPS, deps=sums),)


@gluon.jit
def _to_be_added_to(sums, MORE: gl.constexpr):
    if MORE > 0:
        return (hopper.warpgroup_mma_init(sums[0]), hopper.warpgroup_mma_init(sums[1]))
    else:
        return (hopper.warpgroup_mma_init(sums[0]),)


@gluon.jit
def _tile(
    buffers,
    barriers,
    pointers,
    place,
    steps,
    count,
    limits,
    WARPGROUP: gl.constexpr,
    WARPGROUPS: gl.constexpr,
    REPEATS: gl.constexpr,
    COLUMNS: gl.constexpr,
    MORE: gl.constexpr,
    UNITS: gl.constexpr,
    STAGES: gl.constexpr,
    FORM: gl.constexpr,
    TWO_LEVEL: gl.constexpr,
    HAS_X_SCALE: gl.constexpr,
    HAS_BIAS: gl.constexpr,
    ACTIVATION: gl.constexpr,
    WHOLE: gl.constexpr,
):
    """A warpgroup's rows of one tile, for a block of up to COLUMNS + MORE pairs: the weight is decoded once for both."""
    ROWS: gl.constexpr = 64 * REPEATS
    SUMS: gl.constexpr = _sums_layout(COLUMNS, FORM)
    sums = (hopper.warpgroup_mma_init(gl.zeros([ROWS, COLUMNS], gl.float32, SUMS)),)
    if MORE > 0:
        SUMS_OF_MORE: gl.constexpr = _sums_layout(MORE, FORM)
        sums = sums + (hopper.warpgroup_mma_init(gl.zeros([ROWS, MORE], gl.float32, SUMS_OF_MORE)),)
    # Two steps a turn, so that their operands have registers of their own; a step in advance where the rest would be odd.
    if steps % 2 == 0:
        sums = _multiply(buffers, barriers, count, sums, WARPGROUP, REPEATS, COLUMNS, MORE, UNITS, STAGES, FORM, TWO_LEVEL)
        sums = _to_be_added_to(_waited(sums, 0, MORE), MORE)
        release(barriers, count, STAGES)
        count += 1
    sums = _multiply(buffers, barriers, count, sums, WARPGROUP, REPEATS, COLUMNS, MORE, UNITS, STAGES, FORM, TWO_LEVEL)
    for pair in range((steps - 1) // 2):
        for half in gl.static_range(2):
            sums = _multiply(
                buffers, barriers, count + 1, sums, WARPGROUP, REPEATS, COLUMNS, MORE, UNITS, STAGES, FORM, TWO_LEVEL
            )
            sums = _to_be_added_to(_waited(sums, 1, MORE), MORE)
            release(barriers, count, STAGES)
            count += 1
    y = _waited(sums, 0, MORE)
    release(barriers, count, STAGES)
    expert, first, pairs, at_n, columns, tiles, out_stride = place
    for i in gl.static_range(len(y)):
        _store(
            y[i],
            pointers,
            (expert, first + i * COLUMNS, pairs - i * COLUMNS, at_n, columns, tiles, out_stride),
            limits,
            WARPGROUP,
            WARPGROUPS,
            ROWS,
            MORE if i else COLUMNS,
            FORM,
            HAS_X_SCALE,
            HAS_BIAS,
            ACTIVATION,
            WHOLE,
        )


@gluon.jit
def _store(
    y,
    pointers,
    place,
    limits,
    WARPGROUP: gl.constexpr,
    WARPGROUPS: gl.constexpr,
    ROWS: gl.constexpr,
    COLUMNS: gl.constexpr,
    FORM: gl.constexpr,
    HAS_X_SCALE: gl.constexpr,
    HAS_BIAS: gl.constexpr,
    ACTIVATION: gl.constexpr,
    WHOLE: gl.constexpr,
):
    """The epilogue in float32, then y^T in rows."""
    SUMS: gl.constexpr = _sums_layout(COLUMNS, FORM)
    out, row_scale, x_scale, bias, positions = pointers
    expert, first, pairs, at_n, columns, tiles, out_stride = place
    alpha, limit = limits
    # E4M3 holds value * 2**(6 - delta), the layout's row scale undoes value * 2**(1 - delta).
    GAIN: gl.constexpr = 2.0**-5 if FORM == "e4m3" else 1.0
    n0 = at_n * (ROWS * WARPGROUPS) + WARPGROUP * ROWS
    rows = n0 + gl.arange(0, ROWS, gl.SliceLayout(1, SUMS))
    inside = rows < tiles * 16
    of_expert = expert.to(gl.int64) * tiles * 16
    y = y * (gl.load(row_scale + of_expert + rows, mask=inside, other=0.0) * GAIN)[:, None]
    if HAS_X_SCALE:
        row_of_x = gl.arange(0, COLUMNS, gl.SliceLayout(0, SUMS))
        y = y * gl.load(x_scale + first + row_of_x, mask=row_of_x < pairs, other=0.0)[None, :]
    if HAS_BIAS:
        y = y + gl.load(bias + of_expert + rows, mask=inside, other=0.0)[:, None]
    if ACTIVATION != "":
        # Rows g and g + 8 of a tile are in one thread.
        sides = gl.permute(gl.reshape(y, [ROWS // 16, 2, 8, COLUMNS]), (0, 2, 3, 1))
        gate, up = gl.split(sides)
        y = gl.reshape(activated(gate, up, alpha, limit, ACTIVATION), [ROWS // 64, 4, 2, 2, 2, COLUMNS])
        # Of each 32 rows 8 t + 4 j + 2 h + e becomes 16 j + 8 h + 2 t + e.
        y = gl.reshape(gl.permute(y, (0, 2, 3, 1, 4, 5)), [ROWS // 2, COLUMNS])
        n0 = n0 // 2
    HEIGHT: gl.constexpr = y.shape[0]
    LANES: gl.constexpr = HEIGHT // 8 if HEIGHT < 128 else 16
    OUT: gl.constexpr = gl.BlockedLayout([1, 8], [32 // LANES, LANES], [4, 1], [1, 0])
    transposed = gl.convert_layout(gl.permute(y.to(out.dtype.element_ty), (1, 0)), OUT)
    row = gl.arange(0, COLUMNS, gl.SliceLayout(1, OUT))
    place = n0 + gl.arange(0, HEIGHT, gl.SliceLayout(0, OUT))
    column = place
    to = first + row
    if ACTIVATION == "":
        to = gl.load(positions + to, mask=row < pairs, other=0)
    else:
        column = place // 32 * 32 + place % 8 // 2 * 8 + place % 32 // 16 * 4 + place % 16 // 8 * 2 + place % 2
    # Asked of 32 neighbours together where the answer is the same for all of them: so 16 bytes are stored at a time.
    there = place // 32 < columns // 32 if WHOLE else column < columns
    at = out + to.to(gl.int64)[:, None] * out_stride + place[None, :]
    gl.store(at, transposed, mask=(row < pairs)[:, None] & there[None, :])


@gluon.jit
def _consume(
    buffers,
    barriers,
    pointers,
    blocks,
    sizes,
    out_stride,
    limits,
    WARPGROUP: gl.constexpr,
    WARPGROUPS: gl.constexpr,
    REPEATS: gl.constexpr,
    COLUMNS: gl.constexpr,
    UNITS: gl.constexpr,
    STAGES: gl.constexpr,
    FORM: gl.constexpr,
    TWO_LEVEL: gl.constexpr,
    HAS_X_SCALE: gl.constexpr,
    HAS_BIAS: gl.constexpr,
    ACTIVATION: gl.constexpr,
    WHOLE: gl.constexpr,
):
    """One warpgroup: its rows of every tile of this CTA."""
    columns, tiles, n_tiles, steps, numbers = sizes
    count = 0
    for number in range(gl.program_id(0), numbers, gl.num_programs(0)):
        expert, first, pairs, at_n = _work(blocks, number, n_tiles)
        place = (expert, first, pairs, at_n, columns, tiles, out_stride)
        for i in gl.static_range(len(_widths(COLUMNS))):
            # The narrowest that holds the block's pairs.
            if (pairs > _up_to(COLUMNS, i - 1)) & (pairs <= _up_to(COLUMNS, i)):
                _tile(
                    buffers,
                    barriers,
                    pointers,
                    place,
                    steps,
                    count,
                    limits,
                    WARPGROUP,
                    WARPGROUPS,
                    REPEATS,
                    _widths(COLUMNS)[i][0],
                    _widths(COLUMNS)[i][1],
                    UNITS,
                    STAGES,
                    FORM,
                    TWO_LEVEL,
                    HAS_X_SCALE,
                    HAS_BIAS,
                    ACTIVATION,
                    WHOLE,
                )
        count += steps


@gluon.jit(do_not_specialize=["columns", "tiles", "n_tiles", "steps"])
def _kernel(
    x_tiles,
    words,
    scales,
    out,
    row_scale,
    x_scale,
    bias,
    positions,
    blocks,
    columns,
    tiles,
    n_tiles,
    steps,
    out_stride,
    alpha,
    limit,
    REPEATS: gl.constexpr,
    WARPGROUPS: gl.constexpr,
    COLUMNS: gl.constexpr,
    UNITS: gl.constexpr,
    STAGES: gl.constexpr,
    FORM: gl.constexpr,
    TWO_LEVEL: gl.constexpr,
    HAS_X_SCALE: gl.constexpr,
    HAS_BIAS: gl.constexpr,
    ACTIVATION: gl.constexpr,
    WHOLE: gl.constexpr,
    REGISTERS: gl.constexpr,
):
    x_buffer = gl.allocate_shared_memory(x_tiles.dtype, [STAGES, COLUMNS, x_tiles.block_type.shape[1]], x_tiles.layout)
    words_buffer = gl.allocate_shared_memory(words.dtype, [STAGES] + words.block_type.shape, words.layout)
    scales_buffer = gl.allocate_shared_memory(scales.dtype, [STAGES] + scales.block_type.shape, scales.layout)
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for stage in gl.static_range(STAGES):
        mbarrier.init(full.index(stage), count=1)
        mbarrier.init(empty.index(stage), count=WARPGROUPS)
    hopper.fence_async_shared()
    buffers = (x_buffer, words_buffer, scales_buffer)
    barriers = (full, empty)
    pointers = (out, row_scale, x_scale, bias, positions)
    limits = (alpha, limit)
    # How many blocks there are is in the first one.
    sizes = (columns, tiles, n_tiles, steps, gl.load(blocks + 3) * n_tiles)
    load = ((x_tiles, words, scales), buffers, barriers, blocks, sizes, STAGES)
    if WARPGROUPS == 1:
        gl.warp_specialize(
            [
                (
                    _consume,
                    (
                        buffers,
                        barriers,
                        pointers,
                        blocks,
                        sizes,
                        out_stride,
                        limits,
                        0,
                        WARPGROUPS,
                        REPEATS,
                        COLUMNS,
                        UNITS,
                        STAGES,
                        FORM,
                        TWO_LEVEL,
                        HAS_X_SCALE,
                        HAS_BIAS,
                        ACTIVATION,
                        WHOLE,
                    ),
                ),
                (_produce, load),
            ],
            [1],
            [24],
        )
    else:
        gl.warp_specialize(
            [
                (
                    _consume,
                    (
                        buffers,
                        barriers,
                        pointers,
                        blocks,
                        sizes,
                        out_stride,
                        limits,
                        0,
                        WARPGROUPS,
                        REPEATS,
                        COLUMNS,
                        UNITS,
                        STAGES,
                        FORM,
                        TWO_LEVEL,
                        HAS_X_SCALE,
                        HAS_BIAS,
                        ACTIVATION,
                        WHOLE,
                    ),
                ),
                (
                    _consume,
                    (
                        buffers,
                        barriers,
                        pointers,
                        blocks,
                        sizes,
                        out_stride,
                        limits,
                        1,
                        WARPGROUPS,
                        REPEATS,
                        COLUMNS,
                        UNITS,
                        STAGES,
                        FORM,
                        TWO_LEVEL,
                        HAS_X_SCALE,
                        HAS_BIAS,
                        ACTIVATION,
                        WHOLE,
                    ),
                ),
                (_produce, load),
            ],
            [4, 1],
            [REGISTERS, 24],
        )
