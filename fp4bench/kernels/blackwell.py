"""W4A4 where tensor cores take FP4 operands: `tl.dot_scaled` on sm_100a and sm_120a. Compiled and interpreted, never measured.

Triton lowers it to `tcgen05.mma` of the kinds mxf4 and mxf4nvf4 on sm_100a, to `mma.sync` of kind mxf4nvf4 on sm_120a. Operands
come by TMA. Scales come in the 128x4 blocked layout, from which on sm_100a MXFP4's go to tensor memory and pass no register
(`tcgen05.cp`). TMA fills what lies outside of an operand with zeros: no shape reads out of bounds, and code 0 times a scale of
the padding is 0.
"""

from dataclasses import dataclass
from math import prod

import torch
import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

from fp4bench.formats import layouts
from fp4bench.kernels.quantize import BlockedQuantized
from fp4bench.quantize import Quantized

# Blackwell's compute capabilities by their major number: B200 and B300 (10), RTX 5090 and RTX PRO 6000 (12).
MAJORS = (10, 12)

# TMA wants rows of whole 16 bytes, which are 32 codes.
ALIGNMENT = 32


@dataclass(frozen=True)
class BlackwellConfig:
    """A tile of rows x columns of the output, `k` codes a step, and `stages` steps in flight. Rows and columns: whole 128."""

    rows: int = 128
    columns: int = 128
    k: int = 256
    stages: int = 3
    warps: int = 4

    def __post_init__(self) -> None:
        sizes = {self.rows, self.columns, self.k}
        if self.rows % 128 or self.columns % 128 or self.k % 128 or any(size & (size - 1) for size in sizes):
            raise ValueError(f"{self}: rows, columns and k are powers of two from 128 on")


def blocked(q: Quantized) -> BlockedQuantized:
    """A quantized matrix (rows, k) with its scales blocked."""
    return BlockedQuantized(q.codes, layouts.to_blocked(q.scales), q.tensor_scale, q.format, q.rule, q.hadamard, q.k)


def default_config(m: int, n: int, capability: tuple[int, int]) -> BlackwellConfig:
    """A choice by arithmetic, not by measurement, of what fits into shared memory: 227 KiB on sm_100a, 99 KiB on sm_120a.

    m, n are there for the day this is measured: today one tile serves all.
    """
    if capability[0] == 12:
        return BlackwellConfig(128, 128, k=128, stages=4, warps=8)
    # 4 warps would spill the 128 x 256 sums on their way out.
    return BlackwellConfig(128, 256 if n >= 256 else 128, k=256, stages=4, warps=8)


def gemm(
    x: BlockedQuantized,
    weight: BlockedQuantized,
    out: torch.Tensor,
    *,
    config: BlackwellConfig,
    alpha: float = 1.0,
    bias: torch.Tensor | None = None,
) -> None:
    """out = x @ weight.T * alpha + bias, summed in float32 and rounded once.

    x (m, k), weight (n, k) of one format -> out bfloat16, float16 or float32 (m, n), contiguous. bias: float (n) or None.
    Allocates nothing on the device and waits for nothing. Raises ValueError for operands that TMA cannot read, that do not fit
    together, or that are by a scale rule whose codes hold more than x / scale.
    """
    _check(x)
    _check(weight)
    (m, row_bytes), n = x.codes.shape, weight.codes.shape[0]
    if weight.codes.shape[1] != row_bytes or x.format is not weight.format or out.shape != (m, n) or not out.is_contiguous():
        raise ValueError(
            f"x {x.format} {(m, 2 * row_bytes)}, weight {weight.format} {(n, 2 * weight.codes.shape[1])} "
            f"and out {tuple(out.shape)} do not fit together"
        )
    row_tiles, column_tiles = triton.cdiv(m, config.rows), triton.cdiv(n, config.columns)
    _gemm[(row_tiles * column_tiles,)](
        *_descriptors(x, config.rows, config.k),
        *_descriptors(weight, config.columns, config.k),
        out,
        bias,
        x.tensor_scale,
        weight.tensor_scale,
        m,
        n,
        triton.cdiv(2 * row_bytes, config.k),
        alpha,
        ROWS=config.rows,
        COLUMNS=config.columns,
        K=config.k,
        BLOCK=x.format.block_size,
        TENSOR_SCALES=x.format.has_tensor_scale,
        HAS_BIAS=bias is not None,
        STAGES=config.stages,
        num_warps=config.warps,
    )


def _check(operand: BlockedQuantized) -> None:
    rows, row_bytes = operand.codes.shape
    if row_bytes % (ALIGNMENT // 2):
        raise ValueError(f"TMA reads rows of whole 16 bytes, not {row_bytes}: pad k to a multiple of {ALIGNMENT}")
    if operand.scales.shape != (prod(layouts.padded_shape(rows, 2 * row_bytes // operand.format.block_size)),):
        raise ValueError(f"scales of shape {tuple(operand.scales.shape)} are not those of {rows} rows, blocked")
    if operand.rule.gain != 1.0:
        raise ValueError(f"codes by the rule {operand.rule} are {operand.rule.gain:g} times too large: use another rule")


def _descriptors(operand: BlockedQuantized, rows: int, k: int) -> tuple[TensorDescriptor, TensorDescriptor]:
    """How TMA cuts the codes and the blocked scales of an operand into tiles of `rows` x `k`."""
    columns = k // operand.format.block_size
    padded_rows, padded_columns = layouts.padded_shape(
        operand.codes.shape[0], 2 * operand.codes.shape[1] // operand.format.block_size
    )
    # Triton knows float8_e4m3fn, and no E8M0: bytes.
    scales = operand.scales if operand.format.has_tensor_scale else operand.scales.view(torch.uint8)
    # A tile of 128 x 4 scales is 512 bytes in a row. A box of TMA is at most 256 long: 2 x 256.
    tiles = scales.view(1, padded_rows // layouts.TILE_ROWS, padded_columns // layouts.TILE_COLUMNS, 2, 256)
    return (
        TensorDescriptor.from_tensor(operand.codes, [rows, k // 2]),
        TensorDescriptor.from_tensor(tiles, [1, rows // layouts.TILE_ROWS, columns // layouts.TILE_COLUMNS, 2, 256]),
    )


@triton.jit
def _gemm(  # type: ignore[no-untyped-def]
    x,
    x_scales,
    w,
    w_scales,
    out,
    bias,
    x_tensor_scale,
    w_tensor_scale,
    m,
    n,
    steps,
    alpha,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    K: tl.constexpr,
    BLOCK: tl.constexpr,
    TENSOR_SCALES: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    STAGES: tl.constexpr,
):
    """One tile of the output a program; eight tiles of rows take turns at the same columns, so that they share them in L2."""
    row_tiles, column_tiles = tl.cdiv(m, ROWS), tl.cdiv(n, COLUMNS)
    tile = tl.program_id(0)
    row, column = tl.swizzle2d(tile // column_tiles, tile % column_tiles, row_tiles, column_tiles, 8)
    total = tl.zeros((ROWS, COLUMNS), dtype=tl.float32)
    for step in tl.range(steps, num_stages=STAGES):
        x_codes = x.load([row * ROWS, step * (K // 2)])
        w_codes = w.load([column * COLUMNS, step * (K // 2)])
        x_tile = _row_major(x_scales, row, step, ROWS, K // BLOCK)
        w_tile = _row_major(w_scales, column, step, COLUMNS, K // BLOCK)
        total = tl.dot_scaled(x_codes, x_tile, "e2m1", w_codes.T, w_tile, "e2m1", total)
    if TENSOR_SCALES:
        alpha = alpha / (tl.load(x_tensor_scale) * tl.load(w_tensor_scale))
    total = total * alpha
    rows, columns = row * ROWS + tl.arange(0, ROWS), column * COLUMNS + tl.arange(0, COLUMNS)
    if HAS_BIAS:
        total += tl.load(bias + columns, mask=columns < n, other=0.0).to(tl.float32)[None, :]
    inside = (rows < m)[:, None] & (columns < n)[None, :]
    tl.store(out + rows.to(tl.int64)[:, None] * n + columns[None, :], total.to(out.dtype.element_ty), mask=inside)


@triton.jit
def _row_major(scales, tile, step, ROWS: tl.constexpr, COLUMNS: tl.constexpr):  # type: ignore[no-untyped-def]
    """A tile of blocked scales in the order of rows: a view, which moves nothing where the tensor core wants them blocked."""
    row_tiles: tl.constexpr = ROWS // 128
    column_tiles: tl.constexpr = COLUMNS // 4
    raw = scales.load([0, tile * row_tiles, step * column_tiles, 0, 0])
    # (row tile, column tile, row % 32, row // 32, column) -> (row tile, row // 32, row % 32, column tile, column)
    return raw.reshape(row_tiles, column_tiles, 32, 4, 4).trans(0, 3, 2, 1, 4).reshape(ROWS, COLUMNS)
