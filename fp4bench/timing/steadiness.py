"""Do launches cost in a timed graph what they usually do on this GPU? A chain of tiny kernels in the same graph tells.

On NVIDIA H200s some graphs have launches that are 700 cycles (0.35 us) cheaper, each: those captured within certain moments of
about a second, which two cards of one machine met at the same times, in processes of their own. A graph keeps it: the samples
of a case are all cheap or none is (`tests/evidence/test_cheap_launches.py`). Of the first 32 accepted runs 12 hold such cases,
chains of small kernels that were 1 to 22 % faster than usual. The chain in the graph sees it: 2142 cycles a kernel where a case
took 3.7 % less, and 2824 to 2894 in others (`baselines/NVIDIA-H200/trials/2026-11-27-looks.txt`). What makes those moments
is not known. Samples of such a graph are thrown away, and it is captured anew a little later.
"""

import time
from collections import deque
from collections.abc import Callable
from statistics import median
from typing import TypeVar

Taken = TypeVar("Taken")
Look = tuple[float, ...]

# Of 116 readings of the canary `launches`, such a chain, 115 are within 0.3 % of their run's median, and one is 15 % below.
_APART = 0.05
# Before samples are taken anew. Most of those moments last for one or two cases, and one lasted longer than 2 s.
_PAUSES = (0.5, 1.0, 2.0, 4.0)
# With fewer looks than this their median may be that of the rare state, so all of them have to agree.
_FEWEST_LOOKS = 5
_MOST_LOOKS = 101
# Where so many of the last ones began in another state, looks tell nothing on this machine, and cost seconds a case.
_TRUSTED_UNTIL, _RECENT = 3, 10


class Steadiness:
    """Takes samples in graphs whose launches cost what they usually do.

    A look is what launches cost in one graph, by one or more witnesses, such as seconds and SM cycles; it is off where all of
    them are, in one direction, for a change of the clock alone shows in one of them. The usual is the median of all looks so
    far: a state that stays becomes the usual one. first: a look at a graph of nothing else.
    """

    def __init__(self, first: Look, sleep: Callable[[float], None] = time.sleep) -> None:
        self._sleep = sleep
        self._seen = deque([first], maxlen=_MOST_LOOKS)
        self._were_off = deque([False], maxlen=_RECENT)  # the first looks of measurements

    def under(self, take: Callable[[], Taken], look: Callable[[Taken], Look]) -> tuple[Taken, int | None]:
        """What `take` gives with a usual look, and how often it was taken anew for that; or the last, and None."""
        trusted = sum(self._were_off) < _TRUSTED_UNTIL
        for retaken, pause in enumerate((0.0, *_PAUSES) if trusted else (0.0,)):
            if pause:
                self._sleep(pause)
            taken = take()
            usual = self._sees(look(taken))
            if not retaken:
                self._were_off.append(not usual)
            if usual:
                return taken, retaken
        return taken, None

    def _sees(self, look: Look) -> bool:
        """Whether a look, which counts from now on, is as usual."""
        self._seen.append(look)
        usual = [median(values) for values in zip(*self._seen, strict=True)]
        told = self._seen if len(self._seen) < _FEWEST_LOOKS else (look,)
        return not any(_off(each, usual) for each in told)


def _off(look: Look, usual: list[float]) -> bool:
    changes = [value / normal - 1 for value, normal in zip(look, usual, strict=True)]
    return min(changes) > _APART or max(changes) < -_APART
