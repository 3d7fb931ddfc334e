"""x -> FP4 in one pass: block rotation, scales and codes, with the bits of `fp4bench.quantize`; FP8 rows; FP4 as FP8 or BF16.

| what | kernel |
|---|---|
| bfloat16 -> FP4, scales in rows, k without padding, on Hopper | `mxfp4_lanes`, `nvfp4_lanes` |
| any other x -> FP4, its scales in any layout, or the values of its codes as bfloat16 | `fp4_tiles` |
| x -> rows of E4M3, as FP8 or by way of MXFP4 | `fp8_rows` |

The last two are written in float32 on `runs`, with the roundings of `rounding`, and run wherever Triton does.
"""

from dataclasses import dataclass, replace
from math import lcm, prod
from typing import Any

import torch
import triton

from fp4bench.formats import MXFP4, BlockFormat, ScaleRule, layouts
from fp4bench.kernels import mxfp4_lanes, nvfp4_lanes, overlap
from fp4bench.kernels.fp4_tiles import largest_of_tiles, quantize_tiles
from fp4bench.kernels.fp8_rows import Columns, quantize_row
from fp4bench.kernels.mxfp4_lanes import RULES as MXFP4_RULES
from fp4bench.quantize import Quantized, RowQuantized, check_arguments

# The largest rotation: a run of 128 values is 128 registers of a thread, of at most 255.
MAX_HADAMARD = 128

RULES = (*MXFP4_RULES, ScaleRule.QUTLASS_ABS_MAX, ScaleRule.TWO_LEVEL)

# E4M3 rows are padded with zeros to whole units of a prepared weight (`fp4bench.kernels.weights`).
_UNIT = 64

# Largest magnitudes that the first kernel of a computed tensor scale leaves to the second one, 4 bytes each.
_MOST_PARTS = 1024

# A row of at most so many values stays in registers between its largest magnitude and its codes, in a program of its own; a
# longer one is read twice. Many rows keep the memory busy while one waits, and are better read twice earlier.
_LONGEST_ROW, _LONGEST_OF_MANY = 32768, 16384
_FEW_ROWS = 128  # each has an SM of its own
_MANY_FP4_ROWS = 4096


@dataclass(frozen=True, eq=False)
class BlockedQuantized:
    """A matrix (m, k) in a block format, its scales as tensor cores of Blackwell read them.

    codes: uint8 (m, k padded / 2), as in `Quantized`.
    scales: the format's scale dtype, flat, in the 128x4 blocked layout (`fp4bench.formats.layouts`), padding bytes zero.
    tensor_scale, format, rule, hadamard, k: as in `Quantized`.
    """

    codes: torch.Tensor
    scales: torch.Tensor
    tensor_scale: torch.Tensor | None
    format: BlockFormat
    rule: ScaleRule
    hadamard: int | None
    k: int

    def row_major(self) -> Quantized:
        """The same with its scales in the order of rows."""
        rows, row_bytes = self.codes.shape
        scales = layouts.from_blocked(self.scales, rows, 2 * row_bytes // self.format.block_size)
        return Quantized(self.codes, scales, self.tensor_scale, self.format, self.rule, self.hadamard, self.k)


@dataclass(frozen=True)
class Image:
    """Quantized values in a wider type, rotated where `hadamard` was given: x ~ values / tensor_scale.

    values: bfloat16 (..., k padded). tensor_scale: float32 (), the encode scale of NVFP4, or None.
    """

    values: torch.Tensor
    tensor_scale: torch.Tensor | None


@dataclass(frozen=True)
class Launch:
    """A program's tile: `rows` x `runs` runs of `run` values, a run a thread."""

    rows: int
    runs: int
    run: int

    @property
    def warps(self) -> int:
        return max(1, min(32, self.rows * self.runs // 32))


def launch(m: int, k: int, run: int) -> Launch:
    """The tile for m rows of k values cut into runs: 128 runs, of one row where it has as many; 32 where that fills no GPU."""
    runs = triton.next_power_of_2(triton.cdiv(k, run))
    threads = 128 if m * runs >= 128 * 256 else 32
    columns = min(runs, threads)
    return Launch(threads // columns, columns, run)


@dataclass(frozen=True)
class RowLaunch:
    """How rows become E4M3, one a program.

    run: neighbours that a thread has at a time. runs: of them, that a program writes at a time. read_runs: that it reads at a
    time to find the largest magnitude; 0 where it keeps the row in registers, and reads and writes it once. warps: of it.
    """

    run: int
    runs: int
    read_runs: int
    warps: int


def fp8_launch(m: int, k: int) -> RowLaunch:
    """The launch for m rows of k values to FP8.

    Runs of 16 instead of 32: between products of Llama-3.3-70B's qkv 64 rows of 8192 take 3.2 us instead of 4.2. Long rows read
    twice, a quarter at a time the second time: 4096 rows of 28672 take 88 us instead of 131, 256 rows 8.6 instead of 11.9; but
    few rows are sooner done by 1024 threads at once. A row shared by several programs, each finding its largest magnitude, took
    less time alone and more behind a product, whose end each of them waits for: 64 rows of 28672 between products of `down` 5.2
    to 5.4 us instead of 3.6. (NVIDIA H200, `baselines/NVIDIA-H200/kernels/2026-11-27_fp8-rows.jsonl`)
    """
    runs = triton.next_power_of_2(max(1, triton.cdiv(min(k, _LONGEST_ROW), 16)))
    if k > _LONGEST_ROW or (k > _LONGEST_OF_MANY and m > _FEW_ROWS):
        return RowLaunch(16, runs // 4, runs, 16)
    return RowLaunch(16, runs, 0, max(1, min(32, runs // (32 if m <= _FEW_ROWS else 64))))


def fp4_as_e4m3_launch(m: int, k: int, hadamard: int | None) -> RowLaunch:
    """The launch for m rows of k values by way of FP4: runs are whole blocks and whole rotations."""
    run, longest = max(32, hadamard or 1), _LONGEST_OF_MANY if m >= _MANY_FP4_ROWS else _LONGEST_ROW
    runs = triton.next_power_of_2(max(1, triton.cdiv(min(k, longest), run)))
    return RowLaunch(run, runs, 0 if k <= longest else runs, max(1, min(32, runs // 32)))


def quantize(
    x: torch.Tensor,
    format: BlockFormat,
    *,
    rule: ScaleRule | None = None,
    hadamard: int | None = None,
    tensor_scale: torch.Tensor | float | None = None,
    blocked: bool = False,
    out: Quantized | BlockedQuantized | None = None,
) -> Any:
    """`fp4bench.quantize.quantize` in one pass, with its bits. float32, bfloat16 or float16 (..., k) of a GPU -> Quantized.

    rule, hadamard (to 128), tensor_scale: as there. A computed tensor scale takes a pass over x before, and no synchronization.
    blocked: x (m, k) -> BlockedQuantized.
    out: what `empty` made for these arguments, written and given back; else allocated. Beside it a computed tensor scale takes
    a workspace of at most 4 KiB.
    Raises TypeError and ValueError as `fp4bench.quantize.quantize` does.
    """
    rule = rule or format.default_rule
    out = out or empty(x, format, rule=rule, hadamard=hadamard, tensor_scale=tensor_scale, blocked=blocked)
    _quantize(x, out.codes, out, tensor_scale)
    return out


def empty(
    x: torch.Tensor,
    format: BlockFormat,
    *,
    rule: ScaleRule | None = None,
    hadamard: int | None = None,
    tensor_scale: torch.Tensor | float | None = None,
    blocked: bool = False,
) -> Any:
    """What `quantize` of these arguments returns, not yet written. -> Quantized, or BlockedQuantized where `blocked`."""
    rule = rule or format.default_rule
    _check(x, format, rule, hadamard, tensor_scale)
    if blocked and x.dim() != 2:
        raise ValueError(f"blocked scales are those of a matrix, not of a tensor of shape {tuple(x.shape)}")
    *lead, k = x.shape
    k_padded = _padded(k, format, hadamard)
    columns = k_padded // format.block_size
    shape = [prod(map(int, layouts.padded_shape(lead[0], columns)))] if blocked else [*lead, columns]
    return (BlockedQuantized if blocked else Quantized)(
        torch.empty(*lead, k_padded // 2, dtype=torch.uint8, device=x.device),
        torch.empty(shape, dtype=format.scale_dtype, device=x.device),
        torch.empty((), dtype=torch.float32, device=x.device) if format.has_tensor_scale else None,
        format,
        rule,
        hadamard,
        k,
    )


def fp4_as_bf16(
    x: torch.Tensor,
    format: BlockFormat,
    *,
    rule: ScaleRule | None = None,
    hadamard: int | None = None,
    tensor_scale: torch.Tensor | float | None = None,
    out: Image | None = None,
    pdl: bool = False,
) -> Image:
    """The values that `quantize` of these arguments stands for, in bfloat16 and exact. float (..., k) -> Image (..., k padded).

    MXFP4: code * 2**e; 2**128, which CEIL reaches at the end of float32, is infinite. NVFP4: code * scale, 2 + 4 significant
    bits of bfloat16's 8, and the encode scale S is left to the epilogue. NaN blocks are NaN. pdl: see `quantize_fp8_rows`.
    Raises ValueError for a rule whose codes hold more than x / scale.
    """
    rule = rule or format.default_rule
    _check(x, format, rule, hadamard, tensor_scale)
    _check_gain(rule)
    if out is None:
        shape = (*x.shape[:-1], _padded(x.shape[-1], format, hadamard))
        s = torch.empty((), dtype=torch.float32, device=x.device) if format.has_tensor_scale else None
        out = Image(torch.empty(shape, dtype=torch.bfloat16, device=x.device), s)
    unscaled = Quantized(out.values, out.values, out.tensor_scale, format, rule, hadamard, x.shape[-1])
    _quantize(x, out.values, unscaled, tensor_scale, pdl)
    return out


def quantize_fp8_rows(
    x: torch.Tensor, *, columns: Columns = Columns.NATURAL, out: RowQuantized | None = None, pdl: bool = False
) -> RowQuantized:
    """`fp4bench.quantize.quantize_fp8_rows` in one pass, with its bits. float (..., k) of a GPU -> RowQuantized.

    columns: their order. But in the natural one k is padded to a multiple of 64, with zeros but in rows whose scale is NaN.
    out: values and scales to write: float8_e4m3fn (..., k or k padded), float32 (..., 1).
    pdl: overlap with the kernels before and after, which must do as `overlap` says. Compute capability 9.0 or later.
    """
    k = x.shape[-1]
    out = out or _empty_rows(x, k if columns is Columns.NATURAL else k + -k % _UNIT)
    _quantize_rows(x, out, MXFP4.default_rule, None, fp4=False, columns=columns, pdl=pdl)
    return out


def fp4_as_e4m3(
    x: torch.Tensor,
    *,
    rule: ScaleRule | None = None,
    hadamard: int | None = None,
    out: RowQuantized | None = None,
    pdl: bool = False,
) -> RowQuantized:
    """MXFP4 codes of x under the scale of their row, as E4M3 in fragment order. float (..., k) -> RowQuantized (..., k padded).

    With e the exponent of a block and base the largest of the row, a value is code * 2**(6 - (base - e)), and the row's scale
    2**(base - 6): the largest, 6 * 2**6 = 384, is below E4M3's 448. Blocks up to 11 binades below base are exact, those of 12
    to 14 where their codes are multiples of 2**(base - e - 15). What is below is rounded to multiples of 2**-9: it errs by at
    most 2**-10 * 2**(base - 6), which is 2**-18 of the row's largest magnitude (at least 4 * 2**base by the default rule).
    A NaN block makes the scale of its row NaN. k is padded with zeros to a multiple of 64 and of the rotation.
    pdl: see `quantize_fp8_rows`. Raises ValueError for a rule whose codes hold more than x / scale.
    """
    rule = rule or MXFP4.default_rule
    _check(x, MXFP4, rule, hadamard, None)
    _check_gain(rule)
    k = x.shape[-1]
    out = out or _empty_rows(x, k + -k % lcm(_UNIT, hadamard or 1))
    _quantize_rows(x, out, rule, hadamard, fp4=True, columns=Columns.FRAGMENTS, pdl=pdl)
    return out


# --- Launches ---------------------------------------------------------------------------------------------------------------


def _quantize(
    x: torch.Tensor,
    values: torch.Tensor,
    q: Quantized | BlockedQuantized,
    tensor_scale: torch.Tensor | float | None,
    pdl: bool = False,
) -> None:
    """Write `values`, codes or the bfloat16 image, and q's scales (of an image: none) and tensor scale."""
    if not values.numel():
        _set_empty_tensor_scale(q, tensor_scale)
        return
    image, blocked = values.dtype == torch.bfloat16, isinstance(q, BlockedQuantized)
    k, block = x.shape[-1], q.format.block_size
    k_padded = _padded(k, q.format, q.hadamard)
    matrix = _matrix(x)
    if not image and not blocked and _is_hopper(x.device) and _quantize_fast(matrix, values, q, tensor_scale):
        return
    m, columns = matrix.shape[0], k_padded // block
    scale_rows, scale_columns = layouts.padded_shape(m, columns) if blocked else (m, columns)
    tile = launch(scale_rows, scale_columns * block, max(32, q.hadamard or 1))
    tiles_across = triton.cdiv(scale_columns * block, tile.runs * tile.run)
    source, parts, given = _encode_scale_source(matrix, q, tensor_scale, pdl)
    quantize_tiles[(triton.cdiv(scale_rows, tile.rows) * tiles_across,)](
        matrix,
        values if image else values.view(torch.int32),
        q.scales.view(torch.uint8),
        q.tensor_scale,
        source,
        parts,
        m,
        k,
        matrix.stride(0),
        k_padded,
        scale_rows,
        scale_columns,
        tiles_across,
        ROWS=tile.rows,
        RUNS=tile.runs,
        RUN=tile.run,
        WIDTH=16 // x.element_size(),
        WHOLE=k % tile.run == 0,
        BLOCK=block,
        RULE=q.rule.value,
        HADAMARD=q.hadamard or 1,
        GIVEN=given,
        BLOCKED=blocked,
        IMAGE=image,
        HAS_CVT=_has_cvt(x.device),
        PDL=pdl,
        num_warps=tile.warps,
        enable_fp_fusion=False,
        **overlap.option(pdl),
    )


def _quantize_fast(
    matrix: torch.Tensor, codes: torch.Tensor, q: Quantized | BlockedQuantized, tensor_scale: torch.Tensor | float | None
) -> bool:
    """Whether one of the kernels for Hopper could do it, and did."""
    if q.tensor_scale is None and mxfp4_lanes.fits(matrix, q.rule, q.hadamard):
        mxfp4_lanes.quantize(matrix, codes, q.scales, q.rule, q.hadamard)
        return True
    if q.tensor_scale is not None and nvfp4_lanes.fits(matrix, q.hadamard):
        source, parts, given = _encode_scale_source(matrix, q, tensor_scale, False)
        nvfp4_lanes.quantize(matrix, codes, q.scales, q.tensor_scale, source, parts, given, q.hadamard)
        return True
    return False


def _encode_scale_source(
    matrix: torch.Tensor, q: Quantized | BlockedQuantized, tensor_scale: torch.Tensor | float | None, pdl: bool
) -> tuple[torch.Tensor | float | None, int, str]:
    """What the kernel makes the encode scale of: the source, how many numbers it has, and what they are."""
    if not q.format.has_tensor_scale:
        return None, 0, "none"
    if isinstance(tensor_scale, torch.Tensor):
        return tensor_scale.to(matrix.device, torch.float32), 1, "tensor"
    if tensor_scale is not None:
        return float(tensor_scale), 1, "number"
    m, k = matrix.shape
    tile = launch(m, k, max(32, q.hadamard or 1))
    tiles_across = triton.cdiv(k, tile.runs * tile.run)
    tiles = triton.cdiv(m, tile.rows) * tiles_across
    parts = torch.empty(min(tiles, _MOST_PARTS), dtype=torch.int32, device=matrix.device)
    if not pdl and _is_hopper(matrix.device) and nvfp4_lanes.fits(matrix, q.hadamard):
        nvfp4_lanes.largest(matrix, parts, q.hadamard)
        return parts, parts.numel(), "largest"
    largest_of_tiles[(parts.numel(),)](
        matrix,
        parts,
        m,
        k,
        matrix.stride(0),
        tiles,
        tiles_across,
        ROWS=tile.rows,
        RUNS=tile.runs,
        RUN=tile.run,
        WIDTH=16 // matrix.element_size(),
        WHOLE=k % tile.run == 0,
        HADAMARD=q.hadamard or 1,
        PDL=pdl,
        num_warps=tile.warps,
        enable_fp_fusion=False,
        **overlap.option(pdl),
    )
    return parts, parts.numel(), "largest"


def _quantize_rows(
    x: torch.Tensor, out: RowQuantized, rule: ScaleRule, hadamard: int | None, *, fp4: bool, columns: Columns, pdl: bool
) -> None:
    if not out.scales.numel():
        return
    matrix, k, k_out = _matrix(x), x.shape[-1], out.values.shape[-1]
    m = matrix.shape[0]
    how = fp4_as_e4m3_launch(m, k_out, hadamard) if fp4 else fp8_launch(m, k_out)
    if columns is Columns.EXPERTS:  # which are put in order within a thread
        how = replace(how, run=32, runs=how.runs // 2, read_runs=how.read_runs // 2)
    quantize_row[(m,)](
        matrix,
        out.values,
        out.scales,
        k,
        matrix.stride(0),
        k_out,
        RUNS=how.runs,
        READ_RUNS=how.read_runs,
        RUN=how.run,
        WIDTH=16 // x.element_size(),
        WHOLE=k % how.run == 0,
        BLOCK=MXFP4.block_size,
        RULE=rule.value,
        HADAMARD=hadamard or 1,
        FP4=fp4,
        COLUMNS=columns.value,
        ONCE=not how.read_runs,
        PDL=pdl,
        num_warps=how.warps,
        enable_fp_fusion=False,
        **overlap.option(pdl),
    )


def _check(
    x: torch.Tensor, format: BlockFormat, rule: ScaleRule, hadamard: int | None, tensor_scale: torch.Tensor | float | None
) -> None:
    check_arguments(x, format, rule, hadamard, tensor_scale)
    if rule not in RULES:
        raise ValueError(f"this kernel has no scale rule {rule}")
    if hadamard is not None and hadamard > MAX_HADAMARD:
        raise ValueError(f"this kernel rotates by at most {MAX_HADAMARD}, not {hadamard}")


def _check_gain(rule: ScaleRule) -> None:
    if rule.gain != 1.0:
        raise ValueError(f"codes by the rule {rule} are {rule.gain:g} times too large for their scale: use another rule")


def _padded(k: int, format: BlockFormat, hadamard: int | None) -> int:
    return k + -k % lcm(format.block_size, hadamard or 1)


def _matrix(x: torch.Tensor) -> torch.Tensor:
    """x as rows, without a copy where its last axis is contiguous and its leading axes are one. (..., k) -> (m, k)."""
    x = x.detach()
    if x.stride(-1) != 1:
        x = x.contiguous()
    return x.reshape(prod(x.shape[:-1]), x.shape[-1])


def _empty_rows(x: torch.Tensor, k: int) -> RowQuantized:
    *lead, _ = x.shape
    return RowQuantized(
        torch.empty(*lead, k, dtype=torch.float8_e4m3fn, device=x.device),
        torch.empty(*lead, 1, dtype=torch.float32, device=x.device),
    )


def _set_empty_tensor_scale(q: Quantized | BlockedQuantized, tensor_scale: torch.Tensor | float | None) -> None:
    if q.tensor_scale is not None:
        q.tensor_scale.copy_(torch.as_tensor(1.0 if tensor_scale is None else tensor_scale).reshape(()))


def _is_hopper(device: torch.device) -> bool:
    return device.type == "cuda" and torch.cuda.get_device_capability(device) == (9, 0)


def _has_cvt(device: torch.device) -> bool:
    """Whether the GPU converts float32 to E2M1 itself: sm_100a and sm_120a."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= (10, 0)
