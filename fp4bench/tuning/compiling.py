"""Compile launches in parallel processes, before one process measures them: a compiler needs seconds each, and a core."""

import multiprocessing
import os
from collections.abc import Callable, Iterable
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import replace

import torch

from fp4bench.devices import Device
from fp4bench.formats import FORMATS
from fp4bench.kernels import decode, prefill
from fp4bench.kernels.configs import Launch, Work
from fp4bench.kernels.decode import DecodeConfig
from fp4bench.kernels.prefill_launch import PrefillConfig, Schedule
from fp4bench.kernels.weights import TILE_N, UNIT_K, PreparedWeight
from fp4bench.tuning.product import OPERANDS, ORDERS, workspace_bytes

Job = tuple[Work, Launch]


def distinct(jobs: Iterable[Job], device: Device) -> list[Job]:
    """One of each kernel: of jobs that differ in numbers which the kernel takes as arguments, the first."""
    kernels: dict[object, Job] = {}
    for work, launch in jobs:
        kernels.setdefault(_kernel_of(work, launch, device), (work, launch))
    return list(kernels.values())


def compile_all(
    jobs: Iterable[Job], device: Device, processes: int, told: Callable[[int, int], None] = lambda done, of: None
) -> None:
    """Put the kernels of all jobs into Triton's cache. What does not compile is left to who measures it, and fails there.

    told: how many are done, of how many.
    """
    wanted = distinct(jobs, device)
    spawn = multiprocessing.get_context("spawn")  # CUDA does not survive a fork
    with ProcessPoolExecutor(max(1, min(processes, len(wanted))), mp_context=spawn, initializer=_mute) as pool:
        waiting = [pool.submit(_compile_quietly, work, launch, device) for work, launch in wanted]
        for done, future in enumerate(as_completed(waiting), 1):
            if isinstance(future.exception(), BrokenProcessPool):
                return
            told(done, len(wanted))


def compile_one(work: Work, launch: Launch, device: Device) -> None:
    """Compile a launch for the current CUDA device; nothing runs on it."""
    weight = _unread_weight(work)
    dtype = OPERANDS[work.operand]
    x = torch.empty(work.m, weight.units * UNIT_K if work.operand == "e4m3" else work.k, dtype=dtype)
    out = torch.empty(work.m, work.n, dtype=torch.bfloat16)
    if isinstance(launch, DecodeConfig):
        decode.compile_only(x, weight, out, config=launch, pdl=True)
        return
    assert isinstance(launch, PrefillConfig)
    assert device.sm_count is not None
    workspace = torch.empty(workspace_bytes(x, weight, launch, device), dtype=torch.uint8)
    x_scale = torch.empty(work.m) if work.operand == "e4m3" else None
    prefill.compile_only(x, weight, out, config=launch, workspace=workspace, x_scale=x_scale, pdl=True, sms=device.sm_count)


def _mute() -> None:
    """Triton prints the whole of what ptxas refuses."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)


def _compile_quietly(work: Work, launch: Launch, device: Device) -> None:
    try:
        compile_one(work, launch, device)
    except Exception:  # a compiler's errors have many classes; who measures meets it again and says it
        return


def _kernel_of(work: Work, launch: Launch, device: Device) -> object:
    if isinstance(launch, DecodeConfig):
        return work.format, launch, work.k, work.m <= 8, work.n % 16 == 0
    assert isinstance(launch, PrefillConfig)
    assert device.sm_count is not None
    schedule = Schedule.of(work.m, -(-work.n // TILE_N), -(-work.k // UNIT_K), launch, device.sm_count)
    same = replace(launch, streamed=True, pairs=False)
    return work.operand, work.format, same, schedule.sharers, work.n % 16 == 0


def _unread_weight(work: Work) -> PreparedWeight:
    """A weight of the right shapes on the CPU, whose pages nobody touches."""
    fmt = FORMATS[work.format]
    tiles, units = -(-work.n // TILE_N), -(-work.k // UNIT_K)
    per_g = (2,) if fmt.has_tensor_scale else ()
    return PreparedWeight(
        words=torch.empty(tiles, units, 32, 4, dtype=torch.int32),
        scales=torch.empty(tiles, units, 8, *per_g, dtype=torch.int32),
        row_scale=torch.empty(TILE_N * tiles),
        base=None if fmt.has_tensor_scale else torch.empty(TILE_N * tiles, dtype=torch.uint8),
        tensor_scale=torch.empty(()) if fmt.has_tensor_scale else None,
        format=fmt,
        rule=fmt.default_rule,
        hadamard=None,
        n=work.n,
        k=work.k,
        operand=OPERANDS[work.operand],
        order=ORDERS[work.operand],
    )
