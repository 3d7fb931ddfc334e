"""A layer of experts in FP4, w4a16 or w4a8: routing order, gated product, product, weighted sum. Nothing waits.

y[token] = sum over its slots j of weights[token, j] * (act(x[token] W13[e]^T + b13[e]) W2[e]^T + b2[e]), e = ids[token, j]

What lies between is rounded to the type of x once, after the activation. The results of a token's pairs are added up in
float32, in the order of slots; for many tokens, where writing them takes time, they are rounded to x's type before. A result
depends on its own row of x alone, and is the same on every run.

For few tokens an expert `grouped` multiplies, the second product `grouped_short` where its k is short: four launches. For many
`grouped_prefill`, whose rows are brought in order first.
In w4a8 the rows of x, and what lies between, are quantized to E4M3 with a scale a row.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from math import ceil
from typing import Any

import torch
from torch.nn.functional import pad

from fp4bench.kernels import grouped, grouped_short, routing
from fp4bench.kernels.experts import PreparedExperts, gated_rows
from fp4bench.kernels.fp8_rows import Columns
from fp4bench.kernels.grouped import GroupedConfig
from fp4bench.kernels.grouped_prefill import product
from fp4bench.kernels.grouped_short import ShortConfig
from fp4bench.kernels.prefill_launch import PrefillConfig
from fp4bench.kernels.quantize import quantize_fp8_rows
from fp4bench.kernels.weights import TILE_N, UNIT_K
from fp4bench.models import Activation
from fp4bench.quantize import RowQuantized


@dataclass(frozen=True, eq=False)
class Layer:
    """The weights of a layer. first: gated (2 i, hidden). second: (hidden, i). Biases: float32, of each row of their tiles."""

    first: PreparedExperts
    second: PreparedExperts
    activation: Activation
    first_bias: torch.Tensor | None = None
    second_bias: torch.Tensor | None = None

    def __post_init__(self) -> None:
        if not self.first.gated or self.second.gated or self.first.experts != self.second.experts:
            raise ValueError("a layer has a gated weight and a plain one of as many experts")
        if (self.first.n // 2, self.first.k) != (self.second.k, self.second.n):
            raise ValueError(f"weights {self.first.n, self.first.k} and {self.second.n, self.second.k} are no layer")

    @property
    def experts(self) -> int:
        """How many there are."""
        return self.first.experts

    @property
    def hidden(self) -> int:
        """Columns of x and y."""
        return self.first.k


@dataclass(frozen=True)
class MoeConfig:
    """How the two products are launched: both by `grouped_prefill`, or both by `grouped`, the second one by `grouped_short`
    where that can. Their blocks are the same.
    """

    first: GroupedConfig | PrefillConfig
    second: GroupedConfig | ShortConfig | PrefillConfig

    def __post_init__(self) -> None:
        if self.is_wide != isinstance(self.second, PrefillConfig) or _block(self.first) != _block(self.second):
            raise ValueError(f"{self.first} and {self.second} have no blocks in common")

    @property
    def is_wide(self) -> bool:
        """Whether `grouped_prefill` computes the products."""
        return isinstance(self.first, PrefillConfig)

    @property
    def block(self) -> int:
        """The most pairs of a block."""
        return _block(self.first)


@dataclass(frozen=True, eq=False)
class Workspace:
    """What the kernels of a call leave to one another, rows in the order of pairs but for the first and the last.

    positions, blocks: as in `routing`. hidden: (pairs, i padded to 64), zeros beyond i. slots: (pairs, hidden).
    rows: x (pairs, hidden padded to 64), for `grouped_prefill`, columns of it and of hidden in the order of `routing.gather`.
    In w4a8 it is E4M3 with `scales`, from `quantized` (m), whose columns are in that order and padded too; and so is
    `hidden_quantized`.
    """

    positions: torch.Tensor
    blocks: torch.Tensor
    hidden: torch.Tensor
    slots: torch.Tensor
    rows: torch.Tensor | None = None
    scales: torch.Tensor | None = None
    quantized: RowQuantized | None = None
    hidden_quantized: RowQuantized | None = None


# The most pairs an expert, on average, for which wgmma multiplies blocks of so many columns. Blocks of 128 do not pay at 64
# pairs: both products of DeepSeek-R1 at m = 2048 in w4a16 3708 us in blocks of 64, 4151 in blocks of 128; in w4a8 2636 and
# 2624, of gpt-oss-120b 805 and 843. These figures and those below: NVIDIA H200,
# baselines/NVIDIA-H200/moe/2026-11-27_launches.jsonl, of products that stored 2 bytes at a time (`grouped_prefill`).
_MEAN_OF_WIDE = ((80, 64), (float("inf"), 128))
_MEAN_OF_WIDE_FP8 = ((12, 16), (24, 32), *_MEAN_OF_WIDE)

_SHORT_WIDE = 512  # columns of k, up to which a tile is so little work that what a CTA stores is hidden by more CTAs an SM
_FEW_CTAS = 264  # two an SM of an H200


def default_config(m: int, topk: int, experts: int, intermediate: int, *, fp8: bool = False) -> MoeConfig:
    """A launch by arithmetic: the narrowest blocks that few experts have more tokens than, if tokens choose evenly.

    fp8: for w4a8, which `grouped_prefill` alone computes.
    """
    mean = m * topk / experts
    if fp8 or mean > 12:
        return _wide_config(mean, intermediate, fp8)
    block = 8 if m <= 8 or mean <= 3 else 16
    first, second = _narrow_configs(block, min(m * topk, experts), intermediate)
    return MoeConfig(first, ShortConfig(block) if grouped_short.fits(intermediate, block) else second)


def _wide_config(mean: float, intermediate: int, fp8: bool) -> MoeConfig:
    """CTAs are two an SM: one stores while the other multiplies. Where k is short there are more of them (DeepSeek-R1 at TP 8,
    m = 1024, w4a8: second product 259 us with four, 276 with two). Few tokens an expert go in long steps (TP 1, m = 256: first
    product 977 us, in steps of 128 1017).
    """
    columns = next(columns for most, columns in (_MEAN_OF_WIDE_FP8 if fp8 else _MEAN_OF_WIDE) if mean <= most)
    if columns < 64:
        narrow = PrefillConfig(64, columns, 256, stages=4, warpgroups=1, ctas=2)
        return MoeConfig(narrow, narrow)
    wide = PrefillConfig(128, columns, 128 if fp8 else 64, 5 if columns == 64 and not fp8 else 4, warpgroups=1, ctas=2)
    if intermediate > _SHORT_WIDE or columns > 64:
        return MoeConfig(wide, wide)
    short = PrefillConfig(64, columns, 128, 3, 1, ctas=4) if fp8 else PrefillConfig(64, columns, 64, 6, 1, ctas=3)
    return MoeConfig(wide, short)


def _narrow_configs(block: int, blocks: int, intermediate: int) -> tuple[GroupedConfig, GroupedConfig]:
    """Of both products. Warps that share k have several units of it each where blocks are wider than 8. Few CTAs, as those of
    experts cut for many GPUs, have more warps, and more units on the way (DeepSeek-R1 at TP 8, m = 1: first product 11.6 us
    instead of 23.3).
    """
    first, units = GroupedConfig(block, ahead=block == 8), ceil(intermediate / UNIT_K)
    if block > 8:
        return first, replace(first, split=4 if units >= 16 else 2 if units >= 8 else 1)
    if blocks * ceil(2 * intermediate / (TILE_N * first.tiles)) <= _FEW_CTAS:
        return GroupedConfig(block, warps=8, depth=2), first
    return first, first  # so little work a CTA that more of them are better


def bias_of_tiles(bias: torch.Tensor, weight: PreparedExperts) -> torch.Tensor:
    """A bias (experts, n), any float, as the kernels read it. -> float32 (experts, 16 tiles)."""
    rows = bias.float().T
    in_order = gated_rows(rows) if weight.gated else rows
    return pad(in_order, (0, 0, 0, weight.row_scale.shape[1] - in_order.shape[0])).T.contiguous()


def workspace(
    m: int, topk: int, layer: Layer, config: MoeConfig, dtype: torch.dtype = torch.bfloat16, *, fp8: bool = False
) -> Workspace:
    """Memory for `run` with m tokens of `dtype`, on the device of the weights. Calls that may overlap need one each.

    fp8: for w4a8. Raises ValueError for a configuration that cannot compute that.
    """
    device, pairs = layer.first.words.device, m * topk
    wide = config.is_wide
    if fp8 and not wide:
        raise ValueError("w4a8 is computed by grouped_prefill alone")
    most = routing.most_blocks(pairs, layer.experts, config.block)
    k, between = grouped.padded(layer.hidden), grouped.padded(layer.second.k)
    return Workspace(
        torch.empty(pairs, dtype=torch.int32, device=device),
        torch.empty(most, routing.BLOCK_FIELDS, dtype=torch.int32, device=device),
        torch.zeros(pairs, between, dtype=dtype, device=device),
        torch.empty(pairs, layer.hidden, dtype=torch.float32 if config.block == 8 else dtype, device=device),
        torch.empty(pairs, k, dtype=torch.float8_e4m3fn if fp8 else dtype, device=device) if wide else None,
        torch.empty(pairs, dtype=torch.float32, device=device) if fp8 else None,
        _empty_rows(m, k, device) if fp8 else None,
        _empty_rows(pairs, between, device) if fp8 else None,
    )


def run(
    x: torch.Tensor,
    ids: torch.Tensor,
    weights: torch.Tensor,
    layer: Layer,
    out: torch.Tensor,
    *,
    space: Workspace,
    config: MoeConfig,
    pdl: bool = False,
) -> torch.Tensor:
    """The layer for x (m, hidden), bfloat16 (or float16, for `grouped`), into out of the same type and shape. Returns out.

    ids: int32 (m, topk), weights: float32 (m, topk), both contiguous. Choices outside of 0 .. experts - 1 count for nothing.
    No allocation, no synchronization. pdl: let the kernels overlap with those before and after, where they can.
    Raises ValueError for shapes, types and a workspace that do not fit.
    """
    for phase in phases(x, ids, weights, layer, out, space=space, config=config, pdl=pdl).values():
        phase()
    return out


def phases(
    x: torch.Tensor,
    ids: torch.Tensor,
    weights: torch.Tensor,
    layer: Layer,
    out: torch.Tensor,
    *,
    space: Workspace,
    config: MoeConfig,
    pdl: bool = False,
) -> Mapping[str, Callable[[], torch.Tensor | None]]:
    """The launches of `run` by name, in their order; the activation is part of "gemm1". Each may be called again and again.

    The last one returns out.
    """
    m, topk = ids.shape
    if x.shape != (m, layer.hidden) or out.shape != x.shape or out.dtype != x.dtype or x.dtype != space.hidden.dtype:
        raise ValueError(f"x {tuple(x.shape)} {x.dtype} and out {tuple(out.shape)} {out.dtype} do not fit {m} tokens")
    if config.is_wide:
        middle = _wide_phases(x, topk, layer, space, config)
    else:
        middle = _narrow_phases(x, topk, layer, space, config, pdl)
    return {
        "routing": lambda: routing.order(ids, layer.experts, config.block, space.positions, space.blocks, pdl=pdl),
        **middle,
        "combine": lambda: routing.combine(space.slots.view(m, topk, -1), ids, layer.experts, weights, out, pdl=pdl),
    }


def _narrow_phases(
    x: torch.Tensor, topk: int, layer: Layer, space: Workspace, config: MoeConfig, pdl: bool
) -> dict[str, Callable[[], None]]:
    first, second = config.first, config.second
    assert isinstance(first, GroupedConfig)
    assert not isinstance(second, PrefillConfig)
    positions, blocks, hidden, slots = space.positions, space.blocks, space.hidden, space.slots
    options: dict[str, Any] = {"topk": topk, "activation": layer.activation}
    of_second: dict[str, Any] = {"bias": layer.second_bias, "pdl": pdl}

    def gemm2() -> None:
        if isinstance(second, ShortConfig):
            grouped_short.down(hidden, layer.second, positions, blocks, slots, config=second, **of_second)
        else:
            grouped.down(hidden, layer.second, positions, blocks, slots, config=second, **of_second)

    return {
        "gemm1": lambda: grouped.gate_up(
            x, layer.first, positions, blocks, hidden, config=first, bias=layer.first_bias, pdl=pdl, **options
        ),
        "gemm2": gemm2,
    }


def _wide_phases(
    x: torch.Tensor, topk: int, layer: Layer, space: Workspace, config: MoeConfig
) -> dict[str, Callable[[], None]]:
    first, second = config.first, config.second
    assert isinstance(first, PrefillConfig)
    assert isinstance(second, PrefillConfig)
    assert space.rows is not None
    positions, blocks, rows, hidden = space.positions, space.blocks, space.rows, space.hidden
    of_x, of_hidden = space.quantized, space.hidden_quantized

    def gemm1() -> None:
        product(
            rows,
            layer.first,
            positions,
            blocks,
            hidden,
            activation=layer.activation,
            config=first,
            x_scale=space.scales,
            bias=layer.first_bias,
        )

    def gemm2(x: torch.Tensor, x_scale: torch.Tensor | None) -> None:
        product(
            x,
            layer.second,
            positions,
            blocks,
            space.slots,
            activation=None,
            config=second,
            x_scale=x_scale,
            bias=layer.second_bias,
        )

    if of_x is None or of_hidden is None:
        return {
            "gather": lambda: routing.gather(x, positions, topk, rows),
            "gemm1": gemm1,
            "gemm2": lambda: gemm2(hidden, None),
        }
    return {
        "quantize": lambda: _quantize(x, Columns.EXPERTS, of_x),
        "gather": lambda: routing.gather(of_x.values, positions, topk, rows, of_x.scales, space.scales),
        "gemm1": gemm1,
        "quantize2": lambda: _quantize(hidden, Columns.FRAGMENTS, of_hidden),
        "gemm2": lambda: gemm2(of_hidden.values, of_hidden.scales),
    }


def _quantize(x: torch.Tensor, columns: Columns, out: RowQuantized) -> None:
    quantize_fp8_rows(x, columns=columns, out=out)


def _block(config: GroupedConfig | ShortConfig | PrefillConfig) -> int:
    return config.columns if isinstance(config, PrefillConfig) else config.block


def _empty_rows(rows: int, columns: int, device: torch.device) -> RowQuantized:
    values = torch.empty(rows, columns, dtype=torch.float8_e4m3fn, device=device)
    return RowQuantized(values, torch.empty(rows, 1, dtype=torch.float32, device=device))
