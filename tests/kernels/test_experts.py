"""Stacks of experts: what goes in comes out, rows of a gated weight lie where the kernels' arithmetic needs them."""

from dataclasses import replace

import pytest
import torch

from fp4bench.formats import MXFP4, NVFP4
from fp4bench.kernels import weights
from fp4bench.kernels.experts import COLUMNS, gated_rows, prepare_experts, restore_expert
from fp4bench.quantize import Quantized, quantize

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


def test_experts_of_e4m3_have_words_in_bytes():
    made = [quantize(torch.randn(20, 96, generator=torch.Generator().manual_seed(i)), MXFP4) for i in range(2)]
    stack = prepare_experts(iter(made), 2, gated=True, operand=torch.float8_e4m3fn)
    assert stack.order is weights.WordOrder.BYTES
    assert not torch.equal(stack.words, prepare_experts(iter(made), 2, gated=True).words)
    for expert, q in enumerate(made):
        assert torch.equal(restore_expert(stack, expert).codes, q.codes)


def test_a_lane_has_eight_columns_that_stand_together():
    # Of each 32 columns lane t holds, in words 2 w and 2 w + 1, registers of columns 8 t, 8 t + 1, ..., 8 t + 7.
    for t in range(4):
        held = [COLUMNS[16 * j + 8 * h + 2 * t + e] for j in range(2) for h in range(2) for e in range(2)]
        assert held == list(range(8 * t, 8 * t + 8))
    # Code 7 at column 13 of row 3 alone: lane 1's of row 3, word 1, its first pair's odd column (13 = 8 + 4 + 0 + 1).
    codes = torch.zeros(16, 32, dtype=torch.uint8)
    codes[3, 13 // 2] = 0x70
    q = Quantized(codes, torch.full((16, 2), 127, dtype=torch.uint8), None, MXFP4, MXFP4.default_rule, None, 64)
    words = prepare_experts([replace(q, scales=q.scales.view(MXFP4.scale_dtype))], 1, gated=False).words
    assert words.nonzero().tolist() == [[0, 0, 0, 4 * 3 + 1, 1]]
    assert words.abs().max() == sum(1 << bit for bit in weights.CODE_BITS[weights.WordOrder.HALVES][0][1][:3])


def test_an_nvfp4_scale_is_that_of_the_lanes_columns():
    # 16 rows of one unit; the scale of block b of row r is 2**(b - 2) for r < 8 and 2**(b + 2) beyond.
    values = torch.exp2(torch.arange(4.0)[None, :] + torch.where(torch.arange(16) < 8, -2.0, 2.0)[:, None])
    q = Quantized(
        torch.full((16, 32), 0x22, dtype=torch.uint8),
        values.to(NVFP4.scale_dtype),
        torch.tensor(1.0),
        NVFP4,
        NVFP4.default_rule,
        None,
        64,
    )
    stored = prepare_experts([q], 1, gated=False).scales.view(torch.uint8).view(1, 1, 1, 8, 2, 4)
    of_value = {2.0**e: (e + 22) * 8 for e in range(-2, 6)}  # E5M3 of bias 22
    for c in range(2):  # t // 2: of 32 columns the first 16 or the others
        want = [of_value[2.0 ** (2 * half + c + offset)] for half in range(2) for offset in (-2, 2)]
        assert stored[0, 0, 0, :, c].tolist() == [want] * 8


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
