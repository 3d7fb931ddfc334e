"""fp4bench: a performance regression suite for FP4 (MXFP4, NVFP4) GEMM, MoE and serving on GPUs.

Importing it needs torch and numpy only and does no work: no GPU is asked for, no provider is loaded.
"""

from fp4bench.formats import MXFP4, NVFP4, BlockFormat, ScaleRule
from fp4bench.hadamard import hadamard_matrix, rotate, unrotate
from fp4bench.quantize import Quantized, decode, dequantize, quantize

__version__ = "0.1.0"

__all__ = [
    "MXFP4",
    "NVFP4",
    "BlockFormat",
    "Quantized",
    "ScaleRule",
    "decode",
    "dequantize",
    "hadamard_matrix",
    "quantize",
    "rotate",
    "unrotate",
]
