"""A provider for tests of the gate: right results, each after a sleep, and 30 % longer for the case that PACED_SLOW names.

A sleep keeps its length on a busy machine, as no computation does. PACED_OUTPUT=nan makes the output not finite.
"""

import os
import time

import torch

from fp4bench.formats import MXFP4, ScaleRule
from fp4bench.quantize import decode, quantize


class PacedProvider:
    name = "paced"
    version = "1"
    ops = ("gemm",)
    modes = ("w4a16",)
    rules = {"mxfp4": (ScaleRule.FLOOR,)}

    def why_not(self, problem, device):
        return None

    def prepare(self, problem, inputs):
        y = (inputs.x.float() @ decode(quantize(inputs.w, MXFP4)).T).to(torch.bfloat16)
        if os.environ.get("PACED_OUTPUT") == "nan":
            y[-1, -1] = torch.nan
        slow = problem.case_id("paced") == os.environ.get("PACED_SLOW")
        seconds = 0.02 * (1.3 if slow else 1)

        def run():
            time.sleep(seconds)
            return y

        return run
