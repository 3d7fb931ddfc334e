"""Marlin's layouts, read back. The order of codes is the library's business: its `repack` leaves them here as they were."""

import torch

from fp4bench.formats import e2m1


def in_row_order(scales):
    """Marlin's scales (k / block, n) back in the order of columns, by where it looks for each.

    Within 64 columns: column 8 * j + i lies at 8 * i + j, and then places 1 and 2 of each four change.
    """
    column = torch.arange(scales.shape[1])
    place = column // 64 * 64 + column % 8 * 8 + column % 64 // 8
    place = place // 4 * 4 + torch.tensor([0, 2, 1, 3])[place % 4]
    return scales[:, place]


def decode_s0e5m3(scales):
    """Values of bytes with 5 bits of exponent (bias 15) and 3 of mantissa, in the sense of float16."""
    bits = scales.view(torch.uint8).int()
    return torch.where(bits == 0, 0.0, torch.exp2((bits >> 3) - 15.0) * (1 + (bits & 7) / 8))


def weights(b_q_weight, b_scales, global_scale, dtype=torch.bfloat16):
    """The values of (n, k) weights, float64, as a kernel for activations of this dtype reads them."""
    scales = in_row_order(b_scales.view(torch.uint8))
    if global_scale is None:
        assert b_scales.dtype == torch.float8_e8m0fnu
        values = torch.exp2(scales.float() - 127)
    else:
        assert b_scales.dtype == torch.float8_e4m3fn
        assert global_scale.shape == (1,)
        # E2M1 is read as bfloat16 or float16 with its own exponent, 2**-126 or 2**-14 too small; the scale is 2**7 too large.
        small = {torch.bfloat16: 2.0**-126, torch.float16: 2.0**-14}[dtype]
        values = decode_s0e5m3(scales).double() * small * global_scale.double()
    codes = e2m1.unpack(b_q_weight.T.contiguous().view(torch.uint8))
    return e2m1.decode(codes).double() * values.T.repeat_interleave(codes.shape[1] // len(values), dim=1)


def repack(b_q_weight, size_k, size_n, num_bits, perm=None, is_a_8bit=False):
    assert b_q_weight.shape == (size_k // 8, size_n)
    assert (b_q_weight.dtype, num_bits, is_a_8bit) == (torch.int32, 4, False)
    assert perm is None or perm.numel() == 0
    return b_q_weight
