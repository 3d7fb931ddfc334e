"""Numbers to scales and codes, and back, on float32: what the quantizing kernels compute of each block and each value.

The roundings are those of `fp4bench.formats` and `fp4bench.quantize`, in their order. Kernels are compiled without contraction
of products and sums (enable_fp_fusion=False): each fma here is written out, and its product is exact or its one rounding meant.
"""

import torch
import triton
import triton.language as tl

from fp4bench.kernels.runs import pairs

# float32: 1.5 * 2**22 has a unit of 1/2 in its last place. Added to |v| < 2 it rounds to halves, ties to even; times a power of
# two to halves of that.
_HALVES: tl.constexpr = tl.constexpr(6291456.0)
_CODE_BIAS: tl.constexpr = tl.constexpr((22 << 23) + 0x400000 + 254)
_SIGN: tl.constexpr = tl.constexpr(-0x80000000)
INF: tl.constexpr = tl.constexpr(0x7F800000)
_FLOAT_MAX: tl.constexpr = tl.constexpr(torch.finfo(torch.float32).max)
FLOAT_TINY: tl.constexpr = tl.constexpr(torch.finfo(torch.float32).tiny)


@triton.jit
def power_of_two(largest, RULE: tl.constexpr):  # type: ignore[no-untyped-def]
    """`scales.e8m0_encode` and `e8m0_decode_inverse`. float32 -> int32 scale bytes, and what elements are multiplied by."""
    bits = largest.to(tl.int32, bitcast=True)
    if RULE == "floor":
        byte = (bits >> 23) - 2
    elif RULE == "ceil":
        byte = ((bits + 0x7FFFFF) >> 23) - 2
    elif RULE == "even":
        byte = ((bits + (1 << 21)) >> 23) - 2
    elif RULE == "rceil":
        sixth = (largest * (1.0 / 6.0)).to(tl.int32, bitcast=True)
        # A subnormal is mantissa * 2**-149: up to 2**-127 (mantissa 0x400000) it is byte 0, above it byte 1.
        byte = tl.where(sixth < 0x800000, tl.where(sixth > 0x400000, 1, 0), (sixth + 0x7FFFFF) >> 23)
    else:
        tl.static_assert(RULE == "qutlass_abs_max")
        byte = (largest + 1e-8).to(tl.int32, bitcast=True) >> 23
    byte = tl.where(bits < INF, tl.minimum(tl.maximum(byte, 0), 254), 255)
    # 2**-127 is a subnormal number.
    inverse = tl.where(byte < 254, (254 - byte) << 23, 0x400000).to(tl.float32, bitcast=True)
    return byte, inverse


@triton.jit
def two_level(largest, s):  # type: ignore[no-untyped-def]
    """NVFP4's block scales under the encode scale s. float32 -> int32 scale bytes, and what elements are multiplied by."""
    wanted = tl.minimum(largest * (s * (1.0 / 6.0)), 448.0)
    scale = wanted.to(tl.float8e4nv)
    multiplier = tl.minimum(tl.div_rn(1.0, scale.to(tl.float32) * tl.div_rn(1.0, s)), _FLOAT_MAX)
    finite = largest.to(tl.int32, bitcast=True) < INF
    return tl.where(finite, scale.to(tl.uint8, bitcast=True).to(tl.int32), 0x7F), multiplier


@triton.jit
def encode_scale(source, parts, GIVEN: tl.constexpr):  # type: ignore[no-untyped-def]
    """NVFP4's encode scale: the given one, or 2688 over the largest magnitude, 1 where that is 0 or not finite."""
    if GIVEN == "number":
        s = source
    elif GIVEN == "tensor":
        s = tl.load(source)
    else:
        part = tl.arange(0, 1024)
        s = encode_scale_of(tl.max(tl.load(source + part, mask=part < parts, other=0), axis=0))
    return s


@triton.jit
def encode_scale_of(bits):  # type: ignore[no-untyped-def]
    """NVFP4's encode scale of a tensor, by the bits of its largest magnitude. int32 -> float32."""
    s = tl.minimum(tl.div_rn(2688.0, bits.to(tl.float32, bitcast=True)), _FLOAT_MAX)
    return tl.where((bits > 0) & (bits < INF), s, 1.0)


@triton.jit
def scale_value(byte, GIVEN: tl.constexpr):  # type: ignore[no-untyped-def]
    """Values of scale bytes. int32 -> float32."""
    if GIVEN != "none":
        value = byte.to(tl.uint8).to(tl.float8e4nv, bitcast=True).to(tl.float32)
    else:
        bits = tl.where(byte == 0, 0x400000, byte << 23)
        value = tl.where(byte == 255, 0x7FC00000, bits).to(tl.float32, bitcast=True)
    return value


@triton.jit
def _clamped(v):  # type: ignore[no-untyped-def]
    """|v| up to 6, and the power of two that its code steps by halves of: the exponent of |v|, at least 1."""
    magnitude = tl.minimum(tl.abs(v), 6.0)
    return magnitude, tl.maximum(magnitude.to(tl.int32, bitcast=True) & 0x7F800000, 0x3F800000)


@triton.jit
def _biased_codes(v):  # type: ignore[no-untyped-def]
    """E2M1 codes of float32 values as `e2m1.encode` rounds them, plus _CODE_BIAS. float32 -> int32.

    With the power of two p a sum p * 1.5 * 2**22 + |v| ends in the number of halves of p, rounded to even; a code is that plus
    twice the exponent of p. A negative v gets 4 p, which is 8 halves, more: the sign bit.
    """
    magnitude, p = _clamped(v)
    two = ((v.to(tl.int32, bitcast=True) & _SIGN) | 0x40000000).to(tl.float32, bitcast=True)
    total = tl.fma(p.to(tl.float32, bitcast=True), (_HALVES + 2.0) - two, magnitude)
    return total.to(tl.int32, bitcast=True) - (p >> 22) * ((1 << 22) - 1)


@triton.jit
def rounded(v):  # type: ignore[no-untyped-def]
    """Values of the E2M1 codes of v. float32 -> float32."""
    magnitude, p = _clamped(v)
    p = p.to(tl.float32, bitcast=True)
    bits = tl.fma(p, -_HALVES, tl.fma(p, _HALVES, magnitude)).to(tl.int32, bitcast=True)
    return (bits | (v.to(tl.int32, bitcast=True) & _SIGN)).to(tl.float32, bitcast=True)


@triton.jit
def packed(even, odd, HAS_CVT: tl.constexpr):  # type: ignore[no-untyped-def]
    """Eight codes a word, the first in the lowest bits. float32 (N, W / 2), twice -> int32 (N, W / 8)."""
    if HAS_CVT:
        pair = tl.inline_asm_elementwise(
            "{ .reg .b8 pair; cvt.rn.satfinite.e2m1x2.f32 pair, $2, $1; cvt.u32.u8 $0, pair; }",
            "=r,f,f",
            [even, odd],
            dtype=tl.int32,
            is_pure=True,
            pack=1,
        )
    else:
        pair = _biased_codes(even) + 16 * _biased_codes(odd)
    a, b = pairs(pair)
    a, b = pairs(a + 256 * b)
    words = a + 65536 * b
    if not HAS_CVT:
        # Eight biases, modulo 2**32.
        words = words - ((_CODE_BIAS * 0x11111111 + 0x80000000) % (1 << 32) - 0x80000000)
    return words
