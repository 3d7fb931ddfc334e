"""Quantization of the activations that enter a layer."""

from dataclasses import dataclass
from typing import ClassVar

import torch

from fp4bench.formats import BlockFormat, ScaleRule
from fp4bench.problems.operands import fp4_bytes, join_case_id, normal


@dataclass(frozen=True)
class QuantizeProblem:
    """Quantization of the activations that enter a layer. The layer names its k; n plays no part."""

    op: ClassVar[str] = "quantize"
    copies_agree: ClassVar[bool] = True  # copies of the inputs have the same output

    model: str
    layer: str
    tp: int
    m: int
    k: int
    format: BlockFormat
    rule: ScaleRule
    hadamard: int | None = None

    def __post_init__(self) -> None:
        if min(self.m, self.k) < 1:
            raise ValueError(f"{self} has m = {self.m}, k = {self.k}: each must be at least 1")
        if self.rule not in self.format.rules:
            raise ValueError(f"{self}: {self.format} has no scale rule {self.rule}")

    def case_id(self, provider: str = "") -> str:
        """As `GemmProblem.case_id`, with the scale rule in the place of the mode."""
        rotation = (f"had{self.hadamard}",) if self.hadamard else ()
        what = (str(self.format), str(self.rule), *rotation)
        return join_case_id(self.op, what, provider, f"{self.model}.{self.layer}.tp{self.tp}", self.m)

    def __str__(self) -> str:
        return self.case_id()

    @property
    def shape(self) -> tuple[int, ...]:
        return self.m, self.k

    @property
    def flops(self) -> int:
        """0: a quantization is bound by the bytes it moves."""
        return 0

    @property
    def bytes(self) -> int:
        return 2 * self.m * self.k + fp4_bytes(self.m, self.k, self.format)

    def inputs(self, device: torch.device | str = "cpu", seed: int = 0) -> torch.Tensor:
        """bfloat16 (m, k), normal values from `seed`."""
        return normal(self.m, self.k, device, 2 * seed)

    def copy(self, inputs: torch.Tensor, number: int) -> torch.Tensor:
        """The same values elsewhere in memory."""
        return inputs.clone()
