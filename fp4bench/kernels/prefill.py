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
with its quantization takes 15.03 us of o and 19.93 of qkv with 21 MB of them, and 13.94 and 18.20 without; all launches that
were tried agree (`2026-11-27_w4a8-m32-trial.jsonl`).

E4M3: Hopper adds FP8 products with some 14 bits (`CUT_FP8_SUMS` of `fp4bench.problems`), bfloat16 and float16 ones in float32.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import product
from math import ceil
from typing import Any

import torch
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia import hopper
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, tma
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from fp4bench.kernels.overlap import BEGIN
from fp4bench.kernels.unpack import assembly
from fp4bench.kernels.weights import TILE_N, UNIT_K, PreparedWeight, WordOrder

_FORMS = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float8_e4m3fn: "e4m3"}
_WARPGROUP_ROWS = 64  # rows of one wgmma
_COLUMNS = (8, 16, 32, 64, 128, 256)
_SHARED_BYTES = 227 * 1024  # of an SM, to one CTA
_BARRIERS_AND_SCRATCH = 6 * 1024
_REGISTERS = 65536  # of an SM
_PRODUCER_REGISTERS = 24  # the fewest that setmaxnreg allows
_FEWEST_STEPS = 4  # a share of a tile is not worth its partial sum below that

# The first bytes of a workspace, which counters take and leave zero, whatever the launch: 4 for each tile that is cut along k
# and each warpgroup, and fewer than two tiles a CTA are. Enough for 170 SMs of 12 warpgroups, more than their threads allow.
COUNTER_BYTES = 16384


@dataclass(frozen=True)
class PrefillConfig:
    """How one product is launched.

    rows, columns: the tile of a CTA, rows of W (n) and rows of x (m). depth: columns of k in a step.
    stages: steps that shared memory holds. warpgroups: 1, 2 or 4, which share the rows. ctas: CTAs an SM.
    group: m tiles that are worked on together, to share the L2. streamed: whether tiles are cut along k to fill all SMs.
    along_k: whether the warpgroups take steps of the same rows in turn, instead of rows of the same step.
    tail: the launch of the rows of W whose tiles fill no whole round of CTAs; None: they are part of this one.
    pairs: whether tiles for one round more are cut along k with those that fill none, so that no more than two CTAs share one.
    """

    rows: int = 128
    columns: int = 128
    depth: int = 64
    stages: int = 4
    warpgroups: int = 2
    ctas: int = 1
    group: int = 8
    streamed: bool = True
    along_k: bool = False
    tail: "PrefillConfig | None" = None
    pairs: bool = False

    def __post_init__(self) -> None:
        for name, allowed in (
            ("rows", (64, 128, 256)),
            ("columns", _COLUMNS),
            ("depth", (64, 128, 256)),
            ("warpgroups", (1, 2, 4)),
            ("ctas", (1, 2, 3, 4)),
        ):
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name} is one of {allowed}, not {getattr(self, name)}")
        least = _WARPGROUP_ROWS * self.warpgroups // self.split
        if self.rows < least:
            raise ValueError(f"{self.warpgroups} warpgroups need at least {least} rows, not {self.rows}")
        if self.along_k and (self.warpgroups == 1 or self.columns > 128):
            raise ValueError(f"{self.warpgroups} warpgroups cannot share the k of {self.columns} columns")
        # A warpgroup that sees only some fills of a stage takes the one before last for its own: a barrier tells parity alone.
        if self.stages % self.split:
            raise ValueError(f"{self.split} warpgroups that share k need a multiple of {self.split} stages, not {self.stages}")
        if self.accumulators > 128:
            raise ValueError(f"a {self.rows} x {self.columns} tile takes {self.accumulators} registers a thread, more than 128")
        if self.tail and (self.tail.tail or self.tail.rows * self.tail.columns >= self.rows * self.columns):
            raise ValueError(f"a tail has smaller tiles than {self.rows} x {self.columns}, and none of its own: {self.tail}")
        if self.pairs and not self.streamed:
            raise ValueError("pairs of CTAs share tiles that are cut along k: such a launch is streamed")
        if self.stages < 2 or self.group < 1:
            raise ValueError(f"at least 2 stages and 1 m tile a group, not {self.stages} and {self.group}")

    @property
    def split(self) -> int:
        """Warpgroups that share the k of the same rows."""
        return self.warpgroups if self.along_k else 1

    @property
    def accumulators(self) -> int:
        """Registers of a thread that hold sums."""
        return self.rows * self.columns * self.split // (128 * self.warpgroups)

    @property
    def registers(self) -> int:
        """Registers a thread at the launch, by which the consumers' share is known."""
        threads = 128 * (self.warpgroups + 1) * self.ctas
        return min(255, _REGISTERS // threads // 8 * 8)

    @property
    def consumer_registers(self) -> int:
        """Registers of a consumer's thread, after the producer's warps gave theirs."""
        free = self.registers * (self.warpgroups + 1) - _PRODUCER_REGISTERS
        return min(240, free // self.warpgroups // 8 * 8)

    def has_registers(self, x_itemsize: int) -> bool:
        """Whether a consumer's thread has room for sums, the decoded weights of two steps, and some 40 registers of the rest.

        ptxas (13.0) refuses a wgmma whose operands exceed the registers of the launch, whatever the consumers are given later.
        """
        weights_of_a_step = self.rows * self.depth * self.split * x_itemsize // 4 // (128 * self.warpgroups)
        needed = self.accumulators + 2 * weights_of_a_step + 40
        return needed <= self.consumer_registers and self.accumulators + 32 <= self.registers

    def most_stages(self, x_itemsize: int, scales_per_byte: int) -> int:
        """How many fit beside the other CTAs of an SM; bytes as `shared_bytes` takes them."""
        rest = _BARRIERS_AND_SCRATCH + self._sums_bytes
        one = self.shared_bytes(x_itemsize, scales_per_byte) - rest
        return (_SHARED_BYTES // self.ctas - rest) * self.stages // one

    def shared_bytes(self, x_itemsize: int, scales_per_byte: int) -> int:
        """Shared memory of a CTA; scales_per_byte: 1 for MXFP4, 2 for NVFP4 scales of a k of 32."""
        words = self.rows * self.depth // 2 + self.rows * self.depth // 32 * scales_per_byte
        return self.stages * (self.columns * self.depth * x_itemsize + words) + _BARRIERS_AND_SCRATCH + self._sums_bytes

    @property
    def _sums_bytes(self) -> int:
        """What warpgroups that share k hand over in shared memory: all but the first one's sums."""
        return (self.split - 1) * self.rows * self.columns * 4


@dataclass(frozen=True)
class Schedule:
    """Which CTA computes what: `shared` tiles are cut along k among all, the others are taken whole, in turn."""

    ctas: int
    shared: int
    tiles: int
    steps: int
    n_tiles: int
    m_tiles: int

    @classmethod
    def of(cls, m: int, tiles_16: int, units: int, config: PrefillConfig, sms: int) -> "Schedule":
        """The schedule of an m-row product with a weight of so many tiles of 16 rows and units of 64 columns."""
        n_tiles, m_tiles = ceil(tiles_16 * TILE_N / config.rows), ceil(m / config.columns)
        tiles, steps = n_tiles * m_tiles, ceil(units * UNIT_K / (config.depth * config.split))
        ctas = sms * config.ctas
        if not config.streamed:
            return cls(min(ctas, tiles), 0, tiles, steps, n_tiles, m_tiles)
        if tiles >= ctas:
            shared = tiles % ctas
            if shared * steps < _FEWEST_STEPS * ctas:  # not worth cutting; and a share of no step has no sum to collect
                shared = 0
            elif config.pairs:
                shared += ctas
            return cls(ctas, shared, tiles, steps, n_tiles, m_tiles)
        ctas = max(tiles, min(ctas, tiles * steps // _FEWEST_STEPS))
        return cls(ctas, tiles if ctas > tiles else 0, tiles, steps, n_tiles, m_tiles)

    @property
    def sharers(self) -> str:
        """How many CTAs may share a tile: "one", "two" where each CTA's share is longer than a tile, or "many"."""
        if not self.shared:
            return "one"
        return "two" if self.shared >= self.ctas else "many"


def default_config(m: int, x_itemsize: int = 2) -> PrefillConfig:
    """A launch for m rows of x: the narrowest tile that holds them all, up to 128, of those that spill no registers."""
    columns = min(128, max(16, 1 << (m - 1).bit_length()))
    return PrefillConfig(columns=columns, depth=128 // x_itemsize, ctas=2 if columns <= 32 else 1)


def candidates(m: int, x_itemsize: int, scales_per_byte: int) -> list[PrefillConfig]:
    """The launches that are worth measuring for m rows of x, whatever the weight. Bytes as `shared_bytes` takes them.

    One tile holds all rows of x where it can: a second would decode the weight again. Where several are needed, 128 and 256.
    """
    least = 128 // x_itemsize
    covering = max(8, 1 << (m - 1).bit_length())
    found = []
    if covering <= 64:
        shapes = [
            (64, 1, 2),
            (64, 1, 3),
            (64, 1, 4),
            (128, 1, 1),
            (128, 1, 2),
            (128, 1, 3),
            (128, 2, 1),
            (128, 2, 2),
            (256, 2, 1),
            (256, 4, 1),
        ]
        depths = sorted({least, 2 * least, 256})  # longer steps wait less often
        for (rows, warpgroups, ctas), depth in product(shapes, depths):
            made = PrefillConfig(rows, covering, depth, 2, warpgroups, ctas)
            most = made.most_stages(x_itemsize, scales_per_byte)
            found += [replace(made, stages=stages) for stages in sorted({min(4, most), min(8, most)}) if stages > 1]
        for (warpgroups, ctas), depth, streamed in product(((2, 1), (2, 2), (4, 1)), depths, (True, False)):
            made = PrefillConfig(64, covering, depth, warpgroups, warpgroups, ctas, streamed=streamed, along_k=True)
            most = min(8, made.most_stages(x_itemsize, scales_per_byte)) // warpgroups * warpgroups
            # Four stages leave room for a CTA of the next kernel, which then begins early.
            found += [replace(made, stages=stages) for stages in sorted({min(4, most), most}) if stages > warpgroups]
    else:
        shapes = [(128, 1, 1), (128, 2, 1), (256, 2, 1), (64, 1, 2)]
        groups = (8,) if m <= 256 else (4, 16)
        tiles = product(shapes, (128, 256), (least, 2 * least), groups)
        for (rows, warpgroups, ctas), columns, depth, group in tiles:
            if rows * columns // (128 * warpgroups) > 128 or (columns > covering):
                continue
            made = PrefillConfig(rows, columns, depth, 2, warpgroups, ctas, group)
            most = min(6, made.most_stages(x_itemsize, scales_per_byte))
            found += [replace(made, stages=most, streamed=s, pairs=p) for s, p in _CUTS if most > 1]
            if most > 1 and columns == 256 and m > columns:  # else a tile is all columns, and a tail decodes W again
                whole = replace(made, stages=most, streamed=False)
                found += [replace(whole, tail=tail) for tail in _tails(whole, x_itemsize, scales_per_byte)]
    return [config for config in found if config.has_registers(x_itemsize)]


_CUTS = ((True, False), (True, True), (False, False))


def _tails(whole: PrefillConfig, x_itemsize: int, scales_per_byte: int) -> list[PrefillConfig]:
    """Launches for the rows that `whole` leaves: its tiles with fewer columns, or of 64 rows, which wait for less decoding."""
    narrow = [
        replace(whole, columns=columns, streamed=streamed) for columns, streamed in ((64, False), (128, False), (128, True))
    ]
    longer = [replace(tail, depth=2 * whole.depth) for tail in narrow[1:2] if whole.depth <= 128]
    low = [replace(tail, rows=64, warpgroups=1) for tail in (narrow[1], *longer)]
    low += [replace(narrow[1], rows=64, warpgroups=2, along_k=True, stages=2)]
    made = []
    for tail in (*narrow, *longer, *low):
        most = min(8, tail.most_stages(x_itemsize, scales_per_byte)) // tail.split * tail.split
        made += [replace(tail, stages=most)] if most > tail.split else []
    return [tail for tail in made if tail.has_registers(x_itemsize)]


def shares(m: int, weight: PreparedWeight, config: PrefillConfig, sms: int) -> list[tuple[int, int, PrefillConfig]]:
    """The launches of a product: (first, last) of W's tiles of 16 rows, and how they are launched.

    A product is one launch, or two where the configuration has a tail: rows whose tiles fill whole rounds of CTAs, then the
    others in smaller tiles. On an H200 qkv of Llama-3.3-70B at m = 512 is 1.2 rounds of 128 x 256.
    """
    alone = replace(config, tail=None)
    n_tiles, m_tiles = ceil(weight.tiles * TILE_N / config.rows), ceil(m / config.columns)
    ctas = sms * config.ctas
    whole = n_tiles * m_tiles // ctas * ctas // m_tiles
    if not config.tail or not 0 < whole < n_tiles:
        return [(0, weight.tiles, alone)]
    end = whole * (config.rows // TILE_N)
    return [(0, end, replace(alone, streamed=False)), (end, weight.tiles, config.tail)]


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
    if config.shared_bytes(x_dtype.itemsize, 2 if weight.format.has_tensor_scale else 1) > _SHARED_BYTES // config.ctas:
        return f"{config.ctas} CTAs of {config} do not fit the shared memory of an SM"
    return why_not(m, weight, x_dtype, config.tail) if config.tail else None


def fits(m: int, weight: PreparedWeight, x_dtype: torch.dtype, config: PrefillConfig) -> bool:
    """Whether `gemm` takes this product in this configuration."""
    return why_not(m, weight, x_dtype, config) is None


def workspace_bytes(m: int, weight: PreparedWeight, x_dtype: torch.dtype, config: PrefillConfig, sms: int) -> int:
    """Bytes of workspace that `gemm` needs: partial sums, counters, and a copy of x whose rows TMA cannot read."""
    schedules = [
        (Schedule.of(m, last - first, weight.units, launch, sms), launch)
        for first, last, launch in shares(m, weight, config, sms)
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
        sms = _sms(x.device)
        for part, into, of_bias, launch in _cut_rows(x.shape[0], weight, out, bias, config, sms):
            grid, arguments, constants = _launch(x, part, into, launch, workspace, x_scale, alpha, of_bias, pdl, sms)
            _kernel[grid](*arguments, **constants)
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
        _kernel.warmup(*arguments, grid=grid, **constants)


def _cut_rows(
    m: int, weight: PreparedWeight, out: torch.Tensor, bias: torch.Tensor | None, config: PrefillConfig, sms: int
) -> Iterator[tuple[PreparedWeight, torch.Tensor, torch.Tensor | None, PrefillConfig]]:
    """Weight, output and bias of each launch of a product."""
    for first, last, launch in shares(m, weight, config, sms):
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
        _descriptor(x, [config.columns, config.depth], 128),
        _descriptor(weight.words.view(weight.tiles, -1), [tiles_per_cta, 128 * units_per_step], 0),
        _descriptor(weight.scales.view(weight.tiles, -1), [tiles_per_cta, per_unit * units_per_step], 0),
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
        "REPEATS": config.rows * config.split // (_WARPGROUP_ROWS * config.warpgroups),
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


def _descriptor(tensor: torch.Tensor, block: list[int], swizzle: int) -> Any:
    layout = gl.NVMMASharedLayout(swizzle, 8 * tensor.itemsize, 2)
    return TensorDescriptor(tensor, list(tensor.shape), list(tensor.stride()), block, layout)


@lru_cache
def _sms(device: torch.device) -> int:
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


# --- Device code: layouts and decoding ---------------------------------------------------------------------------------------


_BF16_MX, _SIXTEEN = (gl.constexpr(text) for text in assembly("bf16", False))
_BF16_NV = gl.constexpr(assembly("bf16", True)[0])
_FP16_MX = gl.constexpr(assembly("fp16", False)[0])
_FP16_NV = gl.constexpr(assembly("fp16", True)[0])
_E4M3_MX, _EIGHT = (gl.constexpr(text) for text in assembly("e4m3", False))
_E4M3_BYTES = gl.constexpr(assembly("e4m3", False, in_bytes=True)[0])
_AS_BF16 = gl.constexpr((gl.bfloat16,) * 8)
_AS_FP16 = gl.constexpr((gl.float16,) * 8)
_AS_E4M3 = gl.constexpr((gl.float8e4nv,) * 8)


@gluon.constexpr_function
def _powers(size):
    """1, 2, 4, ... below size."""
    return [1 << i for i in range(size.bit_length() - 1)]


@gluon.constexpr_function
def _words_layout(repeats, units):
    """int32 (4 repeats, 128 units): a warp has one tile of each repeat, a lane four words of each unit."""
    registers = [[0, 1], [0, 2]] + [[0, 128 * p] for p in _powers(units)] + [[4 * p, 0] for p in _powers(repeats)]
    return gl.DistributedLinearLayout(
        registers, [[0, 4 << i] for i in range(5)], [[1, 0], [2, 0]], [], [4 * repeats, 128 * units]
    )


@gluon.constexpr_function
def _scales_layout(repeats, units, per_g):
    """int32 (4 repeats, 8 per_g units): a lane has the words of its g = lane // 4."""
    registers = [[0, p] for p in _powers(per_g)] + [[0, 8 * per_g * p] for p in _powers(units)]
    registers += [[4 * p, 0] for p in _powers(repeats)]
    lanes = [[0, 0], [0, 0]] + [[0, per_g << i] for i in range(3)]
    return gl.DistributedLinearLayout(registers, lanes, [[1, 0], [2, 0]], [], [4 * repeats, 8 * per_g * units])


@gluon.constexpr_function
def _columns_layout(columns):
    """A number of each column: 64 of them in the lanes of two warps and, the same, two more; the others in registers."""
    bits = [[p] for p in _powers(columns)]
    lanes, warps = (bits + 5 * [[0]])[:5], (bits[5:6] or [[0]]) + [[0]]
    return gl.DistributedLinearLayout(bits[6:], lanes, warps, [], [columns])


@gluon.jit
def _decode(
    words,
    scales,
    REPEATS: gl.constexpr,
    UNITS: gl.constexpr,
    FORM: gl.constexpr,
    TWO_LEVEL: gl.constexpr,
    IN_BYTES: gl.constexpr,
    OPERAND: gl.constexpr,
):
    """Shared memory of words and scales -> (64 REPEATS, 64 UNITS) in the registers of the A operand. No data moves."""
    PER_G: gl.constexpr = 2 if TWO_LEVEL else 1
    WORDS: gl.constexpr = _words_layout(REPEATS, UNITS)
    SCALES: gl.constexpr = _scales_layout(REPEATS, UNITS, PER_G)
    w = words.load(WORDS).reshape([4 * REPEATS, UNITS, 8, 4, PER_G, 4 // PER_G])
    LANES: gl.constexpr = w.type.layout
    s = scales.load(SCALES).reshape([4 * REPEATS, UNITS, 8, PER_G])
    s = gl.convert_layout(s, gl.SliceLayout(3, gl.SliceLayout(5, LANES)), assert_trivial=True)
    s, w = gl.broadcast(gl.expand_dims(gl.expand_dims(s, 3), 5), w)
    # Volatile, so that it stays before the wgmma that it is written before.
    if FORM == "e4m3":
        CODE: gl.constexpr = _E4M3_BYTES if IN_BYTES else _E4M3_MX
        q0, q1, q2, q3, q4, q5, q6, q7 = gl.inline_asm_elementwise(CODE, _EIGHT, [w, s], _AS_E4M3, False, 4)
    elif FORM == "bf16":
        CODE: gl.constexpr = _BF16_NV if TWO_LEVEL else _BF16_MX
        q0, q1, q2, q3, q4, q5, q6, q7 = gl.inline_asm_elementwise(CODE, _SIXTEEN, [w, s], _AS_BF16, False, 4)
    else:
        CODE: gl.constexpr = _FP16_NV if TWO_LEVEL else _FP16_MX
        q0, q1, q2, q3, q4, q5, q6, q7 = gl.inline_asm_elementwise(CODE, _SIXTEEN, [w, s], _AS_FP16, False, 4)
    low_words = gl.join(gl.join(q0, q1), gl.join(q2, q3))
    high_words = gl.join(gl.join(q4, q5), gl.join(q6, q7))
    q = gl.join(low_words, high_words)
    if FORM == "e4m3":
        # repeat, warp, unit, g, t, byte, high row, word's two bits -> repeat, warp, high row, g; unit, word, t, byte
        q = q.reshape([REPEATS, 4, UNITS, 8, 4, 4, 2, 2, 2]).permute([0, 1, 6, 3, 2, 8, 7, 4, 5])
    else:
        # repeat, warp, unit, g, t, h, e, high row, word's two bits -> repeat, warp, high row, g; unit, word, h, t, e
        q = q.reshape([REPEATS, 4, UNITS, 8, 4, 2, 2, 2, 2, 2]).permute([0, 1, 7, 3, 2, 9, 8, 5, 4, 6])
    return gl.convert_layout(q.reshape([64 * REPEATS, 64 * UNITS]), OPERAND, assert_trivial=True)


# --- Device code: who does what ----------------------------------------------------------------------------------------------


@gluon.jit
def _pieces(schedule):
    """How many pieces of tiles this CTA computes."""
    ctas, shared, tiles, steps, n_tiles, m_tiles = schedule
    cta = gl.program_id(0)
    begin = cta * (shared * steps) // ctas
    end = (cta + 1) * (shared * steps) // ctas
    cut = gl.where(end > begin, (end - 1) // steps - begin // steps + 1, 0)
    return cut + (tiles - shared - cta + ctas - 1) // ctas


@gluon.jit
def _piece(index, schedule):
    """-> (tile, first step, step after the last) of a piece. The cut ones come first: their sums have time to be collected."""
    ctas, shared, tiles, steps, n_tiles, m_tiles = schedule
    cta = gl.program_id(0)
    begin = cta * (shared * steps) // ctas
    end = (cta + 1) * (shared * steps) // ctas
    first = begin // steps
    cut = gl.where(end > begin, (end - 1) // steps - first + 1, 0)
    whole = index >= cut
    tile = gl.where(whole, shared + cta + (index - cut) * ctas, first + index)
    return (
        tile,
        gl.where(whole, 0, gl.maximum(begin - tile * steps, 0)),
        gl.where(whole, steps, gl.minimum(end - tile * steps, steps)),
    )


@gluon.jit
def _place(tile, schedule, GROUP: gl.constexpr):
    """-> (n tile, m tile): all n tiles by GROUP m tiles are consecutive, the m tiles fastest."""
    ctas, shared, tiles, steps, n_tiles, m_tiles = schedule
    group = tile // (GROUP * n_tiles)
    size = gl.minimum(m_tiles - group * GROUP, GROUP)
    rest = tile - group * (GROUP * n_tiles)
    return rest // size, group * GROUP + rest % size


@gluon.jit
def _produce(descriptors, buffers, barriers, schedule, SPLIT: gl.constexpr, STAGES: gl.constexpr, GROUP: gl.constexpr):
    """One warp: fill free stages. Each step of the schedule is one of each warpgroup, where they share k."""
    x_tiles, words, scales = descriptors
    x_buffer, words_buffer, scales_buffer = buffers
    full, empty = barriers
    COLUMNS: gl.constexpr = x_tiles.block_type.shape[0]
    DEPTH: gl.constexpr = x_tiles.block_type.shape[1]
    TILES: gl.constexpr = words.block_type.shape[0]
    WORDS: gl.constexpr = words.block_type.shape[1]
    SCALES: gl.constexpr = scales.block_type.shape[1]
    # The weights of the first stages do not wait for the kernel before, which x may come from.
    tile, begin, end = _piece(0, schedule)
    begin, end = begin * SPLIT, end * SPLIT
    at_n, at_m = _place(tile, schedule, GROUP)
    early = gl.where(_pieces(schedule) > 0, gl.minimum(end - begin, STAGES), 0)
    for stage in range(early):
        ready = full.index(stage)
        mbarrier.expect(ready, x_tiles.block_type.nbytes + words.block_type.nbytes + scales.block_type.nbytes)
        step = begin + stage
        tma.async_copy_global_to_shared(words, [at_n * TILES, step * WORDS], ready, words_buffer.index(stage))
        tma.async_copy_global_to_shared(scales, [at_n * TILES, step * SCALES], ready, scales_buffer.index(stage))
    lane = gl.arange(0, 32, gl.BlockedLayout([1], [32], [1], [0]))
    gl.inline_asm_elementwise(BEGIN, "=r,r,~{memory}", [lane], dtype=gl.int32, is_pure=False, pack=1)
    for stage in range(early):
        step = begin + stage
        tma.async_copy_global_to_shared(x_tiles, [at_m * COLUMNS, step * DEPTH], full.index(stage), x_buffer.index(stage))
    count = early
    for index in range(_pieces(schedule)):
        tile, begin, end = _piece(index, schedule)
        at_n, at_m = _place(tile, schedule, GROUP)
        begin, end = begin * SPLIT + gl.where(index == 0, early, 0), end * SPLIT
        for step in range(begin, end):
            stage = count % STAGES
            mbarrier.wait(empty.index(stage), (count // STAGES & 1) ^ 1)
            ready = full.index(stage)
            mbarrier.expect(ready, x_tiles.block_type.nbytes + words.block_type.nbytes + scales.block_type.nbytes)
            tma.async_copy_global_to_shared(words, [at_n * TILES, step * WORDS], ready, words_buffer.index(stage))
            tma.async_copy_global_to_shared(scales, [at_n * TILES, step * SCALES], ready, scales_buffer.index(stage))
            tma.async_copy_global_to_shared(x_tiles, [at_m * COLUMNS, step * DEPTH], ready, x_buffer.index(stage))
            count += 1


@gluon.jit
def _multiply(
    buffers,
    barriers,
    count,
    sums,
    WARPGROUP: gl.constexpr,
    REPEATS: gl.constexpr,
    UNITS: gl.constexpr,
    STAGES: gl.constexpr,
    FORM: gl.constexpr,
    TWO_LEVEL: gl.constexpr,
    IN_BYTES: gl.constexpr,
    OPERAND: gl.constexpr,
):
    """Decode a step and issue its products, without waiting for them."""
    x_buffer, words_buffer, scales_buffer = buffers
    full, empty = barriers
    stage = count % STAGES
    mbarrier.wait(full.index(stage), count // STAGES & 1)
    words = words_buffer.index(stage).slice(4 * REPEATS * WARPGROUP, 4 * REPEATS, 0)
    scales = scales_buffer.index(stage).slice(4 * REPEATS * WARPGROUP, 4 * REPEATS, 0)
    w = _decode(words, scales, REPEATS, UNITS, FORM, TWO_LEVEL, IN_BYTES, OPERAND)
    return hopper.warpgroup_mma(w, x_buffer.index(stage).permute((1, 0)), sums, is_async=True)


@gluon.jit
def _release(barriers, count, STAGES: gl.constexpr):
    full, empty = barriers
    mbarrier.arrive(empty.index(count % STAGES), count=1)


@gluon.jit
def _consume(
    sides,
    WARPGROUP: gl.constexpr,
    WARPGROUPS: gl.constexpr,
    REPEATS: gl.constexpr,
    COLUMNS: gl.constexpr,
    UNITS: gl.constexpr,
    SPLIT: gl.constexpr,
    STAGES: gl.constexpr,
    GROUP: gl.constexpr,
    FORM: gl.constexpr,
    TWO_LEVEL: gl.constexpr,
    IN_BYTES: gl.constexpr,
    SHARERS: gl.constexpr,
    HAS_X_SCALE: gl.constexpr,
    HAS_BIAS: gl.constexpr,
):
    """One warpgroup: its rows of every tile of this CTA, or its share of their k."""
    buffers, barriers, handover, pointers, schedule, bounds, alpha = sides
    out, row_scale, x_scale, bias, partial, counters = pointers
    ctas, shared, tiles, steps, n_tiles, m_tiles = schedule
    ROWS: gl.constexpr = 64 * REPEATS
    SUMS: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, COLUMNS, 32 if FORM == "e4m3" else 16])
    OPERAND: gl.constexpr = gl.DotOperandLayout(0, SUMS, 4 if FORM == "e4m3" else 2)
    MEMBER: gl.constexpr = WARPGROUP if SPLIT == 1 else 0  # whose rows of the tile
    count = 0 if SPLIT == 1 else WARPGROUP
    for index in range(_pieces(schedule)):
        tile, begin, end = _piece(index, schedule)
        at_n, at_m = _place(tile, schedule, GROUP)
        sums = hopper.warpgroup_mma_init(gl.zeros([ROWS, COLUMNS], gl.float32, SUMS))
        # Two steps a turn, so that their operands have registers of their own; a step in advance where the rest would be odd.
        if (end - begin) % 2 == 0:
            sums = _multiply(buffers, barriers, count, sums, MEMBER, REPEATS, UNITS, STAGES, FORM, TWO_LEVEL, IN_BYTES, OPERAND)
            sums = hopper.warpgroup_mma_init(hopper.warpgroup_mma_wait(0, deps=(sums,)))
            _release(barriers, count, STAGES)
            count += SPLIT
        sums = _multiply(buffers, barriers, count, sums, MEMBER, REPEATS, UNITS, STAGES, FORM, TWO_LEVEL, IN_BYTES, OPERAND)
        # Behind the wait for x, as the kernel before makes both; and not behind the loop, where they would be waited for.
        n0 = at_n * (ROWS * (WARPGROUPS // SPLIT)) + MEMBER * ROWS
        scales = _scales(pointers, bounds, n0, at_m * COLUMNS, ROWS, COLUMNS, SUMS, FORM, HAS_X_SCALE)
        for pair in range((end - begin - 1) // 2):
            for half in gl.static_range(2):
                sums = _multiply(
                    buffers, barriers, count + SPLIT, sums, MEMBER, REPEATS, UNITS, STAGES, FORM, TWO_LEVEL, IN_BYTES, OPERAND
                )
                sums = hopper.warpgroup_mma_init(hopper.warpgroup_mma_wait(1, deps=(sums,)))
                _release(barriers, count, STAGES)
                count += SPLIT
        y = hopper.warpgroup_mma_wait(0, deps=(sums,))
        _release(barriers, count, STAGES)
        count += SPLIT

        complete = True
        if SPLIT > 1:
            y = _add_up(y, handover, index, WARPGROUP, WARPGROUPS, ROWS, COLUMNS, SUMS)
            complete = WARPGROUP == 0
        if WARPGROUP == MEMBER:
            if SHARERS != "one":
                if end - begin < steps:
                    if SHARERS == "two":
                        y, complete = _meet(y, partial, counters, tile, begin, MEMBER, WARPGROUPS // SPLIT, ROWS, COLUMNS, SUMS)
                    else:
                        y, complete = _collect(
                            y, partial, counters, tile, begin, schedule, MEMBER, WARPGROUPS // SPLIT, ROWS, COLUMNS, SUMS
                        )
            if complete:
                _store(y, scales, pointers, bounds, alpha, n0, at_m * COLUMNS, ROWS, COLUMNS, SUMS, HAS_X_SCALE, HAS_BIAS)


@gluon.jit
def _add_up(
    y,
    handover,
    index,
    WARPGROUP: gl.constexpr,
    WARPGROUPS: gl.constexpr,
    ROWS: gl.constexpr,
    COLUMNS: gl.constexpr,
    SUMS: gl.constexpr,
):
    """The sums of warpgroups that share k, in the first one; of the others, nothing."""
    buffer, ready, free = handover
    y = _by_thread(y, ROWS, COLUMNS)
    if WARPGROUP > 0:
        mbarrier.wait(free.index(WARPGROUP - 1), (index & 1) ^ 1)
        buffer.index(WARPGROUP - 1).store(y)
        mbarrier.arrive(ready.index(WARPGROUP - 1), count=1)
    else:
        for other in gl.static_range(WARPGROUPS - 1):
            mbarrier.wait(ready.index(other), index & 1)
            y += buffer.index(other).load(y.type.layout)
            mbarrier.arrive(free.index(other), count=1)
    return _by_row(y, ROWS, COLUMNS, SUMS)


@gluon.jit
def _collect(
    y,
    partial,
    counters,
    tile,
    begin,
    schedule,
    WARPGROUP: gl.constexpr,
    WARPGROUPS: gl.constexpr,
    ROWS: gl.constexpr,
    COLUMNS: gl.constexpr,
    SUMS: gl.constexpr,
):
    """Leave a partial sum in the workspace; who brings the last one of a tile gets all. -> (sums, whether they are all)."""
    ctas, shared, tiles, steps, n_tiles, m_tiles = schedule
    SIZE: gl.constexpr = ROWS * COLUMNS
    y = _by_thread(y, ROWS, COLUMNS)
    at = gl.arange(0, SIZE, y.type.layout)
    # The first CTA of a tile begins it, as its last piece: slot 1. The others end or cross it, as their first: slot 0.
    slot = 2 * gl.program_id(0) + gl.where(begin == 0, 1, 0)
    gl.store(partial + (slot * WARPGROUPS + WARPGROUP).to(gl.int64) * SIZE + at, y)
    first = ((tile * steps + 1) * ctas - 1) // (shared * steps)
    last = ((tile * steps + steps) * ctas - 1) // (shared * steps)
    counter = counters + tile * WARPGROUPS + WARPGROUP
    gl.thread_barrier()
    complete = gl.atomic_add(counter, 1, sem="acq_rel", scope="gpu") == last - first
    if complete:
        y = gl.load(partial + ((2 * first + 1) * WARPGROUPS + WARPGROUP).to(gl.int64) * SIZE + at, cache_modifier=".cg")
        for cta in range(first + 1, last + 1):
            y += gl.load(partial + (2 * cta * WARPGROUPS + WARPGROUP).to(gl.int64) * SIZE + at, cache_modifier=".cg")
        gl.store(counter, 0)
    return _by_row(y, ROWS, COLUMNS, SUMS), complete


@gluon.jit
def _meet(
    y,
    partial,
    counters,
    tile,
    begin,
    WARPGROUP: gl.constexpr,
    WARPGROUPS: gl.constexpr,
    ROWS: gl.constexpr,
    COLUMNS: gl.constexpr,
    SUMS: gl.constexpr,
):
    """`_collect` of a tile that two CTAs share. Who finds the other's sums there keeps its own in registers."""
    SIZE: gl.constexpr = ROWS * COLUMNS
    y = _by_thread(y, ROWS, COLUMNS)
    counter = counters + tile * WARPGROUPS + WARPGROUP
    cta = gl.program_id(0)
    own = 2 * cta + gl.where(begin == 0, 1, 0)
    other = gl.where(begin == 0, 2 * cta + 2, 2 * cta - 1)
    complete = begin < 0
    if begin == 0:
        complete = gl.atomic_add(counter, 0, sem="acquire", scope="gpu") == 1
    if complete == 0:
        gl.store(partial + (own * WARPGROUPS + WARPGROUP).to(gl.int64) * SIZE + gl.arange(0, SIZE, y.type.layout), y)
        gl.thread_barrier()
        complete = gl.atomic_add(counter, 1, sem="acq_rel", scope="gpu") == 1
    if complete:
        y = _plus(y, partial + (other * WARPGROUPS + WARPGROUP).to(gl.int64) * SIZE, SIZE, 2)
        gl.store(counter, 0)
    return _by_row(y, ROWS, COLUMNS, SUMS), complete


@gluon.jit
def _plus(y, at, SIZE: gl.constexpr, HALVINGS: gl.constexpr):
    """y + what lies there, in parts, so that not all of it takes registers at once."""
    if HALVINGS == 0:
        return y + gl.load(at + gl.arange(0, SIZE, y.type.layout), cache_modifier=".cg")
    else:
        low, high = y.reshape([2, SIZE // 2]).permute([1, 0]).split()
        low = _plus(low, at, SIZE // 2, HALVINGS - 1)
        high = _plus(high, at + SIZE // 2, SIZE // 2, HALVINGS - 1)
        return gl.convert_layout(gl.join(low, high).permute([1, 0]).reshape([SIZE]), y.type.layout, assert_trivial=True)


@gluon.jit
def _by_thread(y, ROWS: gl.constexpr, COLUMNS: gl.constexpr):
    """Sums (ROWS, COLUMNS) in the order that threads hold them: four of one lane, then its warp's lanes, so 512 bytes a store.

    Bits of the index, the lowest first: column 0, row 3 (a lane's); columns 1, 2, rows 0 to 2 (lanes); rows 4 .., columns 3 ..
    """
    y = y.reshape([ROWS // 16, 2, 8, COLUMNS // 8, 4, 2])
    return y.permute([3, 0, 2, 4, 1, 5]).reshape([ROWS * COLUMNS])


@gluon.jit
def _by_row(y, ROWS: gl.constexpr, COLUMNS: gl.constexpr, SUMS: gl.constexpr):
    """Inverse of `_by_thread`."""
    y = y.reshape([COLUMNS // 8, ROWS // 16, 8, 4, 2, 2]).permute([1, 4, 2, 0, 3, 5])
    return gl.convert_layout(y.reshape([ROWS, COLUMNS]), SUMS, assert_trivial=True)


@gluon.jit
def _scales(
    pointers,
    bounds,
    n0,
    m0,
    ROWS: gl.constexpr,
    COLUMNS: gl.constexpr,
    SUMS: gl.constexpr,
    FORM: gl.constexpr,
    HAS_X_SCALE: gl.constexpr,
):
    """-> what the rows and what the columns of a tile are multiplied by."""
    out, row_scale, x_scale, bias, partial, counters = pointers
    m, n, stride = bounds
    # E4M3 holds value * 2**(6 - delta), the layout's row scale undoes value * 2**(1 - delta).
    GAIN: gl.constexpr = 2.0**-5 if FORM == "e4m3" else 1.0
    rows = n0 + gl.arange(0, ROWS, gl.SliceLayout(1, SUMS))
    of_rows = gl.load(row_scale + rows, mask=rows < n, other=0.0) * GAIN
    of_columns = of_rows
    if HAS_X_SCALE:
        columns = m0 + gl.arange(0, COLUMNS, _columns_layout(COLUMNS))
        of_columns = gl.load(x_scale + columns, mask=columns < m, other=0.0)
    return of_rows, of_columns


@gluon.jit
def _store(
    y,
    scales,
    pointers,
    bounds,
    alpha,
    n0,
    m0,
    ROWS: gl.constexpr,
    COLUMNS: gl.constexpr,
    SUMS: gl.constexpr,
    HAS_X_SCALE: gl.constexpr,
    HAS_BIAS: gl.constexpr,
):
    """The epilogue in float32, then y^T in rows of 128 bytes a warpgroup. Some columns at a time, or registers run out."""
    if COLUMNS > 64:
        of_rows, of_columns = scales
        HALF: gl.constexpr = COLUMNS // 2
        SUMS_OF_HALF: gl.constexpr = _halved(SUMS)
        low, high = y.reshape([ROWS, 2, HALF]).permute([0, 2, 1]).split()
        low = gl.convert_layout(low, SUMS_OF_HALF, assert_trivial=True)
        high = gl.convert_layout(high, SUMS_OF_HALF, assert_trivial=True)
        of_rows = gl.convert_layout(of_rows, gl.SliceLayout(1, SUMS_OF_HALF), assert_trivial=True)
        of_low, of_high = of_rows, of_rows
        if HAS_X_SCALE:
            of_low, of_high = of_columns.reshape([2, HALF]).permute([1, 0]).split()
        _store(low, (of_rows, of_low), pointers, bounds, alpha, n0, m0, ROWS, HALF, SUMS_OF_HALF, HAS_X_SCALE, HAS_BIAS)
        _store(
            high, (of_rows, of_high), pointers, bounds, alpha, n0, m0 + HALF, ROWS, HALF, SUMS_OF_HALF, HAS_X_SCALE, HAS_BIAS
        )
    else:
        _store_columns(y, scales, pointers, bounds, alpha, n0, m0, ROWS, COLUMNS, SUMS, HAS_X_SCALE, HAS_BIAS)


@gluon.constexpr_function
def _halved(sums):
    """The layout of half as many columns."""
    rows, columns, depth = sums.instr_shape
    return gl.NVMMADistributedLayout(sums.version, sums.warps_per_cta, [rows, columns // 2, depth])


@gluon.jit
def _store_columns(
    y,
    scales,
    pointers,
    bounds,
    alpha,
    n0,
    m0,
    ROWS: gl.constexpr,
    COLUMNS: gl.constexpr,
    SUMS: gl.constexpr,
    HAS_X_SCALE: gl.constexpr,
    HAS_BIAS: gl.constexpr,
):
    out, row_scale, x_scale, bias, partial, counters = pointers
    m, n, stride = bounds
    of_rows, of_columns = scales
    y = y * of_rows[:, None]
    if HAS_X_SCALE:
        y = y * gl.convert_layout(of_columns, gl.SliceLayout(0, SUMS))[None, :]
    y = y * alpha
    if HAS_BIAS:
        rows = n0 + gl.arange(0, ROWS, gl.SliceLayout(1, SUMS))
        y = y + gl.load(bias + rows, mask=rows < n, other=0.0).to(gl.float32)[:, None]
    LANES: gl.constexpr = 8 if ROWS == 64 else 16
    OUT: gl.constexpr = gl.BlockedLayout([1, 8], [32 // LANES, LANES], [4, 1], [1, 0])
    transposed = gl.convert_layout(y.to(out.dtype.element_ty).permute((1, 0)), OUT)
    at_m = m0 + gl.arange(0, COLUMNS, gl.SliceLayout(1, OUT))
    at_n = n0 + gl.arange(0, ROWS, gl.SliceLayout(0, OUT))
    at = out + at_m.to(gl.int64)[:, None] * stride + at_n[None, :]
    gl.store(at, transposed, mask=(at_m < m)[:, None] & (at_n < n)[None, :])


# Sizes that 16 divides, and those that are 1, would get kernels of their own: the same code, compiled anew.
@gluon.jit(do_not_specialize=["m", "ctas", "shared", "tiles", "steps", "n_tiles", "m_tiles"])
def _kernel(
    x_tiles,
    words,
    scales,
    out,
    row_scale,
    x_scale,
    bias,
    partial,
    counters,
    m,
    n,
    stride,
    ctas,
    shared,
    tiles,
    steps,
    n_tiles,
    m_tiles,
    alpha,
    REPEATS: gl.constexpr,
    WARPGROUPS: gl.constexpr,
    COLUMNS: gl.constexpr,
    UNITS: gl.constexpr,
    SPLIT: gl.constexpr,
    STAGES: gl.constexpr,
    GROUP: gl.constexpr,
    FORM: gl.constexpr,
    TWO_LEVEL: gl.constexpr,
    IN_BYTES: gl.constexpr,
    SHARERS: gl.constexpr,
    HAS_X_SCALE: gl.constexpr,
    HAS_BIAS: gl.constexpr,
    REGISTERS: gl.constexpr,
):
    x_buffer = gl.allocate_shared_memory(x_tiles.dtype, [STAGES] + x_tiles.block_type.shape, x_tiles.layout)
    words_buffer = gl.allocate_shared_memory(words.dtype, [STAGES] + words.block_type.shape, words.layout)
    scales_buffer = gl.allocate_shared_memory(scales.dtype, [STAGES] + scales.block_type.shape, scales.layout)
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for stage in gl.static_range(STAGES):
        mbarrier.init(full.index(stage), count=1)
        mbarrier.init(empty.index(stage), count=WARPGROUPS // SPLIT)
    if SPLIT > 1:
        SUMS_SIZE: gl.constexpr = 64 * REPEATS * COLUMNS
        handed = gl.allocate_shared_memory(gl.float32, [SPLIT - 1, SUMS_SIZE], gl.SwizzledSharedLayout(1, 1, 1, [0]))
        ready = gl.allocate_shared_memory(gl.int64, [SPLIT - 1, 1], mbarrier.MBarrierLayout())
        free = gl.allocate_shared_memory(gl.int64, [SPLIT - 1, 1], mbarrier.MBarrierLayout())
        for other in gl.static_range(SPLIT - 1):
            mbarrier.init(ready.index(other), count=1)
            mbarrier.init(free.index(other), count=1)
        handover = (handed, ready, free)
    else:
        handover = (full, full, full)  # not used
    hopper.fence_async_shared()
    buffers = (x_buffer, words_buffer, scales_buffer)
    barriers = (full, empty)
    schedule = (ctas, shared, tiles, steps, n_tiles, m_tiles)
    pointers = (out, row_scale, x_scale, bias, partial, counters)
    bounds = (m, n, stride)
    load = ((x_tiles, words, scales), buffers, barriers, schedule, SPLIT, STAGES, GROUP)
    sides = (buffers, barriers, handover, pointers, schedule, bounds, alpha)
    # The partitions are written out: tuples that hold FORM, a string, cannot be put together.
    # fmt: off
    if WARPGROUPS == 1:
        gl.warp_specialize(
            [
                (_consume, (sides, 0, WARPGROUPS, REPEATS, COLUMNS, UNITS, SPLIT, STAGES, GROUP,
                              FORM, TWO_LEVEL, IN_BYTES, SHARERS, HAS_X_SCALE, HAS_BIAS)),
                (_produce, load),
            ],
            [1],
            [24],
        )
    elif WARPGROUPS == 2:
        gl.warp_specialize(
            [
                (_consume, (sides, 0, WARPGROUPS, REPEATS, COLUMNS, UNITS, SPLIT, STAGES, GROUP,
                              FORM, TWO_LEVEL, IN_BYTES, SHARERS, HAS_X_SCALE, HAS_BIAS)),
                (_consume, (sides, 1, WARPGROUPS, REPEATS, COLUMNS, UNITS, SPLIT, STAGES, GROUP,
                              FORM, TWO_LEVEL, IN_BYTES, SHARERS, HAS_X_SCALE, HAS_BIAS)),
                (_produce, load),
            ],
            [4, 1],
            [REGISTERS, 24],
        )
    else:
        gl.warp_specialize(
            [
                (_consume, (sides, 0, WARPGROUPS, REPEATS, COLUMNS, UNITS, SPLIT, STAGES, GROUP,
                              FORM, TWO_LEVEL, IN_BYTES, SHARERS, HAS_X_SCALE, HAS_BIAS)),
                (_consume, (sides, 1, WARPGROUPS, REPEATS, COLUMNS, UNITS, SPLIT, STAGES, GROUP,
                              FORM, TWO_LEVEL, IN_BYTES, SHARERS, HAS_X_SCALE, HAS_BIAS)),
                (_consume, (sides, 2, WARPGROUPS, REPEATS, COLUMNS, UNITS, SPLIT, STAGES, GROUP,
                              FORM, TWO_LEVEL, IN_BYTES, SHARERS, HAS_X_SCALE, HAS_BIAS)),
                (_consume, (sides, 3, WARPGROUPS, REPEATS, COLUMNS, UNITS, SPLIT, STAGES, GROUP,
                              FORM, TWO_LEVEL, IN_BYTES, SHARERS, HAS_X_SCALE, HAS_BIAS)),
                (_produce, load),
            ],
            [4, 4, 4, 1],
            [REGISTERS, REGISTERS, REGISTERS, 24],
        )
    # fmt: on
