"""The prepared layout: bits, order and scales restated here in plain Python, and `restore` as its inverse, byte by byte."""

from dataclasses import replace

import contract
import numpy as np
import pytest
import torch

from fp4bench.formats import MXFP4, NVFP4, ScaleRule, e2m1
from fp4bench.kernels.weights import CODE_BITS, E4M3_ORDER, WINDOWS, PreparedWeight, WordOrder, prepare, restore
from fp4bench.quantize import Quantized, decode, quantize

FORMATS = [MXFP4, NVFP4]
OPERANDS = [(fmt, operand) for fmt in FORMATS for operand in WINDOWS if not (fmt is NVFP4 and operand is torch.float8_e4m3fn)]
SHAPES = [(1, 1), (16, 64), (17, 65), (33, 300), (48, 128)]

each_format = pytest.mark.parametrize("fmt", FORMATS, ids=str)
each_operand = pytest.mark.parametrize(("fmt", "operand"), OPERANDS, ids=[f"{fmt}-{operand}"[:-1] for fmt, operand in OPERANDS])


def wild(n, k, seed=0):
    """Rows of very different sizes, blocks far apart within a row, zeros, and a NaN."""
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(n, k, generator=g) * torch.exp2(torch.randint(-30, 30, (n, 1), generator=g).float())
    x[n // 2] *= torch.exp2(torch.randint(-40, 40, (k,), generator=g).float())
    x[n // 3, : k // 2] = 0
    x[n - 1, k // 2] = torch.nan
    return x


def same_bytes(a, b):
    return torch.equal(a.codes, b.codes) and torch.equal(a.scales.view(torch.uint8), b.scales.view(torch.uint8))


def without_meaningless_codes(q):
    """Codes of blocks of scale 0 as zeros."""
    blocks = q.codes.reshape(*q.scales.shape, -1)
    return replace(q, codes=torch.where(q.scales.view(torch.uint8)[..., None] != 0, blocks, 0).reshape(q.codes.shape))


def parts(weight):
    return [weight, *(parts(weight.rest) if weight.rest else [])]


# --- Inverse ----------------------------------------------------------------------------------------------------------------


@each_operand
@pytest.mark.parametrize(("n", "k"), SHAPES)
def test_restore_gives_the_bytes_back(fmt, operand, n, k):
    q = quantize(wild(n, k), fmt)
    back = restore(prepare(q, operand))
    assert same_bytes(back, q if fmt is MXFP4 else without_meaningless_codes(q))
    assert (back.shape, back.format, back.rule, back.hadamard) == (q.shape, q.format, q.rule, q.hadamard)
    torch.testing.assert_close(decode(back), decode(q), rtol=0, atol=0, equal_nan=True)


@each_operand
def test_restore_gives_contract_blocks_back(fmt, operand):
    for block in contract.BLOCKS:
        if block.format == fmt.name:
            q = quantize(block.tensor(), fmt, rule=ScaleRule(block.rule), tensor_scale=block.tensor_scale)
            assert same_bytes(restore(prepare(q, operand)), q if fmt is MXFP4 else without_meaningless_codes(q)), block


@pytest.mark.parametrize(("n", "k"), SHAPES)
def test_words_in_bytes_give_the_bytes_back(n, k):
    q = quantize(wild(n, k), MXFP4)
    weight = prepare(q, torch.float8_e4m3fn, WordOrder.BYTES)
    assert {part.order for part in parts(weight)} == {WordOrder.BYTES}
    assert same_bytes(restore(weight), q)


def test_words_in_bytes_are_for_e4m3_alone():
    q = quantize(torch.ones(2, 32), MXFP4)
    weight = prepare(q, torch.float8_e4m3fn, WordOrder.BYTES)
    assert [weight.fits(operand) for operand in WINDOWS] == [False, False, True]
    with pytest.raises(ValueError, match="words in bytes"):
        prepare(q, torch.bfloat16, WordOrder.BYTES)


@each_format
def test_every_code_survives_in_every_place(fmt):
    codes = torch.randint(0, 256, (32, 64), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    scale = torch.full((32, 128 // fmt.block_size), 0x38, dtype=torch.uint8).view(fmt.scale_dtype)
    q = Quantized(codes, scale, torch.tensor(3.0) if fmt.has_tensor_scale else None, fmt, fmt.default_rule, None, 128)
    assert same_bytes(restore(prepare(q)), q)


def test_every_scale_of_nvfp4_survives():
    scale = torch.arange(0x80, dtype=torch.uint8)[None].view(NVFP4.scale_dtype)
    codes = torch.full((1, 0x80 * 8), 0x11, dtype=torch.uint8)
    q = Quantized(codes, scale, torch.tensor(3.0), NVFP4, ScaleRule.TWO_LEVEL, None, 0x80 * 16)
    assert same_bytes(restore(prepare(q)), without_meaningless_codes(q))


@pytest.mark.parametrize("fmt", FORMATS, ids=str)
def test_a_rotated_weight_stays_rotated(fmt):
    q = quantize(torch.randn(5, 200, generator=torch.Generator().manual_seed(0)), fmt, hadamard=128)
    weight = prepare(q)
    assert same_bytes(restore(weight), q)
    assert weight.units == 4  # k is padded to 256
    assert restore(weight).hadamard == 128


# --- Bits and order ---------------------------------------------------------------------------------------------------------


each_order = pytest.mark.parametrize("order", WordOrder, ids=str)


def code_at(words, order, n, column):
    """The code of (n, column) from `words`, as the module's text says where it is."""
    tile, unit, j = n // 16, column // 64, column % 64 // 16
    g, t = n % 8, column % 8 // 2
    pair = 2 * (column % 16 // 8) + n % 16 // 8
    word = int(words[tile, unit, 4 * g + t, j]) & 0xFFFFFFFF
    return sum((word >> bit & 1) << i for i, bit in enumerate(CODE_BITS[order][pair][column % 2]))


@each_order
def test_codes_are_where_the_text_says(order):
    q = quantize(torch.randn(20, 130, generator=torch.Generator().manual_seed(0)), MXFP4)
    words, codes = prepare(q, torch.float8_e4m3fn, order).words, e2m1.unpack(q.codes)
    assert [[code_at(words, order, n, c) for c in range(130)] for n in range(20)] == codes[:, :130].tolist()


@each_order
def test_no_two_bits_of_a_word_share_a_place(order):
    assert sorted(bit for pair in CODE_BITS[order] for column in pair for bit in column) == list(range(32))


def test_scale_bytes_of_mxfp4_are_relative_to_their_row():
    x = torch.zeros(16, 128)
    x[3, [0, 32, 64, 96]] = torch.tensor([4.0, 1.0, 0.0, 2.0**-20])  # scales 2**0, 2**-2, none, 2**-22
    weight = prepare(quantize(x, MXFP4))
    in_bytes = weight.scales.view(torch.uint8).reshape(1, 2, 8, 2, 2)  # tile, unit, g, block, high row
    assert in_bytes[0, :, 3, :, 0].tolist() == [[254, 252], [254, 232]]
    assert weight.base[3] == 127
    assert weight.row_scale[3] == 0.5
    assert weight.rest is None


@pytest.mark.parametrize("byte", [0, 1, 254])
def test_row_scales_reach_both_ends(byte):
    q = quantize(torch.ones(1, 32), MXFP4)
    weight = prepare(replace(q, scales=torch.full((1, 1), byte, dtype=torch.uint8).view(MXFP4.scale_dtype)))
    assert weight.row_scale[0].item() == 2.0 ** (byte - 128)


def test_qutlass_divides_by_three_in_the_row_scale():
    q = quantize(torch.ones(1, 32), MXFP4, rule=ScaleRule.QUTLASS_ABS_MAX)
    one, third = prepare(replace(q, rule=ScaleRule.FLOOR)), prepare(q)
    assert third.row_scale[0].item() == np.float32(one.row_scale[0].item()) / np.float32(3)


@each_format
def test_a_nan_block_makes_its_row_scale_nan_and_no_other(fmt):
    x = torch.ones(4, 96)
    x[2, 40] = torch.nan
    assert prepare(quantize(x, fmt)).row_scale.isnan().nonzero().flatten().tolist() == [2]


def test_the_order_of_e4m3_activations_is_that_of_masked_words():
    # Register byte b of lane t meets pair column e = b // 2 of the columns 8 (b % 2) + 2 t + e.
    assert E4M3_ORDER == (0, 8, 1, 9, 2, 10, 3, 11, 4, 12, 5, 13, 6, 14, 7, 15)


# --- Windows ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("operand", WINDOWS, ids=str)
def test_blocks_beyond_the_window_go_to_the_rest(operand):
    window = WINDOWS[operand]
    byte = torch.tensor([[254, 254 - window, 253 - window, 0]], dtype=torch.uint8).view(MXFP4.scale_dtype)
    q = Quantized(torch.full((1, 64), 0x11, dtype=torch.uint8), byte, None, MXFP4, ScaleRule.FLOOR, None, 128)
    weights = parts(prepare(q, operand))
    assert len(weights) == 3  # 0 is too far even from 253 - window
    assert all((part.scales.view(torch.uint8) >= 254 - window).all() for part in weights)
    assert same_bytes(restore(weights[0]), q)
    assert weights[0].fits(operand)
    assert weights[0].fits(torch.float8_e4m3fn) == (operand is torch.float8_e4m3fn)


def test_an_ordinary_weight_has_no_rest():
    q = quantize(torch.randn(64, 512, generator=torch.Generator().manual_seed(0)), MXFP4)
    assert [prepare(q, operand).rest for operand in WINDOWS] == [None] * 3


# --- Refusals ---------------------------------------------------------------------------------------------------------------


def test_what_cannot_be_prepared_is_refused():
    with pytest.raises(ValueError, match="a weight is a matrix"):
        prepare(quantize(torch.ones(2, 3, 32), MXFP4))
    with pytest.raises(ValueError, match=r"cannot be multiplied as torch\.float32"):
        prepare(quantize(torch.ones(2, 32), MXFP4), torch.float32)
    with pytest.raises(ValueError, match=r"a nvfp4 weight cannot be multiplied as torch\.float8_e4m3fn"):
        prepare(quantize(torch.ones(2, 32), NVFP4), torch.float8_e4m3fn)
    q = quantize(torch.ones(2, 32), NVFP4)
    with pytest.raises(ValueError, match="negative"):
        prepare(replace(q, scales=(-q.scales.float()).to(NVFP4.scale_dtype)))


@pytest.mark.parametrize(
    "change",
    [
        {"words": torch.zeros(1, 1, 32, 3, dtype=torch.int32)},
        {"words": torch.zeros(1, 1, 4, 32, dtype=torch.int32).mT},
        {"scales": torch.zeros(1, 1, 8, dtype=torch.int64)},
        {"row_scale": torch.zeros(1)},
        {"base": torch.zeros(16)},
        {"tensor_scale": torch.zeros(1)},
        {"words": torch.zeros(1, 1, 32, 4, dtype=torch.int32, device="meta")},
        {"n": 17},
    ],
    ids=str,
)
def test_a_prepared_weight_checks_its_parts(change):
    weight = prepare(quantize(torch.ones(2, 32), MXFP4))
    assert isinstance(weight, PreparedWeight)
    with pytest.raises(ValueError, match=r"weight is|is on"):
        replace(weight, **change)


def test_nvfp4_needs_its_tensor_scale():
    with pytest.raises(ValueError, match="has a tensor_scale"):
        replace(prepare(quantize(torch.ones(2, 32), NVFP4)), tensor_scale=None)
