"""What registers hold, and the instructions that are functions of registers alone.

A register is an array of all threads: bool of a predicate, else unsigned integers of its size. A type of PTX, such as s32, b64,
f32 or pred, says how its bits are read.
"""

import re
from functools import cache

import numpy as np
import ptx
import torch

UNSIGNED = {8: np.uint8, 16: np.uint16, 32: np.uint32, 64: np.uint64}
_SIGNED = {8: np.int8, 16: np.int16, 32: np.int32, 64: np.int64}
HALVES = {"bf16": torch.bfloat16, "f16": torch.float16}
_PACKED = {**HALVES, "e4m3": torch.float8_e4m3fn}


@cache
def bits_of(kind):
    """How many a type has."""
    return int(re.search(r"\d+", kind)[0]) * (2 if kind.endswith("x2") else 1)


def read_as(register, kind):
    """What a register holds, as numbers of a type; half-precision ones as their bits."""
    if kind == "pred":
        return register
    size = bits_of(kind)
    register = register if register.dtype.itemsize * 8 == size else register.astype(UNSIGNED[size])
    return register.view({"s": _SIGNED[size], "f": np.float32 if size == 32 else UNSIGNED[size]}.get(kind[0], UNSIGNED[size]))


def as_register(numbers, kind):
    """Inverse of `read_as`; float64 is rounded to float32."""
    if kind == "pred":
        return np.asarray(numbers, bool)
    numbers = np.ascontiguousarray(numbers)
    if numbers.dtype == np.float64:
        numbers = numbers.astype(np.float32)
    return numbers.view(UNSIGNED[8 * numbers.dtype.itemsize]).astype(UNSIGNED[bits_of(kind)])


def numbers(register, kind):
    """Both halves or all four bytes of a register, the lowest first: (2 or 4, threads) float64."""
    packed = torch.from_numpy(np.ascontiguousarray(register, np.uint32).view(np.uint8).copy()).view(_PACKED[kind])
    return packed.double().numpy().reshape(len(register), -1).T


def converted(numbers, source, to):
    """Numbers of one type as those of another, by `cvt`."""
    if source == "f32" and to in HALVES:
        return torch.from_numpy(numbers.copy()).to(HALVES[to]).view(torch.int16).numpy().view(np.uint16)
    if (source, to) == ("f32", "e4m3"):  # to the largest, not to NaN
        return torch.from_numpy(numbers.copy()).clamp(-448, 448).to(torch.float8_e4m3fn).view(torch.uint8).numpy()
    if source in HALVES and to == "f32":
        return torch.from_numpy(numbers.view(np.int16).copy()).view(HALVES[source]).float().numpy()
    if source[0] in "su" and to[0] in "su":
        return numbers.astype((_SIGNED if to[0] == "s" else UNSIGNED)[bits_of(to)])
    if source[0] in "su" and to == "f32":
        return numbers.astype(np.float32)
    raise NotImplementedError(f"cvt.{to}.{source}")


@cache
def function_of(opcode):
    """-> (function of numbers, the types of its operands, at least as many as it has, the type of its result)."""
    if (whole := ".".join(opcode)) in _OF_WORDS:
        return ptx.INSTRUCTIONS[whole], ("b32",) * 4, "b32"
    name, modifiers, kind = opcode[0], opcode[1:-1], opcode[-1]
    if opcode == ("max", "NaN", "bf16"):
        return _maximum_of_bf16, ("b16",) * 2, "b16"
    if kind in HALVES or kind.endswith("x2"):
        raise NotImplementedError(whole)
    if opcode[:2] == ("mul", "hi"):
        return _upper_half, (kind,) * 2, kind
    if name not in _FUNCTIONS or not set(modifiers) <= _MODIFIERS:
        raise NotImplementedError(whole)
    if "wide" in modifiers:
        wide = f"{kind[0]}{2 * bits_of(kind)}"
        return _of_twice_the_size(_FUNCTIONS[name]), (kind, kind, wide), wide
    return _FUNCTIONS[name], (kind,) * 3, kind


def _of_twice_the_size(compute):
    def of_wide(a, b, *sum_of):
        size = f"{a.dtype.kind}{2 * a.dtype.itemsize}"
        return compute(a.astype(size), b.astype(size), *sum_of)

    return of_wide


def _maximum_of_bf16(a, b):
    return converted(np.maximum(*(converted(bits, "bf16", "f32") for bits in (a, b))), "f32", "bf16")


def _upper_half(a, b):
    """Of the product of 32-bit numbers."""
    wide = a.astype(f"{a.dtype.kind}8") * b
    return (wide >> wide.dtype.type(32)).astype(a.dtype)


def _shifted(shift):
    """By no more than the size of a register: what lies beyond is gone."""

    def by(numbers, count):
        size = 8 * numbers.dtype.itemsize
        moved = shift(numbers, np.minimum(count, size - 1).astype(numbers.dtype))
        return np.where((count >= size) & (numbers.dtype.kind == "u"), np.zeros_like(numbers), moved)

    return by


def _field(numbers, start, size):
    """Bits from `start` on, with the sign that the highest has where numbers have signs."""
    above = numbers.dtype.type(8 * numbers.dtype.itemsize) - size
    return numbers << above - start >> above


def _quotient(a, b):
    return np.trunc(a / b).astype(a.dtype) if a.dtype.kind in "iu" else a / b


# False where either is NaN.
COMPARISONS = {"eq": np.equal, "lt": np.less, "le": np.less_equal, "gt": np.greater, "ge": np.greater_equal}
COMPARISONS["ne"] = lambda a, b: (a < b) | (a > b)
_FUNCTIONS = {
    "add": np.add,
    "sub": np.subtract,
    "mul": np.multiply,
    "mad": lambda a, b, c: a * b + c,
    "fma": lambda a, b, c: a.astype(np.float64) * b + c,
    "div": _quotient,
    "rem": np.fmod,
    "neg": np.negative,
    "abs": np.abs,
    "min": np.fmin,
    "max": np.fmax,
    "and": np.bitwise_and,
    "or": np.bitwise_or,
    "xor": np.bitwise_xor,
    "not": np.invert,
    "bfe": _field,
    "shl": _shifted(np.left_shift),
    "shr": _shifted(np.right_shift),
    "ex2": np.exp2,
    "rcp": lambda a: 1 / a,
    "popc": lambda a: np.bitwise_count(a).astype(a.dtype),
}
# That change nothing here: low halves of products are what integers of numpy keep.
_MODIFIERS = {"lo", "wide", "rn", "full", "approx"}
# Instructions on whole words that inline assembly has too.
_OF_WORDS = {"shf.r.wrap.b32", "prmt.b32", "lop3.b32", "mul.rn.f16x2", "max.NaN.f32", "add.s16x2", "min.u16x2", "max.u16x2"}
_OF_WORDS |= {f"{name}.bf16x2" for name in ("mul.rn", "fma.rn", "abs", "min", "max", "max.NaN")}
