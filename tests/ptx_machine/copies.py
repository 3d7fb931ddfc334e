"""Copies to shared memory that run beside the threads: cp.async by threads, and the bulk copies of Hopper of whole boxes."""

from dataclasses import dataclass, field

import numpy as np

from ptx_machine.memory import OutOfBoundsError


@dataclass
class Groups:
    """What threads asked for by cp.async: not in a group yet, and in groups that are not waited for, the oldest first."""

    asked: list = field(default_factory=list)
    groups: list = field(default_factory=list)

    def check_over(self):
        assert not self.asked, "copies are asked for and in no group when the kernel ends"
        assert not any(self.groups), "copies are on their way when the kernel ends"

    def of(self, threads):
        """What these threads asked for."""

        def theirs(copy):
            addresses, values, asked = copy
            which = np.isin(asked, threads)
            return addresses[which], values[which], asked[which]

        return Groups([theirs(copy) for copy in self.asked], [[theirs(copy) for copy in group] for group in self.groups])


def _cp(warps, one, active):
    if one.opcode[2] == "bulk":
        _copy_box(warps, one, active)
    elif one.opcode[2] == "commit_group":
        warps.copies.groups.append(warps.copies.asked)
        warps.copies.asked = []
    elif one.opcode[2] == "wait_group":
        while len(warps.copies.groups) > int(one.operands[0]):
            for copy in warps.copies.groups.pop(0):
                warps.shared.arrive(*copy)
    else:
        _ask(warps, one, active)


def _ask(warps, one, active):
    """16 bytes a thread, of which so many as the last operand says are read, and the others zeros."""
    assert one.opcode[1:] == ("async", "cg", "shared", "global")
    size = warps.read(one.operands[3], "u32")
    assert set(size.tolist()) <= {0, 16}
    found, some = np.zeros((len(size), 16), np.uint8), active & (size == 16)
    found[some] = warps.memory.read(warps.addresses(one.operands[1])[some], 16, warps.ctas(some), early=warps.early)
    to, threads = warps.addresses(one.operands[0])[active], warps.threads[active]
    warps.shared.ask(to, 16, threads)
    warps.copies.asked.append((to, found[active], threads))


@dataclass(frozen=True)
class Box:
    """What a tensor map says of a tensor of two dimensions, the rows first, and of the boxes that are copied of it.

    start: its address. stride: bytes of a row. size: bytes of an element. swizzle: bytes of its span, 0 for none.
    """

    start: int
    rows: int
    columns: int
    stride: int
    size: int
    box_rows: int
    box_columns: int
    swizzle: int

    @property
    def bytes(self):
        """Of a box."""
        return self.box_rows * self.box_columns * self.size

    def pieces(self, row, column):
        """-> (places in shared memory from the box's begin, addresses or -1 where the tensor ends) of 4 bytes each."""
        per_row = self.box_columns * self.size // 4
        r, c = np.divmod(np.arange(self.box_rows * per_row), per_row)
        from_row, from_byte = row + r, column * self.size + 4 * c
        inside = (from_row >= 0) & (from_row < self.rows) & (from_byte >= 0) & (from_byte < self.columns * self.size)
        if (inside & (from_byte + 4 > self.columns * self.size)).any():
            raise NotImplementedError("a tensor whose rows are no whole words")
        return 4 * np.arange(len(r)), np.where(inside, self.start + from_row * self.stride + from_byte, -1)


def swizzled(addresses, span):
    """Where 128-, 64- or 32-byte swizzling has what would lie at `addresses`: 16-byte pieces exchanged within `span` bytes."""
    return addresses if not span else addresses ^ ((addresses >> 7 & span // 16 - 1) << 4)


def _copy_box(warps, one, active):
    assert one.opcode[3:] == ("tensor", "2d", "shared_cluster", "global", "mbarrier_complete_tx_bytes")
    target, source, barrier = one.operands
    name, column, row = (word for word in source.strip("[]").replace("{", " ").replace("}", " ").replace(",", " ").split())
    boxes, to, barriers = warps.read(name, "b64"), warps.addresses(target), warps.addresses(barrier)
    columns, rows = warps.read(column, "s32"), warps.read(row, "s32")
    for i in np.flatnonzero(active):
        box = warps.machine.boxes[int(boxes[i])]
        places, addresses = box.pieces(int(rows[i]), int(columns[i]))
        if to[i] % (8 * box.swizzle or 128):
            raise OutOfBoundsError(f"a box to {to[i]}, which is not aligned as its swizzle of {box.swizzle} bytes asks for")
        found, there = np.zeros((len(places), 4), np.uint8), addresses >= 0
        cta = np.full(there.sum(), warps.machine.number(warps.threads[i] // warps.program.threads))
        found[there] = warps.memory.read(addresses[there], 4, cta, early=warps.early)
        copy = swizzled(to[i] + places, box.swizzle), found, np.full(len(places), warps.threads[i])
        warps.shared.ask(copy[0], 4, copy[2])
        warps.machine.mbarriers.bring(warps.threads[i], barriers[i], copy, box.bytes)


INSTRUCTIONS = {"cp": _cp}
