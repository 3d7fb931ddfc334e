"""Warps that execute the same instructions: all of their threads one at a time, until they wait, end or go different ways."""

import numpy as np
import ptx

from ptx_machine.values import COMPARISONS, HALVES, UNSIGNED, as_register, bits_of, converted, function_of, read_as

_NOTHING = {"fence", "membar", "createpolicy", "prefetch"}


class Warps:
    """Some warps of CTAs that run at once, counted through all of them. They share their place in the program.

    After `run` they either are `done`, wait at a barrier and run again when `may_go_on`, or have left other warps in `others`.
    """

    def __init__(self, machine, warps, at=0):
        self._machine, self._program, self._memory = machine, machine.program, machine.memory
        self._shared = machine.shared
        self.warps, self._at = warps, at
        self._threads = (32 * warps[:, None] + np.arange(32)).reshape(-1)
        self._registers = {}
        self._asked, self._groups = [], []  # of cp.async: not in a group yet, and groups that are not waited for
        self._early = machine.program.overlaps
        self._waits_for = None

    @property
    def done(self):
        """Whether they have ended."""
        return self._at >= len(self._program.instructions)

    @property
    def may_go_on(self):
        """Whether they do not wait at a barrier."""
        return self._waits_for is None or self._machine.barriers.is_over(self._waits_for)

    def run(self):
        """-> warps that have gone another way."""
        self._waits_for = None
        while not self.done and self._waits_for is None:
            one = self._program.instructions[self._at]
            self._at += 1
            active = self._active(one)
            if one.opcode[0] in ("bra", "ret"):
                go = active.reshape(-1, 32)
                if (go.any(axis=1) != go.all(axis=1)).any():
                    raise NotImplementedError(f"{one}: threads of a warp go different ways")
                to = self._program.labels[one.operands[0]] if one.opcode[0] == "bra" else len(self._program.instructions)
                if go.any() and not go.all():
                    others = self._leave(~go[:, 0])
                    self._at = to
                    return [others]
                if go.any():
                    self._at = to
            elif active.any():
                self._execute(one, active)
        if self.done:
            assert not self._asked, "copies are asked for and in no group when the kernel ends"
            assert not any(self._groups), "copies are on their way when the kernel ends"
        return []

    def _leave(self, which):
        """-> the warps of a mask, which are no longer here."""
        others = Warps(self._machine, self.warps[which], self._at)
        rest = Warps(self._machine, self.warps[~which], self._at)
        for part, mask in ((others, which), (rest, ~which)):
            threads = mask.repeat(32)
            part._registers = {name: register[threads] for name, register in self._registers.items()}
            part._asked = [_copy_of(copy, part._threads) for copy in self._asked]
            part._groups = [[_copy_of(copy, part._threads) for copy in group] for group in self._groups]
            part._early = self._early
        self.__dict__.update(rest.__dict__)
        return others

    def _active(self, one):
        if one.predicate is None:
            return np.ones(len(self._threads), bool)
        return self._registers[one.predicate] == one.wanted

    def _execute(self, one, active):
        if one.opcode[0] in _NOTHING:
            return
        if method := getattr(self, f"_{one.opcode[0]}", None):
            method(one, active)
            return
        compute, kinds, result = function_of(one.opcode)
        numbers = [self._read(word, kind) for word, kind in zip(one.operands[1:], kinds, strict=False)]
        with np.errstate(all="ignore"):
            self._write(one.operands[0], compute(*numbers), result, active)

    # --- Operands -----------------------------------------------------------------------------------------------------------

    def _read(self, word, kind):
        if word in self._registers:
            return read_as(self._registers[word], kind)
        if word.startswith("0f"):
            return self._all(np.uint32(int(word[2:], 16)), "f32")
        if word.startswith("%"):
            return self._special(word).astype(UNSIGNED[bits_of(kind)])
        value = 0 if word == "global_smem" else int(word, 0)
        if kind == "pred":
            return np.full(len(self._threads), value != 0)
        return self._all(value & (1 << bits_of(kind)) - 1, kind)

    def _all(self, bits, kind):
        return read_as(np.full(len(self._threads), bits, UNSIGNED[bits_of(kind)]), kind)

    def _special(self, word):
        if word == "%tid.x":
            return self._threads % self._program.threads
        if word == "%laneid":
            return self._threads % 32
        name, _, axis = word.partition(".")
        if name != "%ctaid":
            raise NotImplementedError(word)
        return self._machine.place(self._threads // self._program.threads, axis)

    def _write(self, word, numbers, kind, active):
        if word == "_":
            return
        register = as_register(numbers, kind)
        if not active.all():
            register = np.where(active, register, self._registers.get(word, np.zeros_like(register)))
        self._registers[word] = register

    def _addresses(self, word):
        base, _, offset = word.strip("[]").replace(" ", "").partition("+")
        return self._read(base, "b64" if base.startswith("%rd") else "b32").astype(np.int64) + int(offset or 0)

    def _ctas(self, active):
        return self._machine.number(self._threads[active] // self._program.threads)

    # --- Barriers -----------------------------------------------------------------------------------------------------------

    def _bar(self, one, active):
        assert active.all()
        if one.opcode[1:] == ("warp", "sync"):
            self._shared.warp_barrier(self.warps)
        else:
            assert (one.opcode[1:], one.operands) == (("sync",), ("0",))
            self._waits_for = self._machine.barriers.arrive(self.warps, 0)
            if self.may_go_on:
                self._waits_for = None

    def _griddepcontrol(self, one, active):
        assert active.all()
        if one.opcode[1] == "wait":
            self._early = False

    # --- Memory -------------------------------------------------------------------------------------------------------------

    def _ld(self, one, active):
        targets, kind = one.operands[0], f"b{bits_of(one.type)}"
        if one.opcode[1] == "param":
            self._write(targets, self._argument(one), one.type, active)
            return
        targets = targets if isinstance(targets, tuple) else (targets,)
        size = bits_of(kind) // 8
        found = np.zeros((len(active), size * len(targets)), np.uint8)
        addresses = self._addresses(one.operands[1])[active]
        if "shared" in one.opcode[1]:
            found[active] = self._shared.read(addresses, found.shape[1], self._threads[active])
        else:
            found[active] = self._memory.read(addresses, found.shape[1], self._ctas(active), early=self._early)
        for target, register in zip(targets, found.view(UNSIGNED[8 * size]).T, strict=True):
            self._write(target, register.copy(), kind, active)

    def _argument(self, one):
        value = self._machine.arguments[self._program.parameters.index(one.operands[1].strip("[]"))]
        if isinstance(value, float):
            return self._all(np.float32(value).view(np.uint32), "f32")
        return self._all(int(value) & (1 << bits_of(one.type)) - 1, one.type)

    def _st(self, one, active):
        sources = one.operands[1] if isinstance(one.operands[1], tuple) else (one.operands[1],)
        registers = [self._read(word, f"b{bits_of(one.type)}") for word in sources]
        values = np.ascontiguousarray(np.stack(registers, axis=1)).view(np.uint8)[active]
        addresses = self._addresses(one.operands[0])[active]
        if "shared" in one.opcode[1]:
            self._shared.write(addresses, values, self._threads[active])
        else:
            self._memory.write(addresses, values, self._ctas(active), early=self._early)

    def _cp(self, one, active):
        """cp.async: 16 bytes, of which so many as the last operand says are read, in groups that arrive when waited for."""
        if one.opcode[2] == "commit_group":
            self._groups.append(self._asked)
            self._asked = []
        elif one.opcode[2] == "wait_group":
            while len(self._groups) > int(one.operands[0]):
                for copy in self._groups.pop(0):
                    self._shared.arrive(*copy)
        else:
            assert one.opcode[1:] == ("async", "cg", "shared", "global")
            size = self._read(one.operands[3], "u32")
            assert set(size.tolist()) <= {0, 16}
            found, some = np.zeros((len(size), 16), np.uint8), active & (size == 16)
            found[some] = self._memory.read(self._addresses(one.operands[1])[some], 16, self._ctas(some), early=self._early)
            to = self._addresses(one.operands[0])[active]
            self._shared.ask(to, 16, self._threads[active])
            self._asked.append((to, found[active], self._threads[active]))

    def _atom(self, one, active):
        """In the order of threads."""
        assert one.opcode[1:] == ("shared", "add", "u32")
        addresses, numbers = self._addresses(one.operands[1]), self._read(one.operands[2], "u32")
        found = np.zeros_like(numbers)
        for thread in np.flatnonzero(active):
            found[thread] = self._shared.add(addresses[thread], numbers[thread], self._threads[thread])
        self._write(one.operands[0], found, "u32", active)

    def _ldmatrix(self, one, active):
        assert active.all()
        assert one.opcode[1:4] == ("sync", "aligned", "m8n8")
        assert "trans" not in one.opcode
        rows = self._shared.read(self._addresses(one.operands[1]), 16, self._threads)
        rows = rows.reshape(-1, 32, 4, 4)  # warp, lane, t, bytes
        for i, target in enumerate(one.operands[0]):
            matrix = rows[:, 8 * i : 8 * i + 8].reshape(-1, 32, 4)  # warp, 4 row + t
            self._write(target, np.ascontiguousarray(matrix).view(np.uint32).reshape(-1), "b32", active)

    # --- Registers of other threads -----------------------------------------------------------------------------------------

    def _mma(self, one, active):
        """m16n8k16 by the ISA's figures: lane 4 g + t."""
        assert active.all()
        assert one.opcode[1:6] == ("sync", "aligned", "m16n8k16", "row", "col")
        d, a, b, c = one.operands
        g, t = ptx.LANES // 4, ptx.LANES % 4
        warps = len(self._threads) // 32
        left, right, out = (np.zeros((warps, *shape)) for shape in ((16, 16), (16, 8), (16, 8)))
        for i, word in enumerate(a):
            for e, half in enumerate(self._halves(word, one.opcode[7])):
                left[:, g + 8 * (i % 2), 2 * t + e + 8 * (i // 2)] = half
        for i, word in enumerate(b):
            for e, half in enumerate(self._halves(word, one.opcode[7])):
                right[:, 2 * t + e + 8 * i, g] = half
        for i, word in enumerate(c):
            out[:, g + 8 * (i // 2), 2 * t + i % 2] = self._read(word, "f32").reshape(warps, 32)
        with np.errstate(all="ignore"):
            out = (left @ right + out).astype(np.float32)
        for i, word in enumerate(d):
            self._write(word, out[:, g + 8 * (i // 2), 2 * t + i % 2].reshape(-1), "f32", active)

    def _halves(self, word, kind):
        """The numbers of both, (warps, 32) each."""
        return ptx.halves(self._read(word, "b32"), HALVES[kind]).reshape(2, -1, 32)

    def _shfl(self, one, active):
        assert active.all()
        target, source, count, clamp, members = (one.operands[0], *(self._read(w, "b32") for w in one.operands[1:]))
        assert (members == 0xFFFFFFFF).all()
        lane, here = self._threads % 32, np.arange(len(self._threads))
        if one.opcode[1:3] == ("sync", "bfly"):
            assert (clamp == 31).all()
            other = lane ^ count
        else:
            assert one.opcode[1:3] == ("sync", "up")
            assert (clamp == 0).all()
            other = np.where(lane >= count, lane - count.astype(np.int64), lane)
        self._write(target, source[here - lane + other], "b32", active)

    def _redux(self, one, active):
        assert active.all()
        assert one.opcode[1:] == ("sync", "add", "s32")
        sums = self._read(one.operands[1], "u32").reshape(-1, 32).sum(axis=1, dtype=np.uint32)
        self._write(one.operands[0], sums.repeat(32), "b32", active)

    def _vote(self, one, active):
        assert active.all()
        assert one.opcode[1:3] == ("sync", "ballot")
        lanes = self._read(one.operands[1], "pred").reshape(-1, 32).astype(np.uint32) << np.arange(32, dtype=np.uint32)
        self._write(one.operands[0], lanes.sum(axis=1, dtype=np.uint32).repeat(32), "b32", active)

    # --- Registers of several types -----------------------------------------------------------------------------------------

    def _mov(self, one, active):
        target, source = one.operands
        if isinstance(target, tuple):
            part = bits_of(one.type) // len(target)
            whole = self._read(source, f"b{bits_of(one.type)}")
            for i, word in enumerate(target):
                self._write(word, (whole >> np.asarray(i * part, whole.dtype)).astype(UNSIGNED[part]), f"b{part}", active)
        elif isinstance(source, tuple):
            part = bits_of(one.type) // len(source)
            whole = np.ascontiguousarray(np.stack([self._read(word, f"b{part}") for word in source], axis=1))
            self._write(target, whole.view(UNSIGNED[bits_of(one.type)]).reshape(-1), one.type, active)
        else:
            self._write(target, self._read(source, one.type), one.type, active)

    def _selp(self, one, active):
        target, yes, no, which = one.operands
        kind = f"b{bits_of(one.type)}"
        self._write(target, np.where(self._read(which, "pred"), self._read(yes, kind), self._read(no, kind)), kind, active)

    def _setp(self, one, active):
        _, compare, kind = one.opcode
        target, a, b = one.operands
        self._write(target, COMPARISONS[compare](self._read(a, kind), self._read(b, kind)), "pred", active)

    def _cvt(self, one, active):
        to, source = one.opcode[-2:]
        if to in ("bf16x2", "f16x2"):  # the first operand is the upper half
            high, low = (converted(self._read(word, source), source, to[:-2]).astype(np.uint32) for word in one.operands[1:])
            self._write(one.operands[0], high << np.uint32(16) | low, "b32", active)
        else:
            self._write(one.operands[0], converted(self._read(one.operands[1], source), source, to), to, active)


def _copy_of(copy, threads):
    """What of a copy some threads have asked for."""
    addresses, values, asked = copy
    theirs = np.isin(asked, threads)
    return addresses[theirs], values[theirs], asked[theirs]
