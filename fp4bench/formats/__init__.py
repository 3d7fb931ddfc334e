"""What the bits mean: the two FP4 formats as values, and (in the submodules) their codes, scales and layouts.

`e2m1` holds the 4-bit codes, `scales` the scale bytes and the named scale rules, `layouts` the order of scales in memory.
This folder imports torch only.
"""

from dataclasses import dataclass
from typing import Any

import torch

from fp4bench.formats.scales import ScaleRule


@dataclass(frozen=True)
class BlockFormat:
    """A block-scaled 4-bit format. Every other module reads its properties from here.

    `rules` are the scale rules that produce this format, its default first.
    """

    name: str
    block_size: int  # values along k that share one scale
    scale_dtype: torch.dtype
    has_tensor_scale: bool  # a second, per-tensor float32 scale
    rules: tuple[ScaleRule, ...]

    @property
    def bits_per_element(self) -> float:
        """Storage per value, block scales included and the one tensor scale not: 4.25 for MXFP4, 4.5 for NVFP4."""
        return 4 + 8 / self.block_size

    @property
    def default_rule(self) -> ScaleRule:
        return self.rules[0]

    def __str__(self) -> str:
        return self.name

    def __reduce_ex__(self, protocol: Any) -> Any:
        """A format of `FORMATS` is the same object in every process, so that `is` holds in workers too."""
        return (_named, (self.name,)) if FORMATS.get(self.name) is self else super().__reduce_ex__(protocol)


# OCP Microscaling Formats (MX) v1.0, section 5.2: MXFP4 is 32 E2M1 elements with one E8M0 scale. The default rule is the one
# that it names, though EVEN has less error on normal data.
MXFP4 = BlockFormat(
    "mxfp4",
    block_size=32,
    scale_dtype=torch.float8_e8m0fnu,
    has_tensor_scale=False,
    rules=(
        ScaleRule.FLOOR,
        ScaleRule.CEIL,
        ScaleRule.EVEN,
        ScaleRule.RCEIL,
        ScaleRule.QUTLASS_ABS_MAX,
        ScaleRule.QUTLASS_QUEST,
    ),
)

# NVIDIA's format, not an OCP one: 16 E2M1 elements with one E4M3 scale, and one float32 scale a tensor.
NVFP4 = BlockFormat(
    "nvfp4",
    block_size=16,
    scale_dtype=torch.float8_e4m3fn,
    has_tensor_scale=True,
    rules=(ScaleRule.TWO_LEVEL,),
)

FORMATS = {fmt.name: fmt for fmt in (MXFP4, NVFP4)}


def _named(name: str) -> BlockFormat:
    return FORMATS[name]


__all__ = ["FORMATS", "MXFP4", "NVFP4", "BlockFormat", "ScaleRule"]
