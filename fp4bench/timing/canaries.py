"""Kernels that are not ours, timed along a run: what they read is the machine's doing, and the ceilings of this run.

Library products and a copy, large enough to fill the chip, and a chain of tiny kernels that waits for launches alone. They
decide whether a run is valid, and correct no times: from card to card they moved otherwise than the cases did.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from statistics import median
from typing import TYPE_CHECKING, Any

import torch

from fp4bench.devices import Device
from fp4bench.timing.clock import Call, Clock, CpuClock, Measurement
from fp4bench.timing.pacing import PACED

if TYPE_CHECKING:
    from fp4bench.timing.graphs import GraphMemory


@dataclass(frozen=True)
class Canary:
    """A fixed piece of work. `flops` and `bytes` of one call; bytes count what is read and what is written."""

    name: str
    call: Call
    flops: int = 0
    bytes: int = 0


@dataclass(frozen=True)
class Ceilings:
    """What this machine reached in this run, paced: GB/s of a copy and TFLOP/s of products. None where it has no such unit."""

    copy_gbps: float | None = None
    bf16_tflops: float | None = None
    fp8_tflops: float | None = None


def canaries(device: Device) -> tuple[Canary, ...]:
    """The canaries of a device; their operands stay allocated (2.5 GiB on a GPU)."""
    side, copied = (8192, 1 << 30) if device.is_cuda else (512, 1 << 24)
    made = [_product("bf16", side, device), _copy(copied, device)]
    if device.is_cuda:  # on a CPU a launch is a call of Python, and no steady one
        made.append(_chain(device))
    if device.has_fp8 and _runs(fp8 := _fp8_product(side, device)):
        made.append(fp8)
    return tuple(made)


def _runs(canary: Canary) -> bool:
    """Whether this torch can: row-wise scales are not built for every GPU that has FP8."""
    try:
        canary.call()
    except RuntimeError:
        return False
    return True


def canary_clock(device: Device, memory: GraphMemory | None = None) -> Clock:
    """A clock that spends some 0.07 s on a canary: what it looks for is percents. memory: of a GPU's graphs."""
    if not device.is_cuda:
        clock = CpuClock()
        clock.budget_seconds = 0.03
        return clock
    from fp4bench.timing.cuda_clock import CudaClock

    # Operands beyond the L2 need no rotation, and the chain's are meant to be warm.
    return CudaClock(device, replace(PACED, fewest=5, most=5), warm=True, memory=memory)


def read(canary: Canary, clock: Clock) -> dict[str, Any]:
    """Time a canary: `name`, and medians of `seconds`, `cycles` and `sm_mhz` of one call (None where unknown)."""
    measured: Measurement = clock.measure([canary.call], canary.bytes)
    return {
        "name": canary.name,
        "seconds": median(measured.seconds),
        "cycles": median(measured.cycles) if measured.cycles else None,
        "sm_mhz": median(measured.sm_mhz) if measured.sm_mhz else None,
    }


def ceilings(made: tuple[Canary, ...], seconds: Callable[[str], float]) -> Ceilings:
    """The ceilings from the canaries' times by name."""
    rates = {c.name: (c.flops * 1e-12 or c.bytes * 1e-9) / seconds(c.name) for c in made if c.flops or c.bytes}
    return Ceilings(rates.get("copy"), rates.get("bf16"), rates.get("fp8"))


def _product(name: str, side: int, device: Device) -> Canary:
    x, w = (torch.randn(side, side, dtype=torch.bfloat16, device=device.torch_name) for _ in range(2))
    out = torch.empty_like(x)
    return Canary(name, lambda: torch.mm(x, w.T, out=out), flops=2 * side**3)


def _fp8_product(side: int, device: Device) -> Canary:
    x, w = (torch.randn(side, side, device=device.torch_name).to(torch.float8_e4m3fn) for _ in range(2))
    scale = torch.ones(side, 1, device=device.torch_name)
    return Canary(
        "fp8",
        lambda: torch._scaled_mm(x, w.T, scale_a=scale, scale_b=scale.T, out_dtype=torch.bfloat16),
        flops=2 * side**3,
    )


def _copy(size: int, device: Device) -> Canary:
    source = torch.randn(size // 4, device=device.torch_name)
    target = torch.empty_like(source)
    # Not copy_, which is a memory copy node in a graph: 2.8 TB/s where kernels reach 4 (NVIDIA H200).
    return Canary("copy", lambda: torch.neg(source, out=target), bytes=2 * source.nbytes)


def _chain(device: Device) -> Canary:
    x = torch.zeros(256, device=device.torch_name)

    def call() -> None:
        for _ in range(20):
            x.add_(1.0)

    return Canary("launches", call)
