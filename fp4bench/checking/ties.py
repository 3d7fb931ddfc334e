"""FP8 values that lie in the middle of two codes, which right hardware may round either way.

The reference divides by a scale. Kernels multiply by its reciprocal, which is off by an ulp of float32: that matters where a
quotient is a tie. Bfloat16 values make it one often, where the largest of a row is a multiple of 7, as 448 is: in one row of
twenty, about one value in a hundred.
"""

import torch

from fp4bench.formats.scales import e4m3_encode
from fp4bench.quantize import RowQuantized, TileQuantized, decode_fp8_tiles

# More than the roundings of a float32 reciprocal and of a product with it, 2**-24 each.
_ROUNDING = 2.0**-22


def tie_steps(x: torch.Tensor, q: RowQuantized | TileQuantized) -> torch.Tensor:
    """How far each value of x (rows, k), quantized to q, moves if it is rounded the other way: 0 if it is no tie. float64."""
    if isinstance(q, RowQuantized):
        scales = q.scales.double()
    else:
        scales = decode_fp8_tiles(TileQuantized(torch.ones_like(q.values), q.scales, q.tile), torch.float64)
    quotients = x.double() / scales
    above, below = (e4m3_encode((quotients * factor).float()).double() for factor in (1 + _ROUNDING, 1 - _ROUNDING))
    return (above - below).abs() * scales
