"""Stacks of experts: what goes in comes out, rows of a gated weight lie where the kernels' arithmetic needs them."""

from dataclasses import replace

import pytest
import torch

from fp4bench.formats import MXFP4, NVFP4
from fp4bench.kernels import weights
from fp4bench.kernels.experts import gated_rows, prepare_experts, restore_expert
from fp4bench.quantize import quantize

each_format = pytest.mark.parametrize("fmt", [MXFP4, NVFP4], ids=str)


def quantized(experts, n, k, fmt):
    generator = torch.Generator().manual_seed(n + k)
    return [quantize(torch.randn(n, k, generator=generator) * 2.0**expert, fmt) for expert in range(experts)]


@each_format
@pytest.mark.parametrize(("n", "gated"), [(48, False), (21, False), (48, True), (40, True), (22, True)])
def test_experts_come_back_as_they_were(n, gated, fmt):
    made = quantized(3, n, 96, fmt)
    stack = prepare_experts(iter(made), 3, gated=gated)
    assert (stack.experts, stack.n, stack.k, stack.units) == (3, n, 96, 2)
    assert stack.nbytes * 3 == stack.words.nbytes + stack.scales.nbytes
    for expert, q in enumerate(made):
        back = restore_expert(stack, expert)
        assert torch.equal(back.codes, q.codes)
        assert torch.equal(back.scales.view(torch.uint8), q.scales.view(torch.uint8))
        assert (back.tensor_scale, back.k, back.format) == (q.tensor_scale, q.k, q.format)


@each_format
def test_a_plain_expert_is_what_weights_prepare_makes(fmt):
    made = quantized(2, 32, 64, fmt)
    stack = prepare_experts(made, 2, gated=False)
    for expert, q in enumerate(made):
        one = weights.prepare(q)
        assert torch.equal(stack.words[expert], one.words)
        assert torch.equal(stack.scales[expert], one.scales)
        assert torch.equal(stack.row_scale[expert], one.row_scale)


def test_a_gated_tile_is_eight_rows_of_each_side():
    # Gate rows 0 to 9, then up rows 100 to 109: two tiles, the second with six rows of zeros on each side.
    rows = torch.cat((torch.arange(10), torch.arange(100, 110)))
    want = [*range(8), *range(100, 108), 8, 9, *[0] * 6, 108, 109, *[0] * 6]
    assert gated_rows(rows).tolist() == want
    assert gated_rows(rows[:, None].expand(20, 3))[:, 2].tolist() == want


def test_weights_that_are_no_stack_are_refused():
    made = quantized(2, 32, 64, MXFP4)
    far = replace(made[1], scales=made[1].scales.clone())
    far.scales.view(torch.uint8)[0] = torch.tensor([0, 200], dtype=torch.uint8)
    for weights_, experts, gated, why in (
        (made, 3, False, "there are 2 weights, not 3"),
        (made, 1, False, "more than 1 weights"),
        ([], 1, False, "there are 0 weights"),
        ([made[0], *quantized(1, 32, 64, NVFP4)], 2, False, "expert 1 is a nvfp4 weight"),
        ([made[0], *quantized(1, 32, 96, MXFP4)], 2, False, "expert 1 is a mxfp4 weight"),
        (quantized(1, 31, 64, MXFP4), 1, True, "even number of rows"),
        ([quantize(torch.randn(32, 64), MXFP4, hadamard=32)], 1, False, "not rotated"),
        ([far], 1, False, "further apart"),
    ):
        with pytest.raises(ValueError, match=why):
            prepare_experts(weights_, experts, gated=gated)
