"""Where the operands of cases lie on a GPU, asked in a process of its own, which finds this module by its name.

Of its own, as every worker is: after other tests there are free blocks of memory that fit operands better than the arena.
"""

import multiprocessing
from concurrent.futures import ProcessPoolExecutor

import torch

from fp4bench.cases import Case
from fp4bench.formats import MXFP4
from fp4bench.problems import W4A16, GemmProblem
from fp4bench.providers.eager import EagerProvider
from fp4bench.workers.measure import Measurer, TimeCase


def asked(seconds):
    """`places` of a fresh process. Raises TimeoutError, and BrokenProcessPool where the process dies."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return pool.submit(places).result(timeout=seconds)


def places():
    """The arena at four cases, small, large, small, small: where it begins, its size, and its blocks, free ones negative."""
    measurer, found = Measurer("cuda"), []
    timed = measurer._clock.measure

    def measure(calls, bytes_touched, slowdown=0.0):
        arena = max(torch.cuda.memory_snapshot(), key=lambda segment: segment["total_size"])
        taken = [b["size"] if b["state"] == "active_allocated" else -b["size"] for b in arena["blocks"]]
        found.append((arena["address"], arena["total_size"], taken))
        return timed(calls, bytes_touched, slowdown)

    measurer._clock.measure = measure
    small, large = _case(16, 4096), _case(64, 1 << 16)
    for one in (small, large, small, small):
        measurer(TimeCase(one))
    return found


def _case(m, k):
    return Case(GemmProblem("none", "o", 1, m, 32, k, W4A16, MXFP4, None), EagerProvider())
