"""A linear layer: Y[m, n] = X[m, k] @ W[n, k]^T."""

from dataclasses import dataclass
from typing import ClassVar

import torch

from fp4bench.formats import BlockFormat
from fp4bench.problems.modes import Mode
from fp4bench.problems.operands import fp4_bytes, join_case_id, normal


@dataclass(frozen=True)
class GemmInputs:
    """x (m, k) in the mode's dtype and w (n, k), before any quantization: bfloat16, but float16 in mode fp16."""

    x: torch.Tensor
    w: torch.Tensor

    def clone(self) -> "GemmInputs":
        """The same values elsewhere in memory."""
        return GemmInputs(self.x.clone(), self.w.clone())


@dataclass(frozen=True)
class GemmProblem:
    """One linear layer at one batch size. `format` is None in the modes without FP4 weights."""

    op: ClassVar[str] = "gemm"
    copies_agree: ClassVar[bool] = True  # copies of the inputs have the same output

    model: str
    layer: str
    tp: int
    m: int
    n: int
    k: int
    mode: Mode
    format: BlockFormat | None = None
    hadamard: int | None = None

    def __post_init__(self) -> None:
        if min(self.m, self.n, self.k) < 1:
            raise ValueError(f"{self} has m = {self.m}, n = {self.n}, k = {self.k}: each must be at least 1")
        if (self.mode.weights == "fp4") != (self.format is not None):
            raise ValueError(
                f"{self}: mode {self.mode} {'needs an FP4 format' if self.format is None else 'has no FP4 format'}"
            )
        if self.hadamard and self.mode.activations != "fp4":
            raise ValueError(f"{self}: mode {self.mode} has no rotation, which needs FP4 weights and activations")

    def case_id(self, provider: str = "") -> str:
        """`<op>-<format>-<mode>[-had<size>][-<provider>]-<model>.<layer>.tp<t>-m<m>`, the key of a baseline."""
        what = (str(self.format), self.mode.name) if self.format else (self.mode.name,)
        rotation = (f"had{self.hadamard}",) if self.hadamard else ()
        return join_case_id(self.op, (*what, *rotation), provider, f"{self.model}.{self.layer}.tp{self.tp}", self.m)

    def __str__(self) -> str:
        return self.case_id()

    @property
    def shape(self) -> tuple[int, ...]:
        """Problems of one operation, shape and mode's dtype have the same inputs."""
        return self.m, self.n, self.k

    @property
    def flops(self) -> int:
        """Multiplications and additions of the product; rotation and quantization count nothing."""
        return 2 * self.m * self.n * self.k

    @property
    def bytes(self) -> int:
        # Activations that the timed region quantizes are read as bfloat16.
        activations = "bf16" if self.mode.quantizes else self.mode.activations
        read = self._operand_bytes(self.n, self.mode.weights) + self._operand_bytes(self.m, activations)
        return read + 2 * self.m * self.n

    def inputs(self, device: torch.device | str = "cpu", seed: int = 0) -> GemmInputs:
        """Normal values from `seed`; w is scaled by k**-0.5 so that outputs stay near 1. Devices draw different values."""
        x = normal(self.m, self.k, device, 2 * seed).to(self.mode.dtype)
        w = normal(self.n, self.k, device, 2 * seed + 1) * self.k**-0.5
        return GemmInputs(x, w.to(self.mode.weight_dtype))

    def copy(self, inputs: GemmInputs, number: int) -> GemmInputs:
        """Inputs of the same work elsewhere in memory; those of a GEMM have the same values."""
        return inputs.clone()

    def _operand_bytes(self, rows: int, element: str) -> int:
        if element in ("bf16", "fp16"):
            return 2 * rows * self.k
        if element == "fp8":
            return rows * self.k + 4 * rows  # one float32 scale a row
        assert self.format is not None
        return fp4_bytes(rows, self.k, self.format)
