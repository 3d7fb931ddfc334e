"""The text that decodes words for the tensor cores, run in numpy (`ptx`) on whole weights."""

import numpy as np
import ptx
import pytest
import torch

from fp4bench.formats import FORMATS, MXFP4, NVFP4
from fp4bench.kernels.unpack import assembly
from fp4bench.kernels.weights import E4M3_ORDER, WordOrder, prepare
from fp4bench.quantize import decode, quantize

TYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "e4m3": torch.float8_e4m3fn}


def matrix(fmt, spread, seed=0):
    """Every code, with scales that spread by some binades."""
    generator = torch.Generator().manual_seed(seed)
    exponents = torch.randint(0, spread, (32, 8), generator=generator).repeat_interleave(fmt.block_size, 1)
    return quantize(torch.randn(32, 8 * fmt.block_size, generator=generator) * 2.0**-exponents, fmt)


def results(code, weight, tile, unit, per_g):
    """What the text makes of a unit's words: registers of each lane, uint32 (32,) each."""
    text, constraints = code
    outputs = constraints.count("=")
    words = weight.words[tile, unit].numpy().view(np.uint32)
    of_g = weight.scales[tile, unit].reshape(8, per_g).numpy().view(np.uint32)[ptx.LANES // 4]
    scales = [of_g[:, i * per_g // 4] for i in range(4)]
    return ptx.run(text, [None] * outputs + [words[:, j] for j in range(4)] + scales)[:outputs]


def unpacked_bytes(weight, in_bytes):
    """The weight as E4M3 operands have it, before the epilogue: float64 (16 tiles, 64 units)."""
    code = assembly("e4m3", False, in_bytes=in_bytes)
    out = torch.full((16 * weight.tiles, 64 * weight.units), torch.nan, dtype=torch.float64)
    g, t = ptx.LANES // 4, ptx.LANES % 4
    for tile in range(weight.tiles):
        for unit in range(weight.units):
            for i, register in enumerate(results(code, weight, tile, unit, 1)):
                values = torch.from_numpy(register.view(np.uint8).reshape(32, 4).copy()).view(torch.float8_e4m3fn).double()
                for byte in range(4):
                    columns = 64 * unit + 16 * (i // 2) + np.array(E4M3_ORDER)[4 * t + byte]
                    out[16 * tile + g + 8 * (i % 2), columns] = values[:, byte]
    return out


@pytest.mark.parametrize("order", WordOrder, ids=str)
def test_e4m3_bytes_are_the_codes_times_their_scales(order):
    q = matrix(MXFP4, spread=9)
    weight = prepare(q, torch.float8_e4m3fn, order)
    assert weight.rest is None
    got = unpacked_bytes(weight, order is WordOrder.BYTES) * weight.row_scale.double()[:, None] * 2.0**-5
    assert torch.equal(got, decode(q, torch.float64))


@pytest.mark.parametrize("fmt", FORMATS.values(), ids=str)
@pytest.mark.parametrize("form", ["bf16", "fp16"])
def test_halves_are_the_codes_times_their_scales(fmt, form):
    q = matrix(fmt, spread=9)
    weight = prepare(q, TYPES[form])
    code = assembly(form, fmt is NVFP4)
    out = torch.full((16 * weight.tiles, 64 * weight.units), torch.nan, dtype=torch.float64)
    g, t = ptx.LANES // 4, ptx.LANES % 4
    for tile in range(weight.tiles):
        for unit in range(weight.units):
            for i, register in enumerate(results(code, weight, tile, unit, 2 if fmt is NVFP4 else 1)):
                low_high = ptx.halves(register, TYPES[form])
                result, half = divmod(i, 2)
                for e in range(2):
                    columns = 64 * unit + 16 * (result // 2) + 8 * half + 2 * t + e
                    out[16 * tile + g + 8 * (result % 2), columns] = torch.from_numpy(low_high[e].copy())
    # 1 / S of NVFP4 is rounded to float32.
    torch.testing.assert_close(out * weight.row_scale.double()[:, None], decode(q, torch.float64), rtol=2e-7, atol=0)


def test_words_in_bytes_are_for_e4m3_alone():
    with pytest.raises(ValueError, match="words in bytes"):
        assembly("bf16", False, in_bytes=True)
    with pytest.raises(ValueError, match="NVFP4"):
        assembly("e4m3", True)
