"""What to compute: one frozen value a problem, with its id, its inputs from a seed, and its exact flops and bytes.

m, n, k as in Y[m, n] = X[m, k] @ W[n, k]^T. Bytes are the fewest that must move through memory: every operand read once in the
form the mode gives it, the output written once in bfloat16.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch

from fp4bench.formats import BlockFormat, ScaleRule

BATCH_SIZES = (1, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384, 24576, 32768)


@dataclass(frozen=True)
class Accumulation:
    """How hardware adds products up, which bounds its error: `terms` at once, and `bits` kept of their sum."""

    bits: int
    terms: int


FLOAT32_SUMS = Accumulation(bits=24, terms=1)
# Hopper's tensor cores on FP8 operands (DeepSeek-V3, arXiv 2412.19437, section 3.5.2).
FP8_SUMS = Accumulation(bits=14, terms=32)


@dataclass(frozen=True)
class Mode:
    """What a GEMM's operands are made of, and whether its timed region quantizes the activations.

    accumulation: the least exact sums that right hardware has for such operands. A provider that computes a mode by others says
    so (`fp4bench.providers.Provider`).
    """

    name: str
    weights: str  # "fp4", "fp8" or "bf16"
    activations: str
    quantizes: bool = False
    accumulation: Accumulation = FLOAT32_SUMS

    def __str__(self) -> str:
        return self.name


W4A4 = Mode("w4a4", "fp4", "fp4", quantizes=True)
W4A4_NOQUANT = Mode("w4a4_noquant", "fp4", "fp4")
W4A8 = Mode("w4a8", "fp4", "fp8", quantizes=True, accumulation=FP8_SUMS)
W4A16 = Mode("w4a16", "fp4", "bf16")
BF16 = Mode("bf16", "bf16", "bf16")
FP8 = Mode("fp8", "fp8", "fp8", accumulation=FP8_SUMS)

MODES = {mode.name: mode for mode in (BF16, FP8, W4A16, W4A8, W4A4, W4A4_NOQUANT)}


@dataclass(frozen=True)
class GemmInputs:
    """x bfloat16 (m, k) and w bfloat16 (n, k), before any quantization."""

    x: torch.Tensor
    w: torch.Tensor

    def clone(self) -> "GemmInputs":
        """The same values elsewhere in memory."""
        return GemmInputs(self.x.clone(), self.w.clone())


@dataclass(frozen=True)
class GemmProblem:
    """One linear layer at one batch size. `format` is None in the modes without FP4 weights."""

    op: ClassVar[str] = "gemm"

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
        return _case_id(self, what, provider)

    def __str__(self) -> str:
        return self.case_id()

    @property
    def shape(self) -> tuple[int, ...]:
        """Problems of one operation and shape have the same inputs."""
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
        return GemmInputs(
            _normal(self.m, self.k, device, 2 * seed), _normal(self.n, self.k, device, 2 * seed + 1) * self.k**-0.5
        )

    def _operand_bytes(self, rows: int, element: str) -> int:
        if element == "bf16":
            return 2 * rows * self.k
        if element == "fp8":
            return rows * self.k + 4 * rows  # one float32 scale a row
        assert self.format is not None
        return fp4_bytes(rows, self.k, self.format)


@dataclass(frozen=True)
class QuantizeProblem:
    """Quantization of the activations that enter a layer. The layer names its k; n plays no part."""

    op: ClassVar[str] = "quantize"

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
        return _case_id(self, (str(self.format), str(self.rule)), provider)

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
        return _normal(self.m, self.k, device, 2 * seed)


Problem = GemmProblem | QuantizeProblem


def fp4_bytes(rows: int, k: int, format: BlockFormat) -> int:
    """Codes, block scales and the tensor scale of a (rows, k) operand: 4.25 bits a value for MXFP4, 4.5 for NVFP4."""
    blocks = -(-k // format.block_size)
    return rows * -(-k // 2) + rows * blocks * format.scale_dtype.itemsize + (4 if format.has_tensor_scale else 0)


def _case_id(problem: Problem, what: tuple[str, ...], provider: str) -> str:
    rotation = (f"had{problem.hadamard}",) if problem.hadamard else ()
    who = (provider,) if provider else ()
    where = f"{problem.model}.{problem.layer}.tp{problem.tp}"
    return "-".join((problem.op, *what, *rotation, *who, where, f"m{problem.m}"))


def _normal(rows: int, columns: int, device: torch.device | str, seed: int) -> torch.Tensor:
    generator = torch.Generator(device).manual_seed(seed)
    return torch.randn(rows, columns, generator=generator, device=device, dtype=torch.bfloat16)
