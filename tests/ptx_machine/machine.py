"""Some CTAs of a grid, run at once."""

import numpy as np

from ptx_machine.memory import SharedMemory
from ptx_machine.warps import Warps


class Machine:
    """The CTAs of `numbers`, a range. arguments: of the kernel, addresses and numbers."""

    def __init__(self, program, memory, shared, grid, numbers, arguments):
        self.program, self.memory, self.arguments = program, memory, arguments
        self._warps = program.threads // 32
        self.shared = SharedMemory(shared, len(numbers), self._warps)
        self.barriers = Barriers(self.shared, len(numbers), self._warps)
        self._first, self._count = numbers[0], len(numbers)
        self._places = dict(zip("xyz", np.unravel_index(np.arange(numbers.start, numbers.stop), grid, order="F"), strict=False))

    def place(self, ctas, axis):
        """Where CTAs are in the grid."""
        return self._places[axis][ctas] if axis in self._places else np.zeros_like(ctas)

    def number(self, ctas):
        """Of CTAs in the whole grid."""
        return self._first + ctas

    def run(self):
        parts = [Warps(self, np.arange(self._count * self._warps))]
        while parts:
            ready = [part for part in parts if part.may_go_on]
            if not ready:
                raise RuntimeError("all warps wait at barriers")
            for part in ready:
                parts += part.run()
            parts = [part for part in parts if not part.done]


class Barriers:
    """`bar.sync` of CTAs, by CTA and number."""

    def __init__(self, shared, ctas, warps):
        self._shared, self._warps = shared, warps
        self._here = np.zeros((ctas, 16, warps), bool)
        self._times = np.zeros((ctas, 16), int)

    def arrive(self, warps, number):
        """Warps, counted through all CTAs, are at a barrier. -> what they wait for."""
        ctas = np.unique(warps // self._warps)
        self._here[warps // self._warps, number, warps % self._warps] = True
        ticket = ctas, number, self._times[ctas, number].copy()
        for cta in ctas:
            if self._here[cta, number].all():
                self._shared.barrier(cta, np.arange(self._warps))
                self._here[cta, number] = False
                self._times[cta, number] += 1
        return ticket

    def is_over(self, ticket):
        ctas, number, times = ticket
        return bool((self._times[ctas, number] > times).all())
