"""Which launch of some work is the fastest: all candidates are measured in haste, the best of them with care.

Decided by numbers alone: who measures is handed in.
"""

from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager
from statistics import median
from typing import Protocol

from fp4bench.devices import Device
from fp4bench.kernels import configs
from fp4bench.kernels.configs import Launch, Work
from fp4bench.tuning.readings import CAREFUL, QUICK, Readings

# In haste a median is known to some percent: what is within WITHIN of the best is measured with care, at most MOST launches.
WITHIN, MOST = 0.06, 4


class WrongOutputError(ValueError):
    """A launch computed something else."""


class DeviceLostError(Exception):
    """This process can use its GPU no more: a new one has to go on."""


class Product(Protocol):
    """Some work with its operands."""

    def check(self, launch: Launch) -> None:
        """Raises WrongOutputError."""
        ...

    def time(self, launch: Launch, careful: bool) -> tuple[float, ...]:
        """Samples of the seconds of a call. Raises WrongOutputError where the output changed meanwhile."""
        ...


Open = Callable[[Work], AbstractContextManager[Product]]


def search(
    works: Iterable[Work],
    device: Device,
    open_product: Open,
    readings: Readings,
    *,
    enough: Callable[[], bool] = lambda: False,
    step: Callable[[Work, int, int], None] = lambda work, done, launches: None,
) -> bool:
    """Measure what `readings` does not hold of these works. Returns whether all are done.

    enough: asked before each launch; the search stops when it says so. step: told of each, with how many are done of a work.
    Raises DeviceLostError after a launch that took the GPU from this process, and what the journal raises.
    """
    for work in works:
        if readings.is_done(work):
            continue
        try:
            with open_product(work) as opened:
                if not _search_one(work, launches(work, device), opened, readings, enough, step):
                    return False
        except (RuntimeError, ValueError) as error:  # RuntimeError: torch's, out of memory among them
            readings.finish(work, _sentence(error))
        else:
            readings.finish(work)
    return True


def launches(work: Work, device: Device) -> list[Launch]:
    """What is measured: the launch that the work gets now, then the kernels' candidates."""
    return list(dict.fromkeys([configs.choose(work, device), *configs.candidates(work, device)]))


def finalists(quick: Mapping[Launch, float], current: Launch) -> list[Launch]:
    """Who is measured with care: the fastest in haste, and the current launch if it runs at all."""
    fastest = sorted(quick, key=lambda launch: quick[launch])[:MOST]
    near = [launch for launch in fastest if quick[launch] <= (1 + WITHIN) * quick[fastest[0]]]
    return list(dict.fromkeys(near + [current] * (current in quick)))


def _search_one(
    work: Work,
    tried: list[Launch],
    product: Product,
    readings: Readings,
    enough: Callable[[], bool],
    step: Callable[[Work, int, int], None],
) -> bool:
    quick: dict[Launch, float] = {}
    for done, launch in enumerate(tried):
        step(work, done, len(tried))
        if enough():
            return False
        seconds = _measured(work, launch, QUICK, product, readings)
        if seconds is not None:
            quick[launch] = seconds
    for launch in finalists(quick, tried[0]) if quick else ():
        if enough():
            return False
        _measured(work, launch, CAREFUL, product, readings)
    step(work, len(tried), len(tried))
    return True


def _measured(work: Work, launch: Launch, how: str, product: Product, readings: Readings) -> float | None:
    """The median seconds of a launch, from the readings or measured now; None where it does not work."""
    if readings.why_not(work, launch):
        return None
    known = readings.seconds(work, launch, how)
    if known is not None:
        return known
    readings.begin(work, launch)
    try:
        if how == QUICK:
            product.check(launch)
        samples = product.time(launch, careful=how == CAREFUL)
    except KeyboardInterrupt:
        readings.stopped(work, launch)
        raise
    except Exception as error:  # a compiler's errors have many classes
        readings.failed(work, launch, _sentence(error))
        if _lost(error):
            raise DeviceLostError(str(error)) from error
        return None
    seconds = median(samples)
    readings.timed(work, launch, how, seconds, samples)
    return seconds


def _lost(error: Exception) -> bool:
    """By CUDA's error strings."""
    words = ("illegal memory access", "illegal instruction", "misaligned address", "unspecified launch failure", "device-side")
    return any(word in str(error) for word in words)


def _sentence(error: Exception) -> str:
    first = str(error).strip().partition("\n")[0]
    return f"{type(error).__name__}: {first[:300]}"
