"""The contract catches the errors that FP4 libraries have made: each is planted in fp4bench, and the checks must raise."""

from dataclasses import replace
from functools import partial

import contract
import pytest
import torch
from eager import EAGER

from fp4bench import quantize as quantizing
from fp4bench.formats import FORMATS, ScaleRule, e2m1, layouts, scales

MX_RULES = FORMATS["mxfp4"].rules
SIGN = 8


def encode_by_midpoints(x, goes_up):
    """E2M1 codes where `goes_up(code_below)` says which way a tie goes."""
    magnitude = x.abs()
    codes = torch.zeros(x.shape, dtype=torch.uint8)
    for below, midpoint in enumerate((0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0)):
        codes += magnitude >= midpoint if goes_up(below) else magnitude > midpoint
    return codes + SIGN * x.signbit()


# --- Mutations of the elements ----------------------------------------------------------------------------------------------


def ties_toward_zero(patch):
    patch.setattr(e2m1, "encode", partial(encode_by_midpoints, goes_up=lambda below: False))


def ties_away_from_zero(patch):
    patch.setattr(e2m1, "encode", partial(encode_by_midpoints, goes_up=lambda below: True))


def codebook_without_zero(patch):
    codebook = (0.5, 0.75, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
    patch.setattr(e2m1, "MAGNITUDES", codebook)
    patch.setattr(
        e2m1,
        "encode",
        lambda x: (x.abs()[..., None] - torch.tensor(codebook)).abs().argmin(-1).to(torch.uint8) + SIGN * x.signbit(),
    )


def decoder_without_zero(patch):
    patch.setattr(e2m1, "MAGNITUDES", (0.5, 0.75, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0))


def zero_decodes_to_a_large_negative(patch):
    # As in an FP8 conversion by exponent shifts, where the zero code wraps to -448.
    decode = e2m1.decode
    patch.setattr(e2m1, "decode", lambda codes: torch.where(codes == 0, -448.0, decode(codes)))


def negative_zero_decodes_to_a_half(patch):
    decode = e2m1.decode
    patch.setattr(e2m1, "decode", lambda codes: torch.where(codes == SIGN, -0.5, decode(codes)))


def high_nibble_first(patch):
    # Pack and unpack agree: a round trip does not see it.
    patch.setattr(e2m1, "pack", lambda codes: (codes[..., 0::2] << 4) | codes[..., 1::2])
    patch.setattr(e2m1, "unpack", lambda packed: torch.stack((packed >> 4, packed & 0xF), dim=-1).flatten(-2))


def sign_lost(patch):
    encode = e2m1.encode
    patch.setattr(e2m1, "encode", lambda x: encode(x.abs()))


def sign_of_zero_lost(patch):
    encode = e2m1.encode
    patch.setattr(e2m1, "encode", lambda x: torch.where(encode(x) == SIGN, 0, encode(x)).to(torch.uint8))


def saturation_wraps_to_zero(patch):
    encode = e2m1.encode
    patch.setattr(e2m1, "encode", lambda x: torch.where(x.abs() > 6, 0, encode(x)).to(torch.uint8))


# --- Mutations of MXFP4's scales --------------------------------------------------------------------------------------------


def patch_scale_bytes(patch, change):
    """Replace the E8M0 byte by change(byte, amax, rule), an int32 tensor; NaN blocks keep theirs."""
    encode = scales.e8m0_encode

    def changed(amax, rule):
        byte = encode(amax, rule).view(torch.uint8).int()
        byte = torch.where(byte == 255, byte, change(byte, amax, rule).clamp(0, 254))
        return byte.to(torch.uint8).view(torch.float8_e8m0fnu)

    patch.setattr(scales, "e8m0_encode", changed)


def exponent_one_too_high(patch):
    patch_scale_bytes(patch, lambda byte, amax, rule: byte + 1)


def exponent_one_too_low(patch):
    patch_scale_bytes(patch, lambda byte, amax, rule: byte - 1)


def rceil_by_a_float_logarithm(patch):
    def change(byte, amax, rule):
        return (torch.log2(amax / 6).ceil() + 127).clamp(0, 254).int() if rule is ScaleRule.RCEIL else byte

    patch_scale_bytes(patch, change)


def floor_by_a_float_logarithm(patch):
    def change(byte, amax, rule):
        return (torch.log2(amax).floor() + 125).clamp(0, 254).int() if rule is ScaleRule.FLOOR else byte

    patch_scale_bytes(patch, change)


def rceil_by_a_difference_of_logarithms(patch):
    # ceil(log2(amax)) - log2(6) rounded: exact at powers of two, wrong at 6 * 2**k.
    def change(byte, amax, rule):
        return (torch.log2(amax) - 2.585).ceil().clamp(-127, 127).int() + 127 if rule is ScaleRule.RCEIL else byte

    patch_scale_bytes(patch, change)


def abs_max_without_its_1e_8(patch):
    def change(byte, amax, rule):
        return torch.frexp(amax).exponent + 126 if rule is ScaleRule.QUTLASS_ABS_MAX else byte

    patch_scale_bytes(patch, change)


def scale_rounded_after_normalizing(patch):
    # The codes follow from amax / 6, the stored scale is its power of two: a maximum of 8.52 comes back as 12.
    def elements(blocks, block_scales, rule):
        return blocks / (blocks.abs().amax(dim=-1, keepdim=True) / 6)

    patch.setattr(quantizing, "_scaled_by_power_of_two", elements)


def subnormal_scale_flushed(patch):
    # Byte 0 is 2**-127; where subnormals are flushed it decodes to 0.
    decode = scales.e8m0_decode
    patch.setattr(scales, "e8m0_decode", lambda s: torch.where(s.view(torch.uint8) == 0, 0.0, decode(s)))


def subnormal_scale_clamped(patch):
    # The elements are divided by 2**-126 while the byte says 2**-127 (torchao 0.18.0).
    inverse = scales.e8m0_decode_inverse
    patch.setattr(scales, "e8m0_decode_inverse", lambda s: inverse(s).clamp(max=2.0**126))


def byte_255_decodes_to_a_power_of_two(patch):
    decode = scales.e8m0_decode
    patch.setattr(scales, "e8m0_decode", lambda s: torch.where(s.view(torch.uint8) == 255, 2.0**127, decode(s)))


def infinity_taken_for_finite(patch):
    encode = scales.e8m0_encode
    patch.setattr(scales, "e8m0_encode", lambda amax, rule: encode(amax.clamp(max=contract.FLOAT32_MAX), rule))


def nan_ignored_by_the_maximum(patch):
    extents = scales.block_extents
    patch.setattr(scales, "block_extents", lambda blocks, rule: extents(blocks.nan_to_num(nan=0.0, posinf=torch.inf), rule))


def patch_deviation(patch, deviation):
    """Replace quest's standard deviation by deviation(blocks), of float32 (..., 32)."""
    extents = scales.block_extents

    def changed(blocks, rule):
        return deviation(blocks) if rule is ScaleRule.QUTLASS_QUEST else extents(blocks, rule)

    patch.setattr(scales, "block_extents", changed)


def quest_about_zero(patch):
    patch_deviation(patch, lambda blocks: blocks.double().square().mean(dim=-1).sqrt().float())


def quest_of_a_sample(patch):
    largest = contract.FLOAT32_MAX
    patch_deviation(patch, lambda blocks: blocks.double().std(dim=-1).clamp(max=largest).float())  # divided by 31


def quest_by_two_sums_in_float32(patch):
    def deviation(blocks):
        unit = blocks.abs().amax(dim=-1, keepdim=True).clamp(min=2.0**-126)
        blocks = blocks / unit
        variance = blocks.square().mean(dim=-1) - blocks.mean(dim=-1).square()
        return variance.clamp(min=0).sqrt() * unit[..., 0]

    patch_deviation(patch, deviation)


def quest_of_nan_has_scale_1(patch):
    extents = scales.block_extents

    def deviation(blocks):
        std = extents(blocks, ScaleRule.QUTLASS_QUEST)
        return torch.where(std.isnan(), 2.06, std)  # 2.06 * 0.48708 is 1.003

    patch_deviation(patch, deviation)


def quest_without_its_1e_8(patch):
    def change(byte, std, rule):
        return torch.frexp(std.double() * (2.92247856 / 6)).exponent + 126 if rule is ScaleRule.QUTLASS_QUEST else byte

    patch_scale_bytes(patch, change)


def missing_third_of_abs_max(patch):
    decode = quantizing.decode
    patch.setattr(quantizing, "decode", lambda q: decode(q) * q.rule.gain)


def abs_max_divided_after_its_scale(patch):
    # code * 2**127 is infinite from code 4 on, where a third of it is not.
    def decode(q):
        whole = original(replace(q, rule=ScaleRule.FLOOR) if q.tensor_scale is None else q)
        return whole / q.rule.gain

    original = quantizing.decode
    patch.setattr(quantizing, "decode", decode)


def abs_max_without_gain(patch):
    patch.setattr(ScaleRule, "gain", 1.0)


# --- Mutations of NVFP4's scales --------------------------------------------------------------------------------------------


def tensor_scale_swapped_in_encoding(patch):
    two_level = quantizing._two_level_scales
    patch.setattr(quantizing, "_two_level_scales", lambda amax, s, floor: two_level(amax, 1 / s, floor))


def tensor_scale_swapped_in_decoding(patch):
    decode = quantizing.decode

    def swapped(q):
        return decode(q if q.tensor_scale is None else replace(q, tensor_scale=1 / q.tensor_scale))

    patch.setattr(quantizing, "decode", swapped)


def decode_scale_returned(patch):
    # The whole chain by amax / 2688, the reciprocal of what is promised.
    original = quantizing.quantize

    def returned(*args, **kwargs):
        q = original(*args, **kwargs)
        return q if q.tensor_scale is None else replace(q, tensor_scale=1 / q.tensor_scale)

    patch.setattr(quantizing, "quantize", returned)


def codes_by_the_unrounded_block_scale(patch):
    def elements(amax, s, floor):
        wanted.append((amax * (s * (1.0 / 6.0))).clamp(max=448))
        return two_level(amax, s, floor)

    wanted, two_level = [], quantizing._two_level_scales
    patch.setattr(quantizing, "_two_level_scales", elements)
    patch.setattr(quantizing, "_two_level_multiplier", lambda block_scales, s: s / wanted[-1])


def smallest_scale_is_normal(patch):
    two_level = quantizing._two_level_scales
    patch.setattr(quantizing, "_two_level_scales", lambda amax, s, floor: two_level(amax, s, 2.0**-6))


def scale_truncated(patch):
    # Toward zero instead of to nearest: the last bit cut off a float32 that E4M3 cannot hold.
    encode = scales.e4m3_encode

    def truncated(x):
        nearest = encode(x)
        too_high = scales.e4m3_decode(nearest) > x
        return (nearest.view(torch.uint8) - too_high.to(torch.uint8)).view(torch.float8_e4m3fn)

    patch.setattr(scales, "e4m3_encode", truncated)


def infinity_saturates_the_block_scale(patch):
    def saturated(amax, s, floor):
        return scales.e4m3_encode((amax * (s * (1.0 / 6.0))).clamp(min=floor))

    patch.setattr(quantizing, "_two_level_scales", saturated)


# --- Mutations of the layout ------------------------------------------------------------------------------------------------


def patch_layout(patch, order):
    """Another order of (expert, row tile, row // 32, row % 32, column tile, column)."""

    def to_blocked(scale_bytes):
        rows, columns = scale_bytes.shape
        padded_rows, padded_columns = layouts.padded_shape(rows, columns)
        raw = torch.nn.functional.pad(scale_bytes, (0, padded_columns - columns, 0, padded_rows - rows))
        return raw.reshape(1, padded_rows // 128, 4, 32, padded_columns // 4, 4).permute(order).flatten()

    patch.setattr(layouts, "to_blocked", to_blocked)


def layout_row_major(patch):
    patch_layout(patch, (0, 1, 2, 3, 4, 5))


def layout_with_rows_in_order(patch):
    patch_layout(patch, (0, 1, 4, 2, 3, 5))


def layout_with_tiles_down_first(patch):
    patch_layout(patch, (0, 4, 1, 3, 2, 5))


def layout_with_transposed_quads(patch):
    patch_layout(patch, (0, 1, 4, 3, 5, 2))


# What the check that must see it says, so that no mutation passes for having broken something else.
MUTATIONS = {
    ties_toward_zero: "mxfp4.*: codes",
    ties_away_from_zero: "mxfp4.*: codes",
    codebook_without_zero: "every_code_once.*: codes",
    decoder_without_zero: "code0: decodes to",
    zero_decodes_to_a_large_negative: "code0: decodes to",
    negative_zero_decodes_to_a_half: "code8: decodes to",
    high_nibble_first: "mxfp4.*: codes 01 23 45 67",
    sign_lost: "mxfp4.*: codes",
    sign_of_zero_lost: "mxfp4.*: codes",
    saturation_wraps_to_zero: "mxfp4-floor-amax_at_7.*: codes",
    exponent_one_too_high: r"scale bytes \[128\], not \[127\]",
    exponent_one_too_low: r"scale bytes \[126\], not \[127\]",
    rceil_by_a_float_logarithm: "rceil: scale wrong in",
    floor_by_a_float_logarithm: r"amax_below_2\*\*-124.*: scale bytes",
    rceil_by_a_difference_of_logarithms: "rceil: scale wrong in",
    abs_max_without_its_1e_8: "qutlass_abs_max-zeros.*: scale bytes",
    scale_rounded_after_normalizing: "mxfp4.*: codes",
    subnormal_scale_flushed: "codes 80|scale0x00-code1: decodes to",
    subnormal_scale_clamped: "subnormal_amax.*: codes",
    byte_255_decodes_to_a_power_of_two: "scale0xff-code0: decodes to",
    infinity_taken_for_finite: "mxfp4-floor-infinity.*: scale bytes",
    nan_ignored_by_the_maximum: "mxfp4-floor-one_nan.*: scale bytes",
    quest_about_zero: "qutlass_quest-mean_of_3.*: scale bytes",
    quest_of_a_sample: "qutlass_quest: scale wrong in",
    quest_by_two_sums_in_float32: "qutlass_quest-mean_of_4096.*: scale bytes",
    quest_of_nan_has_scale_1: r"qutlass_quest-one_nan.*: scale bytes \[127\], not \[255\]",
    quest_without_its_1e_8: "qutlass_quest-zeros.*: scale bytes",
    missing_third_of_abs_max: "qutlass_abs_max.*: decodes to",
    abs_max_divided_after_its_scale: "qutlass_abs_max-scale0xfe-code6: decodes to",
    abs_max_without_gain: "qutlass_abs_max.*: codes",
    tensor_scale_swapped_in_encoding: "tensor_scale_448.*: scale bytes",
    tensor_scale_swapped_in_decoding: "S448: decodes to",
    decode_scale_returned: "tensor scale 0.0033.*, not 300",
    codes_by_the_unrounded_block_scale: "codes_follow_the_rounded_scale.*: codes",
    smallest_scale_is_normal: "smallest_scale.*: scale bytes",
    scale_truncated: "scale_tie_up.*: scale bytes",
    infinity_saturates_the_block_scale: "nvfp4-two_level-infinity.*: scale bytes",
    layout_row_major: r"scale \(1, 0\) .* lies at \[4\]",
    layout_with_rows_in_order: r"scale \(1, 0\) .* lies at \[4\]",
    layout_with_tiles_down_first: r"scale \(128, 0\) of 256 x 8 lies at \[512\]",
    layout_with_transposed_quads: r"scale \(0, 3\) .* lies at \[12\]",
}


def test_the_contract_holds_without_mutation():
    contract.check_contract(EAGER)


@pytest.mark.parametrize(("mutation", "message"), MUTATIONS.items(), ids=[mutation.__name__ for mutation in MUTATIONS])
def test_the_contract_catches(mutation, message, monkeypatch):
    mutation(monkeypatch)
    with pytest.raises(AssertionError, match=message):
        contract.check_contract(EAGER)


@pytest.mark.parametrize("used", MX_RULES, ids="used_{}".format)
@pytest.mark.parametrize("named", MX_RULES, ids="named_{}".format)
def test_the_contract_catches_a_swapped_rule(named, used, monkeypatch):
    encode = scales.e8m0_encode
    monkeypatch.setattr(scales, "e8m0_encode", lambda amax, rule: encode(amax, used if rule is named else rule))
    if used is named:
        contract.check_contract(EAGER, rules=(str(named),))
    else:
        with pytest.raises(AssertionError, match=f"{named}.*(scale|codes)"):
            contract.check_contract(EAGER, rules=(str(named),))
