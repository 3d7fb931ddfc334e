"""E2M1, the 4-bit element: encode, decode, and two codes a byte.

A code is sign (bit 3), exponent (bits 2 and 1, bias 1), mantissa (bit 0); exponent 0 is subnormal. There is no NaN and no
infinity (OCP Microscaling Formats v1.0, section 5.3.3). The magnitudes are those of `MAGNITUDES`, in code order.
"""

from functools import cache

import torch

MAGNITUDES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
MAX = 6.0

_MAX_BITS = 0x40C00000  # 6.0 as float32
_ONE_BITS = 0x3F800000  # 1.0 as float32
# 2**22 has a unit of 0.5 in its last place: adding it to |x| < 2 rounds |x| to halves, ties to even, in the low bits.
_HALVES = 4194304.0
_HALVES_BITS = 0x4A800000


def encode(x: torch.Tensor) -> torch.Tensor:
    """Codes of float32 values, rounded to nearest, ties to even, saturating at 6. float32 (...) -> uint8 (...), 0 to 15.

    Infinity and NaN saturate as well, with their sign: E2M1 has no code for them, and a quantizer marks their block by
    its scale. Integer arithmetic on the float32 bits, hence the same codes on every device.
    """
    if x.dtype != torch.float32:
        raise TypeError(f"e2m1.encode takes float32 values, not {x.dtype}")
    bits = x.contiguous().view(torch.int32)
    sign = (bits >> 28) & 8
    magnitude = (bits & 0x7FFFFFFF).clamp_max_(_MAX_BITS)
    # Below 1 the codes step by halves; from 1 on a code is the exponent and the first mantissa bit.
    small = (magnitude.view(torch.float32) + _HALVES).view(torch.int32).sub_(_HALVES_BITS)
    odd = (magnitude >> 22) & 1
    large = (magnitude + odd).add_((1 << 21) - 1 - _ONE_BITS).bitwise_right_shift_(22).add_(2)
    codes = torch.where(magnitude < _ONE_BITS, small, large)
    return codes.bitwise_or_(sign).to(torch.uint8)


def decode(codes: torch.Tensor) -> torch.Tensor:
    """Values of codes. uint8 (...), 0 to 15 -> float32 (...). Code 8 is negative zero."""
    return _values(MAGNITUDES, codes.device)[codes.int()]


@cache
def _values(magnitudes: tuple[float, ...], device: torch.device) -> torch.Tensor:
    """The table of values by code. Kept, since copying it to a GPU on each call could not be captured in a CUDA graph."""
    return torch.tensor(magnitudes + tuple(-v for v in magnitudes), dtype=torch.float32, device=device)


def pack(codes: torch.Tensor) -> torch.Tensor:
    """Two codes a byte, the even-indexed one in the low nibble. uint8 (..., k) -> uint8 (..., k / 2)."""
    if codes.shape[-1] % 2:
        raise ValueError(f"cannot pack {codes.shape[-1]} codes: two go into a byte; pad k to an even size")
    return codes[..., 0::2] | (codes[..., 1::2] << 4)


def unpack(packed: torch.Tensor) -> torch.Tensor:
    """Inverse of `pack`. uint8 (..., k / 2) -> uint8 (..., k)."""
    return torch.stack((packed & 0xF, packed >> 4), dim=-1).flatten(-2)
