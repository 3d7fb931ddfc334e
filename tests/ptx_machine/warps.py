"""Warps that execute the same instructions: all of their threads one at a time, until they wait, end or go different ways."""

import numpy as np

from ptx_machine import copies, on_memory, on_registers, synchronization, tensor_cores
from ptx_machine.memory import RaceError
from ptx_machine.values import UNSIGNED, as_register, bits_of, function_of, read_as

_INSTRUCTIONS = {
    **on_registers.INSTRUCTIONS,
    **on_memory.INSTRUCTIONS,
    **copies.INSTRUCTIONS,
    **synchronization.INSTRUCTIONS,
    **tensor_cores.INSTRUCTIONS,
}


class Warps:
    """Some warps of CTAs that run at once, counted through all of them. They share their place in the program.

    `run` ends when they have ended, wait for something, or go different ways.
    """

    def __init__(self, machine, warps, at=0):
        self.machine, self.program, self.memory, self.shared = machine, machine.program, machine.memory, machine.shared
        self.warps, self._at = warps, at
        self.threads = (32 * warps[:, None] + np.arange(32)).reshape(-1)
        self._everyone = np.ones(len(self.threads), bool)
        self._registers = {}
        self._early = machine.program.overlaps
        self.copies = copies.Groups()  # of cp.async
        self.products = tensor_cores.Groups()  # of wgmma
        self._may_go_on = None  # what they wait for: a function that says whether it has come

    # --- Control ------------------------------------------------------------------------------------------------------------

    @property
    def _done(self):
        return self._at >= len(self.program.instructions)

    @property
    def may_go_on(self):
        """Whether nothing that they wait for is missing."""
        return self._may_go_on is None or self._may_go_on()

    @property
    def early(self):
        """Whether the kernel before may still run, for all that they know."""
        self._early = self._early and not self.shared.know_of_wait(self.warps)
        return self._early

    def wait(self, until, *, again=False):
        """Go on when `until` is true. again: with the instruction that waits, not the one behind it."""
        self._may_go_on = until
        self._at -= again

    def run(self):
        """-> what is to be run on: these, the parts that they have become, or nothing."""
        self._may_go_on = None
        while not (self._done or self._may_go_on):
            one = self.program.instructions[self._at]
            self._at += 1
            active = self._active(one)
            if one.opcode[0] in ("bra", "brx", "ret"):
                parts = self._go(self._targets(one, active))
                if parts:
                    return parts
            elif active is self._everyone or active.any():
                self._execute(one, active)
        if not self._done:
            return [self]
        self.copies.check_over()
        self.products.check_over()
        return []

    def _active(self, one):
        """Which threads execute it: `_everyone` itself where all do."""
        if one.predicate is None:
            return self._everyone
        active = self._registers[one.predicate] == one.wanted
        return self._everyone if active.all() else active

    def _targets(self, one, active):
        """Where threads go."""
        if one.opcode[0] == "ret":
            return np.where(active, len(self.program.instructions), self._at)
        if one.opcode[0] == "brx":
            targets = np.array([self.program.labels[label] for label in self.program.tables[one.operands[1]]])
            return targets[self.read(one.operands[0], "u32")]
        return np.where(active, self.program.labels[one.operands[0]], self._at) if active.any() else np.full(1, self._at)

    def _go(self, targets):
        """Go there. -> the parts that they become where these are several places."""
        if (targets == targets[0]).all():
            self._at = targets[0]
            return []
        of_warp = targets.reshape(-1, 32)
        if (of_warp != of_warp[:, :1]).any():
            raise NotImplementedError("threads of a warp go different ways")
        return [self._part(of_warp[:, 0] == target, target) for target in np.unique(of_warp)]

    def _part(self, which, at):
        part = Warps(self.machine, self.warps[which], at)
        part._registers = {name: register[which.repeat(32)] for name, register in self._registers.items()}
        part.copies, part.products = self.copies.of(part.threads), self.products.of(part.warps)
        part._early = self._early
        return part

    def _execute(self, one, active):
        if execute := _INSTRUCTIONS.get(one.opcode[0]):
            execute(self, one, active)
            return
        compute, kinds, result = function_of(one.opcode)
        numbers = [self.read(word, kind) for word, kind in zip(one.operands[1:], kinds, strict=False)]
        with np.errstate(all="ignore"):
            self.write(one.operands[0], compute(*numbers), result, active)

    # --- Operands -----------------------------------------------------------------------------------------------------------

    def ctas(self, active):
        """The CTA of each active thread, as numbered in the grid."""
        return self.machine.number(self.threads[active] // self.program.threads)

    def read(self, word, kind):
        """An operand as numbers of a type."""
        if word in self._registers:
            if word in self.products.sums:
                raise RaceError(f"{word} is read before its wgmma is waited for")
            return read_as(self._registers[word], kind)
        if word.startswith("0f"):
            return self.all(int(word[2:], 16), kind)
        if word.startswith("%"):
            special = self._special(word)
            return self._unwritten(kind) if special is None else special.astype(UNSIGNED[bits_of(kind)])
        if word in self.program.parameters:
            return self.all(self.machine.arguments[self.program.parameters.index(word)], kind)
        value = 0 if word == "global_smem" else int(word.rstrip("U"), 0)
        if kind == "pred":
            return np.full(len(self.threads), value != 0)
        return self.all(value & (1 << bits_of(kind)) - 1, kind)

    def all(self, bits, kind):
        """The same in all threads."""
        return read_as(np.full(len(self.threads), bits, UNSIGNED[bits_of(kind)]), kind)

    def write(self, word, numbers, kind, active):
        """A register of active threads."""
        if word == "_":
            return
        if word in self.products.registers:
            raise RaceError(f"{word} is written before its wgmma is waited for")
        register = as_register(numbers, kind)
        if active is not self._everyone:
            register = np.where(active, register, self._registers.get(word, as_register(self._unwritten(kind), kind)))
        self._registers[word] = register

    def addresses(self, word):
        """Of an operand in brackets."""
        base, _, offset = word.strip("[] ").replace(" ", "").partition("+")
        register = self.read(base, "s64" if base.startswith("%rd") else "s32")
        return (register + register.dtype.type(offset or 0)).astype(np.int64)

    def _unwritten(self, kind):
        """Of a register that nothing was written to: NaN as a number."""
        return self.all((1 << bits_of(kind)) - 1, kind) if kind != "pred" else np.zeros(len(self.threads), bool)

    def _special(self, word):
        if word == "%tid.x":
            return self.threads % self.program.threads
        if word == "%laneid":
            return self.threads % 32
        name, _, axis = word.partition(".")
        if name == "%nctaid":
            return np.full(len(self.threads), self.machine.grid.get(axis, 1))
        return self.machine.place(self.threads // self.program.threads, axis) if name == "%ctaid" else None
