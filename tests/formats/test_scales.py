"""Scale bytes, typed from the standard: OCP Microscaling Formats v1.0, section 5.4.1 (E8M0), and OFP8 v1.0 (E4M3)."""

from math import inf, isnan, nan

import ml_dtypes
import numpy as np
import oracle
import pytest
import torch

from fp4bench.formats import FORMATS, MXFP4, NVFP4, ScaleRule, scales

FLOAT32_MAX = (2 - 2**-23) * 2.0**127

# amax: bytes under FLOOR, CEIL, EVEN, RCEIL. Byte b is 2**(b - 127); 6 = 1.5 * 2**2 is E2M1's largest.
OCP_BYTES = {
    1.0: (125, 125, 125, 125),  # 2**-2: 1 is 4 quarters
    1.5: (125, 126, 125, 125),  # 6 quarters
    1.625: (125, 126, 125, 126),  # 6.5 quarters: over 6 for RCEIL
    1.75: (125, 126, 126, 126),  # 7 quarters: EVEN goes up
    2.0: (126, 126, 126, 126),
    3.0: (126, 127, 126, 126),
    4.0: (127, 127, 127, 127),
    5.0: (127, 128, 127, 127),
    6.0: (127, 128, 127, 127),
    7.0: (127, 128, 128, 128),
    8.0: (128, 128, 128, 128),
    0.0: (0, 0, 0, 0),
    2.0**-149: (0, 0, 0, 0),
    2.0**-127: (0, 0, 0, 0),
    2.0**-124: (1, 1, 1, 1),
    6 * 2.0**-127: (0, 1, 0, 0),
    7 * 2.0**-127: (0, 1, 1, 1),
    2.0**127: (252, 252, 252, 252),  # e = 125; 2**127 / 6 is 1.33 * 2**124
    FLOAT32_MAX: (252, 253, 253, 253),
    inf: (255, 255, 255, 255),
    nan: (255, 255, 255, 255),
}
OCP_RULES = (ScaleRule.FLOOR, ScaleRule.CEIL, ScaleRule.EVEN, ScaleRule.RCEIL)

# floor(log2(amax + 1e-8)) + 127; log2(1e-8) is -26.6.
ABS_MAX_BYTES = {
    0.0: 100,
    2.0**-149: 100,
    2.0**-27: 101,
    1.0: 127,
    1.99: 127,
    2.0: 128,
    6.0: 129,
    FLOAT32_MAX: 254,
    inf: 255,
    nan: 255,
}

# floor(log2(std * 0.48708 + 1e-8)) + 127.
QUEST_BYTES = {
    0.0: 100,
    2.0**-149: 100,
    2.0**-26: 101,
    1.0: 125,
    2.0: 126,
    2.05: 126,
    2.06: 127,
    4.1: 127,
    4.11: 128,
    FLOAT32_MAX: 253,
    inf: 255,
    nan: 255,
}


def e8m0(amax, rule):
    return scales.e8m0_encode(torch.tensor([amax], dtype=torch.float32), rule).view(torch.uint8).item()


@pytest.mark.parametrize(("amax", "expected"), OCP_BYTES.items(), ids=str)
def test_e8m0_bytes_of_the_ocp_rules(amax, expected):
    assert tuple(e8m0(amax, rule) for rule in OCP_RULES) == expected


@pytest.mark.parametrize(("amax", "expected"), ABS_MAX_BYTES.items(), ids=str)
def test_e8m0_bytes_of_abs_max(amax, expected):
    assert e8m0(amax, ScaleRule.QUTLASS_ABS_MAX) == expected


@pytest.mark.parametrize(("std", "expected"), QUEST_BYTES.items(), ids=str)
def test_e8m0_bytes_of_quest(std, expected):
    assert e8m0(std, ScaleRule.QUTLASS_QUEST) == expected


@pytest.mark.parametrize("rule", MXFP4.rules, ids=str)
def test_the_extent_of_a_block_is_its_largest_magnitude_or_its_standard_deviation(rule):
    blocks = torch.zeros(5, 32)
    blocks[0, :4] = torch.tensor([1.0, -7.0, 3.0, 3.0])  # mean 0, squares 68
    blocks[1] = torch.tensor([5.0, 1.0]).repeat(16)
    blocks[2, 3], blocks[3, 3], blocks[4] = nan, -inf, 1.5
    largest, spread = (7.0, 5.0, nan, inf, 1.5), ((68 / 32) ** 0.5, 2.0, nan, nan, 0.0)
    want = torch.tensor(spread if rule is ScaleRule.QUTLASS_QUEST else largest)
    assert torch.equal(scales.block_extents(blocks, rule).nan_to_num(nan=-1.0), want.nan_to_num(nan=-1.0))


def test_a_negative_nan_is_a_nan():
    amax = torch.tensor([-1], dtype=torch.int32).view(torch.float32)
    assert scales.e8m0_encode(amax, ScaleRule.FLOOR).view(torch.uint8).item() == 255


@pytest.mark.parametrize("rule", MXFP4.rules, ids=str)
def test_e8m0_encode_agrees_with_the_oracle_on_every_exponent(rule):
    # Two million positive float32 bit patterns, subnormals, infinity and NaNs among them, and all around powers of two.
    bits = torch.randint(0, 1 << 31, (1 << 21,), generator=torch.Generator().manual_seed(0))
    mantissas = torch.tensor([0x000000, 0x400000, 0x600000])  # 1, 1.5, 1.75
    edges = (torch.arange(256)[:, None, None] * (1 << 23) + mantissas[:, None] + torch.arange(-9, 10)).flatten()
    amax = torch.cat((bits, edges.clamp(0, (1 << 31) - 1))).to(torch.int32).view(torch.float32)
    got = scales.e8m0_encode(amax, rule).view(torch.uint8).numpy()
    np.testing.assert_array_equal(got, oracle.e8m0(amax.numpy(), str(rule)))


def test_the_rules_are_ordered():
    amax = torch.logspace(-37, 38, 100_000)
    floor, ceil, even, rceil = (scales.e8m0_encode(amax, rule).view(torch.uint8).int() for rule in OCP_RULES)
    assert bool((floor <= rceil).all() and (rceil <= ceil).all() and (ceil <= floor + 1).all())
    assert bool((even <= rceil).all()), "EVEN goes up from 1.75 on, RCEIL already from 1.5 on"


def test_the_rule_of_nvfp4_gives_no_e8m0_scale():
    with pytest.raises(ValueError, match="scale rule two_level gives no E8M0 scale"):
        scales.e8m0_encode(torch.ones(1), ScaleRule.TWO_LEVEL)


def test_every_e8m0_byte_is_its_power_of_two():
    every_byte = torch.arange(256, dtype=torch.uint8)
    decoded = scales.e8m0_decode(every_byte).tolist()
    assert decoded[:255] == [2.0 ** (byte - 127) for byte in range(255)]
    assert isnan(decoded[255])
    typed = every_byte.view(torch.float8_e8m0fnu)
    np.testing.assert_array_equal(
        scales.e8m0_decode(typed), every_byte.numpy().view(ml_dtypes.float8_e8m0fnu).astype(np.float32)
    )


def test_the_inverse_of_every_e8m0_scale_is_exact():
    every_byte = torch.arange(255, dtype=torch.uint8)
    assert scales.e8m0_decode_inverse(every_byte).tolist() == [2.0 ** (127 - byte) for byte in range(255)]
    assert scales.e8m0_decode_inverse(torch.tensor([255], dtype=torch.uint8)).item() == 2.0**-127


# Between 1 and 2 E4M3 steps by 1/8, 1 being 0x38; from 256 by 32; the subnormals by 2**-9.
E4M3_BYTES = [
    (0.0, 0x00),
    (-0.0, 0x80),
    (1.0, 0x38),
    (1.0625, 0x38),  # tie, to the even 1.0
    (1.0626, 0x39),
    (1.1875, 0x3A),  # tie, to the even 1.25
    (-1.5, 0xBC),
    (2.0**-6, 0x08),  # the smallest normal
    (2.0**-9, 0x01),
    (2.0**-10, 0x00),  # tie, to 0
    (1.01 * 2.0**-10, 0x01),
    (1.5 * 2.0**-9, 0x02),  # tie, to the even 2
    (432.0, 0x7E),  # tie of 416 (0x7d) and 448 (0x7e), to the even
    (431.9, 0x7D),
    (448.0, 0x7E),
    (449.0, 0x7E),
    (464.0, 0x7E),
    (465.0, 0x7E),
    (480.0, 0x7E),
    (1e30, 0x7E),
    (inf, 0x7E),
    (-inf, 0xFE),
]


@pytest.mark.parametrize(("x", "byte"), E4M3_BYTES, ids=str)
def test_e4m3_rounds_to_nearest_even_and_saturates(x, byte):
    assert scales.e4m3_encode(torch.tensor([x])).view(torch.uint8).item() == byte


def test_e4m3_of_nan_is_nan():
    assert scales.e4m3_encode(torch.tensor([nan])).view(torch.uint8).item() & 0x7F == 0x7F


def test_e4m3_encode_agrees_with_ml_dtypes():
    small = torch.empty(1 << 19).uniform_(-512, 512, generator=torch.Generator().manual_seed(0))
    wide = small * torch.exp2(torch.randint(-24, 4, small.shape, generator=torch.Generator().manual_seed(1)).float())
    x = torch.cat((small, wide, torch.arange(1 << 16, dtype=torch.int32).to(torch.int16).view(torch.bfloat16).float()))
    x = x[~x.isnan()]
    np.testing.assert_array_equal(scales.e4m3_encode(x).view(torch.uint8), oracle.e4m3(x.numpy()))


def test_every_e4m3_byte_decodes_as_ml_dtypes_does():
    every_byte = torch.arange(256, dtype=torch.uint8)
    expected = every_byte.numpy().view(ml_dtypes.float8_e4m3fn).astype(np.float32)
    np.testing.assert_array_equal(scales.e4m3_decode(every_byte), expected)
    np.testing.assert_array_equal(scales.e4m3_decode(every_byte.view(torch.float8_e4m3fn)), expected)
    assert expected[0x7E] == 448
    assert isnan(expected[0x7F])
    assert isnan(expected[0xFF])


def test_the_formats_are_those_of_the_specifications():
    assert (MXFP4.block_size, MXFP4.scale_dtype, MXFP4.has_tensor_scale) == (32, torch.float8_e8m0fnu, False)
    assert (NVFP4.block_size, NVFP4.scale_dtype, NVFP4.has_tensor_scale) == (16, torch.float8_e4m3fn, True)
    assert (MXFP4.bits_per_element, NVFP4.bits_per_element) == (4.25, 4.5)  # 4 + 8 / 32, 4 + 8 / 16
    assert FORMATS == {"mxfp4": MXFP4, "nvfp4": NVFP4}
    assert [str(fmt) for fmt in FORMATS.values()] == ["mxfp4", "nvfp4"]


def test_the_default_rules_are_ocp_and_transformer_engine():
    assert MXFP4.default_rule is ScaleRule.FLOOR
    assert NVFP4.default_rule is ScaleRule.TWO_LEVEL
    assert [str(rule) for rule in MXFP4.rules] == ["floor", "ceil", "even", "rceil", "qutlass_abs_max", "qutlass_quest"]
    assert NVFP4.rules == (ScaleRule.TWO_LEVEL,)


def test_only_abs_max_has_a_gain():
    assert {str(rule): rule.gain for rule in ScaleRule if rule.gain != 1} == {"qutlass_abs_max": 3.0}
