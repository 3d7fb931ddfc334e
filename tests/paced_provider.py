"""A provider for tests of the plugin: right results, each after a sleep, and for some cases a fault.

A sleep keeps its length on a busy machine, as no computation does. The environment's PACED is JSON, the fault by case id: what
`PacedProvider` has a method for; `slow`; `suspect`, which is slow, and stops pytest when it is measured again; `absent`, which
says before the run that the case cannot run. PACED_LOG names a file that gets a line a case that is prepared: its id, and that
of the process.
"""

import json
import os
import signal
import time
from pathlib import Path

import torch

from fp4bench.formats import MXFP4, ScaleRule
from fp4bench.quantize import decode, quantize

SECONDS = 0.02


class PacedProvider:
    name = "paced"
    version = "1"
    ops = ("gemm",)
    modes = ("w4a16",)
    rules = {"mxfp4": (ScaleRule.FLOOR,)}

    def why_not(self, problem, device):
        return "it is away today" if self.fault(problem) == "absent" else None

    def prepare(self, problem, inputs):
        if path := os.environ.get("PACED_LOG"):
            with open(path, "a") as log:
                log.write(f"{problem.case_id('paced')} {os.getpid()}\n")
        y = (inputs.x.float() @ decode(quantize(inputs.w, MXFP4)).T).to(torch.bfloat16)
        fault = self.fault(problem)
        seconds = SECONDS * (1.5 if fault in ("slow", "suspect") else 1)
        if fault == "suspect" and Path(path).read_text().split().count(problem.case_id("paced")) > 1:
            self.interrupt_pytest(y)
        elif fault not in (None, "slow", "suspect"):
            getattr(self, fault)(y)

        def run():
            time.sleep(seconds)
            return y

        return run

    def fault(self, problem):
        return json.loads(os.environ.get("PACED", "{}")).get(problem.case_id("paced"))

    def nan(self, y):
        y[-1, -1] = torch.nan

    def exit(self, y):
        print("no licence", flush=True)
        os._exit(3)

    def hang(self, y):
        time.sleep(1000)

    def complain(self, y):
        raise ValueError("no such tile")

    def out_of_memory(self, y):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 8.00 GiB.")

    def kill_pytest(self, y):
        os.kill(os.getppid(), signal.SIGKILL)
        time.sleep(1000)

    def interrupt_pytest(self, y):
        os.kill(os.getppid(), signal.SIGINT)
        time.sleep(1000)
