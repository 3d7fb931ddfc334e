"""The steps of vLLM's MoE layers around their products: which tokens an expert's tiles multiply, the gate, the weighted sum.

They are operators of its libraries, called as `fused_experts` and `fused_marlin_moe` of vLLM 0.26.0 do, on buffers that stay:
vLLM allocates them on each call, which a CUDA graph does not.
"""

from dataclasses import dataclass
from typing import Any

import torch

from fp4bench.problems import Activation
from fp4bench.providers import Runner, vllm_ops

ALIGN, SUM = "moe_align_block_size", "moe_sum"


def gate_operator(activation: Activation) -> str:
    """The operator that applies an activation to gates that lie before what they gate."""
    return "silu_and_mul" if activation.limit is None else "silu_and_mul_with_clamp"


@dataclass(frozen=True, eq=False)
class Tiles:
    """Pairs of a token and one of its experts in the order of experts, each expert's padded to whole tiles.

    pairs: int32, token * topk + choice of each row of each tile; padding has the number of pairs, or more.
    experts: int32, of each tile. rows: int32 (1), of all tiles that there are.
    """

    pairs: torch.Tensor
    experts: torch.Tensor
    rows: torch.Tensor


def tiles(topk_ids: torch.Tensor, experts: int, rows: int) -> tuple[Tiles, Runner]:
    """Tiles of so many rows, and what fills them from int32 ids (m, topk)."""
    pairs = topk_ids.numel()
    most = pairs + experts * (rows - 1)
    if pairs < experts:
        most = min(most, pairs * rows)
    buffer = torch.empty(most + -(-most // rows) + 1, dtype=torch.int32, device=topk_ids.device)
    made = Tiles(buffer[:most], buffer[most:-1], buffer[-1:])
    align = vllm_ops.MOE.operator(ALIGN)
    given = {
        "topk_ids": topk_ids,
        "num_experts": experts,
        "block_size": rows,
        "sorted_token_ids": made.pairs,
        "experts_ids": made.experts,
        "num_tokens_post_pad": made.rows,
    }
    arguments = vllm_ops.arguments(align, given, {"maybe_expert_map": None})
    return made, lambda: align(*arguments)


def gate(sums: torch.Tensor, out: torch.Tensor, activation: Activation) -> Runner:
    """What writes the activation of bfloat16 sums (pairs, 2 n), gates first, to `out` (pairs, n)."""
    operator = vllm_ops.MAIN.operator(gate_operator(activation))
    given: dict[str, Any] = {"result": out, "input": sums}
    if activation.limit is not None:  # gate * sigmoid(alpha * gate) * (up + beta), both clamped
        given |= {"limit": activation.limit, "alpha": activation.alpha, "beta": 1.0}
    arguments = vllm_ops.arguments(operator, given, {})
    return lambda: operator(*arguments)


def add_up(parts: torch.Tensor, out: torch.Tensor) -> Runner:
    """What adds the experts' parts (m, topk, hidden) up to `out` (m, hidden), which it returns."""
    operator = vllm_ops.MOE.operator(SUM)
    arguments = vllm_ops.arguments(operator, {"input": parts, "output": out}, {"topk_ids": None, "expert_map": None})

    def run() -> torch.Tensor:
        operator(*arguments)
        return out

    return run
