"""PTX that rotates bfloat16 and rounds it to FP4 codes, two values in a register: text, over registers that a caller names.

Rounding takes 9 instructions a value in float32 (`rounding`) and 5 in pairs of bfloat16. Pairs are exact: a power of two
multiplies bfloat16 without error, and a float32 is cut to bfloat16 first with its last bit set if any bit was lost (rounding to
odd), which no rounding to two bits can tell from the number itself, nor a comparison with 1.5 or 1.75 times a power of two.

A *pair* has value s of eight neighbours in its low half and value s + 4 in its high one, so that four pairs of codes, each
shifted by one code more, are the word of all eight.
"""

import triton


@triton.constexpr_function
def block(*lines: str) -> str:
    """Lines as one piece of inline assembly, with registers of its own."""
    return "{\n" + "".join(f"{line};\n" for line in lines) + "}"


@triton.constexpr_function
def registers(results: int, operands: int) -> str:
    """Constraints of so many results, that are written before all operands are read, and operands."""
    return ",".join(["=&r"] * results + ["r"] * operands)


# --- Rotation ---------------------------------------------------------------------------------------------------------------


@triton.constexpr_function
def rotation(size: int, count: int, first: int) -> tuple[list[str], dict[tuple[int, int], str]]:
    """Rows g and g + 8 of an `mma`, `count` registers of two neighbours each, rotated. -> lines; float32 by row and place.

    first: the number of the first operand: row g, row g + 8, and the lane's number. Times size**-0.5 where that is no power of
    two, for scales to take.

    Four lanes have a row, and their values are the k of the A operand, in some order. One `mma` rotates by 16, over the four
    lanes and four values of each; the rest of a rotation is a butterfly in a lane's registers. Sums are float32, in another
    order than those of `fp4bench.hadamard`: equal to them where they are exact.
    """
    products, values = _products(count, first)
    lines = _matrix(f"${first + 2 * count}", size) + products
    step = 4
    while step < 2 * count:
        lines += _butterfly(values, step)
        step *= 2
    if size in (32, 128):
        unit = "0f3e3504f3" if size == 32 else "0f3db504f3"
        lines += [f"mul.rn.f32 {v}, {v}, {unit}" for v in values.values()]
    return lines, values


@triton.constexpr_function
def left_of_unit(size: int) -> float:
    """What is left to multiply a rotation with."""
    return {16: 0.25, 64: 0.125}.get(size, 1.0)


@triton.constexpr_function
def _matrix(number: str, size: int) -> list[str]:
    """The B operand of a rotation by 16, +-1: registers `plus` and, where values 2 and 3 meet values 2 and 3, `minus`.

    Its rows and columns are places of 16, 8 (e // 2) + 2 t + e % 2 that of value e of lane t. Their sign is the parity of the
    bits that 4 t + e of the one and of the other have in common. A lane has rows of its own t and columns of its g, which are
    those of the lane g // 2. A rotation by 16 is over two lanes only: zeros keep pairs of lanes apart, but for a NaN, which
    makes all of their 32 values one.
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


@triton.constexpr_function
def _products(count: int, first: int) -> tuple[list[str], dict[tuple[int, int], str]]:
    """Each four values of a lane rotated with those of the other three. As `rotation`, of which this is the first part."""
    lines = [".reg .b32 zero", "mov.b32 zero, 0"]
    values: dict[tuple[int, int], str] = {}
    for group in range(count // 2):
        low, high = first + 2 * group, first + count + 2 * group
        for tile, b in enumerate(("plus", "minus")):
            sums = [f"d{group}_{tile}_{i}" for i in range(4)]
            lines.append(f".reg .b32 {', '.join(sums)}")
            lines.append(
                f"mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {{{', '.join(sums)}}}, "
                f"{{${low}, ${high}, ${low + 1}, ${high + 1}}}, {{plus, {b}}}, {{zero, zero, zero, zero}}"
            )
            values |= {(i // 2, 4 * group + 2 * tile + i % 2): sums[i] for i in range(4)}
    return lines, values


@triton.constexpr_function
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


# --- Rounding ---------------------------------------------------------------------------------------------------------------


@triton.constexpr_function
def ones() -> list[str]:
    """What `to_odd` needs once: min of halves takes no number as an operand."""
    return [".reg .b32 ones", "mov.b32 ones, 0x00010001"]


@triton.constexpr_function
def to_odd(pair: str, low: str, high: str) -> list[str]:
    """Two float32 as a pair of bfloat16 whose last bits say whether any was lost. Uses `u` and `ones`."""
    return [
        f"prmt.b32 u, {low}, {high}, 0x5410",
        "min.u16x2 u, u, ones",
        f"prmt.b32 {pair}, {low}, {high}, 0x7632",
        f"or.b32 {pair}, {pair}, u",
    ]


@triton.constexpr_function
def word(result: str, pairs: list[str], multiplier: str | None) -> list[str]:
    """Four pairs, multiplied by a pair of powers of two if there is one, as the codes of eight neighbours.

    With the power of two p, 1, 2 or 4, that |v| <= 6 steps by halves of, 96 p + |v| has the number of halves of p, rounded to
    even, in its last bits. A code is that plus twice the exponent of p. A negative v gets 4 p more, 8 halves: the sign bit.
    """
    lines = [".reg .b32 v, c, p0, p1, p2, p3, s0, s1, s2, s3, six, one, most, less"]
    lines += ["mov.b32 six, 0x40c040c0", "mov.b32 one, 0x3f803f80", "mov.b32 most, 0x42c442c4", "mov.b32 less, 0xbf80bf80"]
    for i, pair in enumerate(pairs):
        lines += [f"lop3.b32 c, {pair}, 0x80008000, 0x40004000, 0xea", "fma.rn.bf16x2 c, c, less, most"]  # 98 - 2 or 98 + 2
        lines.append(f"abs.bf16x2 v, {pair}")
        if multiplier:
            lines.append(f"mul.rn.bf16x2 v, v, {multiplier}")
        lines += ["min.bf16x2 v, v, six", f"and.b32 p{i}, v, 0x7f807f80", f"max.bf16x2 p{i}, p{i}, one"]
        lines.append(f"fma.rn.bf16x2 s{i}, p{i}, c, v")
    lines += ["mad.lo.u32 s2, s3, 16, s2", "mad.lo.u32 s1, s2, 16, s1", "mad.lo.u32 s0, s1, 16, s0"]
    # Less 126 times the biased exponents, p / 128, each shifted as its sum: halves are borrowed from, and all is modulo 2**32.
    lines += ["shr.u32 p0, p0, 7", "shr.u32 p1, p1, 7"]
    for i, factor in enumerate((126, 126 * 16, 126 * 256 // 128, 126 * 4096 // 128)):
        lines.append(f"mad.lo.u32 s0, p{i}, {-factor % (1 << 32):#x}, s0")
    bias = (133 << 7) + 64 - 126 * 127  # of each half, of every pair
    bias = sum(bias * 0x10001 << 4 * i for i in range(4))
    return [*lines, f"add.u32 {result}, s0, {-bias % (1 << 32):#x}"]
