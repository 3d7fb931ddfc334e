"""Kernels of our own, in Triton and Gluon: one operation a file, launch choice in `configs`.

| what | files |
| --- | --- |
| a call, whatever the shape | `gemm`, `moe`, `quantize`; `ops` has them as torch operators |
| weights, laid out once | `weights`, `experts` |
| products | `decode` for a few rows, `prefill` for many; `blackwell` where tensor cores take FP4 |
| of `prefill` | `prefill_launch`: its tiles and schedule; `rounds`: what they cost; `prefill_kernel`: its device code |
| products of experts | `routing`; `grouped` for few rows each, `grouped_short` where k is short, `grouped_prefill` for many |
| quantization | `mxfp4_lanes`, `nvfp4_lanes` on Hopper, `fp4_tiles` anywhere, `fp8_rows` |
| shared by products | `streams`: a weight from memory; `fragments`, `unpack`: its bits to registers; `slots`: a few rows of x |
| shared by all | `overlap`: with the kernels before and after |
| shared by quantization | `lanes`, `fp4_text`, `runs`, `rounding` |

Importing this package imports torch only; each kernel's module needs Triton.
"""
