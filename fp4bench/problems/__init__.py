"""What to compute: one frozen value a problem, with its id, its inputs from a seed, and its exact flops and bytes.

m, n, k as in Y[m, n] = X[m, k] @ W[n, k]^T. Bytes are the fewest that must move through memory: every operand read once in the
form the mode gives it, the output written once in bfloat16.
"""

from fp4bench.problems.gemm import GemmInputs, GemmProblem
from fp4bench.problems.modes import (
    BF16,
    BLOCK,
    CUT_FP8_SUMS,
    FLOAT32_SUMS,
    FP8,
    FP8_SCALINGS,
    FP8_SUMS,
    FP16,
    MODES,
    PER_BLOCK,
    PER_CHANNEL,
    PER_TENSOR,
    PER_TOKEN,
    PER_TOKEN_CHANNEL,
    W4A4,
    W4A4_NOQUANT,
    W4A8,
    W4A16,
    W4A16_FP16,
    Accumulation,
    Fp8Scaling,
    Mode,
)
from fp4bench.problems.moe import SILU, Activation, ExpertWeights, MoeInputs, MoeProblem
from fp4bench.problems.operands import fp4_bytes
from fp4bench.problems.quantize import QuantizeProblem
from fp4bench.problems.routing import ROUTINGS, UNIFORM, Choices, Routing, read_routing

Problem = GemmProblem | QuantizeProblem | MoeProblem

BATCH_SIZES = (1, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384, 24576, 32768)
MOE_BATCH_SIZES = BATCH_SIZES[: BATCH_SIZES.index(2048) + 1]

__all__ = [
    "BATCH_SIZES",
    "BF16",
    "BLOCK",
    "CUT_FP8_SUMS",
    "FLOAT32_SUMS",
    "FP8",
    "FP8_SCALINGS",
    "FP8_SUMS",
    "FP16",
    "MODES",
    "MOE_BATCH_SIZES",
    "PER_BLOCK",
    "PER_CHANNEL",
    "PER_TENSOR",
    "PER_TOKEN",
    "PER_TOKEN_CHANNEL",
    "ROUTINGS",
    "SILU",
    "UNIFORM",
    "W4A4",
    "W4A4_NOQUANT",
    "W4A8",
    "W4A16",
    "W4A16_FP16",
    "Accumulation",
    "Activation",
    "Choices",
    "ExpertWeights",
    "Fp8Scaling",
    "GemmInputs",
    "GemmProblem",
    "Mode",
    "MoeInputs",
    "MoeProblem",
    "Problem",
    "QuantizeProblem",
    "Routing",
    "fp4_bytes",
    "read_routing",
]
