"""bfloat16 -> NVFP4 on Hopper, as `mxfp4_lanes`: one pass where the encode scale is given, a second after it was computed.

Scales are no powers of two here. So largest magnitudes and products with the scale's inverse are float32, and only what is
rounded to codes is a pair. With a given encode scale 4096 x 8192 reaches 0.93 of a copy's bandwidth, by Hadamard 64 0.85, by 32
0.77 (NVIDIA H200, as `mxfp4_lanes` says).
"""

import torch
from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from fp4bench.kernels import fp4_text, lanes
from fp4bench.kernels.lanes import Shape, beside, load_rows, of_cta, of_thread, quarters, registers_of, store_words
from fp4bench.kernels.rounding import encode_scale_of, two_level

# By 16 a NaN would leave its rotation (`fp4_text`), and so its block of 16; by 128 a lane has two blocks.
ROTATIONS = (32, 64)


def shape(hadamard: int | None) -> Shape:
    """The launch for a rotation: as those of `mxfp4_lanes`, but rows share the inverse of the encode scale even without one."""
    return {None: Shape(16, warps=2, repeats=2), 64: Shape(16, warps=2, repeats=4)}.get(hadamard, Shape(8, 2, repeats=4))


def fits(x: torch.Tensor, hadamard: int | None) -> bool:
    """Whether x (m, k) can be quantized here: bfloat16, without gaps, its rows whole rotations (or 64 values)."""
    return hadamard in (None, *ROTATIONS) and lanes.fits(x, shape(hadamard))


def quantize(
    x: torch.Tensor,
    codes: torch.Tensor,
    scales: torch.Tensor,
    tensor_scale: torch.Tensor,
    source: torch.Tensor | float | None,
    parts: int,
    given: str,
    hadamard: int | None,
    how: Shape | None = None,
) -> None:
    """Write codes, uint8 (m, k / 2), scales, E4M3 (m, k / 16), and the encode scale, of x (m, k) that `fits`.

    source, parts, given: as `quantize` makes them of what its caller gave. how: default by `shape`.
    """
    rows = x.numel() // (4 * (how or shape(hadamard)).lane)
    how = how or shape(hadamard).of(rows)
    _quantize[(-(-rows // how.rows),)](
        x,
        codes.view(torch.int32),
        scales.view(torch.uint8),
        tensor_scale,
        source,
        parts,
        rows,
        LANE=how.lane,
        REPEATS=how.repeats,
        HADAMARD=hadamard or 1,
        GIVEN=given,
        num_warps=how.warps,
        enable_fp_fusion=False,
    )


def largest(x: torch.Tensor, parts: torch.Tensor, hadamard: int | None) -> None:
    """Write the bits of the largest magnitudes, float32, of x that `fits`, rotated. parts: int32, one a program."""
    rows = x.numel() // (4 * shape(hadamard).lane)
    how = shape(hadamard).of(rows)
    _largest_of_all[(parts.numel(),)](
        x,
        parts,
        rows,
        LANE=how.lane,
        REPEATS=how.repeats,
        HADAMARD=hadamard or 1,
        num_warps=how.warps,
    )


# --- PTX --------------------------------------------------------------------------------------------------------------------
# Values 0 to 3 of each eight neighbours of a lane are in one tensor, values 4 to 7 in another, `lane` / 2 registers each.


@gluon.constexpr_function
def _unpacked(lane: int) -> str:
    """Operands: `lane` / 2 results of each tensor, and as many registers of x."""
    count = lane // 2
    lines = []
    for first in range(0, count, 4):
        for i in range(4):
            for half in range(2):
                result, operand = count * half + first + i, 2 * count + first + 2 * half + i // 2
                lines.append((f"shl.b32 ${result}, ${operand}, 16", f"and.b32 ${result}, ${operand}, 0xffff0000")[i % 2])
    return fp4_text.block(*lines)


@gluon.constexpr_function
def _rotated(size: int) -> str:
    """Operands, `lane` / 2 each: both tensors of row g, both of row g + 8, both rows of x, and the lane's number."""
    count = max(4, size // 8)
    lines, values = fp4_text.rotation(size, count, 4 * count)
    for row in range(2):
        for half in range(2):
            for i in range(count):
                place = 8 * (i // 4) + 4 * half + i % 4
                lines.append(f"mov.b32 ${count * (2 * row + half) + i}, {values[row, place]}")
    return fp4_text.block(*lines)


@gluon.constexpr_function
def _largest() -> str:
    """Bits of the largest magnitude of eight values, NaN above all. Operands: result, the values."""
    lines = [".reg .b32 a, b", "abs.f32 a, $1"]
    for i in range(2, 9):
        lines += [f"abs.f32 b, ${i}", "max.NaN.f32 a, a, b"]
    return fp4_text.block(*lines, "mov.b32 $0, a")


@gluon.constexpr_function
def _codes() -> str:
    """A word of codes. Operands: result, eight values, and what they are multiplied with."""
    lines = [".reg .b32 u, low, high, a0, a1, a2, a3", *fp4_text.ones()]
    for i in range(4):
        lines += [f"mul.rn.f32 low, ${i + 1}, $9", f"mul.rn.f32 high, ${i + 5}, $9"]
        lines += fp4_text.to_odd(f"a{i}", "low", "high")
    return fp4_text.block(*lines, *fp4_text.word("$0", ["a0", "a1", "a2", "a3"], None))


# --- Kernel -----------------------------------------------------------------------------------------------------------------


@gluon.jit(do_not_specialize=["parts", "rows"])
def _quantize(  # type: ignore[no-untyped-def]
    x,
    codes,
    scales,
    tensor_scale,
    source,
    parts,
    rows,
    LANE: gl.constexpr,
    REPEATS: gl.constexpr,
    HADAMARD: gl.constexpr,
    GIVEN: gl.constexpr,
):
    ROWS: gl.constexpr = gl.SliceLayout(1, registers_of(LANE, gl.num_warps()))
    x, codes, scales, left = of_cta(x, codes, scales, rows, LANE, REPEATS, 16)
    thread, t, row = of_thread(LANE, REPEATS)
    loaded = load_rows(x, row, t, left, LANE, 2 * REPEATS)
    s = _encode_scale(source, parts, GIVEN)
    gl.store(tensor_scale, s, mask=gl.program_id(0) == 0)
    for i in gl.static_range(REPEATS):
        low, high = _eights(loaded[2 * i], loaded[2 * i + 1], thread % 32, LANE, HADAMARD)
        _store(low, s, codes, scales, row + 16 * i, t, left, LANE, HADAMARD, ROWS)
        _store(high, s, codes, scales, row + 16 * i + 8, t, left, LANE, HADAMARD, ROWS)


@gluon.jit(do_not_specialize=["rows"])
def _largest_of_all(x, parts, rows, LANE: gl.constexpr, REPEATS: gl.constexpr, HADAMARD: gl.constexpr):  # type: ignore[no-untyped-def]
    """Programs take tiles of rows in turn."""
    WARPS: gl.constexpr = gl.num_warps()
    ROWS: gl.constexpr = gl.SliceLayout(1, registers_of(LANE, WARPS))
    thread, t, row = of_thread(LANE, REPEATS)
    x = x.to(gl.pointer_type(gl.int32), bitcast=True)
    largest = gl.zeros([32 * WARPS], gl.int32, ROWS)
    for start in range(gl.program_id(0) * (16 * WARPS * REPEATS), rows, gl.num_programs(0) * (16 * WARPS * REPEATS)):
        own = x + start.to(gl.int64) * (2 * LANE)  # type: ignore[attr-defined]
        loaded = load_rows(own, row, t, rows - start, LANE, 2 * REPEATS)
        for i in gl.static_range(REPEATS):
            low, high = _eights(loaded[2 * i], loaded[2 * i + 1], thread % 32, LANE, HADAMARD)
            largest = gl.maximum(largest, gl.maximum(_of_lane(low, ROWS), _of_lane(high, ROWS)))
    top = gl.max(largest, axis=0).to(gl.float32, bitcast=True) * fp4_text.left_of_unit(HADAMARD)
    gl.store(parts + gl.program_id(0), top.to(gl.int32, bitcast=True))


@gluon.jit
def _encode_scale(source, parts, GIVEN: gl.constexpr):  # type: ignore[no-untyped-def]
    """NVFP4's encode scale: the given one, or that of the largest of `parts` magnitudes."""
    if GIVEN == "number":
        s = source
    elif GIVEN == "tensor":
        s = gl.load(source)
    else:
        part = gl.arange(0, 1024, gl.BlockedLayout([4], [32], [gl.num_warps()], [0]))
        s = encode_scale_of(gl.max(gl.load(source + part, mask=part < parts, other=0), axis=0))
    return s


@gluon.jit
def _eights(low, high, lane, LANE: gl.constexpr, HADAMARD: gl.constexpr):  # type: ignore[no-untyped-def]
    """Two rows, rotated. -> for each the bits of float32 (threads, LANE / 8), eight times: values 0 to 7 of eights."""
    PAIRS: gl.constexpr = LANE // 2
    if HADAMARD > 1:
        a, b, c, d = gl.inline_asm_elementwise(
            _rotated(HADAMARD),
            fp4_text.registers(4 * PAIRS, 3 * PAIRS),
            [low, high, beside(lane, low)],
            dtype=(gl.int32, gl.int32, gl.int32, gl.int32),
            is_pure=True,
            pack=PAIRS,
        )
    else:
        a, b = _floats(low, LANE)
        c, d = _floats(high, LANE)
    return quarters(a) + quarters(b), quarters(c) + quarters(d)


@gluon.jit
def _floats(x, LANE: gl.constexpr):  # type: ignore[no-untyped-def]
    return gl.inline_asm_elementwise(
        _unpacked(LANE), fp4_text.registers(LANE, LANE // 2), [x], dtype=(gl.int32, gl.int32), is_pure=True, pack=LANE // 2
    )


@gluon.jit
def _store(eight, s, codes, scales, row, t, left, LANE: gl.constexpr, HADAMARD: gl.constexpr, ROWS: gl.constexpr):  # type: ignore[no-untyped-def]
    """The scale of a block and codes by it. eight: bits of float32 (threads, LANE / 8), eight times."""
    v0, v1, v2, v3, v4, v5, v6, v7 = eight
    UNIT: gl.constexpr = fp4_text.left_of_unit(HADAMARD)
    largest = _of_lane(eight, ROWS)
    if LANE == 8:
        largest = gl.maximum(largest, _of_next_lane(largest))
    byte, multiplier = two_level(largest.to(gl.float32, bitcast=True) * UNIT, s)
    bits = beside((multiplier * UNIT).to(gl.int32, bitcast=True), v0)
    words = gl.inline_asm_elementwise(
        _codes(), fp4_text.registers(1, 9), [v0, v1, v2, v3, v4, v5, v6, v7, bits], dtype=gl.int32, is_pure=True, pack=1
    )
    store_words(words, codes, row, t, left, LANE)
    first = (row < left) & (t % (16 // LANE) == 0)
    gl.store(scales + row * (LANE // 4) + t // (16 // LANE), byte.to(gl.uint8), mask=first)


@gluon.jit
def _of_lane(eight, ROWS: gl.constexpr):  # type: ignore[no-untyped-def]
    """Bits of the largest magnitude of a lane's values. -> (threads)"""
    v0, v1, v2, v3, v4, v5, v6, v7 = eight
    largest = gl.inline_asm_elementwise(
        _largest(), fp4_text.registers(1, 8), [v0, v1, v2, v3, v4, v5, v6, v7], dtype=gl.int32, is_pure=True, pack=1
    )
    return gl.convert_layout(gl.max(largest, axis=1), ROWS, assert_trivial=True)


@gluon.jit
def _of_next_lane(v):  # type: ignore[no-untyped-def]
    return gl.inline_asm_elementwise("shfl.sync.bfly.b32 $0, $1, 1, 31, -1;", "=r,r", [v], dtype=gl.int32, is_pure=True, pack=1)
