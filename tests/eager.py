"""The eager quantization of fp4bench as the contract calls it.

Functions are looked up in their modules on each call, so that a test can plant an error there.
"""

import contract
import torch

from fp4bench import quantize as quantizing
from fp4bench.formats import FORMATS, ScaleRule, layouts


def quantize(x, format, rule, tensor_scale):
    q = quantizing.quantize(x, FORMATS[format], rule=ScaleRule(rule), tensor_scale=tensor_scale)
    return contract.Bytes(q.codes, q.scales.view(torch.uint8), None if q.tensor_scale is None else q.tensor_scale.item())


def dequantize(quantized, format, rule):
    codes, scale_bytes, s = quantized
    fmt = FORMATS[format]
    s = None if s is None else torch.tensor(s)
    q = quantizing.Quantized(codes, scale_bytes.view(fmt.scale_dtype), s, fmt, ScaleRule(rule), None, 2 * codes.shape[-1])
    return quantizing.dequantize(q)


EAGER = contract.Implementation(quantize, dequantize, to_blocked=lambda scale_bytes: layouts.to_blocked(scale_bytes))
