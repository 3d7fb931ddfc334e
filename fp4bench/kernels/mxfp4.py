"""bfloat16 -> MXFP4 on Hopper, as fast as memory is read: what `quantize.quantize` launches where x has no padding.

A value may cost some 20 instructions at 90 % of an H200's memory, and rounding alone takes 9 in float32. So values are rounded
two at a time, as pairs of bfloat16 in one register. That is exact: a power of two scales bfloat16 without error, and where a
rotation made float32 of it, that is cut to bfloat16 first with its last bit set if any bit was lost (rounding to odd), which
no rounding to two bits or comparison with 1.5 or 1.75 times a power of two can tell from the number itself.

x is taken as a matrix of 4 `lane` columns: four lanes have a row, `lane` neighbours each. Those are the k of the A operand of
an `mma` in some order, and the order of a sum is free: the registers that 16-byte loads fill are that operand as they are. One
`mma` rotates by 16, over the four lanes and four values of each; the rest of a rotation is a butterfly in a lane's registers.
"""

from dataclasses import dataclass

import torch
from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from fp4bench.formats import ScaleRule
from fp4bench.kernels.rounding import power_of_two

ROTATIONS = (16, 32, 64, 128)


@dataclass(frozen=True)
class Shape:
    """How to launch. lane: neighbours that a lane has, 8, 16 or 32. warps: of a CTA. repeats: times 16 rows that a warp has."""

    lane: int
    warps: int = 4
    repeats: int = 1

    @property
    def rows(self) -> int:
        """Rows of 4 `lane` values that a CTA has."""
        return 16 * self.warps * self.repeats


def shape(hadamard: int | None) -> Shape:
    """The launch for a rotation: four lanes hold one, or a block of 32."""
    lane = 16 if hadamard is None else max(8, hadamard // 4)
    return Shape(lane, repeats=max(1, 16 // lane))


def fits(x: torch.Tensor, rule: ScaleRule, hadamard: int | None) -> bool:
    """Whether x (m, k) can be quantized here: bfloat16, without gaps, its rows whole rotations (or 64 values)."""
    whole = x.is_contiguous() and x.shape[1] % (4 * shape(hadamard).lane) == 0 and x.data_ptr() % 16 == 0
    return whole and x.dtype == torch.bfloat16 and hadamard in (None, *ROTATIONS) and rule.gain == 1.0


def quantize(
    x: torch.Tensor, codes: torch.Tensor, scales: torch.Tensor, rule: ScaleRule, hadamard: int | None, how: Shape | None = None
) -> None:
    """Write codes, uint8 (m, k / 2), and scales, E8M0 (m, k / 32), of x (m, k) that `fits`."""
    how = how or shape(hadamard)
    rows = x.numel() // (4 * how.lane)
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
# Pairs of a result are of values s and s + 4 of eight, so that four of them, shifted by a code each, are a word of codes.


@gluon.constexpr_function
def _lines(*lines: str) -> str:
    return "{\n" + "".join(f"{line};\n" for line in lines) + "}"


@gluon.constexpr_function
def _rearranged(lane: int) -> str:
    """Neighbours to pairs of a result. Operands: `lane` / 2 results, and as many registers of x."""
    count = lane // 2
    lines = []
    for first in range(0, count, 4):
        for i in range(4):
            low, high = count + first + i // 2, count + first + i // 2 + 2
            lines.append(f"prmt.b32 ${first + i}, ${low}, ${high}, {('0x5410', '0x7632')[i % 2]}")
    return _lines(*lines)


@gluon.constexpr_function
def _rotated(size: int) -> str:
    """Rows g and g + 8 of x, rotated and rounded to odd. -> pairs of a result.

    Operands, `lane` / 2 registers each: results of row g, results of row g + 8, both rows of x, and the lane's number.
    """
    lane = max(8, size // 4)
    count = lane // 2
    products, values = _products(count)
    lines = _matrix(f"${4 * count}", size) + products
    step = 4
    while step < lane:
        lines += _butterfly(values, step)
        step *= 2
    for v in values.values():
        if size in (32, 128):  # size**-0.5 in float32; that of 16 and 64 is a power of two, which scales take
            lines.append(f"mul.rn.f32 {v}, {v}, {'0f3e3504f3' if size == 32 else '0f3db504f3'}")
        lines += [f"add.u32 u, {v}, 0xffff", f"lop3.b32 {v}, u, 0x10000, {v}, 0xea"]  # 0xea: (a & b) | c
    for row in range(2):
        for i in range(count):
            place = 8 * (i // 4) + i % 4
            lines.append(f"prmt.b32 ${count * row + i}, {values[row, place]}, {values[row, place + 4]}, 0x7632")
    return _lines(*lines)


@gluon.constexpr_function
def _matrix(number: str, size: int) -> list[str]:
    """The B operand of a rotation by 16, +-1: registers `plus` and, where values 2 and 3 meet values 2 and 3, `minus`.

    Its rows and columns are places of 16, 8 (e // 2) + 2 t + e % 2 that of value e of lane t. Their sign is the parity of the
    bits that 4 t + e of the one and of the other have in common. A lane has rows of its own t and columns of its g, which are
    those of the lane g // 2. A rotation by 16 is over two lanes only: zeros keep pairs of lanes apart, within a block of 32,
    of which a NaN makes a whole NaN anyway.
    """
    lines = [".reg .b32 u, w, plus, minus"]
    lines += [f"shr.u32 u, {number}, 3", f"and.b32 u, u, {number}", f"and.b32 u, u, {1 if size == 16 else 3}"]
    lines += ["shr.u32 w, u, 1", "xor.b32 u, u, w", "and.b32 u, u, 1"]  # of even rows
    lines += [f"shr.u32 w, {number}, 2", "and.b32 w, w, 1", "xor.b32 w, w, u"]  # of odd rows, by odd columns
    lines += ["shl.b32 u, u, 15", "shl.b32 w, w, 31", "xor.b32 u, u, w"]
    lines += ["xor.b32 plus, u, 0x3f803f80", "xor.b32 minus, plus, 0x80008000"]
    if size == 16:
        lines += [f"shr.u32 u, {number}, 1", f"shr.u32 w, {number}, 4", "xor.b32 u, u, w", "and.b32 u, u, 1"]
        lines += ["add.u32 u, u, 0xffffffff", "and.b32 plus, plus, u", "and.b32 minus, minus, u"]
    return lines


@gluon.constexpr_function
def _products(count: int) -> tuple[list[str], dict[tuple[int, int], str]]:
    """Each four values of a lane rotated with those of the other three. -> lines; registers by row and place in the lane."""
    lines = [".reg .b32 zero", "mov.b32 zero, 0"]
    values: dict[tuple[int, int], str] = {}
    for group in range(count // 2):
        low, high = 2 * count + 2 * group, 3 * count + 2 * group
        for tile, b in enumerate(("plus", "minus")):
            sums = [f"d{group}_{tile}_{i}" for i in range(4)]
            lines.append(f".reg .b32 {', '.join(sums)}")
            lines.append(
                f"mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {{{', '.join(sums)}}}, "
                f"{{${low}, ${high}, ${low + 1}, ${high + 1}}}, {{plus, {b}}}, {{zero, zero, zero, zero}}"
            )
            values |= {(i // 2, 4 * group + 2 * tile + i % 2): sums[i] for i in range(4)}
    return lines, values


@gluon.constexpr_function
def _butterfly(values: dict[tuple[int, int], str], step: int) -> list[str]:
    """Sums and differences of values `step` apart, which take their places in `values`."""
    lines = []
    for where, a in list(values.items()):
        row, place = where
        if not place & step:
            b = values[row, place + step]
            plus, minus = f"p{step}_{row}_{place}", f"m{step}_{row}_{place}"
            lines += [f".reg .b32 {plus}, {minus}", f"add.rn.f32 {plus}, {a}, {b}", f"sub.rn.f32 {minus}, {a}, {b}"]
            values[row, place], values[row, place + step] = plus, minus
    return lines


@gluon.constexpr_function
def _registers(results: int, operands: int) -> str:
    return ",".join(["=&r"] * results + ["r"] * operands)


@gluon.constexpr_function
def _largest_pair() -> str:
    """The largest magnitudes of low and of high halves. Operands: result, four pairs. As whole numbers, NaN is above all."""
    return _lines(
        ".reg .b32 a, b, c, d",
        *(f"and.b32 {name}, ${i + 1}, 0x7fff7fff" for i, name in enumerate("abcd")),
        "max.u16x2 a, a, b",
        "max.u16x2 c, c, d",
        "max.u16x2 $0, a, c",
    )


@gluon.constexpr_function
def _largest_of_block(lane: int) -> str:
    """That of row g in the low half, of row g + 8 in the high one, from all lanes of a block. Operands: result, both rows."""
    lines = [".reg .b32 a, b", "prmt.b32 a, $1, $2, 0x5410", "prmt.b32 b, $1, $2, 0x7632", "max.u16x2 a, a, b"]
    for distance in (1, 2):
        if lane * distance < 32:
            lines += [f"shfl.sync.bfly.b32 b, a, {distance}, 31, -1", "max.u16x2 a, a, b"]
    return _lines(*lines, "mov.b32 $0, a")


@gluon.constexpr_function
def _codes() -> str:
    """A word of eight codes. Operands: result, four pairs, and what they are multiplied with, in both halves.

    With the power of two p, 1, 2 or 4, that |v| <= 6 steps by halves of, 96 p + |v| has the number of halves of p, rounded to
    even, in its last bits. A code is that plus twice the exponent of p.
    """
    lines = [".reg .b32 v, p, s, word, powers, signs, six, one, most"]
    lines += ["mov.b32 six, 0x40c040c0", "mov.b32 one, 0x3f803f80", "mov.b32 most, 0x42c042c0"]
    for i in (3, 2, 1, 0):
        lines += [f"and.b32 v, ${i + 1}, 0x7fff7fff", "mul.rn.bf16x2 v, v, $5", "min.bf16x2 v, v, six"]
        lines += ["and.b32 p, v, 0x7f807f80", "max.bf16x2 p, p, one", "fma.rn.bf16x2 s, p, most, v"]
        lines += ["shr.u32 p, p, 7", "mad.lo.u32 s, p, 0xffffff82, s"]  # less 126 times the biased exponent
        lines.append("mov.b32 word, s" if i == 3 else "mad.lo.u32 word, word, 16, s")
    lines.append("and.b32 signs, $1, 0x80008000")
    for i in range(1, 4):
        lines += ["shr.u32 signs, signs, 4", f"lop3.b32 signs, ${i + 1}, 0x80008000, signs, 0xea"]
    bias = (133 << 7) + 64 - 126 * 127  # of each half, of every pair
    bias = sum(bias * 0x10001 << 4 * i for i in range(4))
    return _lines(*lines, "add.u32 word, word, signs", f"add.u32 $0, word, {-bias % (1 << 32):#x}")


# --- Kernel -----------------------------------------------------------------------------------------------------------------


@gluon.jit
def _larger(a, b):  # type: ignore[no-untyped-def]
    return gl.inline_asm_elementwise("max.u16x2 $0, $1, $2;", "=r,r,r", [a, b], dtype=gl.int32, is_pure=True, pack=1)


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
    WARPS: gl.constexpr = gl.num_warps()
    PAIRS: gl.constexpr = LANE // 2
    REGISTERS: gl.constexpr = gl.BlockedLayout([1, PAIRS], [32, 1], [WARPS, 1], [1, 0])
    ROWS: gl.constexpr = gl.SliceLayout(1, REGISTERS)
    # An int64 once a program; from there on everything is within it.
    start = gl.program_id(0).to(gl.int64) * (16 * WARPS * REPEATS)
    x = x.to(gl.pointer_type(gl.int32), bitcast=True) + start * (4 * PAIRS)
    codes += start * PAIRS
    scales += start * (LANE // 8)
    left = rows - gl.program_id(0) * (16 * WARPS * REPEATS)
    thread = gl.arange(0, 32 * WARPS, ROWS)
    t = thread % 4
    row = thread // 32 * (16 * REPEATS) + thread % 32 // 4
    register = gl.arange(0, PAIRS, gl.SliceLayout(0, REGISTERS))
    loaded = ()  # type: ignore[var-annotated]
    for i in gl.static_range(2 * REPEATS):
        own = row + 8 * i
        place = x + (own * (4 * PAIRS) + t * PAIRS)[:, None] + register[None, :]
        loaded = loaded + (gl.load(place, mask=(own < left)[:, None], other=0),)
    lane = (thread % 32)[:, None] + gl.zeros([32 * WARPS, PAIRS], gl.int32, REGISTERS)
    for i in gl.static_range(REPEATS):
        if HADAMARD > 1:
            a, b = gl.inline_asm_elementwise(
                _rotated(HADAMARD),
                _registers(2 * PAIRS, 3 * PAIRS),
                [loaded[2 * i], loaded[2 * i + 1], lane],
                dtype=(gl.int32, gl.int32),
                is_pure=True,
                pack=PAIRS,
            )
        else:
            a = _in_pairs(loaded[2 * i], LANE)
            b = _in_pairs(loaded[2 * i + 1], LANE)
        a = _quarters(a)
        b = _quarters(b)
        both = gl.inline_asm_elementwise(
            _largest_of_block(LANE), "=&r,r,r", [_of_lane(a, ROWS), _of_lane(b, ROWS)], dtype=gl.int32, is_pure=True, pack=1
        )
        _store(a, both << 16, codes, scales, row + 16 * i, t, left, LANE, HADAMARD, RULE)
        _store(b, both & -65536, codes, scales, row + 16 * i + 8, t, left, LANE, HADAMARD, RULE)


@gluon.jit
def _in_pairs(x, LANE: gl.constexpr):  # type: ignore[no-untyped-def]
    return gl.inline_asm_elementwise(
        _rearranged(LANE), _registers(LANE // 2, LANE // 2), [x], dtype=gl.int32, is_pure=True, pack=LANE // 2
    )


@gluon.jit
def _quarters(pairs):  # type: ignore[no-untyped-def]
    """Pairs 0, 1, 2 and 3 of each eight values. (threads, 4 n) -> (threads, n), four times."""
    even, odd = gl.split(pairs.reshape([pairs.shape[0], pairs.shape[1] // 4, 2, 2]))
    a0, a2 = gl.split(even)
    a1, a3 = gl.split(odd)
    return a0, a1, a2, a3


@gluon.jit
def _of_lane(pairs, ROWS: gl.constexpr):  # type: ignore[no-untyped-def]
    """The largest magnitudes of a lane, even places in one half, odd ones in the other. -> (threads)"""
    a0, a1, a2, a3 = pairs
    largest = gl.inline_asm_elementwise(_largest_pair(), "=&r,r,r,r,r", [a0, a1, a2, a3], dtype=gl.int32, is_pure=True, pack=1)
    return gl.convert_layout(gl.reduce(largest, 1, _larger), ROWS, assert_trivial=True)


@gluon.jit
def _store(pairs, largest, codes, scales, row, t, left, LANE: gl.constexpr, HADAMARD: gl.constexpr, RULE: gl.constexpr):  # type: ignore[no-untyped-def]
    """Scales of a block, from the bits of its largest magnitude, and codes by it."""
    a0, a1, a2, a3 = pairs
    # What an orthonormal rotation multiplies with, where that is a power of two.
    UNIT: gl.constexpr = 0.125 if HADAMARD == 64 else 0.25 if HADAMARD == 16 else 1.0
    byte, multiplier = power_of_two(largest.to(gl.float32, bitcast=True) * UNIT, RULE)
    bits = (multiplier * UNIT).to(gl.int32, bitcast=True)
    LAYOUT: gl.constexpr = a0.type.layout
    twice = gl.convert_layout(bits | bits >> 16, gl.SliceLayout(1, LAYOUT), assert_trivial=True)
    twice = gl.expand_dims(twice, 1) + gl.zeros_like(a0)
    word = gl.inline_asm_elementwise(_codes(), "=&r,r,r,r,r,r", [a0, a1, a2, a3, twice], dtype=gl.int32, is_pure=True, pack=1)
    place = gl.convert_layout(row * (LANE // 2) + t * (LANE // 8), gl.SliceLayout(1, LAYOUT), assert_trivial=True)
    inside = gl.convert_layout(row < left, gl.SliceLayout(1, LAYOUT), assert_trivial=True)
    offset = gl.arange(0, LANE // 8, gl.SliceLayout(0, LAYOUT))
    gl.store(codes + place[:, None] + offset[None, :], word, mask=inside[:, None])
    first = (row < left) & (t % (32 // LANE) == 0)
    gl.store(scales + row * (LANE // 8) + t // (32 // LANE), byte.to(gl.uint8), mask=first)
