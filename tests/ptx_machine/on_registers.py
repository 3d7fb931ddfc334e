"""Instructions on registers of several types, and on other threads' registers. All take (warps, instruction, active)."""

import numpy as np

from ptx_machine.values import COMPARISONS, UNSIGNED, bits_of, converted, numbers


def _mov(warps, one, active):
    target, source = one.operands
    if isinstance(target, tuple):
        part = bits_of(one.type) // len(target)
        whole = warps.read(source, f"b{bits_of(one.type)}")
        for i, word in enumerate(target):
            warps.write(word, (whole >> np.asarray(i * part, whole.dtype)).astype(UNSIGNED[part]), f"b{part}", active)
    elif isinstance(source, tuple):
        part = bits_of(one.type) // len(source)
        whole = np.ascontiguousarray(np.stack([warps.read(word, f"b{part}") for word in source], axis=1))
        warps.write(target, whole.view(UNSIGNED[bits_of(one.type)]).reshape(-1), one.type, active)
    else:
        warps.write(target, warps.read(source, one.type), one.type, active)


def _cvta(warps, one, active):
    warps.write(one.operands[0], warps.read(one.operands[1], one.type), one.type, active)


def _selp(warps, one, active):
    target, yes, no, which = one.operands
    kind = f"b{bits_of(one.type)}"
    warps.write(target, np.where(warps.read(which, "pred"), warps.read(yes, kind), warps.read(no, kind)), kind, active)


def _setp(warps, one, active):
    _, compare, kind = one.opcode
    target, a, b = one.operands
    warps.write(target, COMPARISONS[compare](warps.read(a, kind), warps.read(b, kind)), "pred", active)


def _cvt(warps, one, active):
    to, source = one.opcode[-2:]
    if (to, source) == ("f16x2", "e4m3x2"):
        halves = numbers(warps.read(one.operands[1], "b16").astype(np.uint32), "e4m3")[:2].astype(np.float16)
        warps.write(one.operands[0], np.ascontiguousarray(halves.T).view(np.uint32).reshape(-1), "b32", active)
    elif to.endswith("x2"):  # the first operand is the upper half
        high, low = (converted(warps.read(word, source), source, to[:-2]) for word in one.operands[1:])
        pair = np.ascontiguousarray(np.stack([low, high], axis=1))
        kind = f"b{16 * pair.itemsize}"
        warps.write(one.operands[0], pair.view(UNSIGNED[bits_of(kind)]).reshape(-1), kind, active)
    else:
        warps.write(one.operands[0], converted(warps.read(one.operands[1], source), source, to), to, active)


def _shfl(warps, one, active):
    assert active.all()
    target, source, count, clamp, members = (one.operands[0], *(warps.read(word, "b32") for word in one.operands[1:]))
    assert (members == 0xFFFFFFFF).all()
    here = np.arange(len(source))
    lane, count = here % 32, count.astype(np.int64)
    assert one.opcode[1] == "sync"
    assert (clamp == (0 if one.opcode[2] == "up" else 31)).all()
    other = {"bfly": lane ^ count, "up": np.where(lane >= count, lane - count, lane), "idx": count}[one.opcode[2]]
    warps.write(target, source[here - lane + other], "b32", active)


def _redux(warps, one, active):
    assert active.all()
    assert (warps.read(one.operands[2], "u32") == 0xFFFFFFFF).all()
    reduce = {"add": np.add, "max": np.maximum, "min": np.minimum}[one.opcode[2]].reduce
    numbers = warps.read(one.operands[1], one.type).reshape(-1, 32)
    warps.write(one.operands[0], reduce(numbers, axis=1, dtype=numbers.dtype).repeat(32), one.type, active)


def _vote(warps, one, active):
    assert active.all()
    assert one.opcode[1:3] == ("sync", "ballot")
    lanes = warps.read(one.operands[1], "pred").reshape(-1, 32).astype(np.uint32) << np.arange(32, dtype=np.uint32)
    warps.write(one.operands[0], lanes.sum(axis=1, dtype=np.uint32).repeat(32), "b32", active)


def _elect(warps, one, active):
    """One lane of each warp, here the first."""
    assert active.all()
    leader, is_leader = one.operands[0].split("|")
    warps.write(leader, warps.all(0, "b32"), "b32", active)
    warps.write(is_leader, warps.threads % 32 == 0, "pred", active)


INSTRUCTIONS = {
    "mov": _mov,
    "cvta": _cvta,
    "selp": _selp,
    "setp": _setp,
    "cvt": _cvt,
    "shfl": _shfl,
    "redux": _redux,
    "vote": _vote,
    "elect": _elect,
}
