"""A layer of experts in FP4, w4a16: routing order, gated product, product, weighted sum. Four launches, nothing waits.

y[token] = sum over its slots j of weights[token, j] * (act(x[token] W13[e]^T + b13[e]) W2[e]^T + b2[e]), e = ids[token, j]

What lies between is rounded to the type of x once, after the activation; results of a pair stay in float32 until they are added
up, in the order of slots. So a result depends on nothing but its own row of x, and is the same on every run.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch.nn.functional import pad

from fp4bench.kernels import grouped, routing
from fp4bench.kernels.experts import PreparedExperts, gated_rows
from fp4bench.kernels.grouped import GroupedConfig
from fp4bench.models import Activation


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
    """How the two products are launched; their blocks are the same."""

    first: GroupedConfig
    second: GroupedConfig

    def __post_init__(self) -> None:
        if self.first.block != self.second.block:
            raise ValueError(f"blocks of {self.first.block} and of {self.second.block} pairs")


@dataclass(frozen=True, eq=False)
class Workspace:
    """What the kernels of a call leave to one another.

    positions, blocks: as in `routing`. hidden: (pairs, i padded to 64), zeros beyond i. slots: float32 (pairs, hidden).
    """

    positions: torch.Tensor
    blocks: torch.Tensor
    hidden: torch.Tensor
    slots: torch.Tensor


def default_config(m: int, topk: int, experts: int) -> MoeConfig:
    """A launch by arithmetic: blocks of 8 where few experts have more tokens than that, if tokens choose evenly."""
    block = 8 if m <= 8 or m * topk <= 3 * experts else 16
    launch = GroupedConfig(block)
    return MoeConfig(launch, launch)


def bias_of_tiles(bias: torch.Tensor, weight: PreparedExperts) -> torch.Tensor:
    """A bias (experts, n), any float, as the kernels read it. -> float32 (experts, 16 tiles)."""
    rows = bias.float().T
    in_order = gated_rows(rows) if weight.gated else rows
    return pad(in_order, (0, 0, 0, weight.row_scale.shape[1] - in_order.shape[0])).T.contiguous()


def workspace(m: int, topk: int, layer: Layer, config: MoeConfig, dtype: torch.dtype = torch.bfloat16) -> Workspace:
    """Memory for `run` with m tokens of `dtype`, on the device of the weights. Calls that may overlap need one each."""
    device, pairs = layer.first.words.device, m * topk
    most = routing.most_blocks(pairs, layer.experts, config.first.block)
    return Workspace(
        torch.empty(pairs, dtype=torch.int32, device=device),
        torch.empty(most, routing.BLOCK_FIELDS, dtype=torch.int32, device=device),
        torch.zeros(pairs, grouped.padded(layer.second.k), dtype=dtype, device=device),
        torch.empty(pairs, layer.hidden, dtype=torch.float32, device=device),
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
    """The layer for x (m, hidden), bfloat16 or float16, into out of the same type and shape. Returns out.

    ids: int32 (m, topk), weights: float32 (m, topk), both contiguous. Choices outside of 0 .. experts - 1 count for nothing.
    No allocation, no synchronization. pdl: let the kernels overlap with those before and after.
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
) -> Mapping[str, Callable[[], None]]:
    """The launches of `run` by name, in their order; the activation is part of "gemm1". Each may be called again and again."""
    m, topk = ids.shape
    if x.shape != (m, layer.hidden) or out.shape != x.shape or out.dtype != x.dtype or x.dtype != space.hidden.dtype:
        raise ValueError(f"x {tuple(x.shape)} {x.dtype} and out {tuple(out.shape)} {out.dtype} do not fit {m} tokens")
    positions, blocks, hidden, slots = space.positions, space.blocks, space.hidden, space.slots
    return {
        "routing": lambda: routing.order(ids, layer.experts, config.first.block, positions, blocks, pdl=pdl),
        "gemm1": lambda: grouped.gate_up(
            x,
            layer.first,
            positions,
            blocks,
            hidden,
            topk=topk,
            activation=layer.activation,
            config=config.first,
            bias=layer.first_bias,
            pdl=pdl,
        ),
        "gemm2": lambda: grouped.down(
            hidden, layer.second, positions, blocks, slots, config=config.second, bias=layer.second_bias, pdl=pdl
        ),
        "combine": lambda: routing.combine(slots.view(m, topk, -1), ids, layer.experts, weights, out, pdl=pdl),
    }
