"""A product whose launches kill and hang, and what measures it in a process of its own, which finds this module by its name."""

import os
import time
from contextlib import contextmanager

from fp4bench.devices import Device
from fp4bench.evidence import journal
from fp4bench.evidence.journal import Journal
from fp4bench.kernels.configs import Work
from fp4bench.tuning.readings import Readings
from fp4bench.tuning.search import launches, search

H200 = Device("cuda:0", "NVIDIA H200", (9, 0), 132, 60 << 20)
WORK = Work("bf16", "mxfp4", 1, 8192, 8192)


class Deadly:
    """The third launch kills the process, the fifth hangs."""

    def check(self, launch):
        at = launches(WORK, H200).index(launch)
        if at == 2:
            os._exit(9)
        if at == 4:
            time.sleep(60)

    def time(self, launch, careful):
        return (1e-5,)


@contextmanager
def open_deadly(work):
    yield Deadly()


def measure(works, device, path, until):
    with Journal.reopen(path) as file:
        return 0 if search(works, device, open_deadly, Readings(journal.read(path)[1], file)) else 3


def end_at_once(works, device, path, until):
    return 7
