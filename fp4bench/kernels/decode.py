"""y = x W^T for a few rows of x: bfloat16 or float16 activations and FP4 weights, w4a16 at M from 1 to 16.

At these M the time is that of reading the weight once. So the weight goes from memory into registers in the order in which the
tensor cores take it (`weights`): a lane's 16-byte load is its A operand of four `mma.sync` of depth 16, W's rows being the rows
of the product and up to 8 rows of x its columns. No barrier and no change of W's layout are in the loop, nor shared memory, but
where x comes through slots that a warp has for itself (`slots`). The warps of a CTA split k, and their sums meet in shared
memory at the end, in a fixed order: the same bits on every run.

Under programmatic dependent launch (`pdl`) a kernel reads its first weights while the kernel before it still runs, and waits
for that one only before it reads x.

What was tried at m = 16, where 128 CTAs read all of x: o and qkv of Llama-3.3-70B, microseconds on an NVIDIA H100
(`baselines/NVIDIA-H100-80GB-HBM3/kernels/2026-11-27_decode-slots-trial.jsonl`) where no other is named:

- x by slots instead of an exchange among lanes: 14.2 and 17.9 instead of 16.5 and 19.5, on an H200 12.8 and 16.7 instead of
  16.0 and 18.4 (tune-6), where 14.3 and 16.3 were predicted: 346 instructions a unit instead of 396, and 152 instead of 198
  of LOP3, SEL, SHF, PRMT, ISETP and IADD3 among them (SASS, 4 tiles). What is read of x is the same.
- Two units of weights ahead instead of one, x by slots: at m = 1 12.9 instead of 13.6 and 16.1 instead of 16.7; at m = 16 14.4
  instead of 14.7, and with 5 tiles 21.0, which spills.
- Weights by shared memory too, three units in flight, to keep the registers: 15.4 and 22.0, though 13.5 and 15.5 were predicted
  of an H200. Why is not known.
- Twice the rows a CTA, which halve the reading of x, need a sum over two CTAs. 8 tiles of 8 warps without that, on half of the
  SMs: 24.0. Triton 3.6 has no multicast, by which two CTAs would read x once.

What scales cost at m = 1 (`2026-11-27_decode-scales-trial.jsonl`, an H100's and an H200's): multiplied from their half of a
register and not spread first, 16.3 us instead of 16.9 of NVFP4's qkv and 15.8 instead of 16.1 of MXFP4's (H100; at m = 16
NVFP4's, which spilled then, 18.6 instead of 18.3). Where nothing but the words is read from memory, down takes 41.2 us (H100):
MXFP4's scales add 2.4, their share of the bytes is 2.6, NVFP4's 6.5 where 5.2 is their share; on an H200 4.8 where 3.9 is.
Registers decide more: at 78 instead of 72 gate_up has six CTAs an SM where it needs 6.8, and takes 102 us, not 87 (H100; it has
72 since `slots.ask` steps from one address).

Scales asked for before the words of their unit, and words past L1 (`streams`): on an H200 MXFP4's down takes 31.0 us instead of
32.0, o 10.3 instead of 10.7, NVFP4's down 34.5 instead of 35.0 and qkv at m = 16 15.6 instead of 16.1
(`2026-11-28_decode-order-trial.jsonl`). In float16 MXFP4's qkv has no registers for that order: 8 bytes would be spilled.
"""

from dataclasses import dataclass
from typing import Any

import torch
from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from fp4bench.kernels import fragments, slots, streams
from fp4bench.kernels.overlap import BEGIN
from fp4bench.kernels.weights import UNIT_K, PreparedWeight

MOST_ROWS = 16  # of x


@dataclass(frozen=True)
class DecodeConfig:
    """How to launch. Any is right for any problem with at least `tiles` tiles of 16 weight rows.

    tiles: of 16 weight rows, that a CTA computes, 1 to 8. Each warp holds one unit of 64 columns of each in registers.
    warps: of a CTA, 4, 8 or 16; they split k.
    exchange: read x 16 bytes a lane and exchange them among lanes, instead of 4 bytes a lane where they are needed.
    ahead: hold x and scales of the next unit while one is computed.
    max_registers: of a thread, None for the compiler's choice.
    depth: units of weights in flight, 1 or 2; 2 is tuned with slots alone.
    slots: units of x on their way to a warp through shared memory (`slots`), up to 4, instead of `exchange` and `ahead`; 0, or
        where x does not lie in whole units of aligned 16 bytes: straight into registers.
    """

    tiles: int = 4
    warps: int = 8
    exchange: bool = False
    ahead: bool = False
    max_registers: int | None = None
    depth: int = 1
    slots: int = 0

    def __post_init__(self) -> None:
        if not 1 <= self.tiles <= 8 or self.warps not in (4, 8, 16) or self.depth not in (1, 2):
            raise ValueError(f"{self}: tiles is 1 to 8, warps 4, 8 or 16, depth 1 or 2")
        if not 0 <= self.slots <= slots.MOST_SLOTS:
            raise ValueError(f"{self}: slots is 0 to {slots.MOST_SLOTS}")


def candidates(m: int) -> list[DecodeConfig]:
    """The launches that are worth measuring for m rows of x, whatever the weight."""
    found = []
    for tiles, warps in ((2, 8), (2, 16), (3, 16), (4, 4), (4, 8), (4, 16), (5, 8), (5, 16), (7, 4)):
        found.append(DecodeConfig(tiles, warps))
        found.append(DecodeConfig(tiles, warps, ahead=True))
        if m > 2:
            found.append(DecodeConfig(tiles, warps, exchange=True, ahead=True))
        found.append(DecodeConfig(tiles, warps, slots=2))
        found.append(DecodeConfig(tiles, warps, slots=4, depth=2))
    return found


def fits(m: int, weight: PreparedWeight) -> bool:
    """Whether this kernel computes m rows of x by `weight`."""
    return 1 <= m <= MOST_ROWS and weight.rest is None


def gemm(
    x: torch.Tensor,
    weight: PreparedWeight,
    out: torch.Tensor,
    *,
    config: DecodeConfig,
    alpha: float = 1.0,
    bias: torch.Tensor | None = None,
    pdl: bool = False,
) -> torch.Tensor:
    """out = (x W^T) * alpha + bias, rounded once from float32. bfloat16 or float16 x (m, k), bias (n), out (m, n) of x's type.

    Rows of x and out may be strided. Launches on the current stream and neither waits nor allocates.
    pdl: overlap with the kernel before and after; the weight must have been complete before the kernel before was launched.
    """
    grid, arguments, constants = _launch(x, weight, out, config, alpha, bias, pdl)
    _decode[grid](*arguments, **constants)
    return out


def compile_only(x: torch.Tensor, weight: PreparedWeight, out: torch.Tensor, *, config: DecodeConfig, pdl: bool) -> None:
    """Put what `gemm` would launch into Triton's cache. The tensors are not read: any device will do."""
    grid, arguments, constants = _launch(x, weight, out, config, 1.0, None, pdl)
    _decode.warmup(*arguments, grid=grid, **constants)


def _launch(
    x: torch.Tensor,
    weight: PreparedWeight,
    out: torch.Tensor,
    config: DecodeConfig,
    alpha: float,
    bias: torch.Tensor | None,
    pdl: bool,
) -> tuple[tuple[int], tuple[Any, ...], dict[str, Any]]:
    """-> grid, arguments and constants of the kernel."""
    if not weight.fits(x.dtype):
        raise ValueError(f"the weight was prepared for {weight.operand}, words in {weight.order}, not for {x.dtype}")
    m, k = x.shape
    tiles = min(config.tiles, weight.tiles)
    columns = 8 if m <= 8 else 16
    steps = -(-weight.units // config.warps)
    in_chunks = k % UNIT_K == 0 and x.stride(0) % 8 == 0 and x.data_ptr() % 16 == 0
    arguments = (
        x,
        weight.words,
        weight.scales,
        weight.row_scale,
        out if bias is None else bias,
        out,
        alpha,
        m,
        weight.n,
        k,
        weight.tiles,
        x.stride(0),
        out.stride(0),
    )
    constants = {
        "UNITS": weight.units,
        "STEPS": steps,
        "TILES": tiles,
        "WARPS": config.warps,
        "COLUMNS": columns,
        "TWO_LEVEL": weight.format.has_tensor_scale,
        "HAS_BIAS": bias is not None,
        "ALL_COLUMNS": k % UNIT_K == 0,
        "PAIRS": x.stride(0) % 2 == 0 and k % 2 == 0 and x.data_ptr() % 4 == 0,
        "EXCHANGE": config.exchange and in_chunks,
        "AHEAD": config.ahead,
        "DEPTH": min(config.depth, steps),
        "SLOTS": min(config.slots, steps) if in_chunks else 0,
        "num_warps": config.warps,
        "launch_pdl": pdl,
        "maxnreg": config.max_registers,
    }
    return (-(-weight.tiles // tiles),), arguments, constants


# --- PTX --------------------------------------------------------------------------------------------------------------------


@gluon.constexpr_function
def _product(columns: int, two_level: bool, half: bool) -> str:
    """acc += A B for one unit of a tile: 4 words, their scales, and x for `columns` columns.

    Operands, four registers each: columns / 8 accumulators; words; scales (four copies of one register; NVFP4 a second four);
    x of columns 0 to 31 and 32 to 63 of the unit, for each 8 columns; the accumulators again.
    """
    words = columns // 2
    scales = (words + 4, words + 8)
    x = words + (12 if two_level else 8)
    text = fragments.SLAB_REGISTERS
    for slab in range(4):
        if slab == 0 or (two_level and slab == 2):
            text += fragments.multipliers(f"${scales[slab // 2]}", two_level=two_level, half=half)
        text += fragments.slab_product(slab, slab % 2 if two_level else slab // 2, columns, words, x, half=half)
    return "{\n" + text + "}"


@gluon.constexpr_function
def _product_constraints(columns: int, two_level: bool) -> str:
    registers = columns // 2
    inputs = 4 + (8 if two_level else 4) + columns
    return ",".join(["=&f"] * registers + ["r"] * inputs + [str(i) for i in range(registers)])


@gluon.constexpr_function
def _transpose() -> str:
    """A 4 x 4 transpose among the four lanes of a group: register i of lane t becomes register t of lane i.

    Operands: four results, four registers, and four copies of the lane.
    """
    return """{
.reg .pred p, q;
.reg .b32 s, b, a0, a1, a2, a3;
and.b32 b, $8, 1; setp.ne.u32 p, b, 0;
and.b32 b, $8, 2; setp.ne.u32 q, b, 0;
selp.b32 s, $4, $5, p; selp.b32 a0, $5, $4, p; shfl.sync.bfly.b32 s, s, 1, 31, -1; selp.b32 a1, a0, s, p; selp.b32 a0, s, a0, p;
selp.b32 s, $6, $7, p; selp.b32 a2, $7, $6, p; shfl.sync.bfly.b32 s, s, 1, 31, -1; selp.b32 a3, a2, s, p; selp.b32 a2, s, a2, p;
selp.b32 s, a0, a2, q; selp.b32 b, a2, a0, q; shfl.sync.bfly.b32 s, s, 2, 31, -1; selp.b32 $2, b, s, q; selp.b32 $0, s, b, q;
selp.b32 s, a1, a3, q; selp.b32 b, a3, a1, q; shfl.sync.bfly.b32 s, s, 2, 31, -1; selp.b32 $3, b, s, q; selp.b32 $1, s, b, q;
}"""


@gluon.constexpr_function
def _younger(step: int, last: int, slots: int) -> int:
    """Units that were asked for after that of `step` of the `last` ones: those beyond the slots are asked for in turn."""
    return slots - 1 - step + min(step, max(0, last - slots))


# --- Kernel -----------------------------------------------------------------------------------------------------------------


@gluon.jit(do_not_specialize=["m", "n", "k", "tiles"])
def _decode(
    x,
    words,
    scales,
    row_scale,
    bias,
    out,
    alpha,
    m,
    n,
    k,
    tiles,
    x_stride,
    out_stride,
    UNITS: gl.constexpr,
    STEPS: gl.constexpr,
    TILES: gl.constexpr,
    WARPS: gl.constexpr,
    COLUMNS: gl.constexpr,
    TWO_LEVEL: gl.constexpr,
    HAS_BIAS: gl.constexpr,
    ALL_COLUMNS: gl.constexpr,
    PAIRS: gl.constexpr,
    EXCHANGE: gl.constexpr,
    AHEAD: gl.constexpr,
    DEPTH: gl.constexpr,
    SLOTS: gl.constexpr,
):  # type: ignore[no-untyped-def]
    # Four registers a thread: a lane's words of a unit, its x of 32 columns, or its accumulators.
    FOUR: gl.constexpr = gl.BlockedLayout([1, 4], [32, 1], [WARPS, 1], [1, 0])
    thread = gl.arange(0, 32 * WARPS, layout=gl.SliceLayout(1, FOUR))
    lane = thread % 32
    warp = thread // 32
    # The last CTA computes rows of the one before it again where the tiles do not divide: the same bits, stored twice.
    first = gl.minimum(gl.program_id(0) * TILES, tiles - TILES).to(gl.int64)
    four = gl.arange(0, 4, layout=gl.SliceLayout(0, FOUR))[None, :]
    words_at = words + first * (UNITS * 128) + (warp * 128 + lane * 4)[:, None] + four
    scales_at = scales.to(gl.pointer_type(gl.int64), bitcast=True) if TWO_LEVEL else scales
    scales_at = scales_at + first * (UNITS * 8) + (warp * 8 + lane // 4)

    # Where the sums of the warps meet, W / 4 accumulators a place; before, slots.
    GROUP: gl.constexpr = WARPS // 4
    SUMS: gl.constexpr = (TILES * (COLUMNS // 8) + GROUP - 1) // GROUP
    RING: gl.constexpr = (SLOTS * slots.slot_bytes(COLUMNS) + GROUP * 512 - 1) // (GROUP * 512)
    PLACES: gl.constexpr = SUMS if SUMS > RING else RING
    shared = gl.allocate_shared_memory(gl.float32, [PLACES, GROUP, WARPS, 128], gl.SwizzledSharedLayout(1, 1, 1, [2, 1, 0]))
    acc = ()  # type: ignore[var-annotated]
    for _ in gl.static_range(TILES * (COLUMNS // 8)):
        acc = acc + (gl.zeros([32 * WARPS, 4], gl.float32, FOUR),)
    HALF: gl.constexpr = x.dtype.element_ty == gl.float16
    if SLOTS > 0:
        acc = _through_slots(
            acc,
            x,
            words_at,
            scales_at,
            thread,
            m,
            x_stride,
            UNITS,
            STEPS,
            TILES,
            WARPS,
            COLUMNS,
            TWO_LEVEL,
            HALF,
            DEPTH,
            SLOTS,
            FOUR,
        )
    else:
        acc = _through_registers(
            acc,
            x,
            words_at,
            scales_at,
            thread,
            m,
            k,
            x_stride,
            UNITS,
            STEPS,
            TILES,
            WARPS,
            COLUMNS,
            TWO_LEVEL,
            HALF,
            ALL_COLUMNS,
            PAIRS,
            EXCHANGE,
            AHEAD,
            DEPTH,
            FOUR,
        )
    _store(acc, shared, row_scale, bias, out, alpha, first, m, n, out_stride, TILES, WARPS, COLUMNS, HAS_BIAS)


@gluon.jit
def _through_slots(
    acc,
    x,
    words_at,
    scales_at,
    thread,
    m,
    x_stride,
    UNITS: gl.constexpr,
    STEPS: gl.constexpr,
    TILES: gl.constexpr,
    WARPS: gl.constexpr,
    COLUMNS: gl.constexpr,
    TWO_LEVEL: gl.constexpr,
    HALF: gl.constexpr,
    DEPTH: gl.constexpr,
    SLOTS: gl.constexpr,
    FOUR: gl.constexpr,
):  # type: ignore[no-untyped-def]
    """The sums of each warp's units, x through its slots."""
    warp = thread // 32
    queue = ()  # type: ignore[var-annotated]
    for step in gl.static_range(DEPTH):
        queue = queue + _load_unit(words_at, scales_at, step, warp, UNITS, WARPS, TILES, not HALF)
    # Everything above is the weight's. x may still be written by the kernel before.
    gl.inline_asm_elementwise(BEGIN, "=r,r,~{memory}", [thread], dtype=gl.int32, is_pure=False, pack=1)
    start = slots.first(warp, SLOTS, COLUMNS)
    for i in gl.static_range(SLOTS):
        slots.ask(start + i * slots.slot_bytes(COLUMNS), x, i, thread, m, x_stride, UNITS, WARPS, COLUMNS)
    slot = start
    LOOP: gl.constexpr = (STEPS - DEPTH) // DEPTH * DEPTH
    for turn in range(0, LOOP, DEPTH):
        for i in gl.static_range(DEPTH):
            b = slots.take(slot, thread, SLOTS - 1, COLUMNS, FOUR)
            slots.ask(slot, x, turn + i + SLOTS, thread, m, x_stride, UNITS, WARPS, COLUMNS)
            acc = _multiply(queue, b, acc, TILES, COLUMNS, TWO_LEVEL, HALF)
            queue = queue[2 * TILES :] + _load_unit(words_at, scales_at, turn + i + DEPTH, warp, UNITS, WARPS, TILES, not HALF)
            slot = slots.following(slot, start, SLOTS, COLUMNS)
    LAST: gl.constexpr = STEPS - LOOP
    for i in gl.static_range(LAST):
        b = slots.take(slot, thread, _younger(i, LAST, SLOTS), COLUMNS, FOUR)
        if i + SLOTS < LAST:
            slots.ask(slot, x, LOOP + i + SLOTS, thread, m, x_stride, UNITS, WARPS, COLUMNS)
        acc = _multiply(queue, b, acc, TILES, COLUMNS, TWO_LEVEL, HALF)
        queue = queue[2 * TILES :]
        if i + DEPTH < LAST:
            queue = queue + _load_unit(words_at, scales_at, LOOP + i + DEPTH, warp, UNITS, WARPS, TILES, not HALF)
        slot = slots.following(slot, start, SLOTS, COLUMNS)
    slots.drain(thread)
    return acc


@gluon.jit
def _through_registers(
    acc,
    x,
    words_at,
    scales_at,
    thread,
    m,
    k,
    x_stride,
    UNITS: gl.constexpr,
    STEPS: gl.constexpr,
    TILES: gl.constexpr,
    WARPS: gl.constexpr,
    COLUMNS: gl.constexpr,
    TWO_LEVEL: gl.constexpr,
    HALF: gl.constexpr,
    ALL_COLUMNS: gl.constexpr,
    PAIRS: gl.constexpr,
    EXCHANGE: gl.constexpr,
    AHEAD: gl.constexpr,
    DEPTH: gl.constexpr,
    FOUR: gl.constexpr,
):  # type: ignore[no-untyped-def]
    """The sums of each warp's units, x straight into registers."""
    warp = thread // 32
    # The next DEPTH units: words and scales of each tile. A queue, whose every turn the loop unrolls.
    queue = ()  # type: ignore[var-annotated]
    for step in gl.static_range(DEPTH):
        queue = queue + _load_unit(words_at, scales_at, step, warp, UNITS, WARPS, TILES, not HALF)
    # Everything above is the weight's. x may still be written by the kernel before.
    gl.inline_asm_elementwise(BEGIN, "=r,r,~{memory}", [thread], dtype=gl.int32, is_pure=False, pack=1)
    b = _load_x(x, 0, thread, m, k, x_stride, UNITS, WARPS, COLUMNS, ALL_COLUMNS, PAIRS, EXCHANGE, FOUR)
    LOOP: gl.constexpr = (STEPS - DEPTH) // DEPTH * DEPTH
    for start in range(0, LOOP, DEPTH):
        for i in gl.static_range(DEPTH):
            if AHEAD:
                next_b = _load_x(
                    x, start + i + 1, thread, m, k, x_stride, UNITS, WARPS, COLUMNS, ALL_COLUMNS, PAIRS, EXCHANGE, FOUR
                )
            acc = _multiply(queue, b, acc, TILES, COLUMNS, TWO_LEVEL, HALF)
            queue = queue[2 * TILES :] + _load_unit(words_at, scales_at, start + i + DEPTH, warp, UNITS, WARPS, TILES, not HALF)
            if not AHEAD:
                next_b = _load_x(
                    x, start + i + 1, thread, m, k, x_stride, UNITS, WARPS, COLUMNS, ALL_COLUMNS, PAIRS, EXCHANGE, FOUR
                )
            b = next_b
    for i in gl.static_range(STEPS - LOOP):
        if AHEAD and i + 1 < STEPS - LOOP:
            next_b = _load_x(x, LOOP + i + 1, thread, m, k, x_stride, UNITS, WARPS, COLUMNS, ALL_COLUMNS, PAIRS, EXCHANGE, FOUR)
        acc = _multiply(queue, b, acc, TILES, COLUMNS, TWO_LEVEL, HALF)
        queue = queue[2 * TILES :]
        if i + DEPTH < STEPS - LOOP:
            queue = queue + _load_unit(words_at, scales_at, LOOP + i + DEPTH, warp, UNITS, WARPS, TILES, not HALF)
        if i + 1 < STEPS - LOOP:
            if not AHEAD:
                next_b = _load_x(
                    x, LOOP + i + 1, thread, m, k, x_stride, UNITS, WARPS, COLUMNS, ALL_COLUMNS, PAIRS, EXCHANGE, FOUR
                )
            b = next_b
    return acc


@gluon.jit
def _load_unit(
    words_at,
    scales_at,
    step,
    warp,
    UNITS: gl.constexpr,
    WARPS: gl.constexpr,
    TILES: gl.constexpr,
    SCALES_FIRST: gl.constexpr,
):  # type: ignore[no-untyped-def]
    """A unit of each tile: int32 [threads, 4], the lane's words, and int32 or int64 [threads], the scales of rows g and g + 8.

    Beyond the last unit zeros. SCALES_FIRST: all tiles' scales are asked for before their words.
    """
    MASKED: gl.constexpr = UNITS % WARPS != 0
    inside = step * WARPS + warp < UNITS
    scales = ()  # type: ignore[var-annotated]
    if SCALES_FIRST:
        for tile in gl.static_range(TILES):
            scales = scales + (streams.load_scales(scales_at + tile * (UNITS * 8) + step * (WARPS * 8), inside, MASKED),)
    unit = ()  # type: ignore[var-annotated]
    for tile in gl.static_range(TILES):
        w = streams.load_words(words_at + tile * (UNITS * 128) + step * (WARPS * 128), inside, MASKED)
        if not SCALES_FIRST:
            scales = scales + (streams.load_scales(scales_at + tile * (UNITS * 8) + step * (WARPS * 8), inside, MASKED),)
        unit = unit + (w, scales[tile])
    return unit


@gluon.jit
def _load_x(
    x,
    step,
    thread,
    m,
    k,
    x_stride,
    UNITS: gl.constexpr,
    WARPS: gl.constexpr,
    COLUMNS: gl.constexpr,
    ALL_COLUMNS: gl.constexpr,
    PAIRS: gl.constexpr,
    EXCHANGE: gl.constexpr,
    FOUR: gl.constexpr,
):  # type: ignore[no-untyped-def]
    """x as the B operand of a unit. -> for each 8 rows of x two int32 [threads, 4], of 32 columns of the unit each."""
    lane = thread % 32
    unit = step * WARPS + thread // 32
    t = (lane % 4)[:, None]
    four = gl.arange(0, 4, layout=gl.SliceLayout(0, FOUR))[None, :]
    b = ()  # type: ignore[var-annotated]
    for i in gl.static_range(COLUMNS // 4):
        row = (lane // 4 + 8 * (i // 2))[:, None]
        inside = row < m
        column = unit[:, None] * 64 + 32 * (i % 2)
        if UNITS % WARPS != 0:
            inside = inside & (unit < UNITS)[:, None]
        if EXCHANGE:
            pairs = x.to(gl.pointer_type(gl.int32), bitcast=True) + row * (x_stride // 2) + column // 2 + 4 * t + four
            raw = gl.load(pairs, mask=inside, other=0)
            lanes = lane[:, None] + gl.zeros_like(raw)
            turned = gl.inline_asm_elementwise(
                _transpose(), "=&r,=&r,=&r,=&r,r,r,r,r,r,r,r,r", [raw, lanes], dtype=gl.int32, is_pure=True, pack=4
            )
            b = b + (turned,)
        else:
            column = column + 8 * four + 2 * t
            b = b + (_load_pairs(x + row * x_stride + column, inside, column, k, ALL_COLUMNS and UNITS % WARPS == 0, PAIRS),)
    return b


@gluon.jit
def _load_pairs(at, inside, column, k, ALL_COLUMNS: gl.constexpr, PAIRS: gl.constexpr):  # type: ignore[no-untyped-def]
    """Two neighbours of 16 bits at each address, 0 from column k on. -> int32."""
    if PAIRS:
        if not ALL_COLUMNS:
            inside = inside & (column < k)
        return gl.load(at.to(gl.pointer_type(gl.int32), bitcast=True), mask=inside, other=0)
    at = at.to(gl.pointer_type(gl.int16), bitcast=True)
    even = gl.load(at, mask=inside & (column < k), other=0).to(gl.int32)
    odd = gl.load(at + 1, mask=inside & (column + 1 < k), other=0).to(gl.int32)
    return (even & 0xFFFF) | (odd << 16)


@gluon.jit
def _multiply(queue, b, acc, TILES: gl.constexpr, COLUMNS: gl.constexpr, TWO_LEVEL: gl.constexpr, HALF: gl.constexpr):  # type: ignore[no-untyped-def]
    """The first unit of the queue, added to its accumulators. -> for each tile COLUMNS / 8 float32 [threads, 4]."""
    sums = ()  # type: ignore[var-annotated]
    for tile in gl.static_range(TILES):
        w = queue[2 * tile]
        s = queue[2 * tile + 1]
        if TWO_LEVEL:
            scales = (
                (s & 0xFFFFFFFF).to(gl.int32)[:, None] + gl.zeros_like(w),
                (s >> 32).to(gl.int32)[:, None] + gl.zeros_like(w),
            )
        else:
            scales = (s[:, None] + gl.zeros_like(w),)
        if COLUMNS == 8:
            one = gl.inline_asm_elementwise(
                _product(COLUMNS, TWO_LEVEL, HALF),
                _product_constraints(COLUMNS, TWO_LEVEL),
                (w,) + scales + b + (acc[tile],),
                dtype=gl.float32,
                is_pure=True,
                pack=4,
            )
            sums = sums + (one,)
        else:
            sums = sums + gl.inline_asm_elementwise(
                _product(COLUMNS, TWO_LEVEL, HALF),
                _product_constraints(COLUMNS, TWO_LEVEL),
                (w,) + scales + b + (acc[2 * tile], acc[2 * tile + 1]),
                dtype=(gl.float32, gl.float32),
                is_pure=True,
                pack=4,
            )
    return sums


@gluon.jit
def _store(
    acc,
    shared,
    row_scale,
    bias,
    out,
    alpha,
    first,
    m,
    n,
    out_stride,
    TILES: gl.constexpr,
    WARPS: gl.constexpr,
    COLUMNS: gl.constexpr,
    HAS_BIAS: gl.constexpr,
):  # type: ignore[no-untyped-def]
    """Sum over the warps, scale, and store: W / 4 accumulators at a time, an element a thread."""
    BLOCKS: gl.constexpr = COLUMNS // 8
    GROUP: gl.constexpr = WARPS // 4
    ROUNDS: gl.constexpr = (TILES * BLOCKS + GROUP - 1) // GROUP
    for i in gl.static_range(TILES * BLOCKS):
        shared.index(i // GROUP).slice(i % GROUP, 1, dim=0).store(gl.reshape(acc[i], [1, WARPS, 128]))
    BY_WARP: gl.constexpr = gl.BlockedLayout([1, WARPS, 1], [1, 1, 32], [GROUP, 1, 4], [2, 1, 0])
    element = gl.arange(0, 128, layout=gl.SliceLayout(0, gl.SliceLayout(1, BY_WARP)))[None, :]
    lane = element // 4
    for i in gl.static_range(ROUNDS):
        sums = gl.sum(shared.index(i).load(BY_WARP), 1)
        which = i * GROUP + gl.arange(0, GROUP, layout=gl.SliceLayout(1, gl.SliceLayout(1, BY_WARP)))[:, None]
        row = (first + which // BLOCKS) * 16 + lane // 4 + 8 * (element % 4 // 2)
        column = 8 * (which % BLOCKS) + 2 * (lane % 4) + element % 2
        inside = (row < n) & (column < m) & (which < TILES * BLOCKS)
        y = sums * gl.load(row_scale + row, mask=inside, other=0.0) * alpha
        if HAS_BIAS:
            y += gl.load(bias + row, mask=inside, other=0.0).to(gl.float32)
        gl.store(out + column * out_stride + row, y.to(out.dtype.element_ty), mask=inside)
