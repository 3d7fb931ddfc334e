"""What operands are made of: the modes of a product, and how hardware adds up."""

from dataclasses import dataclass
from typing import Any

import torch


@dataclass(frozen=True)
class Accumulation:
    """How hardware adds products up, which bounds its error: `terms` at once, and `bits` kept of their sum."""

    bits: int
    terms: int


FLOAT32_SUMS = Accumulation(bits=24, terms=1)
# Hopper's tensor cores on FP8 operands (DeepSeek-V3, arXiv 2412.19437, section 3.5.2).
FP8_SUMS = Accumulation(bits=14, terms=32)
# The same where nothing else adds up: bits beyond the 14 are cut off (same place), which errs by up to twice what rounding
# does.
CUT_FP8_SUMS = Accumulation(bits=13, terms=32)


@dataclass(frozen=True)
class Mode:
    """What a product's operands are made of, and whether a GEMM's timed region quantizes the activations.

    A MoE layer begins and ends in bfloat16: its timed region quantizes activations in every mode that has them so.
    accumulation: the least exact sums that right hardware has for such operands. A provider that computes a mode by others says
    so (`fp4bench.providers.Provider`).
    """

    name: str
    weights: str  # "fp4", "fp8", "bf16" or "fp16"
    activations: str
    quantizes: bool = False
    accumulation: Accumulation = FLOAT32_SUMS

    def __str__(self) -> str:
        return self.name

    @property
    def dtype(self) -> torch.dtype:
        """Of x before any quantization, and of the output."""
        return torch.float16 if self.activations == "fp16" else torch.bfloat16

    @property
    def weight_dtype(self) -> torch.dtype:
        """Of w before any quantization."""
        return torch.float16 if self.weights == "fp16" else torch.bfloat16

    def __reduce_ex__(self, protocol: Any) -> Any:
        """A mode of `MODES` is the same object in every process, so that `is` holds in workers too."""
        return (_mode, (self.name,)) if MODES.get(self.name) is self else super().__reduce_ex__(protocol)


W4A4 = Mode("w4a4", "fp4", "fp4", quantizes=True)
W4A4_NOQUANT = Mode("w4a4_noquant", "fp4", "fp4")
W4A8 = Mode("w4a8", "fp4", "fp8", quantizes=True, accumulation=FP8_SUMS)
W4A16 = Mode("w4a16", "fp4", "bf16")
W4A16_FP16 = Mode("w4a16_fp16", "fp4", "fp16")
BF16 = Mode("bf16", "bf16", "bf16")
FP16 = Mode("fp16", "fp16", "fp16")
FP8 = Mode("fp8", "fp8", "fp8", accumulation=FP8_SUMS)

MODES = {mode.name: mode for mode in (BF16, FP16, FP8, W4A16, W4A16_FP16, W4A8, W4A4, W4A4_NOQUANT)}


def _mode(name: str) -> Mode:
    return MODES[name]


@dataclass(frozen=True)
class Fp8Scaling:
    """What shares one float32 scale, amax / 448, in a MoE layer's FP8 operands.

    activations: "tensor" (all rows of x; all rows of the intermediate), "token" (a row), or "block" (128 values of a row).
    weights: "tensor" (a w13 or w2 of one expert), "channel" (a row of it), or "block" (128 by 128 values of it).
    """

    name: str
    activations: str
    weights: str

    @property
    def activation_tile(self) -> tuple[int | None, int | None]:
        """Rows and columns that share a scale, as `fp4bench.quantize.quantize_fp8_tiles` takes them."""
        return {"tensor": (None, None), "token": (1, None), "block": (1, BLOCK)}[self.activations]

    @property
    def weight_tile(self) -> tuple[int | None, int | None]:
        """Likewise, of a weight (n, k)."""
        return {"tensor": (None, None), "channel": (1, None), "block": (BLOCK, BLOCK)}[self.weights]

    def __str__(self) -> str:
        return self.name


BLOCK = 128  # values along an axis that share a scale in the scaling by blocks, that of DeepSeek-V3

PER_TENSOR = Fp8Scaling("tensor", "tensor", "tensor")
PER_TOKEN = Fp8Scaling("token", "token", "tensor")
PER_CHANNEL = Fp8Scaling("channel", "tensor", "channel")
PER_TOKEN_CHANNEL = Fp8Scaling("token_channel", "token", "channel")
PER_BLOCK = Fp8Scaling("block128", "block", "block")

FP8_SCALINGS = {s.name: s for s in (PER_TENSOR, PER_TOKEN, PER_CHANNEL, PER_TOKEN_CHANNEL, PER_BLOCK)}
