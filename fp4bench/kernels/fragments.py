"""PTX from a prepared weight's words and scales to the A operand of the tensor cores; `weights` has the bits.

Each function returns the text of a few instructions for inline assembly, over registers that the caller names (.b32).
"""

import triton

SIGNS_AND_MAGNITUDES = 0x81C081C0
_SIGNS = 0x80008000


@triton.constexpr_function
def to_bfloat16(word: str, a: tuple[str, str, str, str], scratch: str) -> str:
    """The four A registers of a word, as bfloat16 pairs of value * 2**-126. Nine integer operations for eight codes."""
    mask = f"{SIGNS_AND_MAGNITUDES:#x}"
    return (
        f"shl.b32 {scratch}, {word}, 6; and.b32 {a[0]}, {scratch}, {mask};\n"
        f"shl.b32 {scratch}, {word}, 2; and.b32 {a[1]}, {scratch}, {mask};\n"
        f"shf.r.wrap.b32 {scratch}, {word}, {word}, 4; and.b32 {a[2]}, {scratch}, {mask};\n"
        f"shr.u32 {scratch}, {word}, 8; and.b32 {scratch}, {scratch}, 0x00400040;\n"
        f"lop3.b32 {a[3]}, {word}, 0x81808180, {scratch}, 0xEA;\n"  # 0xEA: (a & b) | c
    )


@triton.constexpr_function
def to_float16(word: str, a: tuple[str, str, str, str], scratch: str) -> str:
    """The four A registers of a word, as float16 pairs of value * 2**-14: three bits higher than in bfloat16."""
    return to_bfloat16(word, a, scratch) + "".join(
        f"and.b32 {scratch}, {register}, {_SIGNS:#x}; and.b32 {register}, {register}, 0x01C001C0;\n"
        f"shl.b32 {register}, {register}, 3; or.b32 {register}, {register}, {scratch};\n"
        for register in a
    )


@triton.constexpr_function
def multipliers(scales: str, *, two_level: bool, half: bool) -> str:
    """What codes are multiplied with: `lows`, of rows g, has in its low half that of the scale in byte 0 of `scales`, in its
    high half that of byte 2; `highs`, of rows g + 8, those of bytes 1 and 3.

    two_level: the scales are NVFP4's, E5M3. half: as float16, else as bfloat16.
    """
    if two_level and not half:  # by an addition, whose constant needs no register
        return (
            f"and.b32 u, {scales}, 0x00FF00FF; mad.lo.u32 lows, u, 16, 0x70007000;\n"
            f"prmt.b32 u, {scales}, 0, 0x4341; mad.lo.u32 highs, u, 16, 0x70007000;\n"
        )
    if half and not two_level:  # the low five bits of the byte are the exponent
        return f"shl.b32 u, {scales}, 10; and.b32 lows, u, 0x7C007C00;\nshl.b32 u, {scales}, 2; and.b32 highs, u, 0x7C007C00;\n"
    return f"shl.b32 u, {scales}, 7; and.b32 lows, u, 0x7F807F80;\nshr.u32 u, {scales}, 1; and.b32 highs, u, 0x7F807F80;\n"


# Of `slab_product`: A, scratch, and what A is multiplied with, in registers 0 and 2 and in 1 and 3.
SLAB_REGISTERS = ".reg .b32 u, low, high, lows, highs, a0, a1, a2, a3; .reg .b16 first, second;\n"


@triton.constexpr_function
def _in_both_halves(scale: int) -> str:
    """`low` and `high`: the half `scale` of `lows` and `highs`, twice. No instruction: HMUL2 can take one half for both."""
    chosen = ("first", "second")[scale]
    return "".join(f"mov.b32 {{first, second}}, {name}s; mov.b32 {name}, {{{chosen}, {chosen}}};\n" for name in ("low", "high"))


@triton.constexpr_function
def slab_product(slab: int, scale: int, columns: int, words: int, x: int, *, half: bool) -> str:
    """acc += A B for 16 of a unit's 64 columns: word `slab`, decoded and scaled, times x for `columns` rows of x.

    Operands: accumulators from $0, four for each 8 rows of x; four words from $words; x from $x, eight for each 8 rows.
    `SLAB_REGISTERS` are declared, `multipliers` made; scale: which half of these is the word's. half: as float16, else as
    bfloat16.
    """
    kind = "f16" if half else "bf16"
    a = ("a0", "a1", "a2", "a3")
    text = _in_both_halves(scale) + (to_float16 if half else to_bfloat16)(f"${words + slab}", a, "u")
    text += "".join(f"mul.rn.{kind}x2 {a[i]}, {a[i]}, {('low', 'high')[i % 2]};\n" for i in range(4))
    for block in range(columns // 8):
        acc = ", ".join(f"${4 * block + i}" for i in range(4))
        b = f"${x + 8 * block + 2 * slab}, ${x + 8 * block + 2 * slab + 1}"
        text += f"mma.sync.aligned.m16n8k16.row.col.f32.{kind}.{kind}.f32 {{{acc}}}, {{a0, a1, a2, a3}}, {{{b}}}, {{{acc}}};\n"
    return text
