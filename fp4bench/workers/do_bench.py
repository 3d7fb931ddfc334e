"""Readings of triton's do_bench_cudagraph, in a process of their own: what its users would measure of the same runners."""

from collections.abc import Callable
from dataclasses import dataclass, field
from math import ceil
from typing import Any

import torch

from fp4bench.cases import Case
from fp4bench.devices import find_device

REP_MS = 200  # what a graph holds, as the rule that is compared with says
# A delay's launch takes one to two microseconds (NVIDIA H200); a delay shorter than this many of them is not exact.
_LAUNCHES = 4


@dataclass(frozen=True)
class ReadCase:
    """Read a case as it is, then once for each slowdown, a share of its time that it idles in addition."""

    case: Case
    slowdowns: tuple[float, ...] = ()


class DoBench:
    """Serves `ReadCase` with seconds of one call: as it is, and by slowdown.

    Nothing is done that do_bench_cudagraph does not do by itself: one copy of the operands, as warm as 200 ms of calls leave
    them, the clock as it comes. Raises ValueError where there is no CUDA GPU.
    """

    def __init__(self, device: str) -> None:
        self._device = find_device(device)
        if not self._device.is_cuda:
            raise ValueError("do_bench_cudagraph captures CUDA graphs, and this device is a CPU")
        torch.cuda.set_device(self._device.torch_name)
        from fp4bench.timing.stamps import spin

        self._spin = spin
        self._launch = _read(lambda: spin(0))

    def __call__(self, request: ReadCase) -> tuple[float, ...]:
        case = request.case
        call = case.provider.prepare(case.problem, case.problem.inputs(self._device.torch_name))
        seconds = _read(call)
        slowed = (_read(Slowed(call, share * seconds, self._launch, self._spin)) for share in request.slowdowns)
        return seconds, *slowed


@dataclass
class Slowed:
    """A call that idles `delay` seconds more, on average over many: after every n-th so long that the idling can be exact.

    launch: what an idling of no length takes, part of the delay. spin: queues an idling of so many nanoseconds.
    """

    call: Callable[[], Any]
    delay: float
    launch: float
    spin: Callable[[int], None]
    _calls: int = field(default=0, init=False)

    def __post_init__(self) -> None:
        self._idle()  # Triton compiles for what divides the number, and cannot while a graph is captured

    @property
    def every(self) -> int:
        """The n of every n-th."""
        return max(1, ceil(_LAUNCHES * self.launch / self.delay))

    def __call__(self) -> Any:
        result = self.call()
        self._calls += 1
        if self._calls % self.every == 0:
            self._idle()
        return result

    def _idle(self) -> None:
        self.spin(round((self.delay * self.every - self.launch) * 1e9))


def _read(call: Callable[[], Any]) -> float:
    from triton.testing import do_bench_cudagraph

    return float(do_bench_cudagraph(call, rep=REP_MS)) * 1e-3
