"""Some CTAs of a grid, run at once."""

import numpy as np

from ptx_machine.memory import SharedMemory
from ptx_machine.synchronization import Barriers, Mbarriers
from ptx_machine.warps import Warps


class Machine:
    """The CTAs of `numbers`, a range. arguments: of the kernel, addresses and numbers. boxes: `Box` by address of its map."""

    def __init__(self, program, memory, shared, grid, numbers, arguments, boxes):
        self.program, self.memory, self.arguments, self.boxes = program, memory, arguments, boxes
        self._warps, self._first, self._count = program.threads // 32, numbers.start, len(numbers)
        self.shared = SharedMemory(shared, self._count, self._warps)
        self.barriers = Barriers(self.shared, self._count, self._warps)
        self.mbarriers = Mbarriers(self.shared, program.threads)
        self.grid = dict(zip("xyz", grid, strict=False))
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
            parts = [part for part in parts if part not in ready]
            for part in ready:
                parts += part.run()
