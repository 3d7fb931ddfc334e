"""Barriers of CTAs and warps, mbarriers, and what tells kernels apart that overlap."""

from dataclasses import dataclass, field

import numpy as np

from ptx_machine.memory import RaceError


class Barriers:
    """`bar.sync` of CTAs, by CTA and number."""

    def __init__(self, shared, ctas, warps):
        self._shared, self._warps = shared, warps
        self._here = np.zeros((ctas, 16, warps), bool)
        self._times = np.zeros((ctas, 16), int)

    def arrive(self, warps, number, count):
        """Warps, counted through all CTAs, are at a barrier of `count` warps. -> a function: whether all are."""
        ctas = np.unique(warps // self._warps)
        self._here[warps // self._warps, number, warps % self._warps] = True
        times = self._times[ctas, number].copy()
        for cta in ctas:
            here = self._here[cta, number]
            if here.sum() == count:
                self._shared.barrier(cta, np.flatnonzero(here))
                self._here[cta, number] = False
                self._times[cta, number] += 1
        return lambda: bool((self._times[ctas, number] > times).all())


@dataclass
class _Mbarrier:
    """Arrivals and bytes that its phase still lacks, the copies that are to be seen then, and who will be known of."""

    count: int
    arrivals: int = 0
    bytes: int = 0
    phase: int = 0
    copies: list = field(default_factory=list)
    knows: np.ndarray | None = None
    known: np.ndarray | None = None  # of the last phase that is over


class Mbarriers:
    """By CTA and address."""

    def __init__(self, shared, threads):
        self._shared, self._threads = shared, threads
        self._all = {}

    def init(self, thread, address, count):
        self._all[thread // self._threads, address] = _Mbarrier(count, count)

    def arrive(self, thread, address, *, expect=0):
        one = self._one(thread, address)
        _, one.knows = self._shared.tell(thread, one.knows)
        one.arrivals, one.bytes = one.arrivals - 1, one.bytes + expect
        self._end_phase(one)

    def bring(self, thread, address, copy, size):
        """A copy of so many bytes that this barrier waits for."""
        one = self._one(thread, address)
        at, one.knows = self._shared.tell(thread, one.knows)
        one.copies.append((*copy, at))
        one.bytes -= size
        self._end_phase(one)

    def is_over(self, thread, address, parity):
        return self._one(thread, address).phase != parity

    def learn(self, thread, address):
        """The thread's warp has waited."""
        self._shared.learn(thread, self._one(thread, address).known)

    def _one(self, thread, address):
        key = thread // self._threads, address
        if key not in self._all:
            raise RaceError("an mbarrier is used that was not initialized")
        return self._all[key]

    def _end_phase(self, one):
        if one.arrivals < 0:
            raise RaceError("more threads arrive at an mbarrier than it counts")
        if one.arrivals or one.bytes:
            return
        for copy in one.copies:
            self._shared.arrive(*copy)
        one.phase, one.arrivals, one.copies = one.phase ^ 1, one.count, []
        one.known, one.knows = one.knows, None


def _bar(warps, one, active):
    assert active.all()
    if one.opcode[1:] == ("warp", "sync"):
        warps.shared.warp_barrier(warps.warps)
        return
    assert one.opcode[1:] == ("sync",)
    number, *count = (int(word) for word in one.operands)
    warps.wait(warps.machine.barriers.arrive(warps.warps, number, (count or [warps.program.threads])[0] // 32))


def _mbarrier(warps, one, active):
    mbarriers = warps.machine.mbarriers
    if one.opcode[1] == "try_wait":
        _try_wait(warps, one, active)
        return
    address = one.operands[0 if one.opcode[1] == "init" else 1]
    for i in np.flatnonzero(active):
        place = warps.addresses(address)[i]
        if one.opcode[1] == "init":
            mbarriers.init(warps.threads[i], place, int(one.operands[1]))
        else:
            expect = warps.read(one.operands[2], "u32")[i] if "expect_tx" in one.opcode else 0
            mbarriers.arrive(warps.threads[i], place, expect=int(expect))


def _try_wait(warps, one, active):
    """It waits until the phase is over: then it is true."""
    assert active.all()
    assert one.opcode[2] == "parity"
    mbarriers, first = warps.machine.mbarriers, slice(None, None, 32)
    asked = list(
        zip(
            warps.threads[first],
            warps.addresses(one.operands[1])[first],
            warps.read(one.operands[2], "u32")[first],
            strict=True,
        )
    )

    def is_over():
        return all(mbarriers.is_over(*each) for each in asked)

    if not is_over():
        warps.wait(is_over, again=True)
        return
    for thread, address, _ in asked:
        mbarriers.learn(thread, address)
    warps.write(one.operands[0], np.ones(len(active), bool), "pred", active)


def _griddepcontrol(warps, one, active):
    assert active.all()
    if one.opcode[1] == "wait":
        warps.shared.note_wait(warps.warps)


def _nothing(warps, one, active):
    """What says how, not what."""


INSTRUCTIONS = {
    "bar": _bar,
    "barrier": _bar,
    "mbarrier": _mbarrier,
    "griddepcontrol": _griddepcontrol,
    **dict.fromkeys(("fence", "membar", "createpolicy", "prefetch", "setmaxnreg"), _nothing),
}
