"""Scale bytes: E8M0 and E4M3, and the named rules that choose a block's scale.

There is no single "MXFP4 quantization": libraries differ in how they round the scale, and a comparison that does not name the
rule compares rules. Exponents are read off the bits of a float32; no log2, which is off by one near powers of two.
"""

from enum import Enum

import torch

E8M0_NAN = 0xFF  # decodes to NaN: the whole block is NaN (OCP Microscaling Formats v1.0, sections 5.4.1 and 6.3)
E4M3_NAN = 0x7F
E4M3_MAX = 448.0

_INF_BITS = 0x7F800000
_SIXTH = 1.0 / 6.0
# QuTLASS: magnitudes above 2.92247856 standard deviations of a normal distribution are cut off to E2M1's 6.
_QUEST = 2.92247856 / 6.0


class ScaleRule(Enum):
    """How a block's scale follows from its largest magnitude, amax, or spread (QUTLASS_QUEST). E2M1 ends at 6 = 1.5 * 2**2.

    The first four give an E8M0 exponent e, clamped to -127..127, and elements x / 2**e:

    FLOOR: floor(log2(amax)) - 2. OCP Microscaling Formats v1.0, section 6.3. amax / 2**e in (6, 8) saturates.
    CEIL: ceil(log2(amax)) - 2. Never saturates, wastes up to one binade.
    EVEN: FLOOR of amax rounded to two significant bits, that is FLOOR plus one from a mantissa of 1.75 on
        (torchao's EVEN; compressed-tensors' only rule). Only amax / 2**e in (6, 7) saturates.
    RCEIL: ceil(log2(amax / 6)) with amax / 6 in float32: NVIDIA's `cvt.rp.ue8m0` of cuBLAS and Transformer Engine.

    QUTLASS_ABS_MAX: e = floor(log2(amax + 1e-8)), and the codes hold 3 * x / 2**e (QuTLASS v0.2, method "abs_max"). Not OCP:
        a decoder must divide by 3, a product of two such operands by 9.
    QUTLASS_QUEST: e = floor(log2(std * (2.92247856 / 6) + 1e-8)) with the standard deviation std of the block's values about
        their mean, divided by their number (QuTLASS v0.2, method "quest"). Elements x / 2**e; the largest ones saturate.
    TWO_LEVEL: NVFP4 in the order of Transformer Engine: E4M3(amax * (S / 6)) with the tensor's encode scale S.
    """

    FLOOR = "floor"
    CEIL = "ceil"
    EVEN = "even"
    RCEIL = "rceil"
    QUTLASS_ABS_MAX = "qutlass_abs_max"
    QUTLASS_QUEST = "qutlass_quest"
    TWO_LEVEL = "two_level"

    @property
    def gain(self) -> float:
        """What the codes hold more than x / scale: 3 for QUTLASS_ABS_MAX, else 1."""
        return 3.0 if self is ScaleRule.QUTLASS_ABS_MAX else 1.0

    def __str__(self) -> str:
        return self.value


def block_extents(blocks: torch.Tensor, rule: ScaleRule) -> torch.Tensor:
    """What a rule takes a block's scale from, NaN or infinite if the block holds either. float32 (..., block) -> float32 (...).

    A standard deviation is computed in float64, the mean first, and rounded once, as in the reference of QuTLASS's tests. Its
    kernels take the mean square less the squared mean, in float32, which errs where the mean is far above the deviation.
    Where that is negative or NaN they set the scale to 1, and the code of a NaN is that of 6. Here a block that holds NaN or
    infinity is NaN, as under every other rule: it must not become numbers.
    """
    if rule is not ScaleRule.QUTLASS_QUEST:
        return blocks.abs().amax(dim=-1)
    values = blocks.double()
    return (values - values.mean(dim=-1, keepdim=True)).square().mean(dim=-1).sqrt().float()


def e8m0_encode(extent: torch.Tensor, rule: ScaleRule) -> torch.Tensor:
    """Scale bytes of blocks with these `block_extents`. float32 (...) >= 0 or NaN -> float8_e8m0fnu (...).

    A block of zeros gets byte 0 (byte 100 under QuTLASS's rules); an extent that is NaN or infinite gets `E8M0_NAN`.
    """
    bits = extent.contiguous().view(torch.int32) & 0x7FFFFFFF
    # The exponent field of a float32 is E8M0 of its floor; a subnormal has field 0, and its scale clamps to byte 0 anyway.
    if rule is ScaleRule.FLOOR:
        byte = (bits >> 23) - 2
    elif rule is ScaleRule.CEIL:
        byte = ((bits + 0x7FFFFF) >> 23) - 2
    elif rule is ScaleRule.EVEN:
        byte = ((bits + (1 << 21)) >> 23) - 2
    elif rule is ScaleRule.RCEIL:
        byte = _exponent_rounded_up((extent * _SIXTH).view(torch.int32))
    elif rule is ScaleRule.QUTLASS_ABS_MAX:
        byte = (extent + 1e-8).view(torch.int32) >> 23
    elif rule is ScaleRule.QUTLASS_QUEST:
        # QuTLASS's order: in float64, rounded once.
        byte = (extent.double() * _QUEST + 1e-8).float().view(torch.int32) >> 23
    else:
        raise ValueError(f"scale rule {rule} gives no E8M0 scale")
    byte = torch.where(bits < _INF_BITS, byte.clamp(0, 254), E8M0_NAN)
    return byte.to(torch.uint8).view(torch.float8_e8m0fnu)


def _exponent_rounded_up(bits: torch.Tensor) -> torch.Tensor:
    """E8M0 byte of the next power of two at or above a float32, given by its bits."""
    # A float32 subnormal is mantissa * 2**-149: up to 2**-127 (mantissa 0x400000) is byte 0, above it byte 1.
    mantissa_above = torch.where(bits < 0x800000, bits > 0x400000, (bits & 0x7FFFFF) > 0)
    return (bits >> 23) + mantissa_above.int()


def e8m0_decode(scales: torch.Tensor) -> torch.Tensor:
    """Values of E8M0 scales: 2**(byte - 127), NaN for byte 255. float8_e8m0fnu or uint8 (...) -> float32 (...)."""
    byte = scales.view(torch.uint8).int()
    bits = torch.where(byte == 0, 0x400000, byte << 23)  # 2**-127 is a float32 subnormal
    return torch.where(byte == E8M0_NAN, 0x7FC00000, bits).view(torch.float32)


def e8m0_decode_inverse(scales: torch.Tensor) -> torch.Tensor:
    """1 / value of E8M0 scales, exactly: 2**(127 - byte), and 2**-127 for byte 255. (...) -> float32 (...)."""
    return e8m0_decode((254 - scales.view(torch.uint8).int()).clamp_min_(0).to(torch.uint8))


def e4m3_encode(x: torch.Tensor) -> torch.Tensor:
    """E4M3 of float32 values, to nearest, ties to even, saturating at 448; NaN stays NaN. (...) -> float8_e4m3fn (...).

    Clamped before the cast: beyond 448 the casts of torch's devices and versions disagree (448 or NaN).
    """
    return x.clamp(-E4M3_MAX, E4M3_MAX).to(torch.float8_e4m3fn)


def e4m3_decode(scales: torch.Tensor) -> torch.Tensor:
    """Values of E4M3 scales. float8_e4m3fn or uint8 (...) -> float32 (...)."""
    return scales.view(torch.float8_e4m3fn).float()
