"""PTX that turns the words of a prepared weight into registers of the A operand of `wgmma`: text only, no Triton.

A lane's four words of a unit (see `weights`) and its scale words go in; eight results of four elements come out, packed as
`inline_asm_elementwise` packs them, two registers a result in 16 bits and one in 8 bits. Result 2 j + row (16 bits; row 0 is g,
row 1 is g + 8) has the columns 16 j + 8 h + 2 t + e, e the half of register h. In 8 bits it has byte b of lane t at position
16 j + 4 t + b, b = h + 2 e, which is `weights.E4M3_ORDER`.

Integer operations and multiplications for the eight codes of a word, scales included (SASS, Triton 3.6): 14 in bfloat16 and 26
in float16 (one more with NVFP4's scales), 21 in E4M3, 10 in E4M3 of words in bytes.
"""

from collections.abc import Callable

FORMS = ("bf16", "fp16", "e4m3")

_PAIR = "0x81C081C0"  # sign, two exponent bits and mantissa of a bfloat16 pair


def assembly(form: str, two_level: bool, of_lane: bool = False, in_bytes: bool = False) -> tuple[str, str]:
    """-> (PTX, constraints) of the operands: results, four words, four scale words (MXFP4: four times the same one).

    form: one of FORMS, the type of the results. two_level: NVFP4's scales, of 16 columns. of_lane: they are those of a lane's
    columns, two words at a time, as `experts` has them: four times the same word too. in_bytes: the order of the words is
    `WordOrder.BYTES`. Raises ValueError for NVFP4 as E4M3, and for words in bytes as another form.
    """
    if in_bytes and form != "e4m3":
        raise ValueError(f"words in bytes are for E4M3, not for {form}")
    if form == "e4m3":
        if two_level:
            raise ValueError("NVFP4 does not fit E4M3")
        return _eight_bits(_bytes_of_bytes if in_bytes else _bytes), ",".join(["=&r"] * 8 + ["r"] * 8)
    return _sixteen_bits(form, two_level, of_lane), ",".join(["=&r"] * 16 + ["r"] * 8)


def _sixteen_bits(form: str, two_level: bool, of_lane: bool) -> str:
    pairs, multiply = (_pairs_bf16, "mul.rn.bf16x2") if form == "bf16" else (_pairs_fp16, "mul.rn.f16x2")
    lines = [".reg .b32 u, s0, s1, t0, t1, a0, a1, a2, a3; .reg .b16 first, second;"]
    of_two = two_level and not of_lane
    for j in range(4):
        if j == 0 or (of_two and j == 2):
            lines += _multiplicands(form, two_level, f"${20 + j}")
        lines += _in_both_halves(j % 2 if of_two else j // 2) + pairs(f"${16 + j}")
        # Pair i is row i % 2 of half i // 2.
        lines += [f"{multiply} ${2 * (2 * j + i % 2) + i // 2}, a{i}, t{i % 2};" for i in range(4)]
    return _block(lines)


def _pairs_bf16(word: str) -> list[str]:
    """Pairs a0 to a3, each code as bfloat16 value * 2**-126."""
    return [
        f"shl.b32 u, {word}, 6;",
        f"and.b32 a0, u, {_PAIR};",
        f"shl.b32 u, {word}, 2;",
        f"and.b32 a1, u, {_PAIR};",
        f"shf.r.wrap.b32 u, {word}, {word}, 4;",
        f"and.b32 a2, u, {_PAIR};",
        f"shr.u32 u, {word}, 8;",
        "and.b32 u, u, 0x00400040;",
        f"lop3.b32 a3, {word}, 0x81808180, u, 0xEA;",
    ]


def _pairs_fp16(word: str) -> list[str]:
    """Pairs a0 to a3, each code as float16 value * 2**-14: the magnitude three bits further up."""
    lines = _pairs_bf16(word)
    for i in range(4):
        lines += [f"and.b32 u, a{i}, 0x01C001C0;", f"and.b32 a{i}, a{i}, 0x80008000;", f"mad.lo.u32 a{i}, u, 8, a{i};"]
    return lines


def _multiplicands(form: str, two_level: bool, scales: str) -> list[str]:
    """s0, of rows g: what the scales in bytes 0 and 2 stand for, in its halves; s1, of rows g + 8: those in bytes 1 and 3.

    MXFP4's bytes are 254 - delta, for 2**(127 - delta) in bfloat16 and 2**(15 - delta) in float16, whose exponent is the low
    five bits of the byte; NVFP4's for scale * 2**119 and scale * 2**7.
    """
    if two_level and form == "bf16":
        codes = (f"and.b32 u, {scales}, 0x00FF00FF;", f"prmt.b32 u, {scales}, 0, 0x4341;")
        return [line for row in range(2) for line in (codes[row], f"mad.lo.u32 s{row}, u, 16, 0x70007000;")]
    if form == "fp16" and not two_level:
        shifted, mask = (f"shl.b32 u, {scales}, 10;", f"shl.b32 u, {scales}, 2;"), "0x7C007C00"
    else:
        shifted, mask = (f"shl.b32 u, {scales}, 7;", f"shr.u32 u, {scales}, 1;"), "0x7F807F80"
    return [line for row in range(2) for line in (shifted[row], f"and.b32 s{row}, u, {mask};")]


def _in_both_halves(half: int) -> list[str]:
    """t0, t1: that half of s0 and s1, twice. No instruction: HMUL2 can take one half for both."""
    chosen = ("first", "second")[half]
    return [f"mov.b32 {{first, second}}, s{row}; mov.b32 t{row}, {{{chosen}, {chosen}}};" for row in range(2)]


def _eight_bits(bytes_of_word: Callable[[str, str, str], list[str]]) -> str:
    """Codes as E4M3 value * 2**(6 - delta): the three bits of a magnitude pick one of 8 bytes, made for the block's delta."""
    lines = [".reg .b32 u, v, r2, r4, r6, l0, l1, h0, h1;"]
    for j in range(4):
        if j % 2 == 0:
            lines += _tables("$12", j)
        lines += bytes_of_word(f"${8 + j}", f"${2 * j}", f"${2 * j + 1}")
    return _block(lines)


def _tables(scales: str, first: int) -> list[str]:
    """l, h: the E4M3 bytes of 0, 0.5, 1, 1.5 and of 2, 3, 4, 6 times 2**(6 - delta), of rows g and g + 8."""
    lines = []
    for row in range(2):
        lines.append(f"bfe.u32 u, {scales}, {8 * (first + row)}, 8;")
        for table, bytes_at_1, step in ((f"l{row}", 0x3C383000, 0x08080800), (f"h{row}", 0x4C484440, 0x08080808)):
            # The byte 254 - delta: 248 of it is the factor 1.
            lines.append(f"mad.lo.u32 {table}, u, {step:#010x}, {(bytes_at_1 - 248 * step) % 2**32:#010x};")
    return lines


def _bytes(word: str, low_row: str, high_row: str) -> list[str]:
    """Four bytes of row g (pairs 0 and 2) and four of row g + 8 (pairs 1 and 3)."""
    select = _lut(lambda a, b, mask: (a & mask) | (b & ~mask))
    with_sign = _lut(lambda a, b, mask: a | (b & mask))
    pick = ["prmt.b32 u, u, 0, 0x0020;", "and.b32 u, u, 0x7777;"]
    return [
        f"shr.u32 r2, {word}, 2;",
        f"shf.r.wrap.b32 r4, {word}, {word}, 4;",
        f"shr.u32 r6, {word}, 6;",
        f"lop3.b32 u, {word}, r6, 0x000F000F, {select};",
        *pick,
        "prmt.b32 u, l0, h0, u;",
        f"lop3.b32 v, r2, r4, 0x00FF00FF, {select};",
        f"lop3.b32 {low_row}, u, v, 0x80808080, {with_sign};",
        f"shr.u32 u, {word}, 4;",
        f"lop3.b32 u, u, r2, 0x000F000F, {select};",
        f"shr.u32 v, {word}, 10;",
        f"lop3.b32 u, v, u, 0x00100010, {select};",
        *pick,
        "prmt.b32 u, l1, h1, u;",
        f"lop3.b32 v, r6, {word}, 0x00FF00FF, {select};",
        f"lop3.b32 {high_row}, u, v, 0x80808080, {with_sign};",
    ]


def _bytes_of_bytes(word: str, low_row: str, high_row: str) -> list[str]:
    """The same of a word in `WordOrder.BYTES`: each nibble picks its byte, row g from the low half."""
    with_sign = _lut(lambda a, b, mask: a | (b & mask))
    return [
        f"and.b32 v, {word}, 0x77777777;",
        "prmt.b32 u, l0, h0, v;",
        f"shl.b32 r2, {word}, 4;",
        f"lop3.b32 {low_row}, u, r2, 0x80808080, {with_sign};",
        "shr.u32 v, v, 16;",
        "prmt.b32 u, l1, h1, v;",
        f"lop3.b32 {high_row}, u, {word}, 0x80808080, {with_sign};",
    ]


def _lut(function: Callable[[int, int, int], int]) -> str:
    """The truth table by which `lop3` knows a function of three bits."""
    return f"{function(0xF0, 0xCC, 0xAA) & 0xFF:#04x}"


def _block(lines: list[str]) -> str:
    return "\n".join(["{", *lines, "}"])
