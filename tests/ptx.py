"""The few PTX instructions that our inline assembly is made of, on one warp in numpy: it runs the very text that is shipped.

Registers are uint32 arrays of 32 lanes. What an instruction means is taken from the PTX ISA, 8.x, section 9.7; one that is not
here raises. float16 and bfloat16 products are rounded by torch, sums of an mma are kept in float64.
"""

import re

import numpy as np
import torch

LANES = np.arange(32)


def run(text, operands):
    """Execute `text`. operands: what $0, $1, ... stand for, uint32 or float64 (32,). -> the list, with those written new."""
    registers = {}

    def read(name):
        if name in ("-1",) or re.fullmatch(r"0x[0-9a-fA-F]+|\d+", name):
            return np.full(32, int(name, 0) & 0xFFFFFFFF, dtype=np.uint32)
        if name.startswith("0f"):  # a float32 by its bits
            return np.full(32, int(name[2:], 16), dtype=np.uint32)
        return operands[int(name[1:])] if name.startswith("$") else registers[name]

    def write(name, value):
        if name.startswith("$"):
            operands[int(name[1:])] = value
        else:
            registers[name] = value

    for statement in text.strip().removeprefix("{").removesuffix("}").split(";"):
        statement = " ".join(statement.split())
        if not statement or statement.startswith(".reg"):
            continue
        opcode, _, rest = statement.partition(" ")
        groups = re.findall(r"\{[^}]*\}|[^,{}\s]+", rest)
        _execute(opcode, groups, read, write)
    return operands


def _execute(opcode, names, read, write):
    if opcode.startswith("mma.sync.aligned.m16n8k16.row.col.f32."):
        dtype = {"bf16.bf16.f32": torch.bfloat16, "f16.f16.f32": torch.float16}[
            opcode.removeprefix("mma.sync.aligned.m16n8k16.row.col.f32.")
        ]
        d, a, b, c = (re.findall(r"[\w$]+", group) for group in names)
        sums = _mma([halves(read(n), dtype) for n in a], [halves(read(n), dtype) for n in b], [read(n) for n in c])
        for name, value in zip(d, sums, strict=True):
            write(name, value)
        return
    if opcode == "mov.b32" and any(name.startswith("{") for name in names):
        _move_halves(*names, read, write)
        return
    target, *sources = names
    values = [read(name) for name in sources]
    write(target, INSTRUCTIONS[opcode](*values))


def _move_halves(target, source, read, write):
    """A register to its halves, the low one first, or two halves to a register."""
    if target.startswith("{"):
        low, high = re.findall(r"\w+", target)
        write(low, read(source) & np.uint32(0xFFFF))
        write(high, read(source) >> np.uint32(16))
        return
    low, high = re.findall(r"\w+", source)
    write(target, read(low) | read(high) << np.uint32(16))


def _mma(a, b, c):
    """m16n8k16 by the ISA's figures: lane 4 g + t. a: 4 pairs, b: 2 pairs, c: 4 float64 (32,)."""
    g, t = LANES // 4, LANES % 4
    left, right, out = np.zeros((16, 16)), np.zeros((16, 8)), np.zeros((16, 8))
    for i in range(4):
        for e in range(2):
            left[g + 8 * (i % 2), 2 * t + e + 8 * (i // 2)] = a[i][e]
    for i in range(2):
        for e in range(2):
            right[2 * t + e + 8 * i, g] = b[i][e]
    for i in range(4):
        out[g + 8 * (i // 2), 2 * t + i % 2] = c[i]
    out = left @ right + out
    return [out[g + 8 * (i // 2), 2 * t + i % 2] for i in range(4)]


def rows_of_lanes(x, lane):
    """bfloat16 x (16, 4 lane) in the registers of lanes: rows g and g + 8, `lane` neighbours of lane t each, two a register."""
    g, t = LANES // 4, LANES % 4
    pairs = x.reshape(16, 4, lane // 2, 2)
    return [[registers(pairs[g + 8 * half, t, i], torch.bfloat16) for i in range(lane // 2)] for half in range(2)]


def halves(register, dtype):
    """Both halves of each lane as numbers, low half first. uint32 (32,) -> float64 (2, 32)."""
    pairs = torch.from_numpy(np.ascontiguousarray(register, dtype=np.uint32).view(np.int16).copy()).view(dtype)
    return pairs.double().numpy().reshape(-1, 2).T


def registers(numbers, dtype):
    """Inverse of `halves`: float (32, 2) -> uint32 (32,)."""
    return torch.as_tensor(numbers).to(dtype).contiguous().view(torch.int16).numpy().view(np.uint32).reshape(-1)


def _multiply(dtype):
    def multiply(a, b):
        x, y = (torch.from_numpy(halves(r, dtype).T.copy()) for r in (a, b))
        return registers(x * y, dtype)  # float64 is exact for such a product

    return multiply


def _minmax(choose):
    """torch.maximum and torch.minimum give NaN where either is, as .NaN does; without it the other number is the result."""

    def of_pairs(a, b):
        x, y = (torch.from_numpy(halves(r, torch.bfloat16).T.copy()) for r in (a, b))
        return registers(choose(x, y), torch.bfloat16)

    return of_pairs


def _fma(a, b, c):
    """Of bfloat16 pairs. float64 holds the sum of products of such numbers where they are less than 2**37 apart."""
    x, y, z = (torch.from_numpy(halves(r, torch.bfloat16).T.copy()) for r in (a, b, c))
    return registers(x * y + z, torch.bfloat16)


def _float32(compute):
    """On registers that hold a float32, or the float64 sum of an mma."""

    def of_registers(*operands):
        numbers = [r.astype(np.float32) if r.dtype == np.float64 else r.view(np.float32) for r in operands]
        with np.errstate(over="ignore"):  # to infinity
            return compute(*numbers).view(np.uint32)

    return of_registers


def _prmt(a, b, selector):
    source = (b.astype(np.uint64) << np.uint64(32)) | a
    out = np.zeros_like(a)
    for i in range(4):
        nibble = (selector >> np.uint32(4 * i)) & np.uint32(15)
        assert (nibble < 8).all(), "sign replication is not emulated"
        byte = (source >> (nibble.astype(np.uint64) * np.uint64(8))) & np.uint64(0xFF)
        out |= byte.astype(np.uint32) << np.uint32(8 * i)
    return out


def _lop3(a, b, c, table):
    out = np.zeros_like(a)
    for index in range(8):
        if int(table[0]) >> index & 1:
            out |= (a if index & 4 else ~a) & (b if index & 2 else ~b) & (c if index & 1 else ~c)
    return out


def _shuffle(value, mask, clamp, members):
    assert (clamp == 31).all()
    assert (members == 0xFFFFFFFF).all()
    return value[LANES ^ mask]


def _funnel_right(low, high, shift):
    both = (high.astype(np.uint64) << np.uint64(32)) | low
    return (both >> (shift & np.uint32(31)).astype(np.uint64)).astype(np.uint32)


INSTRUCTIONS = {
    "bfe.u32": lambda a, start, size: (a >> start) & (np.uint32(1) << size) - np.uint32(1),
    "mad.lo.u32": lambda a, b, c: (a.astype(np.uint64) * b + c).astype(np.uint32),
    "shl.b32": lambda a, n: (a << n).astype(np.uint32),
    "shr.u32": lambda a, n: a >> n,
    "and.b32": lambda a, b: a & b,
    "or.b32": lambda a, b: a | b,
    "xor.b32": lambda a, b: a ^ b,
    "add.u32": lambda a, b: (a + b).astype(np.uint32),
    "shf.r.wrap.b32": _funnel_right,
    "prmt.b32": _prmt,
    "lop3.b32": _lop3,
    "mul.rn.bf16x2": _multiply(torch.bfloat16),
    "mul.rn.f16x2": _multiply(torch.float16),
    "min.bf16x2": _minmax(torch.minimum),
    "max.bf16x2": _minmax(torch.maximum),
    "max.NaN.bf16x2": _minmax(torch.maximum),
    "abs.bf16x2": lambda a: a & np.uint32(0x7FFF7FFF),
    "fma.rn.bf16x2": _fma,
    "add.s16x2": lambda a, b: (a.view(np.uint16) + b.view(np.uint16)).view(np.uint32),
    "min.u16x2": lambda a, b: np.minimum(a.view(np.uint16), b.view(np.uint16)).view(np.uint32),
    "max.u16x2": lambda a, b: np.maximum(a.view(np.uint16), b.view(np.uint16)).view(np.uint32),
    "add.rn.f32": _float32(np.add),
    "sub.rn.f32": _float32(np.subtract),
    "mul.rn.f32": _float32(np.multiply),
    "abs.f32": _float32(np.abs),
    "max.NaN.f32": _float32(np.maximum),
    "mov.b32": lambda a: a,
    "setp.ne.u32": lambda a, b: a != b,
    "selp.b32": lambda a, b, p: np.where(p, a, b),
    "shfl.sync.bfly.b32": _shuffle,
}
