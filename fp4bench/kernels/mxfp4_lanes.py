"""bfloat16 -> MXFP4 on Hopper, as fast as memory is read: what `quantize.quantize` launches where x has no padding.

What ways of it reach of a copy's bandwidth, bytes read and written, 4096 x 8192 (NVIDIA H200, torch.neg between buffers beyond
L2, `baselines/NVIDIA-H200/kernels/2026-11-27_fp4-lanes.jsonl`), without a rotation and by Hadamard 64, and the instructions of
a value (SASS of sm_90a, whole kernel):

| way | of a copy | instructions |
|---|---|---|
| `fp4_tiles`: float32, 32 neighbours a thread (`tiles`) | 0.79, 0.57 | 16, 22 |
| float32, 8 neighbours a thread, rotations by `wgmma` from shared memory (`flat`) | 0.79, 0.72 | 17, 28 |
| the same, rounded in pairs (`packed`) | 0.93, 0.79 | 13, 26 |
| in pairs, rotations by `mma` of the registers that were loaded (`lanes, integer signs`) | 0.95, 0.85 | 10, 15 |
| this: signs by the fma that rounds, lost bits of two values at once (`lanes`) | 0.97, 0.88 | 10, 14 |

In the second and third way without a rotation ptxas moves each 16-byte load down to its first use, so that a thread has one on
its way; here all of a thread's loads, four or more, are operands of the same instructions. Fewer registers a thread, for more
threads, gained nothing.
"""

import torch
from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from fp4bench.formats import ScaleRule
from fp4bench.kernels import fp4_text, lanes
from fp4bench.kernels.lanes import Shape, beside, load_rows, of_cta, of_thread, quarters, registers_of, store_words
from fp4bench.kernels.rounding import power_of_two

ROTATIONS = (16, 32, 64, 128)
RULES = (ScaleRule.FLOOR, ScaleRule.CEIL, ScaleRule.EVEN, ScaleRule.RCEIL)


def shape(hadamard: int | None) -> Shape:
    """The launch for a rotation, of which four lanes hold one, or 32 values.

    More rows a warp share the matrix of a rotation: 16384 x 8192 by Hadamard 64 takes 84 us instead of 90. Without a rotation
    nothing is to be shared; by 128, of which a lane has 32 values of each row, warps that are CTAs of their own are best.
    """
    return {None: Shape(16), 64: Shape(16, warps=2, repeats=2), 128: Shape(32, warps=1)}.get(hadamard, Shape(8, 2, repeats=4))


def fits(x: torch.Tensor, rule: ScaleRule, hadamard: int | None) -> bool:
    """Whether x (m, k) can be quantized here: bfloat16, without gaps, its rows whole rotations (or 64 values)."""
    return hadamard in (None, *ROTATIONS) and rule in RULES and lanes.fits(x, shape(hadamard))


def quantize(
    x: torch.Tensor, codes: torch.Tensor, scales: torch.Tensor, rule: ScaleRule, hadamard: int | None, how: Shape | None = None
) -> None:
    """Write codes, uint8 (m, k / 2), and scales, E8M0 (m, k / 32), of x (m, k) that `fits`. how: default by `shape`."""
    rows = x.numel() // (4 * (how or shape(hadamard)).lane)
    how = how or shape(hadamard).of(rows)
    _quantize[(-(-rows // how.rows),)](
        x,
        codes.view(torch.int32),
        scales.view(torch.uint8),
        rows,
        LANE=how.lane,
        REPEATS=how.repeats,
        HADAMARD=hadamard or 1,
        RULE=rule.value,
        num_warps=how.warps,
    )


# --- PTX --------------------------------------------------------------------------------------------------------------------


@gluon.constexpr_function
def _rearranged(lane: int) -> str:
    """Neighbours to pairs. Operands: `lane` / 2 results, and as many registers of x."""
    count = lane // 2
    lines = []
    for first in range(0, count, 4):
        for i in range(4):
            low, high = count + first + i // 2, count + first + i // 2 + 2
            lines.append(f"prmt.b32 ${first + i}, ${low}, ${high}, {('0x5410', '0x7632')[i % 2]}")
    return fp4_text.block(*lines)


@gluon.constexpr_function
def _rotated(size: int) -> str:
    """Rows g and g + 8 rotated, as pairs. Operands, `lane` / 2 each: both rows' results, both rows, and the lane's number."""
    count = max(4, size // 8)
    lines, values = fp4_text.rotation(size, count, 2 * count)
    lines += fp4_text.ones()
    for row in range(2):
        for i in range(count):
            place = 8 * (i // 4) + i % 4
            lines += fp4_text.to_odd(f"${count * row + i}", values[row, place], values[row, place + 4])
    return fp4_text.block(*lines)


@gluon.constexpr_function
def _largest_pair() -> str:
    """The largest magnitudes of low and of high halves, NaN if one is. Operands: result, four pairs."""
    return fp4_text.block(
        ".reg .b32 a, b, c, d",
        *(f"abs.bf16x2 {name}, ${i + 1}" for i, name in enumerate("abcd")),
        "max.NaN.bf16x2 a, a, b",
        "max.NaN.bf16x2 c, c, d",
        "max.NaN.bf16x2 $0, a, c",
    )


@gluon.constexpr_function
def _largest_of_block(lane: int) -> str:
    """That of row g in the low half, of row g + 8 in the high one, from all lanes of a block. Operands: result, both rows."""
    lines = [".reg .b32 a, b", "prmt.b32 a, $1, $2, 0x5410", "prmt.b32 b, $1, $2, 0x7632", "max.u16x2 a, a, b"]
    for distance in (1, 2):  # as whole numbers, NaN is above all
        if lane * distance < 32:
            lines += [f"shfl.sync.bfly.b32 b, a, {distance}, 31, -1", "max.u16x2 a, a, b"]
    return fp4_text.block(*lines, "mov.b32 $0, a")


@gluon.constexpr_function
def _codes() -> str:
    """A word of codes. Operands: result, four pairs, and what they are multiplied with, in both halves."""
    return fp4_text.block(*fp4_text.word("$0", ["$1", "$2", "$3", "$4"], "$5"))


# --- Kernel -----------------------------------------------------------------------------------------------------------------


@gluon.jit(do_not_specialize=["rows"])
def _quantize(  # type: ignore[no-untyped-def]
    x,
    codes,
    scales,
    rows,
    LANE: gl.constexpr,
    REPEATS: gl.constexpr,
    HADAMARD: gl.constexpr,
    RULE: gl.constexpr,
):
    PAIRS: gl.constexpr = LANE // 2
    ROWS: gl.constexpr = gl.SliceLayout(1, registers_of(LANE, gl.num_warps()))
    x, codes, scales, left = of_cta(x, codes, scales, rows, LANE, REPEATS, 32)
    thread, t, row = of_thread(LANE, REPEATS)
    loaded = load_rows(x, row, t, left, LANE, 2 * REPEATS)
    for i in gl.static_range(REPEATS):
        if HADAMARD > 1:
            a, b = gl.inline_asm_elementwise(
                _rotated(HADAMARD),
                fp4_text.registers(2 * PAIRS, 3 * PAIRS),
                [loaded[2 * i], loaded[2 * i + 1], beside(thread % 32, loaded[2 * i])],
                dtype=(gl.int32, gl.int32),
                is_pure=True,
                pack=PAIRS,
            )
        else:
            a = _in_pairs(loaded[2 * i], LANE)
            b = _in_pairs(loaded[2 * i + 1], LANE)
        a = quarters(a)
        b = quarters(b)
        both = gl.inline_asm_elementwise(
            _largest_of_block(LANE), "=&r,r,r", [_of_lane(a, ROWS), _of_lane(b, ROWS)], dtype=gl.int32, is_pure=True, pack=1
        )
        _store(a, both << 16, codes, scales, row + 16 * i, t, left, LANE, HADAMARD, RULE)
        _store(b, both & -65536, codes, scales, row + 16 * i + 8, t, left, LANE, HADAMARD, RULE)


@gluon.jit
def _in_pairs(x, LANE: gl.constexpr):  # type: ignore[no-untyped-def]
    return gl.inline_asm_elementwise(
        _rearranged(LANE), fp4_text.registers(LANE // 2, LANE // 2), [x], dtype=gl.int32, is_pure=True, pack=LANE // 2
    )


@gluon.jit
def _larger(a, b):  # type: ignore[no-untyped-def]
    return gl.inline_asm_elementwise("max.u16x2 $0, $1, $2;", "=r,r,r", [a, b], dtype=gl.int32, is_pure=True, pack=1)


@gluon.jit
def _of_lane(pairs, ROWS: gl.constexpr):  # type: ignore[no-untyped-def]
    """The largest magnitudes of a lane's values, of the low halves and of the high ones. -> (threads)"""
    a0, a1, a2, a3 = pairs
    largest = gl.inline_asm_elementwise(_largest_pair(), "=&r,r,r,r,r", [a0, a1, a2, a3], dtype=gl.int32, is_pure=True, pack=1)
    return gl.convert_layout(gl.reduce(largest, 1, _larger), ROWS, assert_trivial=True)


@gluon.jit
def _store(pairs, largest, codes, scales, row, t, left, LANE: gl.constexpr, HADAMARD: gl.constexpr, RULE: gl.constexpr):  # type: ignore[no-untyped-def]
    """The scale of a block, from the bits of its largest magnitude, and codes by it."""
    a0, a1, a2, a3 = pairs
    UNIT: gl.constexpr = fp4_text.left_of_unit(HADAMARD)
    byte, multiplier = power_of_two(largest.to(gl.float32, bitcast=True) * UNIT, RULE)
    bits = (multiplier * UNIT).to(gl.int32, bitcast=True)
    twice = beside(bits | bits >> 16, a0)
    words = gl.inline_asm_elementwise(_codes(), "=&r,r,r,r,r,r", [a0, a1, a2, a3, twice], dtype=gl.int32, is_pure=True, pack=1)
    store_words(words, codes, row, t, left, LANE)
    first = (row < left) & (t % (32 // LANE) == 0)
    gl.store(scales + row * (LANE // 8) + t // (32 // LANE), byte.to(gl.uint8), mask=first)
