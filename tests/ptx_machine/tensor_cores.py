"""Matrix products: of a warp at once, and of a warpgroup, whose registers are not to be touched until they are waited for."""

import re
from dataclasses import dataclass, field

import numpy as np
import ptx

from ptx_machine.copies import swizzled
from ptx_machine.memory import RaceError
from ptx_machine.values import numbers

_SWIZZLE = {0: 0, 1: 128, 2: 64, 3: 32}  # bytes, by the number in a descriptor of shared memory


@dataclass
class Groups:
    """wgmma that are not waited for, in groups, the oldest first, and registers that they read or write."""

    asked: list = field(default_factory=list)
    groups: list = field(default_factory=list)

    def __post_init__(self):
        self.update()

    def update(self):
        """Note which registers are not to be read, `sums`, and which not to be written, `registers`."""
        pending = [product for group in (*self.groups, self.asked) for product in group]
        self.sums = {word for product in pending for word in product.sums}
        self.registers = self.sums | {word for product in pending for word in product.operands}

    def check_over(self):
        assert not self.asked, "wgmma are in no group when the kernel ends"

    def of(self, warps):
        """What these warps asked for."""
        return Groups([one.of(warps) for one in self.asked], [[one.of(warps) for one in group] for group in self.groups])


@dataclass(frozen=True)
class _Product:
    """sums, operands: its registers. reads: (addresses, bytes, threads) of what it reads of shared memory."""

    sums: tuple
    operands: tuple
    reads: tuple

    def of(self, warps):
        addresses, read, threads = self.reads
        theirs = np.isin(threads // 32, warps)
        return _Product(self.sums, self.operands, (addresses[theirs], read[theirs], threads[theirs]))


def _left(warps, words, kind):
    """The A operand of each warp: (warps, 16, k), rows g and g + 8 in turn, then the same of the other half of k."""
    g, t = ptx.LANES // 4, ptx.LANES % 4
    per = 4 if kind == "e4m3" else 2
    left = np.zeros((len(warps.warps), 16, 8 * per))
    for i, word in enumerate(words):
        for e, number in enumerate(numbers(warps.read(word, "b32"), kind)):
            left[:, g + 8 * (i % 2), per * t + e + 4 * per * (i // 2)] = number.reshape(-1, 32)
    return left


def _sums(warps, words):
    """(warps, 16, n): two neighbours of row g, then of row g + 8, for each 8 columns."""
    g, t = ptx.LANES // 4, ptx.LANES % 4
    sums = np.zeros((len(warps.warps), 16, 2 * len(words)))
    for i, word in enumerate(words):
        sums[:, g + 8 * (i // 2 % 2), 8 * (i // 4) + 2 * t + i % 2] = warps.read(word, "f32").reshape(-1, 32)
    return sums


def _write_sums(warps, words, sums, active):
    g, t = ptx.LANES // 4, ptx.LANES % 4
    for i, word in enumerate(words):
        warps.write(word, sums[:, g + 8 * (i // 2 % 2), 8 * (i // 4) + 2 * t + i % 2].reshape(-1), "f32", active)


def _mma(warps, one, active):
    """m16n8k16."""
    assert active.all()
    assert one.opcode[1:6] == ("sync", "aligned", "m16n8k16", "row", "col")
    d, a, b, c = one.operands
    g, t = ptx.LANES // 4, ptx.LANES % 4
    right = np.zeros((len(warps.warps), 16, 8))
    for i, word in enumerate(b):
        for e, half in enumerate(numbers(warps.read(word, "b32"), one.opcode[7])):
            right[:, 2 * t + e + 8 * i, g] = half.reshape(-1, 32)
    with np.errstate(all="ignore"):
        sums = (_left(warps, a, one.opcode[7]) @ right + _sums(warps, c)).astype(np.float32)
    _write_sums(warps, d, sums, active)


def _wgmma(warps, one, active):
    assert active.all()
    products = warps.products
    if one.opcode[1] == "commit_group":
        products.groups.append(products.asked)
        products.asked = []
    elif one.opcode[1] == "wait_group":
        while len(products.groups) > int(one.operands[0]):
            _check_unchanged(warps, products.groups.pop(0))
        products.update()
    elif one.opcode[1] == "mma_async":
        _start(warps, one, active)


def _start(warps, one, active):
    """m64nNk32 bytes: A by registers, B by a descriptor, both along k."""
    assert one.opcode[2:4] == ("sync", "aligned")
    n, kind = int(re.fullmatch(r"m64n(\d+)k\d+", one.opcode[4])[1]), one.opcode[6]
    d, a, descriptor, scale_d, *signs = one.operands
    assert [int(sign) for sign in signs] in ([1, 1], [1, 1, 0]), "signs, and whether B lies along n"
    groups = warps.warps.reshape(-1, 4)
    assert (groups % 4 == np.arange(4)).all(), "not whole warpgroups"
    reads = _read_b(warps, groups, descriptor, n)
    right = numbers(np.ascontiguousarray(reads[1]).view(np.uint32).reshape(-1), kind).T.reshape(len(groups), n, -1)
    left, scale = _left(warps, a, kind), warps.read(scale_d, "pred").reshape(-1, 32)[:, 0, None, None]
    # Sums of a wgmma that is not waited for may be added to again: they are added in the order of the program.
    products, warps.products = warps.products, Groups()
    sums = _sums(warps, d)
    with np.errstate(all="ignore"):
        product = left.reshape(len(groups), 64, -1) @ right.transpose(0, 2, 1)
        sums = (np.where(scale, sums, 0) + product.reshape(sums.shape)).astype(np.float32)
    _write_sums(warps, d, sums, active)
    warps.products = products
    products.asked.append(_Product(d, a, reads))
    products.update()


def _read_b(warps, groups, descriptor, n):
    """What each warpgroup reads, by its first thread: (addresses, bytes, threads), warpgroup by warpgroup, n, 4-byte pieces."""
    places = _rows_of_b(warps.read(descriptor, "u64").reshape(-1, 128)[:, 0], n)
    addresses, threads = places.reshape(-1), np.repeat(32 * groups[:, 0], places[0].size)
    return addresses, warps.shared.read(addresses, 4, threads), threads


def _rows_of_b(descriptors, n):
    """Where 32 bytes of each of n rows lie, rows of a swizzle's span, in groups of eight: (descriptors, n, 8)."""
    start, stride = (descriptors & 0x3FFF) << 4, (descriptors >> 32 & 0x3FFF) << 4
    span = _SWIZZLE[int(descriptors[0] >> 62)]
    assert span
    assert not (descriptors >> 49 & 7).any()
    row, piece = np.arange(n)[:, None], np.arange(8)
    places = start[:, None, None] + (row // 8 * stride[:, None, None] + row % 8 * span + 4 * piece)
    return swizzled(places.astype(np.int64), span)


def _check_unchanged(warps, group):
    """What a wgmma reads is read until it is waited for."""
    for product in group:
        addresses, read, threads = product.reads
        if not np.array_equal(warps.shared.read(addresses, 4, threads), read):
            raise RaceError("what a wgmma reads is overwritten before it was waited for")


INSTRUCTIONS = {"mma": _mma, "wgmma": _wgmma}
