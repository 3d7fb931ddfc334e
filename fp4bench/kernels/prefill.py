"""Y[m, n] = X[m, k] @ W[n, k]^T on Hopper's `wgmma`, W in FP4: any m, best from some 16 rows of x on.

W is the left operand and goes through registers: the words of a prepared weight are in the order of its fragments, so decoding
them needs no shuffle and no shared memory, and the result feeds `wgmma` as it is. X is the right operand, from shared memory.
So a CTA computes a tile of Y^T, and transposes it on the way out. The operand is bfloat16 or float16 (exact, see `weights`), or
E4M3 for FP8 activations (MXFP4 weights only: NVFP4's scales have no room in it).

A CTA has one warp that brings tiles of x, words and scales by TMA into a ring of stages, and one to four warpgroups that decode
and multiply, each its own rows of W. A warpgroup decodes step i + 1 while the tensor cores work on step i: the `wgmma` of i + 1
is issued before that of i is waited for, which also keeps ptxas from moving the decoding behind the wait (it does, where only
the use of the result is behind it: then nothing overlaps).

CTAs are persistent, one or more an SM. The tiles that do not fill a last round are cut along k into equal shares for all CTAs;
so are all tiles where there are fewer than CTAs (small m). Partial sums go to the workspace in float32, and the warpgroup that
brings the last one of a tile adds them up, in the order of k: the result does not depend on who was last. Where the tiles of
one round more are cut with them (`pairs`), a share is longer than a tile, no more than two CTAs meet in one, and who comes last
reads one partial sum instead of four or five (the two-tile schedule of Stream-K, Osama et al., 2023).

What it bought, Llama-3.3-70B on NVIDIA H200s (`baselines/NVIDIA-H200/kernels/2026-11-27_tune-*.jsonl`): steps of 128 columns
and a ring that fills shared memory, qkv at m = 64 29.2 us instead of 35.6; three CTAs of 64 rows an SM at m = 32, 22.1 instead
of 26.1; tiles of 256 rows of x, whole, in groups of 4, at m = 4096, 821 instead of 915. E4M3 from words in bytes, 10
operations for eight codes instead of 21: gate_up at m = 32 66 and 67 (two cards) instead of 103, at m = 4096 2574 instead of
3076 (the tensor cores waited for decoding in 30 % of all cycles). Partial sums 16 bytes a thread instead of 8: o at m = 64
22.9 instead of 26.0. Warpgroups that share k where a tile a CTA is one round: o at m = 32 17.6 instead of 18.7. A tail of its
own launch instead of tiles cut along k: qkv as E4M3 at m = 1024 123.2 instead of 130.3.

What m = 512 bought, E4M3, predicted and measured in `2026-11-27_w4a8-m512-trial.jsonl` (an H200, an H100): scales asked for
before the loop, and 64 columns of the epilogue at a time, without spills, o 45.7 instead of 47.3, qkv with its tail 68.0
instead of 71.4. Pairs, qkv at m = 256 39.0 instead of 42.3, at m = 512 65.8 instead of 68.8, where 1.2 rounds would be 55: CTAs
that are each elsewhere in k do not ask the L2 for the same bytes at once; it is 69 % busy instead of 34, and the clock falls by
3 %. A tail of 64 rows by 128 columns whose two warpgroups share k, qkv at m = 512 62.4 instead of 64.6 in pairs (predicted: 57
to 62; `2026-11-27_w4a8-tails-trial.jsonl`, one card): a tail waits for decoding, and they decode half of k each. Steps of 256
columns in the tail at m = 1024, 116.4 instead of 118.5. Nothing: more stages for a tail of 64 columns, shared k in one, and a
tail that begins before the launch before it has ended. Worse: y transposed within warps, in rows of 32 bytes, o 46.3.

Weights beyond the ring, brought to the L2 before x is complete, are in the way of those that the ring waits for: at m = 32 W4A8
with its quantization takes 15.03 us of o and 19.44 of qkv with 21 MB of them, and 13.94 and 17.65 without; two of 81 launches
of both are 0.1 and 0.4 % faster with them (`2026-11-27_w4a8-m32-trial.jsonl`, an H200).

E4M3: Hopper adds FP8 products with some 14 bits (`CUT_FP8_SUMS` of `fp4bench.problems`), bfloat16 and float16 ones in float32.
"""

from collections.abc import Iterator
from dataclasses import replace
from functools import lru_cache
from typing import Any

import torch
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from fp4bench.kernels.prefill_kernel import wgmma_product
from fp4bench.kernels.prefill_launch import SHARED_BYTES, WARPGROUP_ROWS, PrefillConfig, Schedule, shares
from fp4bench.kernels.weights import TILE_N, UNIT_K, PreparedWeight, WordOrder

_FORMS = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float8_e4m3fn: "e4m3"}

# The first bytes of a workspace, which counters take and leave zero, whatever the launch: 4 for each tile that is cut along k
# and each warpgroup, and fewer than two tiles a CTA are. Enough for 170 SMs of 12 warpgroups, more than their threads allow.
COUNTER_BYTES = 16384


def why_not(m: int, weight: PreparedWeight, x_dtype: torch.dtype, config: PrefillConfig) -> str | None:
    """Why this configuration cannot compute this product exactly, or None."""
    if x_dtype not in _FORMS:
        return f"x is bfloat16, float16 or float8_e4m3fn, not {x_dtype}"
    if x_dtype is torch.float8_e4m3fn and weight.format.has_tensor_scale:
        return "NVFP4 weights do not fit E4M3"
    if not weight.fits(x_dtype):
        return f"the weight was prepared for {weight.operand}, words in {weight.order}, not for {x_dtype}"
    if x_dtype.itemsize * config.depth < 128:
        return f"a step of {config.depth} columns of {x_dtype} is less than the 128 bytes that the tensor cores' layout has"
    if config.shared_bytes(x_dtype.itemsize, 2 if weight.format.has_tensor_scale else 1) > SHARED_BYTES // config.ctas:
        return f"{config.ctas} CTAs of {config} do not fit the shared memory of an SM"
    return why_not(m, weight, x_dtype, config.tail) if config.tail else None


def fits(m: int, weight: PreparedWeight, x_dtype: torch.dtype, config: PrefillConfig) -> bool:
    """Whether `gemm` takes this product in this configuration."""
    return why_not(m, weight, x_dtype, config) is None


def workspace_bytes(m: int, weight: PreparedWeight, x_dtype: torch.dtype, config: PrefillConfig, sms: int) -> int:
    """Bytes of workspace that `gemm` needs: partial sums, counters, and a copy of x whose rows TMA cannot read."""
    schedules = [
        (Schedule.of(m, last - first, weight.units, launch, sms), launch)
        for first, last, launch in shares(m, weight.tiles, config, sms)
    ]
    return max(sum(_sizes(m, weight, x_dtype, schedule, launch)) for schedule, launch in schedules)


def gemm(
    x: torch.Tensor,
    weight: PreparedWeight,
    out: torch.Tensor,
    *,
    config: PrefillConfig,
    workspace: torch.Tensor | None = None,
    x_scale: torch.Tensor | None = None,
    alpha: float = 1.0,
    bias: torch.Tensor | None = None,
    pdl: bool = False,
) -> torch.Tensor:
    """out = alpha * x_scale[m] * (x @ weight^T) + bias[n], rounded once. `weight.rest` is not added. Returns out.

    x: bfloat16 or float16 (m, k), or padded to whole blocks of the weight and of its rotation; or float8_e4m3fn (m, k padded to
        64) in `weights.E4M3_ORDER`. The last axis contiguous.
    out: bfloat16, float16 or float32 (m, n), the last axis contiguous. x_scale: float32 (m). bias: any float (n).
    pdl: overlap with the kernel before and after (`decode`): the first weights do not wait for the one before.
    workspace: uint8, at least `workspace_bytes`, its first COUNTER_BYTES zero before its first use; each call leaves them zero,
        so products of any sizes may use it in turn. Calls that may run at the same time need one each.

    No allocation, no synchronization. Raises ValueError for what `why_not` names, and shapes that do not match.
    """
    _check(x, weight, out, config)
    if x.shape[0]:
        sms = count_sms(x.device)
        for part, into, of_bias, launch in _cut_rows(x.shape[0], weight, out, bias, config, sms):
            grid, arguments, constants = _launch(x, part, into, launch, workspace, x_scale, alpha, of_bias, pdl, sms)
            wgmma_product[grid](*arguments, **constants)
    return out


def compile_only(
    x: torch.Tensor,
    weight: PreparedWeight,
    out: torch.Tensor,
    *,
    config: PrefillConfig,
    workspace: torch.Tensor | None,
    x_scale: torch.Tensor | None,
    pdl: bool,
    sms: int,
) -> None:
    """Put what `gemm` launches on a GPU of so many SMs into Triton's cache. The tensors are not read: any device will do."""
    _check(x, weight, out, config)
    for part, into, _, launch in _cut_rows(x.shape[0], weight, out, None, config, sms):
        grid, arguments, constants = _launch(x, part, into, launch, workspace, x_scale, 1.0, None, pdl, sms)
        wgmma_product.warmup(*arguments, grid=grid, **constants)


def _cut_rows(
    m: int, weight: PreparedWeight, out: torch.Tensor, bias: torch.Tensor | None, config: PrefillConfig, sms: int
) -> Iterator[tuple[PreparedWeight, torch.Tensor, torch.Tensor | None, PrefillConfig]]:
    """Weight, output and bias of each launch of a product."""
    for first, last, launch in shares(m, weight.tiles, config, sms):
        if last - first == weight.tiles:
            yield weight, out, bias, launch
            continue
        rows = slice(first * TILE_N, min(last * TILE_N, weight.n))
        part = replace(
            weight,
            words=weight.words[first:last],
            scales=weight.scales[first:last],
            row_scale=weight.row_scale[first * TILE_N : last * TILE_N],
            base=None if weight.base is None else weight.base[first * TILE_N : last * TILE_N],
            n=rows.stop - rows.start,
        )
        yield part, out[:, rows], bias if bias is None else bias[rows], launch


def _launch(
    x: torch.Tensor,
    weight: PreparedWeight,
    out: torch.Tensor,
    config: PrefillConfig,
    workspace: torch.Tensor | None,
    x_scale: torch.Tensor | None,
    alpha: float,
    bias: torch.Tensor | None,
    pdl: bool,
    sms: int,
) -> tuple[tuple[int], tuple[Any, ...], dict[str, Any]]:
    """-> grid, arguments and constants of the kernel."""
    (m, k), form = x.shape, _FORMS[x.dtype]
    schedule = Schedule.of(m, weight.tiles, weight.units, config, sms)
    partial, counters, copy = _carve(workspace, m, weight, x.dtype, schedule, config)
    if copy is not None and k == weight.k:  # rows that are padded to blocks begin where TMA wants them
        x = copy[:, :k].copy_(x)
    two_level = weight.format.has_tensor_scale
    tiles_per_cta, units_per_step = config.rows // TILE_N, config.depth // UNIT_K
    per_unit = 16 if two_level else 8
    arguments = (
        descriptor(x, [config.columns, config.depth], 128),
        descriptor(weight.words.view(weight.tiles, -1), [tiles_per_cta, 128 * units_per_step], 0),
        descriptor(weight.scales.view(weight.tiles, -1), [tiles_per_cta, per_unit * units_per_step], 0),
        out,
        weight.row_scale,
        weight.row_scale if x_scale is None else x_scale,
        weight.row_scale if bias is None else bias,
        partial,
        counters,
        m,
        weight.n,
        out.stride(0),
        schedule.ctas,
        schedule.shared,
        schedule.tiles,
        schedule.steps,
        schedule.n_tiles,
        schedule.m_tiles,
        alpha,
    )
    constants = {
        "REPEATS": config.rows * config.split // (WARPGROUP_ROWS * config.warpgroups),
        "WARPGROUPS": config.warpgroups,
        "COLUMNS": config.columns,
        "UNITS": units_per_step,
        "SPLIT": config.split,
        "STAGES": config.stages,
        "GROUP": config.group,
        "FORM": form,
        "TWO_LEVEL": two_level,
        "IN_BYTES": weight.order is WordOrder.BYTES,
        "SHARERS": schedule.sharers,
        "HAS_X_SCALE": x_scale is not None,
        "HAS_BIAS": bias is not None,
        "REGISTERS": config.consumer_registers,
        "num_warps": 4,
        "launch_pdl": pdl,
        "maxnreg": config.registers,
    }
    return (schedule.ctas,), arguments, constants


def _check(x: torch.Tensor, weight: PreparedWeight, out: torch.Tensor, config: PrefillConfig) -> None:
    m, k = x.shape
    reason = why_not(m, weight, x.dtype, config)
    if reason:
        raise ValueError(reason)
    widest = weight.units * UNIT_K
    if not (weight.k <= k <= widest if x.dtype.itemsize == 2 else k == widest) or out.shape != (m, weight.n):
        raise ValueError(f"x {tuple(x.shape)} and out {tuple(out.shape)} do not fit a weight of {weight.shape}")


def descriptor(tensor: torch.Tensor, block: list[int], swizzle: int) -> Any:
    layout = gl.NVMMASharedLayout(swizzle, 8 * tensor.itemsize, 2)
    return TensorDescriptor(tensor, list(tensor.shape), list(tensor.stride()), block, layout)


@lru_cache
def count_sms(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count


# --- Workspace: partial sums, then counters, then a copy of x ----------------------------------------------------------------


def _partial_bytes(schedule: Schedule, config: PrefillConfig) -> int:
    """Two partial tiles a CTA: the end of its first tile and the beginning of its last."""
    return 2 * schedule.ctas * config.rows * config.columns * 4 if schedule.shared else 0


def _sizes(
    m: int, weight: PreparedWeight, x_dtype: torch.dtype, schedule: Schedule, config: PrefillConfig
) -> tuple[int, int, int]:
    """Bytes of counters, partial sums and the copy of x: a copy stays off the counters of other products."""
    if schedule.shared * config.warpgroups * 4 > COUNTER_BYTES:
        raise ValueError(f"{schedule.shared} tiles cut along k are more than a workspace has counters for")
    partial, copy = _partial_bytes(schedule, config), _copy_bytes(m, weight, x_dtype)
    return COUNTER_BYTES if partial or copy else 0, partial, copy


def _copy_bytes(m: int, weight: PreparedWeight, x_dtype: torch.dtype) -> int:
    """Rows of x must begin at multiples of 16 bytes; E4M3 rows, which are padded, do."""
    row = weight.k * x_dtype.itemsize
    return 0 if x_dtype is torch.float8_e4m3fn or row % 16 == 0 else m * (row + -row % 16)


def _carve(
    workspace: torch.Tensor | None,
    m: int,
    weight: PreparedWeight,
    x_dtype: torch.dtype,
    schedule: Schedule,
    config: PrefillConfig,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """-> float32 partial sums, int32 counters, and the copy of x if one is needed. row_scale stands in for what is not used."""
    sizes = _sizes(m, weight, x_dtype, schedule, config)
    if not sum(sizes):
        return weight.row_scale, weight.row_scale.view(torch.int32), None
    if workspace is None or workspace.dtype != torch.uint8 or workspace.numel() < sum(sizes) or not workspace.is_contiguous():
        raise ValueError(f"this product needs a contiguous uint8 workspace of {sum(sizes)} bytes")
    # Counters first: their place is the same whatever else the workspace serves, and they must stay zero.
    counters, partial, copy = workspace[: sum(sizes)].split(sizes)
    return (
        partial.view(torch.float32) if sizes[1] else weight.row_scale,
        counters.view(torch.int32),
        copy.view(x_dtype).view(m, -1) if sizes[2] else None,
    )
