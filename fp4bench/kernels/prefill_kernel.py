"""The device code of `prefill`, whose head says how its warps work together."""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia import hopper
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, tma

from fp4bench.kernels.overlap import BEGIN
from fp4bench.kernels.unpack import assembly

# --- Layouts and decoding -----------------------------------------------------------------------------------------------------


_BF16_MX, _SIXTEEN = (gl.constexpr(text) for text in assembly("bf16", False))
_BF16_NV = gl.constexpr(assembly("bf16", True)[0])
_FP16_MX = gl.constexpr(assembly("fp16", False)[0])
_FP16_NV = gl.constexpr(assembly("fp16", True)[0])
_E4M3_MX, _EIGHT = (gl.constexpr(text) for text in assembly("e4m3", False))
_E4M3_BYTES = gl.constexpr(assembly("e4m3", False, in_bytes=True)[0])
_AS_BF16 = gl.constexpr((gl.bfloat16,) * 8)
_AS_FP16 = gl.constexpr((gl.float16,) * 8)
_AS_E4M3 = gl.constexpr((gl.float8e4nv,) * 8)


@gluon.constexpr_function
def powers(size: int) -> list[int]:
    """1, 2, 4, ... below size."""
    return [1 << i for i in range(size.bit_length() - 1)]


@gluon.constexpr_function
def words_layout(repeats: int, units: int) -> gl.DistributedLinearLayout:
    """int32 (4 repeats, 128 units): a warp has one tile of each repeat, a lane four words of each unit."""
    registers = [[0, 1], [0, 2]] + [[0, 128 * p] for p in powers(units)] + [[4 * p, 0] for p in powers(repeats)]
    return gl.DistributedLinearLayout(
        registers, [[0, 4 << i] for i in range(5)], [[1, 0], [2, 0]], [], [4 * repeats, 128 * units]
    )


@gluon.constexpr_function
def _scales_layout(repeats, units, per_g):
    """int32 (4 repeats, 8 per_g units): a lane has the words of its g = lane // 4."""
    registers = [[0, p] for p in powers(per_g)] + [[0, 8 * per_g * p] for p in powers(units)]
    registers += [[4 * p, 0] for p in powers(repeats)]
    lanes = [[0, 0], [0, 0]] + [[0, per_g << i] for i in range(3)]
    return gl.DistributedLinearLayout(registers, lanes, [[1, 0], [2, 0]], [], [4 * repeats, 8 * per_g * units])


@gluon.constexpr_function
def _columns_layout(columns):
    """A number of each column: 64 of them in the lanes of two warps and, the same, two more; the others in registers."""
    bits = [[p] for p in powers(columns)]
    lanes, warps = (bits + 5 * [[0]])[:5], (bits[5:6] or [[0]]) + [[0]]
    return gl.DistributedLinearLayout(bits[6:], lanes, warps, [], [columns])


@gluon.jit
def _decode(
    words,
    scales,
    REPEATS: gl.constexpr,
    UNITS: gl.constexpr,
    FORM: gl.constexpr,
    TWO_LEVEL: gl.constexpr,
    IN_BYTES: gl.constexpr,
    OPERAND: gl.constexpr,
):
    """Shared memory of words and scales -> (64 REPEATS, 64 UNITS) in the registers of the A operand. No data moves."""
    PER_G: gl.constexpr = 2 if TWO_LEVEL else 1
    WORDS: gl.constexpr = words_layout(REPEATS, UNITS)
    SCALES: gl.constexpr = _scales_layout(REPEATS, UNITS, PER_G)
    w = words.load(WORDS).reshape([4 * REPEATS, UNITS, 8, 4, PER_G, 4 // PER_G])
    LANES: gl.constexpr = w.type.layout
    s = scales.load(SCALES).reshape([4 * REPEATS, UNITS, 8, PER_G])
    s = gl.convert_layout(s, gl.SliceLayout(3, gl.SliceLayout(5, LANES)), assert_trivial=True)
    s, w = gl.broadcast(gl.expand_dims(gl.expand_dims(s, 3), 5), w)
    # Volatile, so that it stays before the wgmma that it is written before.
    if FORM == "e4m3":
        CODE: gl.constexpr = _E4M3_BYTES if IN_BYTES else _E4M3_MX
        q0, q1, q2, q3, q4, q5, q6, q7 = gl.inline_asm_elementwise(CODE, _EIGHT, [w, s], _AS_E4M3, False, 4)
    elif FORM == "bf16":
        CODE: gl.constexpr = _BF16_NV if TWO_LEVEL else _BF16_MX
        q0, q1, q2, q3, q4, q5, q6, q7 = gl.inline_asm_elementwise(CODE, _SIXTEEN, [w, s], _AS_BF16, False, 4)
    else:
        CODE: gl.constexpr = _FP16_NV if TWO_LEVEL else _FP16_MX
        q0, q1, q2, q3, q4, q5, q6, q7 = gl.inline_asm_elementwise(CODE, _SIXTEEN, [w, s], _AS_FP16, False, 4)
    return as_operand((q0, q1, q2, q3, q4, q5, q6, q7), REPEATS, UNITS, FORM, OPERAND)


@gluon.jit
def as_operand(q, REPEATS: gl.constexpr, UNITS: gl.constexpr, FORM: gl.constexpr, OPERAND: gl.constexpr):  # type: ignore[no-untyped-def]
    """The eight results of `unpack` -> (64 REPEATS, 64 UNITS) in the registers of the A operand. No data moves."""
    low_words = gl.join(gl.join(q[0], q[1]), gl.join(q[2], q[3]))
    high_words = gl.join(gl.join(q[4], q[5]), gl.join(q[6], q[7]))
    a = gl.join(low_words, high_words)
    if FORM == "e4m3":
        # repeat, warp, unit, g, t, byte, high row, word's two bits -> repeat, warp, high row, g; unit, word, t, byte
        a = a.reshape([REPEATS, 4, UNITS, 8, 4, 4, 2, 2, 2]).permute([0, 1, 6, 3, 2, 8, 7, 4, 5])
    else:
        # repeat, warp, unit, g, t, h, e, high row, word's two bits -> repeat, warp, high row, g; unit, word, h, t, e
        a = a.reshape([REPEATS, 4, UNITS, 8, 4, 2, 2, 2, 2, 2]).permute([0, 1, 7, 3, 2, 9, 8, 5, 4, 6])
    return gl.convert_layout(a.reshape([64 * REPEATS, 64 * UNITS]), OPERAND, assert_trivial=True)


# --- Who does what ------------------------------------------------------------------------------------------------------------


@gluon.jit
def _pieces(schedule):
    """How many pieces of tiles this CTA computes."""
    ctas, shared, tiles, steps, n_tiles, m_tiles = schedule
    cta = gl.program_id(0)
    begin = cta * (shared * steps) // ctas
    end = (cta + 1) * (shared * steps) // ctas
    cut = gl.where(end > begin, (end - 1) // steps - begin // steps + 1, 0)
    return cut + (tiles - shared - cta + ctas - 1) // ctas


@gluon.jit
def _piece(index, schedule):
    """-> (tile, first step, step after the last) of a piece. The cut ones come first: their sums have time to be collected."""
    ctas, shared, tiles, steps, n_tiles, m_tiles = schedule
    cta = gl.program_id(0)
    begin = cta * (shared * steps) // ctas
    end = (cta + 1) * (shared * steps) // ctas
    first = begin // steps
    cut = gl.where(end > begin, (end - 1) // steps - first + 1, 0)
    whole = index >= cut
    tile = gl.where(whole, shared + cta + (index - cut) * ctas, first + index)
    return (
        tile,
        gl.where(whole, 0, gl.maximum(begin - tile * steps, 0)),
        gl.where(whole, steps, gl.minimum(end - tile * steps, steps)),
    )


@gluon.jit
def _place(tile, schedule, GROUP: gl.constexpr):
    """-> (n tile, m tile): all n tiles by GROUP m tiles are consecutive, the m tiles fastest."""
    ctas, shared, tiles, steps, n_tiles, m_tiles = schedule
    group = tile // (GROUP * n_tiles)
    size = gl.minimum(m_tiles - group * GROUP, GROUP)
    rest = tile - group * (GROUP * n_tiles)
    return rest // size, group * GROUP + rest % size


@gluon.jit
def _produce(descriptors, buffers, barriers, schedule, SPLIT: gl.constexpr, STAGES: gl.constexpr, GROUP: gl.constexpr):
    """One warp: fill free stages. Each step of the schedule is one of each warpgroup, where they share k."""
    x_tiles, words, scales = descriptors
    x_buffer, words_buffer, scales_buffer = buffers
    full, empty = barriers
    COLUMNS: gl.constexpr = x_tiles.block_type.shape[0]
    DEPTH: gl.constexpr = x_tiles.block_type.shape[1]
    TILES: gl.constexpr = words.block_type.shape[0]
    WORDS: gl.constexpr = words.block_type.shape[1]
    SCALES: gl.constexpr = scales.block_type.shape[1]
    # The weights of the first stages do not wait for the kernel before, which x may come from.
    tile, begin, end = _piece(0, schedule)
    begin, end = begin * SPLIT, end * SPLIT
    at_n, at_m = _place(tile, schedule, GROUP)
    early = gl.where(_pieces(schedule) > 0, gl.minimum(end - begin, STAGES), 0)
    for stage in range(early):
        ready = full.index(stage)
        mbarrier.expect(ready, x_tiles.block_type.nbytes + words.block_type.nbytes + scales.block_type.nbytes)
        step = begin + stage
        tma.async_copy_global_to_shared(words, [at_n * TILES, step * WORDS], ready, words_buffer.index(stage))
        tma.async_copy_global_to_shared(scales, [at_n * TILES, step * SCALES], ready, scales_buffer.index(stage))
    lane = gl.arange(0, 32, gl.BlockedLayout([1], [32], [1], [0]))
    gl.inline_asm_elementwise(BEGIN, "=r,r,~{memory}", [lane], dtype=gl.int32, is_pure=False, pack=1)
    for stage in range(early):
        step = begin + stage
        tma.async_copy_global_to_shared(x_tiles, [at_m * COLUMNS, step * DEPTH], full.index(stage), x_buffer.index(stage))
    count = early
    for index in range(_pieces(schedule)):
        tile, begin, end = _piece(index, schedule)
        at_n, at_m = _place(tile, schedule, GROUP)
        begin, end = begin * SPLIT + gl.where(index == 0, early, 0), end * SPLIT
        for step in range(begin, end):
            stage = count % STAGES
            mbarrier.wait(empty.index(stage), (count // STAGES & 1) ^ 1)
            ready = full.index(stage)
            mbarrier.expect(ready, x_tiles.block_type.nbytes + words.block_type.nbytes + scales.block_type.nbytes)
            tma.async_copy_global_to_shared(words, [at_n * TILES, step * WORDS], ready, words_buffer.index(stage))
            tma.async_copy_global_to_shared(scales, [at_n * TILES, step * SCALES], ready, scales_buffer.index(stage))
            tma.async_copy_global_to_shared(x_tiles, [at_m * COLUMNS, step * DEPTH], ready, x_buffer.index(stage))
            count += 1


@gluon.jit
def _multiply(
    buffers,
    barriers,
    count,
    sums,
    WARPGROUP: gl.constexpr,
    REPEATS: gl.constexpr,
    UNITS: gl.constexpr,
    STAGES: gl.constexpr,
    FORM: gl.constexpr,
    TWO_LEVEL: gl.constexpr,
    IN_BYTES: gl.constexpr,
    OPERAND: gl.constexpr,
):
    """Decode a step and issue its products, without waiting for them."""
    x_buffer, words_buffer, scales_buffer = buffers
    full, empty = barriers
    stage = count % STAGES
    mbarrier.wait(full.index(stage), count // STAGES & 1)
    words = words_buffer.index(stage).slice(4 * REPEATS * WARPGROUP, 4 * REPEATS, 0)
    scales = scales_buffer.index(stage).slice(4 * REPEATS * WARPGROUP, 4 * REPEATS, 0)
    w = _decode(words, scales, REPEATS, UNITS, FORM, TWO_LEVEL, IN_BYTES, OPERAND)
    return hopper.warpgroup_mma(w, x_buffer.index(stage).permute((1, 0)), sums, is_async=True)


@gluon.jit
def release(barriers, count, STAGES: gl.constexpr) -> None:  # type: ignore[no-untyped-def]
    full, empty = barriers
    mbarrier.arrive(empty.index(count % STAGES), count=1)


@gluon.jit
def _consume(
    sides,
    WARPGROUP: gl.constexpr,
    WARPGROUPS: gl.constexpr,
    REPEATS: gl.constexpr,
    COLUMNS: gl.constexpr,
    UNITS: gl.constexpr,
    SPLIT: gl.constexpr,
    STAGES: gl.constexpr,
    GROUP: gl.constexpr,
    FORM: gl.constexpr,
    TWO_LEVEL: gl.constexpr,
    IN_BYTES: gl.constexpr,
    SHARERS: gl.constexpr,
    HAS_X_SCALE: gl.constexpr,
    HAS_BIAS: gl.constexpr,
):
    """One warpgroup: its rows of every tile of this CTA, or its share of their k."""
    buffers, barriers, handover, pointers, schedule, bounds, alpha = sides
    out, row_scale, x_scale, bias, partial, counters = pointers
    ctas, shared, tiles, steps, n_tiles, m_tiles = schedule
    ROWS: gl.constexpr = 64 * REPEATS
    SUMS: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, COLUMNS, 32 if FORM == "e4m3" else 16])
    OPERAND: gl.constexpr = gl.DotOperandLayout(0, SUMS, 4 if FORM == "e4m3" else 2)
    MEMBER: gl.constexpr = WARPGROUP if SPLIT == 1 else 0  # whose rows of the tile
    count = 0 if SPLIT == 1 else WARPGROUP
    for index in range(_pieces(schedule)):
        tile, begin, end = _piece(index, schedule)
        at_n, at_m = _place(tile, schedule, GROUP)
        sums = hopper.warpgroup_mma_init(gl.zeros([ROWS, COLUMNS], gl.float32, SUMS))
        # Two steps a turn, so that their operands have registers of their own; a step in advance where the rest would be odd.
        if (end - begin) % 2 == 0:
            sums = _multiply(buffers, barriers, count, sums, MEMBER, REPEATS, UNITS, STAGES, FORM, TWO_LEVEL, IN_BYTES, OPERAND)
            sums = hopper.warpgroup_mma_init(hopper.warpgroup_mma_wait(0, deps=(sums,)))
            release(barriers, count, STAGES)
            count += SPLIT
        sums = _multiply(buffers, barriers, count, sums, MEMBER, REPEATS, UNITS, STAGES, FORM, TWO_LEVEL, IN_BYTES, OPERAND)
        # Behind the wait for x, as the kernel before makes both; and not behind the loop, where they would be waited for.
        n0 = at_n * (ROWS * (WARPGROUPS // SPLIT)) + MEMBER * ROWS
        scales = _scales(pointers, bounds, n0, at_m * COLUMNS, ROWS, COLUMNS, SUMS, FORM, HAS_X_SCALE)
        for pair in range((end - begin - 1) // 2):
            for half in gl.static_range(2):
                sums = _multiply(
                    buffers, barriers, count + SPLIT, sums, MEMBER, REPEATS, UNITS, STAGES, FORM, TWO_LEVEL, IN_BYTES, OPERAND
                )
                sums = hopper.warpgroup_mma_init(hopper.warpgroup_mma_wait(1, deps=(sums,)))
                release(barriers, count, STAGES)
                count += SPLIT
        y = hopper.warpgroup_mma_wait(0, deps=(sums,))
        release(barriers, count, STAGES)
        count += SPLIT

        complete = True
        if SPLIT > 1:
            y = _add_up(y, handover, index, WARPGROUP, WARPGROUPS, ROWS, COLUMNS, SUMS)
            complete = WARPGROUP == 0
        if WARPGROUP == MEMBER:
            if SHARERS != "one":
                if end - begin < steps:
                    if SHARERS == "two":
                        y, complete = _meet(y, partial, counters, tile, begin, MEMBER, WARPGROUPS // SPLIT, ROWS, COLUMNS, SUMS)
                    else:
                        y, complete = _collect(
                            y, partial, counters, tile, begin, schedule, MEMBER, WARPGROUPS // SPLIT, ROWS, COLUMNS, SUMS
                        )
            if complete:
                _store(y, scales, pointers, bounds, alpha, n0, at_m * COLUMNS, ROWS, COLUMNS, SUMS, HAS_X_SCALE, HAS_BIAS)


@gluon.jit
def _add_up(
    y,
    handover,
    index,
    WARPGROUP: gl.constexpr,
    WARPGROUPS: gl.constexpr,
    ROWS: gl.constexpr,
    COLUMNS: gl.constexpr,
    SUMS: gl.constexpr,
):
    """The sums of warpgroups that share k, in the first one; of the others, nothing."""
    buffer, ready, free = handover
    y = _by_thread(y, ROWS, COLUMNS)
    if WARPGROUP > 0:
        mbarrier.wait(free.index(WARPGROUP - 1), (index & 1) ^ 1)
        buffer.index(WARPGROUP - 1).store(y)
        mbarrier.arrive(ready.index(WARPGROUP - 1), count=1)
    else:
        for other in gl.static_range(WARPGROUPS - 1):
            mbarrier.wait(ready.index(other), index & 1)
            y += buffer.index(other).load(y.type.layout)
            mbarrier.arrive(free.index(other), count=1)
    return _by_row(y, ROWS, COLUMNS, SUMS)


@gluon.jit
def _collect(
    y,
    partial,
    counters,
    tile,
    begin,
    schedule,
    WARPGROUP: gl.constexpr,
    WARPGROUPS: gl.constexpr,
    ROWS: gl.constexpr,
    COLUMNS: gl.constexpr,
    SUMS: gl.constexpr,
):
    """Leave a partial sum in the workspace; who brings the last one of a tile gets all. -> (sums, whether they are all)."""
    ctas, shared, tiles, steps, n_tiles, m_tiles = schedule
    SIZE: gl.constexpr = ROWS * COLUMNS
    y = _by_thread(y, ROWS, COLUMNS)
    at = gl.arange(0, SIZE, y.type.layout)
    # The first CTA of a tile begins it, as its last piece: slot 1. The others end or cross it, as their first: slot 0.
    slot = 2 * gl.program_id(0) + gl.where(begin == 0, 1, 0)
    gl.store(partial + (slot * WARPGROUPS + WARPGROUP).to(gl.int64) * SIZE + at, y)
    first = ((tile * steps + 1) * ctas - 1) // (shared * steps)
    last = ((tile * steps + steps) * ctas - 1) // (shared * steps)
    counter = counters + tile * WARPGROUPS + WARPGROUP
    gl.thread_barrier()
    complete = gl.atomic_add(counter, 1, sem="acq_rel", scope="gpu") == last - first
    if complete:
        y = gl.load(partial + ((2 * first + 1) * WARPGROUPS + WARPGROUP).to(gl.int64) * SIZE + at, cache_modifier=".cg")
        for cta in range(first + 1, last + 1):
            y += gl.load(partial + (2 * cta * WARPGROUPS + WARPGROUP).to(gl.int64) * SIZE + at, cache_modifier=".cg")
        gl.store(counter, 0)
    return _by_row(y, ROWS, COLUMNS, SUMS), complete


@gluon.jit
def _meet(
    y,
    partial,
    counters,
    tile,
    begin,
    WARPGROUP: gl.constexpr,
    WARPGROUPS: gl.constexpr,
    ROWS: gl.constexpr,
    COLUMNS: gl.constexpr,
    SUMS: gl.constexpr,
):
    """`_collect` of a tile that two CTAs share. Who finds the other's sums there keeps its own in registers."""
    SIZE: gl.constexpr = ROWS * COLUMNS
    y = _by_thread(y, ROWS, COLUMNS)
    counter = counters + tile * WARPGROUPS + WARPGROUP
    cta = gl.program_id(0)
    own = 2 * cta + gl.where(begin == 0, 1, 0)
    other = gl.where(begin == 0, 2 * cta + 2, 2 * cta - 1)
    complete = begin < 0
    if begin == 0:
        complete = gl.atomic_add(counter, 0, sem="acquire", scope="gpu") == 1
    if complete == 0:
        gl.store(partial + (own * WARPGROUPS + WARPGROUP).to(gl.int64) * SIZE + gl.arange(0, SIZE, y.type.layout), y)
        gl.thread_barrier()
        complete = gl.atomic_add(counter, 1, sem="acq_rel", scope="gpu") == 1
    if complete:
        y = _plus(y, partial + (other * WARPGROUPS + WARPGROUP).to(gl.int64) * SIZE, SIZE, 2)
        gl.store(counter, 0)
    return _by_row(y, ROWS, COLUMNS, SUMS), complete


@gluon.jit
def _plus(y, at, SIZE: gl.constexpr, HALVINGS: gl.constexpr):
    """y + what lies there, in parts, so that not all of it takes registers at once."""
    if HALVINGS == 0:
        return y + gl.load(at + gl.arange(0, SIZE, y.type.layout), cache_modifier=".cg")
    else:
        low, high = y.reshape([2, SIZE // 2]).permute([1, 0]).split()
        low = _plus(low, at, SIZE // 2, HALVINGS - 1)
        high = _plus(high, at + SIZE // 2, SIZE // 2, HALVINGS - 1)
        return gl.convert_layout(gl.join(low, high).permute([1, 0]).reshape([SIZE]), y.type.layout, assert_trivial=True)


@gluon.jit
def _by_thread(y, ROWS: gl.constexpr, COLUMNS: gl.constexpr):
    """Sums (ROWS, COLUMNS) in the order that threads hold them: four of one lane, then its warp's lanes, so 512 bytes a store.

    Bits of the index, the lowest first: column 0, row 3 (a lane's); columns 1, 2, rows 0 to 2 (lanes); rows 4 .., columns 3 ..
    """
    y = y.reshape([ROWS // 16, 2, 8, COLUMNS // 8, 4, 2])
    return y.permute([3, 0, 2, 4, 1, 5]).reshape([ROWS * COLUMNS])


@gluon.jit
def _by_row(y, ROWS: gl.constexpr, COLUMNS: gl.constexpr, SUMS: gl.constexpr):
    """Inverse of `_by_thread`."""
    y = y.reshape([COLUMNS // 8, ROWS // 16, 8, 4, 2, 2]).permute([1, 4, 2, 0, 3, 5])
    return gl.convert_layout(y.reshape([ROWS, COLUMNS]), SUMS, assert_trivial=True)


@gluon.jit
def _scales(
    pointers,
    bounds,
    n0,
    m0,
    ROWS: gl.constexpr,
    COLUMNS: gl.constexpr,
    SUMS: gl.constexpr,
    FORM: gl.constexpr,
    HAS_X_SCALE: gl.constexpr,
):
    """-> what the rows and what the columns of a tile are multiplied by."""
    out, row_scale, x_scale, bias, partial, counters = pointers
    m, n, stride = bounds
    # E4M3 holds value * 2**(6 - delta), the layout's row scale undoes value * 2**(1 - delta).
    GAIN: gl.constexpr = 2.0**-5 if FORM == "e4m3" else 1.0
    rows = n0 + gl.arange(0, ROWS, gl.SliceLayout(1, SUMS))
    of_rows = gl.load(row_scale + rows, mask=rows < n, other=0.0) * GAIN
    of_columns = of_rows
    if HAS_X_SCALE:
        columns = m0 + gl.arange(0, COLUMNS, _columns_layout(COLUMNS))
        of_columns = gl.load(x_scale + columns, mask=columns < m, other=0.0)
    return of_rows, of_columns


@gluon.jit
def _store(
    y,
    scales,
    pointers,
    bounds,
    alpha,
    n0,
    m0,
    ROWS: gl.constexpr,
    COLUMNS: gl.constexpr,
    SUMS: gl.constexpr,
    HAS_X_SCALE: gl.constexpr,
    HAS_BIAS: gl.constexpr,
):
    """The epilogue in float32, then y^T in rows of 128 bytes a warpgroup. Some columns at a time, or registers run out."""
    if COLUMNS > 64:
        of_rows, of_columns = scales
        HALF: gl.constexpr = COLUMNS // 2
        SUMS_OF_HALF: gl.constexpr = _halved(SUMS)
        low, high = y.reshape([ROWS, 2, HALF]).permute([0, 2, 1]).split()
        low = gl.convert_layout(low, SUMS_OF_HALF, assert_trivial=True)
        high = gl.convert_layout(high, SUMS_OF_HALF, assert_trivial=True)
        of_rows = gl.convert_layout(of_rows, gl.SliceLayout(1, SUMS_OF_HALF), assert_trivial=True)
        of_low, of_high = of_rows, of_rows
        if HAS_X_SCALE:
            of_low, of_high = of_columns.reshape([2, HALF]).permute([1, 0]).split()
        _store(low, (of_rows, of_low), pointers, bounds, alpha, n0, m0, ROWS, HALF, SUMS_OF_HALF, HAS_X_SCALE, HAS_BIAS)
        _store(
            high, (of_rows, of_high), pointers, bounds, alpha, n0, m0 + HALF, ROWS, HALF, SUMS_OF_HALF, HAS_X_SCALE, HAS_BIAS
        )
    else:
        _store_columns(y, scales, pointers, bounds, alpha, n0, m0, ROWS, COLUMNS, SUMS, HAS_X_SCALE, HAS_BIAS)


@gluon.constexpr_function
def _halved(sums):
    """The layout of half as many columns."""
    rows, columns, depth = sums.instr_shape
    return gl.NVMMADistributedLayout(sums.version, sums.warps_per_cta, [rows, columns // 2, depth])


@gluon.jit
def _store_columns(
    y,
    scales,
    pointers,
    bounds,
    alpha,
    n0,
    m0,
    ROWS: gl.constexpr,
    COLUMNS: gl.constexpr,
    SUMS: gl.constexpr,
    HAS_X_SCALE: gl.constexpr,
    HAS_BIAS: gl.constexpr,
):
    out, row_scale, x_scale, bias, partial, counters = pointers
    m, n, stride = bounds
    of_rows, of_columns = scales
    y = y * of_rows[:, None]
    if HAS_X_SCALE:
        y = y * gl.convert_layout(of_columns, gl.SliceLayout(0, SUMS))[None, :]
    y = y * alpha
    if HAS_BIAS:
        rows = n0 + gl.arange(0, ROWS, gl.SliceLayout(1, SUMS))
        y = y + gl.load(bias + rows, mask=rows < n, other=0.0).to(gl.float32)[:, None]
    LANES: gl.constexpr = 8 if ROWS == 64 else 16
    OUT: gl.constexpr = gl.BlockedLayout([1, 8], [32 // LANES, LANES], [4, 1], [1, 0])
    transposed = gl.convert_layout(y.to(out.dtype.element_ty).permute((1, 0)), OUT)
    at_m = m0 + gl.arange(0, COLUMNS, gl.SliceLayout(1, OUT))
    at_n = n0 + gl.arange(0, ROWS, gl.SliceLayout(0, OUT))
    at = out + at_m.to(gl.int64)[:, None] * stride + at_n[None, :]
    gl.store(at, transposed, mask=(at_m < m)[:, None] & (at_n < n)[None, :])


# Sizes that 16 divides, and those that are 1, would get kernels of their own: the same code, compiled anew.
@gluon.jit(do_not_specialize=["m", "ctas", "shared", "tiles", "steps", "n_tiles", "m_tiles"])
def wgmma_product(
    x_tiles,
    words,
    scales,
    out,
    row_scale,
    x_scale,
    bias,
    partial,
    counters,
    m,
    n,
    stride,
    ctas,
    shared,
    tiles,
    steps,
    n_tiles,
    m_tiles,
    alpha,
    REPEATS: gl.constexpr,
    WARPGROUPS: gl.constexpr,
    COLUMNS: gl.constexpr,
    UNITS: gl.constexpr,
    SPLIT: gl.constexpr,
    STAGES: gl.constexpr,
    GROUP: gl.constexpr,
    FORM: gl.constexpr,
    TWO_LEVEL: gl.constexpr,
    IN_BYTES: gl.constexpr,
    SHARERS: gl.constexpr,
    HAS_X_SCALE: gl.constexpr,
    HAS_BIAS: gl.constexpr,
    REGISTERS: gl.constexpr,
) -> None:  # type: ignore[no-untyped-def]
    x_buffer = gl.allocate_shared_memory(x_tiles.dtype, [STAGES] + x_tiles.block_type.shape, x_tiles.layout)
    words_buffer = gl.allocate_shared_memory(words.dtype, [STAGES] + words.block_type.shape, words.layout)
    scales_buffer = gl.allocate_shared_memory(scales.dtype, [STAGES] + scales.block_type.shape, scales.layout)
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for stage in gl.static_range(STAGES):
        mbarrier.init(full.index(stage), count=1)
        mbarrier.init(empty.index(stage), count=WARPGROUPS // SPLIT)
    if SPLIT > 1:
        SUMS_SIZE: gl.constexpr = 64 * REPEATS * COLUMNS
        handed = gl.allocate_shared_memory(gl.float32, [SPLIT - 1, SUMS_SIZE], gl.SwizzledSharedLayout(1, 1, 1, [0]))
        ready = gl.allocate_shared_memory(gl.int64, [SPLIT - 1, 1], mbarrier.MBarrierLayout())
        free = gl.allocate_shared_memory(gl.int64, [SPLIT - 1, 1], mbarrier.MBarrierLayout())
        for other in gl.static_range(SPLIT - 1):
            mbarrier.init(ready.index(other), count=1)
            mbarrier.init(free.index(other), count=1)
        handover = (handed, ready, free)
    else:
        handover = (full, full, full)  # not used
    hopper.fence_async_shared()
    buffers = (x_buffer, words_buffer, scales_buffer)
    barriers = (full, empty)
    schedule = (ctas, shared, tiles, steps, n_tiles, m_tiles)
    pointers = (out, row_scale, x_scale, bias, partial, counters)
    bounds = (m, n, stride)
    load = ((x_tiles, words, scales), buffers, barriers, schedule, SPLIT, STAGES, GROUP)
    sides = (buffers, barriers, handover, pointers, schedule, bounds, alpha)
    # The partitions are written out: tuples that hold FORM, a string, cannot be put together.
    # fmt: off
    if WARPGROUPS == 1:
        gl.warp_specialize(
            [
                (_consume, (sides, 0, WARPGROUPS, REPEATS, COLUMNS, UNITS, SPLIT, STAGES, GROUP,
                              FORM, TWO_LEVEL, IN_BYTES, SHARERS, HAS_X_SCALE, HAS_BIAS)),
                (_produce, load),
            ],
            [1],
            [24],
        )
    elif WARPGROUPS == 2:
        gl.warp_specialize(
            [
                (_consume, (sides, 0, WARPGROUPS, REPEATS, COLUMNS, UNITS, SPLIT, STAGES, GROUP,
                              FORM, TWO_LEVEL, IN_BYTES, SHARERS, HAS_X_SCALE, HAS_BIAS)),
                (_consume, (sides, 1, WARPGROUPS, REPEATS, COLUMNS, UNITS, SPLIT, STAGES, GROUP,
                              FORM, TWO_LEVEL, IN_BYTES, SHARERS, HAS_X_SCALE, HAS_BIAS)),
                (_produce, load),
            ],
            [4, 1],
            [REGISTERS, 24],
        )
    else:
        gl.warp_specialize(
            [
                (_consume, (sides, 0, WARPGROUPS, REPEATS, COLUMNS, UNITS, SPLIT, STAGES, GROUP,
                              FORM, TWO_LEVEL, IN_BYTES, SHARERS, HAS_X_SCALE, HAS_BIAS)),
                (_consume, (sides, 1, WARPGROUPS, REPEATS, COLUMNS, UNITS, SPLIT, STAGES, GROUP,
                              FORM, TWO_LEVEL, IN_BYTES, SHARERS, HAS_X_SCALE, HAS_BIAS)),
                (_consume, (sides, 2, WARPGROUPS, REPEATS, COLUMNS, UNITS, SPLIT, STAGES, GROUP,
                              FORM, TWO_LEVEL, IN_BYTES, SHARERS, HAS_X_SCALE, HAS_BIAS)),
                (_consume, (sides, 3, WARPGROUPS, REPEATS, COLUMNS, UNITS, SPLIT, STAGES, GROUP,
                              FORM, TWO_LEVEL, IN_BYTES, SHARERS, HAS_X_SCALE, HAS_BIAS)),
                (_produce, load),
            ],
            [4, 4, 4, 1],
            [REGISTERS, REGISTERS, REGISTERS, 24],
        )
    # fmt: on
