"""fp4bench: a performance regression suite for FP4 (MXFP4, NVFP4) GEMM, MoE and serving on GPUs.

Public names live in the modules: `fp4bench.formats`, `fp4bench.quantize`, `fp4bench.hadamard`, `fp4bench.reference`,
`fp4bench.problems`, `fp4bench.providers`. Importing fp4bench imports nothing else, and `fp4bench.quantize` stays the module.
"""

__version__ = "0.2.0.dev0"
