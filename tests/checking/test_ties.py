"""FP8 ties: found where a reciprocal rounds the other way and nowhere else, and allowed for by the checks."""

import pytest
import torch

from fp4bench.checking import WrongResultError, check
from fp4bench.checking.ties import tie_steps
from fp4bench.formats import MXFP4
from fp4bench.formats.scales import e4m3_encode
from fp4bench.problems import FLOAT32_SUMS, W4A8, GemmInputs, GemmProblem
from fp4bench.quantize import decode_fp8_rows, dequantize, quantize, quantize_fp8_rows, quantize_fp8_tiles


def by_reciprocal(x, scales):
    """As kernels quantize."""
    return e4m3_encode(x.float() * (1.0 / scales)).float()


def activations(rows=800, k=256, seed=0):
    return torch.randn(rows, k, generator=torch.Generator().manual_seed(seed)).bfloat16()


def test_every_value_that_a_reciprocal_rounds_the_other_way_is_a_tie():
    x = activations()
    q = quantize_fp8_rows(x)
    moved = (by_reciprocal(x, q.scales) - q.values.float()) * q.scales
    steps = tie_steps(x, q)
    assert (moved != 0).sum() > 50
    assert torch.equal(moved.abs()[moved != 0].double(), steps[moved != 0])
    # A tie in some hundred values: what is allowed is not everything.
    assert 0 < (steps > 0).double().mean() < 0.01


def test_a_tie_moves_by_the_step_between_its_neighbours():
    x = torch.tensor([[448.0, 17.0, 19.0, 18.0, 17.125, 2.0**-10, 0.0, -17.0]]).bfloat16()
    assert tie_steps(x, quantize_fp8_rows(x)).tolist() == [[0, 2, 2, 0, 0, 2.0**-9, 0, 2]]
    tiles = quantize_fp8_tiles(torch.cat((x, 2 * x)), 1, 8)
    assert tie_steps(torch.cat((x, 2 * x)), tiles)[1].tolist() == [0, 4, 4, 0, 0, 2.0**-8, 0, 4]


def products(inputs, values):
    return (values @ dequantize(quantize(inputs.w, MXFP4)).T).bfloat16()


def test_a_product_of_ties_that_were_rounded_up_is_right_and_of_others_is_not():
    problem = GemmProblem("tiny", "fc", 1, 1, 64, 256, W4A8, MXFP4)
    x = torch.zeros(1, 256)
    x[0, 0], x[0, 1::5], x[0, 2::5] = 448.0, 17.0, 18.0  # ties, and values that have a code
    inputs = GemmInputs(x.bfloat16(), problem.inputs().w.abs())
    values = decode_fp8_rows(quantize_fp8_rows(inputs.x))
    for others, right in ((torch.where(x == 17.0, 18.0, values), True), (torch.where(x == 18.0, 22.0, values), False)):
        out = products(inputs, others)
        if right:
            check(problem, inputs, None, out, FLOAT32_SUMS)
        else:
            with pytest.raises(WrongResultError):
                check(problem, inputs, None, out, FLOAT32_SUMS)
