"""Global memory, which holds tensors, and the shared memory of CTAs. Both know which reads and writes are mistakes."""

from collections import Counter

import numpy as np
import torch

_GAP = 4096  # bytes between tensors that belong to none
_NOBODY, _ALL = -1, -2  # where the number of a thread or a CTA stands otherwise


class OutOfBoundsError(Exception):
    """A read or write of what no tensor holds, or at an address that is not aligned."""


class RaceError(Exception):
    """A read or write that another thread's may come before or after."""


class TooEarlyError(Exception):
    """A read of what the kernel before may still write, or a write that it may still read before, under `griddepcontrol`."""


def _places(addresses, size, end):
    """The bytes of each address: int64 (threads, size)."""
    places = addresses.astype(np.int64)[:, None] + np.arange(size)
    if (places < 0).any() or (places >= end).any():
        raise OutOfBoundsError(f"{size} bytes outside of the memory")
    if (places[:, 0] % size).any():
        raise OutOfBoundsError(f"{size} bytes at an address that is no multiple of {size}")
    return places


class Memory:
    """Tensors at addresses of their own, for one launch. Addresses are int64 (threads), what is read or written uint8
    (threads, size), and CTAs the number of each thread's."""

    def __init__(self, tensors, early=()):
        """tensors: of the CPU. Those that share memory are one. early: those that may be read before the wait."""
        self._tensors, self._at, end = {}, {}, _GAP
        for tensor in tensors:
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in self._at:
                self._at[storage.data_ptr()], self._tensors[end] = end, storage
                end += -(-storage.nbytes() // 512) * 512 + _GAP
        self._bytes = np.zeros(end, np.uint8)
        self._held, self._early = np.zeros(end, bool), np.zeros(end, bool)
        self._writer, self._written_at = np.full(end, _NOBODY), np.zeros(end, np.int64)
        self._clocks, self._told, self._known = Counter(), {}, {}  # of CTAs, whose clocks count their atomics
        from_before = {tensor.untyped_storage().data_ptr() for tensor in early}
        for start, storage in self._tensors.items():
            held = slice(start, start + storage.nbytes())
            self._bytes[held] = _bytes_of(storage)
            self._held[held] = True
            self._early[held] = storage.data_ptr() in from_before

    def address(self, tensor):
        return self._at[tensor.untyped_storage().data_ptr()] + tensor.storage_offset() * tensor.element_size()

    def give_back(self):
        """What was written, to the tensors."""
        for start, storage in self._tensors.items():
            _bytes_of(storage)[:] = self._bytes[start : start + storage.nbytes()]

    def read(self, addresses, size, ctas, *, early=False):
        """early: the kernel before may still run."""
        places = self._within(addresses, size)
        if early and not self._early[places].all():
            raise TooEarlyError("what the kernel before may write is read")
        if (self._of_others(places, ctas)).any():
            raise RaceError("what another CTA writes is read")
        return self._bytes[places]

    def write(self, addresses, values, ctas, *, early=False):
        places = self._within(addresses, values.shape[1])
        if early:
            raise TooEarlyError("memory is written")
        if (self._of_others(places, ctas) & (self._bytes[places] != values)).any():
            raise RaceError("two CTAs write different values")
        self._bytes[places] = values
        self._note_writers(places, ctas)
        if (self._bytes[places] != values).any():
            raise RaceError("two threads write different values at once")

    def add(self, address, value, *, early=False):
        """Atomically, uint32. -> what was there."""
        if early:
            raise TooEarlyError("memory is written")
        places = self._within(np.array([address]), 4)
        before = self._bytes[places].view(np.uint32)[0, 0]
        self._bytes[places] = np.array([[before + value]], np.uint32).view(np.uint8)
        return before

    def release(self, address, cta):
        """What the CTA has written is known to those who acquire what is at an address."""
        self._clocks[cta] += 1
        self._told[address] = (
            self._told.get(address, Counter()) | self._known.get(cta, Counter()) | Counter({cta: self._clocks[cta]})
        )

    def acquire(self, address, cta):
        self._known[cta] = self._known.get(cta, Counter()) | self._told.get(address, Counter())

    def _note_writers(self, places, ctas):
        self._writer[places] = ctas[:, None]
        for cta in np.unique(ctas):
            self._written_at[places[ctas == cta]] = self._clocks[cta] + 1

    def _of_others(self, places, ctas):
        """Which bytes another CTA has written that this one does not know of."""
        writer = self._writer[places]
        unknown = (writer != _NOBODY) & (writer != ctas[:, None])
        for row, column in np.argwhere(unknown):
            known = self._known.get(ctas[row], {}).get(writer[row, column], 0)
            unknown[row, column] = known < self._written_at[places[row, column]]
        return unknown

    def _within(self, addresses, size):
        places = _places(addresses, size, len(self._bytes))
        if not self._held[places].all():
            raise OutOfBoundsError(f"{size} bytes that no tensor holds")
        return places


def _bytes_of(storage):
    return torch.tensor([], dtype=torch.uint8).set_(storage).numpy()


class SharedMemory:
    """Of some CTAs, each one's from 0. A byte that was never written is 0xFF, a NaN.

    Who knows what is told by vector clocks: a warp's clock counts its barriers, and of each other warp it knows the clock up to
    which a barrier has separated them. Threads are counted through all CTAs; those of a warp are separated by its barriers too.
    """

    def __init__(self, size, ctas, warps):
        self._size, self._warps = size, warps
        self._bytes = np.full(size * ctas, 0xFF, np.uint8)
        self._writer, self._written_at = np.full(size * ctas, _NOBODY), np.zeros(size * ctas, np.int32)
        self._reader = np.full(size * ctas, _NOBODY)  # the last one
        self._read_at = np.zeros((size * ctas, warps), np.int16)  # by each warp
        self._asked = np.zeros(size * ctas, bool)  # by cp.async
        self._added_at = {}  # clocks of the warps that have added to a byte, whose writer is all of them
        self._clock, self._waited_at = np.ones((ctas, warps), np.int32), np.zeros((ctas, warps), np.int32)
        self._known = np.zeros((ctas, warps, warps), np.int32)

    def note_wait(self, warps):
        """Warps, counted through all CTAs, have waited for the kernel before."""
        cta, warp = warps // self._warps, warps % self._warps
        self._waited_at[cta, warp] = self._clock[cta, warp]
        self._tick(cta, warp)

    def know_of_wait(self, warps):
        """Whether each of them has waited for the kernel before, or has been told by one that has."""
        cta, warp = warps // self._warps, warps % self._warps
        waited = self._waited_at[cta]
        theirs = np.arange(self._warps) == warp[:, None]
        return bool(((waited > 0) & (theirs | (self._known[cta, warp] >= waited))).any(axis=1).all())

    def barrier(self, cta, warps):
        """Of some warps of a CTA."""
        together = self._known[cta, warps].max(axis=0)
        together[warps] = self._clock[cta, warps]
        self._known[cta, warps] = together
        self._tick(cta, warps)

    def warp_barrier(self, warps):
        """warps: counted through all CTAs."""
        cta, warp = warps // self._warps, warps % self._warps
        self._known[cta, warp, warp] = self._clock[cta, warp]
        self._tick(cta, warp)

    def tell(self, thread, known=None):
        """What the warp of a thread knows and does until now, added to `known`. -> its clock, and clocks of all warps."""
        cta, warp = divmod(thread // 32, self._warps)
        clocks = self._known[cta, warp].copy()
        clocks[warp] = self._clock[cta, warp]
        self._tick(cta, warp)
        return clocks[warp], clocks if known is None else np.maximum(known, clocks)

    def learn(self, thread, clocks):
        """The warp of a thread knows what `tell` has told."""
        if clocks is not None:
            cta, warp = divmod(thread // 32, self._warps)
            self._known[cta, warp] = np.maximum(self._known[cta, warp], clocks)

    def read(self, addresses, size, threads):
        places = self._within(addresses, size, threads)
        self._check_written(places, threads)
        if self._asked[places].any():
            raise RaceError("what cp.async is to write is read before it was waited for")
        cta, warp = self._who(threads)
        self._read_at[places, warp] = self._clock[cta, warp]
        self._reader[places] = threads[:, None]
        return self._bytes[places]

    def write(self, addresses, values, threads):
        places = self._within(addresses, values.shape[1], threads)
        if self._asked[places].any():
            raise RaceError("what cp.async is to write is written")
        self._check_read(places, threads)
        self._check_written(places, threads, unless=self._bytes[places] == values)
        self._store(places, values, threads)

    def ask(self, addresses, size, threads):
        """Of `cp.async`: the bytes are to be written from now on."""
        places = self._within(addresses, size, threads)
        if self._asked[places].any():
            raise RaceError("cp.async is asked twice for the same bytes")
        self._check_read(places, threads)
        self._check_written(places, threads)
        self._asked[places] = True

    def arrive(self, addresses, values, threads, at=None):
        """What was asked for is there. at: the clock of those who asked, when they did; None: they have waited for it now."""
        places = self._within(addresses, values.shape[1], threads)
        self._asked[places] = False
        self._store(places, values, threads)
        if at is not None:
            self._written_at[places] = at

    def add(self, address, value, thread):
        """Atomically, uint32. -> what was there."""
        threads = np.array([thread])
        places = self._within(np.array([address]), 4, threads)
        self._check_read(places, threads)
        self._check_written(places, threads, unless=self._writer[places] == _ALL)
        if (self._writer[places] != _ALL).any():
            self._added_at.update((place, np.zeros(self._warps, np.int32)) for place in places[0])
        before = self._bytes[places].view(np.uint32)[0, 0]
        self._store(places, np.array([[before + value]], np.uint32).view(np.uint8), threads)
        self._writer[places] = _ALL
        cta, warp = divmod(thread // 32, self._warps)
        for place in places[0]:
            self._added_at[place][warp] = self._clock[cta, warp]
        return before

    def _tick(self, cta, warp):
        self._clock[cta, warp] += 1
        if self._clock.max() > np.iinfo(self._read_at.dtype).max:
            raise NotImplementedError("more barriers than a clock counts")

    def _within(self, addresses, size, threads):
        return _places(addresses, size, self._size) + (threads // (32 * self._warps) * self._size)[:, None]

    def _who(self, threads):
        """-> the CTA of each thread, and its warp in it, as columns."""
        warp = threads[:, None] // 32
        return warp // self._warps, warp % self._warps

    def _store(self, places, values, threads):
        self._bytes[places] = values
        if (self._bytes[places] != values).any():
            raise RaceError("two threads write different values at once")
        self._writer[places] = threads[:, None]
        self._written_at[places] = self._clock[self._who(threads)]

    def _check_written(self, places, threads, unless=False):
        writer = self._writer[places]
        cta, warp = self._who(threads)
        known = self._written_at[places] <= self._known[cta, warp, writer // 32 % self._warps]
        for row, column in np.argwhere(writer == _ALL):
            known[row, column] = (self._added_at[places[row, column]] <= self._known[cta[row, 0], warp[row, 0]]).all()
        if not (known | (writer == _NOBODY) | (writer == threads[:, None]) | unless).all():
            raise RaceError("what another thread wrote is read or overwritten, and no barrier is between")

    def _check_read(self, places, threads):
        cta, warp = self._who(threads)
        unknown = self._read_at[places] > self._known[cta, warp]
        unknown &= (np.arange(self._warps) != warp[..., None]) | (self._reader[places] != threads[:, None])[..., None]
        if unknown.any():
            raise RaceError("what another thread reads is overwritten, and no barrier is between")
