"""Loads, stores and atomics. All take (warps, instruction, active)."""

import numpy as np

from ptx_machine.values import UNSIGNED, bits_of


def _ld(warps, one, active):
    targets, kind = one.operands[0], f"b{bits_of(one.type)}"
    if one.opcode[1] == "param":
        warps.write(targets, _argument(warps, one), one.type, active)
        return
    targets = targets if isinstance(targets, tuple) else (targets,)
    size = bits_of(kind) // 8
    found = np.zeros((len(active), size * len(targets)), np.uint8)
    addresses = warps.addresses(one.operands[1])[active]
    if "shared" in one.opcode[1]:
        found[active] = warps.shared.read(addresses, found.shape[1], warps.threads[active])
    else:
        for address, cta in zip(addresses, warps.ctas(active), strict=True) if "acquire" in one.opcode else ():
            warps.memory.acquire(address, cta)
        found[active] = warps.memory.read(addresses, found.shape[1], warps.ctas(active), early=warps.early)
    for target, register in zip(targets, found.view(UNSIGNED[8 * size]).T, strict=True):
        # A byte or a half is loaded to a register of 32 bits too.
        to = "b32" if target.startswith("%r") and target[2:].isdigit() else kind
        warps.write(target, register.copy(), to, active)


def _argument(warps, one):
    value = warps.machine.arguments[warps.program.parameters.index(one.operands[1].strip("[]"))]
    if isinstance(value, float):
        return warps.all(np.float32(value).view(np.uint32), "f32")
    return warps.all(int(value) & (1 << bits_of(one.type)) - 1, one.type)


def _st(warps, one, active):
    sources = one.operands[1] if isinstance(one.operands[1], tuple) else (one.operands[1],)
    registers = [warps.read(word, f"b{bits_of(one.type)}") for word in sources]
    values = np.ascontiguousarray(np.stack(registers, axis=1)).view(np.uint8)[active]
    addresses = warps.addresses(one.operands[0])[active]
    if "shared" in one.opcode[1]:
        warps.shared.write(addresses, values, warps.threads[active])
    else:
        warps.memory.write(addresses, values, warps.ctas(active), early=warps.early)


def _atom(warps, one, active):
    """In the order of threads."""
    assert one.opcode[-2:] == ("add", "u32")
    assert one.opcode[1:-2] in (("shared",), ("global", "gpu", "acq_rel"), ("global", "gpu", "relaxed"))
    addresses, numbers = warps.addresses(one.operands[1]), warps.read(one.operands[2], "u32")
    found = np.zeros_like(numbers)
    for thread in np.flatnonzero(active):
        if one.opcode[1] == "shared":
            found[thread] = warps.shared.add(addresses[thread], numbers[thread], warps.threads[thread])
        else:
            cta = warps.machine.number(warps.threads[thread] // warps.program.threads)
            if "acq_rel" in one.opcode:
                warps.memory.acquire(addresses[thread], cta)
                warps.memory.release(addresses[thread], cta)
            found[thread] = warps.memory.add(addresses[thread], numbers[thread], early=warps.early)
    warps.write(one.operands[0], found, "u32", active)


def _ldmatrix(warps, one, active):
    assert active.all()
    assert one.opcode[1:4] == ("sync", "aligned", "m8n8")
    assert "trans" not in one.opcode
    rows = warps.shared.read(warps.addresses(one.operands[1]), 16, warps.threads)
    rows = rows.reshape(-1, 32, 4, 4)  # warp, lane, t, bytes
    for i, target in enumerate(one.operands[0]):
        matrix = rows[:, 8 * i : 8 * i + 8].reshape(-1, 32, 4)  # warp, 4 row + t
        warps.write(target, np.ascontiguousarray(matrix).view(np.uint32).reshape(-1), "b32", active)


def _stmatrix(warps, one, active):
    assert active.all()
    assert one.opcode[1:4] == ("sync", "aligned", "m8n8")
    rows = []
    for word in one.operands[1]:
        halves = np.ascontiguousarray(warps.read(word, "b32")).view(np.uint16).reshape(-1, 8, 4, 2)  # warp, g, t, half
        matrix = halves.reshape(-1, 8, 8)
        rows.append(matrix.transpose(0, 2, 1) if "trans" in one.opcode else matrix)
    rows = np.ascontiguousarray(np.stack(rows, axis=1)).view(np.uint8).reshape(len(warps.warps), -1, 16)
    lanes = slice(rows.shape[1])  # a lane has the address of a row
    addresses, threads = (of.reshape(-1, 32)[:, lanes].reshape(-1) for of in (warps.addresses(one.operands[0]), warps.threads))
    warps.shared.write(addresses, rows.reshape(-1, 16), threads)


INSTRUCTIONS = {"ld": _ld, "st": _st, "atom": _atom, "ldmatrix": _ldmatrix, "stmatrix": _stmatrix}
