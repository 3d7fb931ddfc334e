"""Is the GPU in its usual state while a case is timed? Looked up by what launches cost just before and just after.

On NVIDIA H200s the kernels of a graph follow each other 0.17 to 0.4 us faster now and then: the canary `launches` took 20.5 us
once, and 24.05 before and after. Of 32 accepted runs 11 hold one or two neighbouring cases, chains of dozens of small kernels,
that were 1 to 22 % faster than in all other runs. Their samples agree with each other, so nothing but such a look tells, and
they are taken anew. What brings that state is not known, nor whether it is of a moment or of a captured graph: the same three
products were taken anew in each of three processes of one machine. If it is of a graph, a look tells nothing of the timed one.

Only chains are looked at. Around single kernels looks differed too, for a reason that is not known: of 54 products of the
provider `triton` on an H200 51 were taken anew, at 1.0 to 1.5 s a case instead of the 0.3 to 0.8 of other libraries
(`baselines/NVIDIA-H200/kernels/20261127T173447-llama3.3-70b.jsonl`).
"""

import time
from collections import deque
from collections.abc import Callable
from statistics import median
from typing import TypeVar

Taken = TypeVar("Taken")

# Of 116 readings of that canary in 32 runs 115 are within 0.3 % of their run's median, and the other state is 15 % away.
_APART = 0.05
# In the accepted runs the other state lasted for one or two cases, less than 1.5 s, if it is of a moment at all.
_PAUSE_SECONDS, _MOST_RETAKEN = 0.5, 4
# With fewer looks than this their median may be that of the rare state, so all of them have to agree.
_FEWEST_LOOKS = 9
_MOST_LOOKS = 101
# After so many measurements in a row that found no steady state, looks tell nothing on this machine, and cost seconds a case.
_TRUSTED_UNTIL = 3


class Steadiness:
    """Takes samples under the usual state of a device.

    look: reads something that is always the same there, by one or more witnesses, such as seconds and SM cycles; a look is off
    where all of them are, in one direction, for a change of the clock alone shows in one of them. The usual is the median of
    all looks so far: a state that stays becomes the usual one.
    """

    def __init__(self, look: Callable[[], tuple[float, ...]], sleep: Callable[[float], None] = time.sleep) -> None:
        self._look, self._sleep = look, sleep
        self._seen = deque([look()], maxlen=_MOST_LOOKS)
        self._unsteady = 0  # measurements in a row

    def under(self, take: Callable[[], Taken]) -> tuple[Taken, int | None]:
        """What `take` gives between two usual looks, and how often it was taken anew for that; or the last, and None."""
        retaken = 0
        while True:
            before = self._seen_now()
            taken = take()
            if self._usual(before, self._seen_now()):
                self._unsteady = 0
                return taken, retaken
            if retaken == _MOST_RETAKEN or self._unsteady >= _TRUSTED_UNTIL:
                self._unsteady += 1
                return taken, None
            retaken += 1
            self._sleep(_PAUSE_SECONDS)

    def _seen_now(self) -> tuple[float, ...]:
        self._seen.append(self._look())
        return self._seen[-1]

    def _usual(self, *looks: tuple[float, ...]) -> bool:
        usual = [median(values) for values in zip(*self._seen, strict=True)]
        told = self._seen if len(self._seen) < _FEWEST_LOOKS else looks
        return not any(_off(look, usual) for look in told)


def _off(look: tuple[float, ...], usual: list[float]) -> bool:
    changes = [value / normal - 1 for value, normal in zip(look, usual, strict=True)]
    return min(changes) > _APART or max(changes) < -_APART
