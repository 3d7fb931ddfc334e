"""MXFP4 and NVFP4 quantization a second time: numpy and ml_dtypes, written from the formulas, nothing of fp4bench.

ml_dtypes rounds to nearest even in C++ of its own. Its float4_e2m1fn saturates (infinity to 6) and turns NaN into code 8; its
float8_e4m3fn gives NaN from 465 on, so values are clamped to 448 first. Exponents come from frexp, never from a logarithm.
"""

import ml_dtypes
import numpy as np

FLOAT32_MAX = np.finfo(np.float32).max
SIXTH = np.float32(1) / np.float32(6)


def e2m1(x: np.ndarray) -> np.ndarray:
    """Codes of float32 values, saturating. -> uint8, 0 to 15."""
    return x.astype(ml_dtypes.float4_e2m1fn).view(np.uint8)


def e2m1_values(codes: np.ndarray) -> np.ndarray:
    return codes.view(ml_dtypes.float4_e2m1fn).astype(np.float32)


def e4m3(x: np.ndarray) -> np.ndarray:
    """E4M3 bytes of float32 values, saturating at 448."""
    return np.clip(x, -448, 448).astype(ml_dtypes.float8_e4m3fn).view(np.uint8)


def extents(blocks: np.ndarray, rule: str) -> np.ndarray:
    """What a rule takes scales from. float32 (..., size) -> float32 (...).

    QuTLASS's quest: the standard deviation, whose square is half the mean squared difference of all pairs.
    """
    if rule != "qutlass_quest":
        return np.abs(blocks).max(axis=-1)
    size = blocks.shape[-1]
    with np.errstate(invalid="ignore"):
        values = blocks.astype(np.float64)
        squares = sum(((values - np.roll(values, shift, axis=-1)) ** 2).sum(axis=-1) for shift in range(1, size))
        return np.sqrt(squares / (2 * size**2)).astype(np.float32)


def e8m0(amax: np.ndarray, rule: str) -> np.ndarray:
    """Scale bytes of blocks with these largest magnitudes (quest: standard deviations). float32 -> uint8."""
    with np.errstate(invalid="ignore"):
        mantissa, exponent = np.frexp(amax)  # amax = mantissa * 2**exponent, mantissa in [0.5, 1)
        if rule == "floor":
            e = exponent - 1 - 2
        elif rule == "ceil":
            e = exponent - 1 - 2 + (mantissa > 0.5)
        elif rule == "even":
            e = exponent - 1 - 2 + (2 * mantissa >= 1.75)
        elif rule == "rceil":
            sixth = amax * SIXTH
            mantissa, exponent = np.frexp(sixth)
            e = np.where(sixth > 0, exponent - 1 + (mantissa > 0.5), -127)  # a sixth of 2**-149 is 0
        elif rule == "qutlass_abs_max":
            e = np.frexp(amax + np.float32(1e-8))[1] - 1
        elif rule == "qutlass_quest":
            e = np.frexp((amax.astype(np.float64) * (2.92247856 / 6) + 1e-8).astype(np.float32))[1] - 1
        else:
            raise ValueError(rule)
    e = np.clip(e, -127, 127)
    if not rule.startswith("qutlass"):
        e = np.where(amax == 0, -127, e)
    return np.where(np.isfinite(amax), e + 127, 255).astype(np.uint8)


def mxfp4(x: np.ndarray, rule: str) -> tuple[np.ndarray, np.ndarray]:
    """float32 (rows, k) -> codes uint8 (rows, k), scale bytes uint8 (rows, k / 32)."""
    blocks = x.reshape(len(x), -1, 32)
    scales = e8m0(extents(blocks, rule), rule)
    with np.errstate(invalid="ignore", over="ignore", under="ignore"):
        elements = np.ldexp(blocks, 127 - scales.astype(np.int32)[..., None])
        if rule == "qutlass_abs_max":
            elements = elements * np.float32(3)
        return e2m1(elements).reshape(x.shape), scales


def nvfp4(
    x: np.ndarray, encode_scale: float | None = None, scale_floor: float = 0.0
) -> tuple[np.ndarray, np.ndarray, np.float32]:
    """Transformer Engine's order in float32. (rows, k) -> codes uint8 (rows, k), scales uint8 (rows, k / 16), encode scale."""
    blocks = x.reshape(len(x), -1, 16)
    amax = np.abs(blocks).max(axis=-1)
    with np.errstate(all="ignore"):
        if encode_scale is None:
            tensor_amax = amax.max(initial=0)
            usable = np.isfinite(tensor_amax) and tensor_amax > 0
            encode_scale = min(np.float32(2688) / tensor_amax, FLOAT32_MAX) if usable else 1
        s = np.float32(encode_scale)
        scales = e4m3(np.maximum(amax * (s * SIXTH), np.float32(scale_floor)))
        scales[~np.isfinite(amax)] = 0x7F
        decoded = scales.view(ml_dtypes.float8_e4m3fn).astype(np.float32)
        inverse = np.minimum(np.float32(1) / (decoded * (np.float32(1) / s)), FLOAT32_MAX)
        return e2m1(blocks * inverse[..., None]).reshape(x.shape), scales, s


def pack(codes: np.ndarray) -> np.ndarray:
    """Element 2j in bits 0 to 3 of byte j, element 2j + 1 in bits 4 to 7."""
    return codes[..., 0::2] + 16 * codes[..., 1::2]


def finite_blocks(x: np.ndarray, size: int) -> np.ndarray:
    """Which elements lie in a block without NaN or infinity: the codes of the others mean nothing. -> bool, as x."""
    return np.repeat(np.isfinite(x.reshape(len(x), -1, size)).all(axis=-1), size, axis=-1)
