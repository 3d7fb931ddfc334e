"""A provider in a package of its own: MXFP4 weights, decoded to bfloat16 and multiplied by torch."""

import torch

from fp4bench.formats import MXFP4, ScaleRule
from fp4bench.quantize import dequantize, quantize


class ExampleProvider:
    name, version = "example", "1.0"
    ops, modes, rules = ("gemm",), ("w4a16",), {"mxfp4": (ScaleRule.FLOOR,)}

    def why_not(self, problem, device):
        return f"it does not rotate, and {problem} does" if problem.hadamard else None

    def prepare(self, problem, inputs):
        w = quantize(inputs.w, MXFP4)  # once: a kernel would lay it out here too
        return lambda: inputs.x @ dequantize(w, torch.bfloat16).T  # on every call: this is timed
