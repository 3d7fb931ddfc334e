"""The shared bitwise contract: named FP4 blocks and the bytes they must become, typed by hand.

Every implementation (eager, Triton, a vendor's) runs the same tables, compared as bytes. Nothing of fp4bench is imported: a
table is never checked against itself. An implementation is an `Implementation` of three callables over tensors of one device;
the `check_*` functions raise AssertionError with the first byte that is wrong.

E2M1, code by code: 0: 0, 1: 0.5, 2: 1, 3: 1.5, 4: 2, 5: 3, 6: 4, 7: 6; codes 8 to f are the negatives. Its midpoints are 0.25,
0.75, 1.25, 1.75, 2.5, 3.5 and 5. E8M0: byte b is 2**(b - 127), byte 255 NaN. E4M3: 1.0 is 0x38, 448 is 0x7e, 0x7f NaN.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import groupby
from math import inf, nan
from typing import NamedTuple

import torch

BLOCK_SIZE = {"mxfp4": 32, "nvfp4": 16}
NAN_SCALE = {"mxfp4": 0xFF, "nvfp4": 0x7F}
MX_RULES = ("floor", "ceil", "even", "rceil", "qutlass_abs_max", "qutlass_quest")

FLOAT32_MAX = (2 - 2**-23) * 2.0**127
FLOAT32_TINY = 2.0**-149  # the smallest subnormal


class Bytes(NamedTuple):
    """What a quantizer makes of x (rows, k)."""

    codes: torch.Tensor  # uint8 (rows, k / 2), the even code in the low nibble
    scales: torch.Tensor  # uint8 (rows, k / block size), row-major
    tensor_scale: float | None  # NVFP4's encode scale S: a value is code * scale / S


@dataclass(frozen=True)
class Implementation:
    """quantize(x, format, rule, tensor_scale), dequantize(bytes, format, rule) -> float32, to_blocked(scale bytes)."""

    quantize: Callable[[torch.Tensor, str, str, float | None], Bytes]
    dequantize: Callable[[Bytes, str, str], torch.Tensor]
    to_blocked: Callable[[torch.Tensor], torch.Tensor]


@dataclass(frozen=True)
class Block:
    """One block: `values`, then `filler` to its end. `codes` has a hex digit a value, in order; None: they mean nothing."""

    name: str
    format: str
    rule: str
    values: tuple[float, ...]
    scale: int
    codes: str | None
    filler: tuple[float, str] = (0.0, "0")  # value and code
    dtype: torch.dtype = torch.float32
    tensor_scale: float | None = None

    def __str__(self) -> str:
        return "-".join((self.format, self.rule, self.name, str(self.dtype).removeprefix("torch.")))

    def tensor(self, device: torch.device | str = "cpu") -> torch.Tensor:
        """The block as one row. -> dtype (1, block size)."""
        rest = BLOCK_SIZE[self.format] - len(self.values)
        return torch.tensor([self.values + (self.filler[0],) * rest], dtype=self.dtype, device=device)

    def packed(self) -> list[int] | None:
        """The block's code bytes: the first code of each pair in the low nibble."""
        if self.codes is None:
            return None
        digits = [int(digit, 16) for digit in self.codes.replace(" ", "")]
        assert len(digits) == len(self.values), f"{self}: {len(digits)} codes for {len(self.values)} values"
        digits += [int(self.filler[1], 16)] * (BLOCK_SIZE[self.format] - len(digits))
        return [even + 16 * odd for even, odd in zip(digits[0::2], digits[1::2], strict=True)]


# --- MXFP4 ------------------------------------------------------------------------------------------------------------------

# A scale byte and the codes that go with it.
Outcome = tuple[int, str | None]


def _mx(
    name: str,
    values: tuple[float, ...],
    *,
    floor: Outcome | None = None,
    ceil: Outcome | None = None,
    even: Outcome | None = None,
    rceil: Outcome | None = None,
    abs_max: Outcome | None = None,
    quest: Outcome | None = None,
    filler: tuple[float, str] = (0.0, "0"),
    dtype: torch.dtype = torch.float32,
) -> list[Block]:
    """One block under each rule that an outcome is stated for."""
    outcomes = zip(MX_RULES, (floor, ceil, even, rceil, abs_max, quest), strict=True)
    return [Block(name, "mxfp4", rule, values, *outcome, filler, dtype) for rule, outcome in outcomes if outcome]


def _ties(name: str, unit: float, byte: int, dtype: torch.dtype) -> list[Block]:
    """All seven midpoints times `unit`, both signs, with the scale `unit` = 2**(byte - 127)."""
    ties = tuple(unit * v for v in (0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0, -0.25, -0.75, -1.25, -1.75, -2.5, -3.5, -5.0))
    # Each goes to the even code: 0, 1, 1, 2, 2, 4, 4. amax is 5 units: floor(log2 5) - 2 = 0, mantissa 1.25, 5 / 6 < 1.
    to_even = (byte, "0224466 8aaccee")
    # CEIL leaves at most 4 units to the largest element: 4 instead of 5, which no rounding touches.
    below_4 = tuple(4.0 * unit if v == 5 * unit else -4.0 * unit if v == -5 * unit else v for v in ties)
    return _mx(name, ties, floor=to_even, even=to_even, rceil=to_even, dtype=dtype) + _mx(
        name, below_4, ceil=to_even, dtype=dtype
    )


def _amax_at(k: int) -> list[Block]:
    """Largest magnitudes 4, 6 and 7 times 2**k: where the rules part. Bytes less 127 are the exponents e.

    abs_max only from 2**-3 on, where its 1e-8 is lost in the rounding of amax.
    """
    unit, b = 2.0**k, k + 127
    return [
        # 4 = 1.0 * 2**2: every OCP rule has e = 0 and the code of 4. abs_max: e = 2, 3 * 4 / 2**2 = 3.
        *_mx(
            f"amax_at_4_times_2**{k}",
            (4 * unit, -unit),
            floor=(b, "6a"),
            ceil=(b, "6a"),
            even=(b, "6a"),
            rceil=(b, "6a"),
            abs_max=(b + 2, "5a") if k > -4 else None,  # -unit: 3 / 4 is a tie, to 1
        ),
        # 6 = 1.5 * 2**2: CEIL goes up, 6 / 2 = 3. 6 / 6 = 1 exactly: RCEIL does not. abs_max: 3 * 6 / 4 = 4.5, to 4.
        *_mx(
            f"amax_at_6_times_2**{k}",
            (6 * unit, -unit),
            floor=(b, "7a"),
            ceil=(b + 1, "59"),
            even=(b, "7a"),
            rceil=(b, "7a"),
            abs_max=(b + 2, "6a") if k > -4 else None,
        ),
        # 7 = 1.75 * 2**2: FLOOR saturates, 7 to 6. EVEN goes up from a mantissa of 1.75 on, RCEIL as 7 / 6 > 1: 7 / 2 = 3.5 is
        # a tie, to 4. abs_max: 3 * 7 / 4 = 5.25, to 6.
        *_mx(
            f"amax_at_7_times_2**{k}",
            (7 * unit, -unit),
            floor=(b, "7a"),
            ceil=(b + 1, "69"),
            even=(b + 1, "69"),
            rceil=(b + 1, "69"),
            abs_max=(b + 2, "7a") if k > -4 else None,
        ),
    ]


def _every_ocp_rule(outcome: Outcome) -> dict[str, Outcome]:
    return {"floor": outcome, "ceil": outcome, "even": outcome, "rceil": outcome}


TIES_AND_6 = (0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0, 6.0, -0.25, -0.75, -1.25, -1.75, -2.5, -3.5, -5.0, -6.0)
EIGHT_AND_THEIR_NEGATIVES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0)

MXFP4_BLOCKS = [
    *_mx(
        "every_code_once",
        EIGHT_AND_THEIR_NEGATIVES,
        floor=(127, "01234567 89abcdef"),
        ceil=(128, "00122345 889aabcd"),  # halved: 0, 0.25 (tie), 0.5, 0.75 (tie), 1, 1.5, 2, 3
        even=(127, "01234567 89abcdef"),
        rceil=(127, "01234567 89abcdef"),
        abs_max=(129, "01223456 89aabcde"),  # 3/4 of each: 0, 0.375, 0.75 (tie), 1.125, 1.5, 2.25, 3, 4.5
        quest=(127, "01234567 89abcdef"),  # the squares add up to 137: std is sqrt(137 / 32) = 2.069, times 0.48708 is 1.008
    ),
    # Low nibble first: the byte is 0x71, not 0x17.
    *_mx("nibble_order", (0.5, 6.0), floor=(127, "17"), ceil=(128, "05"), even=(127, "17"), rceil=(127, "17")),
    *_ties("ties", 1.0, 127, torch.bfloat16),
    *_ties("ties", 1.0, 127, torch.float16),
    *_ties("ties", 1.0, 127, torch.float32),
    *_ties("ties_times_2**-40", 2.0**-40, 87, torch.bfloat16),
    *_ties("ties_times_2**50", 2.0**50, 177, torch.bfloat16),
    # 3 * 0.25 = 0.75 is the only tie of abs_max: the others over 3 are no binary fractions. e = 0, and 3 * 1 = 3.
    *_mx("tie", (0.25, -0.25, 1.0), abs_max=(127, "2a5"), dtype=torch.bfloat16),
    # One float32 ulp below and above each midpoint.
    *_mx(
        "beside_the_ties",
        (
            *(0.25 - 2**-26, 0.25 + 2**-25, 0.75 - 2**-24, 0.75 + 2**-24, 1.25 - 2**-23, 1.25 + 2**-23, 1.75 - 2**-23),
            *(1.75 + 2**-23, 2.5 - 2**-22, 2.5 + 2**-22, 3.5 - 2**-22, 3.5 + 2**-22, 5 - 2**-21, 5 + 2**-21),
        ),
        floor=(127, "0112233 4455667"),
        even=(127, "0112233 4455667"),
        rceil=(127, "0112233 4455667"),
    ),
    *(block for k in (-100, -3, 0, 1, 100) for block in _amax_at(k)),
    # Between 6 and 8 times the scale FLOOR saturates; it must not wrap to 0. EVEN: 6.5 has mantissa 1.625, below 1.75.
    *_mx("saturates", (6.5, 7.0, 7.75, -6.5, -7.0, -7.75), floor=(127, "777fff"), dtype=torch.bfloat16),
    *_mx("saturates_below_7", (6.5, -6.5, 6.96875), floor=(127, "7f7"), even=(127, "7f7"), dtype=torch.bfloat16),
    # The largest magnitude belongs to a negative element, or to the last one.
    *_mx("amax_is_negative", (1.0, -6.0), floor=(127, "2f"), ceil=(128, "1d"), even=(127, "2f"), rceil=(127, "2f")),
    *_mx("amax_is_last", (*(0.0,) * 31, 6.0), floor=(127, "0" * 31 + "7"), ceil=(128, "0" * 31 + "5")),
    # No zeros at all: every element has its own place to go wrong.
    *_mx("no_zeros", (6.0,), floor=(127, "7"), even=(127, "7"), rceil=(127, "7"), filler=(-3.0, "d")),
    *_mx("no_zeros", (6.0,), ceil=(128, "5"), filler=(-3.0, "b")),
    # Zeros: byte 0, and codes that decode to 0. abs_max: floor(log2(0 + 1e-8)) = -27, byte 100.
    *_mx("zeros", (), **_every_ocp_rule((0, "")), abs_max=(100, ""), quest=(100, "")),
    *_mx("zeros", (), **_every_ocp_rule((0, "")), abs_max=(100, ""), quest=(100, ""), dtype=torch.bfloat16),
    *_mx("negative_zeros", (), **_every_ocp_rule((0, "")), abs_max=(100, ""), quest=(100, ""), filler=(-0.0, "8")),
    # A zero among others stays code 0 (some codebooks have no zero); -0 and what rounds to it keep their sign.
    *_mx(
        "zero_among_others",
        (6.0, 0.0, -0.0, 0.125, -0.125, 2.0**-120, -(2.0**-120)),
        floor=(127, "7080808"),
        ceil=(128, "5080808"),
        even=(127, "7080808"),
        rceil=(127, "7080808"),
        abs_max=(129, "6080808"),
        quest=(126, "7080808"),  # std is 1.044: 12 saturates, and 0.25 is a tie, to 0
    ),
    # NaN and infinity: scale NaN, whatever the other elements are.
    *(
        block
        for name, values in {
            "one_nan": (1.0, nan, -6.0),
            "infinity": (1.0, inf, -6.0),
            "negative_infinity": (1.0, -inf, -6.0),
            "nan_and_infinity": (inf, nan, -inf),
            "nan_among_zeros": (nan,),
        }.items()
        for dtype in (torch.float32, torch.bfloat16, torch.float16)
        for block in _mx(name, values, **_every_ocp_rule((255, None)), abs_max=(255, None), quest=(255, None), dtype=dtype)
    ),
    # float32 subnormals: e = -129 clamps to -127, byte 0. In units of 2**-127: 1, 0.5, 0.25 (tie, to 0), 0.75 (tie, to 1).
    *_mx(
        "subnormal_amax",
        (2.0**-127, 2.0**-128, 2.0**-129, 3 * 2.0**-129, FLOAT32_TINY, -FLOAT32_TINY, -(2.0**-127)),
        **_every_ocp_rule((0, "210208a")),
        abs_max=(100, "0000088"),
        quest=(100, "0000088"),
    ),
    *_mx("subnormal_amax", (2.0**-127, -(2.0**-128)), **_every_ocp_rule((0, "29")), dtype=torch.bfloat16),
    *_mx(
        "smallest_subnormal",
        (FLOAT32_TINY, -FLOAT32_TINY),
        **_every_ocp_rule((0, "08")),
        abs_max=(100, "08"),
        quest=(100, "08"),
    ),
    # The last scale before the clamp: 2**-124 is 4 * 2**-126, byte 1; one ulp below it FLOOR has byte 0 and saturates.
    *_mx("amax_2**-124", (2.0**-124,), **_every_ocp_rule((1, "6"))),
    *_mx("amax_below_2**-124", (2.0**-124 - 2.0**-148,), floor=(0, "7"), ceil=(1, "6"), even=(1, "6"), rceil=(1, "6")),
    *_mx("amax_6_times_2**-127", (6 * 2.0**-127,), floor=(0, "7"), ceil=(1, "5"), even=(0, "7"), rceil=(0, "7")),
    # The top: FLT_MAX is just below 8 * 2**125. FLOOR e = 125 saturates; the others e = 126, just below 4, to 4.
    *_mx(
        "largest_float32",
        (FLOAT32_MAX, -FLOAT32_MAX, 2.0**125),
        floor=(252, "7f2"),
        ceil=(253, "6e1"),
        even=(253, "6e1"),
        rceil=(253, "6e1"),
        abs_max=(254, "7f2"),  # e = 127: 3 * 2 = 6, and 3 / 4 is a tie, to 1
        quest=(251, "7f4"),  # std is 1.004 * 2**126, whose square is no float32, times 0.48708 is 1.96 * 2**124
    ),
    # float16: its largest, 65504 = 7.996 * 2**13, and subnormals, which are ordinary numbers for E8M0: 6 * 2**-24.
    *_mx(
        "largest_float16", (65504.0,), floor=(140, "7"), ceil=(141, "6"), even=(141, "6"), rceil=(141, "6"), dtype=torch.float16
    ),
    *_mx(
        "subnormal_float16",
        (6 * 2.0**-24, 2.0**-24),
        floor=(103, "72"),
        ceil=(104, "51"),
        even=(103, "72"),
        rceil=(103, "72"),
        dtype=torch.float16,
    ),
    # abs_max adds 1e-8 before the logarithm. 2**-27 + 1e-8 = 1.745e-8 lies in [2**-26, 2**-25): byte 101, and the code of
    # 3 * 2**-27 / 2**-26 = 1.5.
    *_mx("amax_like_1e-8", (2.0**-27, -(2.0**-28)), abs_max=(101, "3a")),  # 0.75 is a tie, to 1
    *_mx("amax_far_below_1e-8", (2.0**-60,), abs_max=(100, "0")),
    *_mx("thirds", (1.0, 1.5, 1.75, 0.5), abs_max=(127, "5673")),  # 3, 4.5 to 4, 5.25 to 6, 1.5
    # quest: e = floor(log2(std * 0.48708 + 1e-8)). The squares of the midpoints and of 6, both signs, add up to 169.5: std is
    # sqrt(169.5 / 32) = 2.30, times 0.48708 is 1.12.
    *(
        block
        for dtype in (torch.float32, torch.bfloat16, torch.float16)
        for block in _mx("ties_and_6", TIES_AND_6, quest=(127, "02244667 8aacceef"), dtype=dtype)
    ),
    *_mx("ties_and_6_times_2**50", tuple(v * 2.0**50 for v in TIES_AND_6), quest=(177, "02244667 8aacceef")),
    *_mx("nibble_order", (0.5, 6.0), quest=(126, "27")),  # squares 36.25, sum 6.5: std 1.045, times 0.48708 is 0.509
    *_mx("halves_of_6", (6.0, -6.0) * 16, quest=(128, "5d" * 16)),  # std 6, times 0.48708 is 2.92: 6 / 2
    *_mx("far_from_the_rest", (6.0,), quest=(126, "7")),  # std 6 * sqrt(31) / 32 = 1.044: 12 saturates
    # About the mean: std is 2, where the root of the mean square is 3.6 and leads to 127. 0.974: 10 saturates, 2.
    *_mx("mean_of_3", (5.0, 1.0) * 16, quest=(126, "74" * 16), dtype=torch.bfloat16),
    # Squares of 4097 need 25 bits: float32's mean square less the squared mean is off by more than the variance, 1.
    *_mx("mean_of_4096", (4097.0, 4095.0) * 16, quest=(125, "77" * 16)),
    *_mx("mean_of_-4096", (-4097.0, -4095.0) * 16, quest=(125, "ff" * 16), dtype=torch.float32),
    *_mx("constant", (), quest=(100, ""), filler=(3.0, "7")),  # std 0, as of zeros: everything saturates
    *_mx("constant_of_24_bits", (), quest=(100, ""), filler=(1.0 + 2**-23, "7")),
    # 2**-26 * 0.48708 + 1e-8 = 1.73e-8 lies in [2**-26, 2**-25); without 1e-8 e would be -28.
    *_mx("std_like_1e-8", (2.0**-26, -(2.0**-26)) * 16, quest=(101, "2a" * 16)),
    *_mx("std_far_below_1e-8", (2.0**-60, -(2.0**-60)) * 16, quest=(100, "08" * 16)),
    *_mx("largest_float32_all", (FLOAT32_MAX, -FLOAT32_MAX) * 16, quest=(253, "6e" * 16)),  # std 2**128, 1.95 * 2**126
]

# amax = m * 2**k one ulp below, at, and one ulp above; for each the scale byte less k + 127, and the code of amax.
#   FLOOR e = floor(log2(amax)) - 2; CEIL rounds up; EVEN adds 1 from 1.75 * 2**j on; RCEIL: the least e with amax <= 6 * 2**e.
#   abs_max e = floor(log2(amax)), code of 3 * amax / 2**e.
#   quest: amax is the magnitude of every value, half of each sign, and so std. e = floor(log2(0.48707976 * amax)); its inverse,
#   2.05305184, lies between the last two of three float32 neighbours.
ULP_SWEEP = {
    "floor": {
        4: ((-1, 7), (0, 6), (0, 6)),  # below: 7.99 units of 2**(k - 1), saturates; then 4
        6: ((0, 7), (0, 7), (0, 7)),
        7: ((0, 7), (0, 7), (0, 7)),
    },
    "ceil": {
        4: ((0, 6), (0, 6), (1, 4)),  # 4, 4, then 2
        6: ((1, 5), (1, 5), (1, 5)),  # 3
        7: ((1, 5), (1, 6), (1, 6)),  # 3.5 is the midpoint: below to 3, at (tie) and above to 4
    },
    "even": {
        4: ((0, 6), (0, 6), (0, 6)),  # below: mantissa 1.99, goes up
        6: ((0, 7), (0, 7), (0, 7)),
        7: ((0, 7), (1, 6), (1, 6)),
    },
    "rceil": {
        4: ((0, 6), (0, 6), (0, 6)),
        6: ((0, 7), (0, 7), (1, 5)),
        7: ((1, 5), (1, 6), (1, 6)),
    },
    "qutlass_abs_max": {
        4: ((1, 7), (2, 5), (2, 5)),  # 3 * 1.99 = 5.99, then 3
        6: ((2, 6), (2, 6), (2, 6)),  # 4.5
        7: ((2, 7), (2, 7), (2, 7)),  # 5.25
    },
    "qutlass_quest": {
        2.053051710128784: ((-1, 6), (-1, 6), (0, 4)),  # 4.106, 4.106, 2.053
    },
}


class Sweep(NamedTuple):
    # float32 (rows, 32): amax in a place and with a sign that change from row to row, zeros elsewhere; quest: everywhere
    values: torch.Tensor
    scales: torch.Tensor  # uint8 (rows, 1)
    codes: torch.Tensor  # uint8 (rows, 16), packed


def ulp_sweep(rule: str, device: torch.device | str = "cpu") -> Sweep:
    """One block for each row of `ULP_SWEEP[rule]` and each k from -100 to 100 (QuTLASS: from 0, where 1e-8 decides nothing)."""
    rows = [
        (m * 2.0**k, side, k + 127 + shift, code)
        for k in range(0 if rule.startswith("qutlass") else -100, 101)
        for m, sides in ULP_SWEEP[rule].items()
        for side, (shift, code) in zip((-1, 0, 1), sides, strict=True)
    ]
    centres = torch.tensor([row[0] for row in rows], dtype=torch.float32)
    amax = (centres.view(torch.int32) + torch.tensor([row[1] for row in rows], dtype=torch.int32)).view(torch.float32)
    values = torch.zeros(len(rows), 32)
    codes = torch.zeros(len(rows), 16, dtype=torch.uint8)
    for i, (_, _, _, code) in enumerate(rows):
        if rule == "qutlass_quest":
            values[i] = amax[i] * torch.tensor([1.0, -1.0]).repeat(16)
            codes[i] = code + 16 * (code + 8)
            continue
        at, negative = i % 32, i % 2
        values[i, at] = -amax[i] if negative else amax[i]
        codes[i, at // 2] = (code + 8 * negative) << 4 * (at % 2)
    scales = torch.tensor([[row[2]] for row in rows], dtype=torch.uint8)
    return Sweep(values.to(device), scales.to(device), codes.to(device))


# --- NVFP4 ------------------------------------------------------------------------------------------------------------------


def _nv(
    name: str,
    values: tuple[float, ...],
    scale: int,
    codes: str | None,
    s: float | None,
    *,
    filler: tuple[float, str] = (0.0, "0"),
    dtypes: tuple[torch.dtype, ...] = (torch.float32,),
) -> list[Block]:
    return [Block(name, "nvfp4", "two_level", values, scale, codes, filler, dtype, s) for dtype in dtypes]


_ALL_DTYPES = (torch.float32, torch.bfloat16, torch.float16)

# Encode scale S: block scale E4M3(amax * (S / 6)), codes E2M1(x * (1 / (scale * (1 / S)))). E4M3 steps by 1/8 from 1 to 2.
NVFP4_BLOCKS = [
    # S = 1, amax 6: 6 * (1 / 6) = 1.0 = 0x38, and the codes are those of the values themselves.
    *_nv("every_code_once", EIGHT_AND_THEIR_NEGATIVES, 0x38, "01234567 89abcdef", 1.0, dtypes=_ALL_DTYPES),
    *_nv("nibble_order", (0.5, 6.0), 0x38, "17", 1.0),
    *_nv(
        "ties",
        (0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0, 6.0, -0.25, -0.75, -1.25, -1.75, -2.5, -3.5, -5.0, -6.0),
        0x38,
        "02244667 8aacceef",
        1.0,
        dtypes=_ALL_DTYPES,
    ),
    *_nv("amax_is_negative", (1.0, -6.0), 0x38, "2f", 1.0),
    *_nv("amax_is_last", (*(0.0,) * 15, 6.0), 0x38, "0" * 15 + "7", 1.0),
    # The block scale rounds to nearest even: 6.375 / 6 = 1.0625 is between 1 and 1.125, to 1 (0x38), and 6.375 saturates;
    # 7.125 / 6 = 1.1875 is between 1.125 and 1.25, to 1.25 (0x3a): 7.125 / 1.25 = 5.7, to 6, and 1 / 1.25 = 0.8, to 1.
    *_nv("scale_tie_down", (6.375, 1.0), 0x38, "72", 1.0),
    *_nv("scale_tie_up", (7.125, 1.0), 0x3A, "72", 1.0),
    # The codes follow from the rounded scale: 5.5 / 6 = 0.9167, to 0.9375 (0x37), and 2.3125 / 0.9375 = 2.467 goes to 2, where
    # 2.3125 / 0.9167 = 2.52 would go to 3.
    *_nv("codes_follow_the_rounded_scale", (5.5, 2.3125), 0x37, "74", 1.0),
    # A saturated block scale, 448 = 0x7e: from 2688 on. 2688 / 448 = 6, 448 / 448 = 1, 6000 / 448 = 13.4 saturates.
    *_nv("scale_at_448", (2688.0, 448.0, -1344.0), 0x7E, "72d", 1.0, dtypes=_ALL_DTYPES),
    *_nv("scale_saturates", (6000.0, -6000.0, 448.0), 0x7E, "7f2", 1.0),
    *_nv("scale_saturates_far", (2.0**100, -(2.0**127)), 0x7E, "7f", 1.0),
    # Underflow: the least E4M3 is 2**-9. 6 * 2**-9 has it, with the code of 6.
    *_nv("smallest_scale", (6 * 2.0**-9, 2.0**-9), 0x01, "72", 1.0),
    # 1.5 of it is a tie to 2**-8: 9 * 2**-9 / 2**-8 = 4.5, to 4.
    *_nv("subnormal_scale_tie", (9 * 2.0**-9,), 0x02, "6", 1.0),
    # Half of it is a tie to 0, just above half goes to 2**-9: 6.0625 * 2**-10 / 2**-9 = 3.03, to 3. Where the scale is 0, the
    # inverse is clamped to FLT_MAX: every nonzero element has the code of 6, and decodes to 0.
    *_nv("scale_underflows", (6 * 2.0**-10, -(2.0**-10), 0.0), 0x00, "7f0", 1.0),
    *_nv("scale_just_above_underflow", (6.0625 * 2.0**-10,), 0x01, "5", 1.0),
    # Zeros: scale 0 and codes 0, whatever S; by default S is 1 for a tensor of zeros.
    *_nv("zeros", (), 0x00, "", 1.0, dtypes=_ALL_DTYPES),
    *_nv("zeros_under_any_tensor_scale", (), 0x00, "", 300.0),
    *_nv("zeros_by_default", (), 0x00, "", None),
    *_nv("negative_zeros", (), 0x00, "", 1.0, filler=(-0.0, "8")),
    *_nv("zero_among_others", (6.0, 0.0, -0.0, 0.125, -0.125), 0x38, "70808", 1.0),
    # S is not a power of two, so that S and 1 / S cannot be mistaken. S = 448: 6 * (448 / 6) = 448 = 0x7e, codes of the values.
    *_nv("tensor_scale_448", (6.0, 3.0, -1.0), 0x7E, "75a", 448.0),
    # S = 3: 4 * (3 / 6) = 2 = 0x40; 3 / 2 times 4, 2, 1, -0.3125 is 6, 3, 1.5, -0.47.
    *_nv("tensor_scale_3", (4.0, 2.0, 1.0, -0.3125), 0x40, "7539", 3.0),
    # S = 12: 1 * (12 / 6) = 2 = 0x40; 12 / 2 times 1, 0.5, -0.25 is 6, 3, -1.5.
    *_nv("tensor_scale_12", (1.0, 0.5, -0.25), 0x40, "75b", 12.0),
    # By default S = 2688 / amax: the largest block has scale 448 and 6 for its largest element. 2688 / 3 = 896; 2688 / 7 = 384,
    # where 2688 times the float32 1 / 7 would be 384.00003.
    *_nv("default_tensor_scale_896", (3.0, 1.5, -0.5), 0x7E, "75a", None, dtypes=_ALL_DTYPES),
    *_nv("default_tensor_scale_384", (-7.0, 3.5), 0x7E, "f5", None),
    # NaN and infinity: the scale is NaN, also by default (S = 1).
    *(
        block
        for name, values in {"one_nan": (1.0, nan, -6.0), "infinity": (1.0, inf), "negative_infinity": (-inf, 6.0)}.items()
        for s in (1.0, None)
        for block in _nv(name if s else f"{name}_by_default", values, 0x7F, None, s, dtypes=_ALL_DTYPES)
    ),
]

# S of the blocks above that take the default.
DEFAULT_TENSOR_SCALE = {
    "zeros_by_default": 1.0,
    "default_tensor_scale_896": 896.0,
    "default_tensor_scale_384": 384.0,
    "one_nan_by_default": 1.0,
    "infinity_by_default": 1.0,
    "negative_infinity_by_default": 1.0,
}

BLOCKS = MXFP4_BLOCKS + NVFP4_BLOCKS


# --- Decoding ---------------------------------------------------------------------------------------------------------------


class Decoded(NamedTuple):
    """One code under one scale byte, and the value both stand for."""

    format: str
    rule: str
    scale: int
    code: int
    value: float
    tensor_scale: float | None = None

    def __str__(self) -> str:
        tensor_scale = f"-S{self.tensor_scale:g}" if self.tensor_scale is not None else ""
        return f"{self.format}-{self.rule}-scale{self.scale:#04x}-code{self.code:x}{tensor_scale}"


DECODED = [
    *(Decoded("mxfp4", "floor", 127, code, value) for code, value in enumerate(EIGHT_AND_THEIR_NEGATIVES)),
    *(Decoded("nvfp4", "two_level", 0x38, code, value, 1.0) for code, value in enumerate(EIGHT_AND_THEIR_NEGATIVES)),
    # Byte 0 is 2**-127, a float32 subnormal; byte 1 is 2**-126.
    Decoded("mxfp4", "floor", 0, 0x1, 2.0**-128),
    Decoded("mxfp4", "floor", 0, 0x7, 6 * 2.0**-127),
    Decoded("mxfp4", "floor", 0, 0xA, -(2.0**-127)),
    Decoded("mxfp4", "floor", 1, 0x2, 2.0**-126),
    # Byte 254 is 2**127: from code 4 (2 * 2**127) on the product leaves float32. Zero stays zero.
    Decoded("mxfp4", "floor", 254, 0x0, 0.0),
    Decoded("mxfp4", "floor", 254, 0x8, -0.0),
    Decoded("mxfp4", "floor", 254, 0x2, 2.0**127),
    Decoded("mxfp4", "floor", 254, 0xB, -1.5 * 2.0**127),
    Decoded("mxfp4", "floor", 254, 0x4, inf),
    Decoded("mxfp4", "floor", 254, 0xF, -inf),
    # Byte 255 is NaN for every code, the zeros included.
    *(Decoded("mxfp4", "floor", 255, code, nan) for code in (0x0, 0x7, 0x8)),
    # abs_max: a third of it. 3 / 3, 6 / 3, 1.5 / 3; 4 / 3 to the nearest float32.
    Decoded("mxfp4", "qutlass_abs_max", 127, 0x5, 1.0),
    Decoded("mxfp4", "qutlass_abs_max", 127, 0x7, 2.0),
    Decoded("mxfp4", "qutlass_abs_max", 128, 0xB, -1.0),
    Decoded("mxfp4", "qutlass_abs_max", 127, 0x6, 11184811 * 2.0**-23),
    # quest: the value itself.
    Decoded("mxfp4", "qutlass_quest", 128, 0xD, -6.0),
    # Under byte 254 a third of 4 * 2**127 is within float32, where 4 * 2**127 is not; 6 / 3 leaves it.
    Decoded("mxfp4", "qutlass_abs_max", 254, 0x6, 11184811 * 2.0**104),
    Decoded("mxfp4", "qutlass_abs_max", 254, 0xE, -11184811 * 2.0**104),
    Decoded("mxfp4", "qutlass_abs_max", 254, 0x7, inf),
    # NVFP4: code * scale / S.
    Decoded("nvfp4", "two_level", 0x7E, 0x7, 2688.0, 1.0),
    Decoded("nvfp4", "two_level", 0x7E, 0x7, 6.0, 448.0),
    Decoded("nvfp4", "two_level", 0x40, 0xF, -4.0, 3.0),
    Decoded("nvfp4", "two_level", 0x40, 0x5, 0.5, 12.0),
    Decoded("nvfp4", "two_level", 0x01, 0x1, 2.0**-10, 1.0),
    Decoded("nvfp4", "two_level", 0x00, 0x7, 0.0, 1.0),
    *(Decoded("nvfp4", "two_level", 0x7F, code, nan, 1.0) for code in (0x0, 0x7, 0x8)),
]

# --- The 128x4 blocked layout of scales -------------------------------------------------------------------------------------

# (rows, columns) of scales, and for some (row, column) the offset of its byte: tiles of 512 bytes, row of tiles by row of
# tiles, and in a tile (row % 32) * 16 + (row % 128 // 32) * 4 + column % 4.
BLOCKED_OFFSETS = {
    (128, 4): {(0, 0): 0, (0, 3): 3, (1, 0): 16, (31, 3): 499, (32, 0): 4, (33, 1): 21, (96, 0): 12, (127, 3): 511},
    (128, 8): {(0, 4): 512, (127, 7): 1023, (32, 5): 517},  # the second tile lies to the right
    (256, 8): {(128, 0): 1024, (128, 4): 1536, (255, 7): 2047},  # two tiles a row, so row 128 starts the third
    (130, 5): {(129, 4): 1024 + 512 + 16, (128, 1): 1025, (0, 4): 512},  # padded to 256 x 8
    (1, 1): {(0, 0): 0},
}


# --- The checks -------------------------------------------------------------------------------------------------------------


def check_block(quantize: Callable[..., Bytes], block: Block, device: torch.device | str = "cpu") -> None:
    """`block` alone, as a tensor of one row."""
    got = quantize(block.tensor(device), block.format, block.rule, block.tensor_scale)
    _check_block_bytes(block, got.codes[0].tolist(), got.scales[0].tolist())
    if block.format == "nvfp4":
        want = DEFAULT_TENSOR_SCALE[block.name] if block.tensor_scale is None else block.tensor_scale
        assert got.tensor_scale == want, f"{block}: tensor scale {got.tensor_scale}, not {want}"


def check_blocks_together(quantize: Callable[..., Bytes], blocks: list[Block], device: torch.device | str = "cpu") -> None:
    """Blocks of one format, rule, dtype and tensor scale side by side: as the rows of a tensor, and as one long row."""
    first = blocks[0]
    rows = torch.cat([block.tensor(device) for block in blocks])
    for x in (rows, rows.reshape(1, -1)):
        got = quantize(x, first.format, first.rule, first.tensor_scale)
        codes, scales = got.codes.reshape(len(blocks), -1).tolist(), got.scales.reshape(len(blocks), -1).tolist()
        for block, block_codes, block_scales in zip(blocks, codes, scales, strict=True):
            _check_block_bytes(block, block_codes, block_scales)


def together(blocks: list[Block]) -> Iterator[list[Block]]:
    """`blocks` in groups that may share a tensor: the default tensor scale depends on the whole tensor, so it stays alone."""
    shared = [block for block in blocks if block.format == "mxfp4" or block.tensor_scale is not None]
    shared.sort(key=_company)
    return (list(group) for _, group in groupby(shared, _company))


def _company(block: Block) -> tuple[str, str, str, float]:
    return block.format, block.rule, str(block.dtype), block.tensor_scale or 0.0


def _check_block_bytes(block: Block, codes: list[int], scales: list[int]) -> None:
    assert scales == [block.scale], f"{block}: scale bytes {scales}, not {[block.scale]}"
    want = block.packed()
    if want is not None:
        assert codes == want, f"{block}: codes {bytes(codes).hex(' ')}, not {bytes(want).hex(' ')}"


def check_ulp_sweep(quantize: Callable[..., Bytes], rule: str, device: torch.device | str = "cpu") -> None:
    """One ulp around 4, 6 and 7 times 2**k: where a logarithm in floating point is off by one."""
    sweep = ulp_sweep(rule, device)
    got = quantize(sweep.values, "mxfp4", rule, None)
    for what, have, want in (("scale", got.scales, sweep.scales), ("codes", got.codes, sweep.codes)):
        wrong = (have != want).any(dim=1).nonzero().flatten().tolist()
        if wrong:
            amax = sweep.values[wrong[0]].abs().max().item()
            raise AssertionError(
                f"{rule}: {what} wrong in {len(wrong)} of {len(want)} rows, first for amax {amax.hex()}: "
                f"{have[wrong[0]].tolist()}, not {want[wrong[0]].tolist()}"
            )


def check_decoded(dequantize: Callable[..., torch.Tensor], case: Decoded, device: torch.device | str = "cpu") -> None:
    """A block whose every code is `case.code`. Bitwise, but for the payload of a NaN."""
    size = BLOCK_SIZE[case.format]
    codes = torch.full((1, size // 2), case.code * 17, dtype=torch.uint8, device=device)
    scales = torch.full((1, 1), case.scale, dtype=torch.uint8, device=device)
    got = dequantize(Bytes(codes, scales, case.tensor_scale), case.format, case.rule)
    assert got.shape == (1, size), f"{case}: shape {tuple(got.shape)}"
    want = torch.full((1, size), case.value, device=device)
    same = torch.equal(got.isnan(), want.isnan()) and torch.equal(
        got.nan_to_num(nan=0.0, posinf=inf, neginf=-inf).view(torch.int32),
        want.nan_to_num(nan=0.0, posinf=inf, neginf=-inf).view(torch.int32),
    )
    assert same, f"{case}: decodes to {got[0, :2].tolist()}, not {case.value}"


def check_zero_decodes_to_zero(
    dequantize: Callable[..., torch.Tensor], format: str, device: torch.device | str = "cpu"
) -> None:
    """Codes 0 and 8 are zero under every finite scale byte, beside codes that are not."""
    scales = torch.arange(NAN_SCALE[format], dtype=torch.uint8, device=device).unsqueeze(1)
    codes = torch.full((len(scales), BLOCK_SIZE[format] // 2), 0x87, dtype=torch.uint8, device=device)  # code 7, code 8
    codes[:, 0] = 0xF0  # code 0, code 15
    rule = "two_level" if format == "nvfp4" else "floor"
    got = dequantize(Bytes(codes, scales, 1.0 if format == "nvfp4" else None), format, rule)
    bad = ((got[:, 0] != 0) | (got[:, 3::2] != 0).any(dim=1)).nonzero().flatten().tolist()
    assert not bad, f"{format}: a zero code decodes to a nonzero under the scale byte {bad[0]}: {got[bad[0], :4].tolist()}"


def check_nan_block_stays_alone(
    implementation: Implementation, format: str, rule: str, device: torch.device | str = "cpu"
) -> None:
    """A block that holds NaN or infinity decodes to NaN altogether; its neighbours do not."""
    size = BLOCK_SIZE[format]
    for bad in (nan, inf, -inf):
        x = torch.ones(1, 3 * size, device=device)
        x[0, size + 3] = bad
        quantized = implementation.quantize(x, format, rule, 1.0 if format == "nvfp4" else None)
        got = implementation.dequantize(quantized, format, rule).isnan()
        want = torch.zeros_like(got)
        want[0, size : 2 * size] = True
        assert torch.equal(got, want), f"{format} {rule}: {bad} makes {int(got.sum())} NaNs, not the {size} of its block"


def check_blocked_layout(to_blocked: Callable[[torch.Tensor], torch.Tensor], device: torch.device | str = "cpu") -> None:
    """Each scale alone lights up its own byte, and nothing else does."""
    for (rows, columns), offsets in BLOCKED_OFFSETS.items():
        for (row, column), offset in offsets.items():
            scales = torch.zeros(rows, columns, dtype=torch.uint8, device=device)
            scales[row, column] = 0xA5
            at = to_blocked(scales).flatten().nonzero().flatten().tolist()
            assert at == [offset], f"scale ({row}, {column}) of {rows} x {columns} lies at {at}, not [{offset}]"


def check_contract(
    implementation: Implementation, rules: tuple[str, ...] = (*MX_RULES, "two_level"), device: torch.device | str = "cpu"
) -> None:
    """Everything above for the rules that an implementation claims."""
    quantize, dequantize = implementation.quantize, implementation.dequantize
    blocks = [block for block in BLOCKS if block.rule in rules]
    for block in blocks:
        check_block(quantize, block, device)
    for group in together(blocks):
        check_blocks_together(quantize, group, device)
    for case in DECODED:
        if case.rule in rules:
            check_decoded(dequantize, case, device)
    for rule in rules:
        format = "nvfp4" if rule == "two_level" else "mxfp4"
        if format == "mxfp4":
            check_ulp_sweep(quantize, rule, device)
        check_nan_block_stays_alone(implementation, format, rule, device)
    for format in sorted({"nvfp4" if rule == "two_level" else "mxfp4" for rule in rules}):
        check_zero_decodes_to_zero(dequantize, format, device)
    check_blocked_layout(implementation.to_blocked, device)
