"""MoE layers by Marlin: the part of the provider `vllm_marlin`, launched as `fused_marlin_moe` of vLLM 0.26.0.

Experts whose intermediate size has no tiles are padded with zeros, once. Products end in bfloat16; the second one weights them;
then the experts' parts are added up.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch.nn.functional import pad

from fp4bench.formats import NVFP4, ScaleRule
from fp4bench.problems import ExpertWeights, MoeInputs, MoeProblem
from fp4bench.providers import Phased, Runner, marlin_layout, vllm_moe, vllm_ops
from fp4bench.quantize import Quantized, quantize

_GEMM = "moe_wna16_marlin_gemm"
_TILES = (8, 16, 32, 48, 64)
_BLOCKS_PER_PROCESSOR = 4  # the most that Marlin runs, each with a counter in the workspace


def why_not_moe(problem: MoeProblem, capability: tuple[int, int]) -> str | None:
    """What keeps `prepare_moe` from a problem, or None."""
    if reason := vllm_ops.MOE.why_not(capability, _GEMM, vllm_moe.ALIGN, vllm_moe.SUM):
        return reason
    if problem.hidden % 64:
        return f"Marlin takes experts with a hidden size that is a multiple of 64, not {problem.hidden}"
    if problem.bias and problem.format is NVFP4:
        return "Marlin multiplies a bias by NVFP4's tensor scale (vLLM 0.26.0, whose own NVFP4 experts have none)"
    return vllm_ops.MAIN.why_not(capability, vllm_moe.gate_operator(problem.activation))


def prepare_moe(problem: MoeProblem, inputs: MoeInputs, rule: ScaleRule) -> Runner:
    """Copies of the inputs share the weights' layout. Raises ValueError for scales that Marlin does not take."""
    x, pairs = inputs.x, problem.m * problem.topk
    if not pairs:
        return lambda: torch.empty_like(x)
    first, second = inputs.weights.keep(("vllm_marlin", problem.format), lambda: _layer(problem, inputs.weights, rule))
    rows = rows_of_a_tile(pairs, problem.experts)
    tiles, align = vllm_moe.tiles(inputs.topk_ids, problem.experts, rows)
    sums, hidden = x.new_empty(pairs, first.n), x.new_empty(pairs, second.k)
    parts, out = x.new_empty(pairs, problem.hidden), torch.empty_like(x)
    shared = {
        "workspace": torch.zeros(
            _BLOCKS_PER_PROCESSOR * marlin_layout.processors(x.device), dtype=torch.int32, device=x.device
        ),
        "sorted_token_ids": tiles.pairs,
        "expert_ids": tiles.experts,
        "num_tokens_past_padded": tiles.rows,
        "topk_weights": inputs.topk_weights,
        "moe_block_size": rows,
    }
    return Phased(
        {
            "route": align,
            "gemm1": first.product(x, sums, problem.topk, False, shared),
            "activation": vllm_moe.gate(sums, hidden, problem.activation),
            "gemm2": second.product(hidden, parts, 1, True, shared),
            "combine": vllm_moe.add_up(parts.unflatten(0, (problem.m, problem.topk)), out),
        }
    )


def rows_of_a_tile(pairs: int, experts: int) -> int:
    """vLLM's choice: the fewest rows of which an expert's tokens fill no more than nine tenths, if all had the same number."""
    return next((rows for rows in _TILES if pairs / experts / rows < 0.9), _TILES[-1])


@dataclass(frozen=True, eq=False)
class MarlinExperts:
    """One product's weights of all experts, as Marlin reads them.

    codes: int32 (experts, k / 16, 2 n). scales: (experts, k / block, n). factors: float32 (experts) of NVFP4, or None.
    bias: bfloat16 (experts, n), or None. n and k are those with padding.
    """

    n: int
    k: int
    codes: torch.Tensor
    scales: torch.Tensor
    factors: torch.Tensor | None
    bias: torch.Tensor | None

    def product(self, x: torch.Tensor, out: torch.Tensor, topk: int, weighted: bool, shared: dict[str, Any]) -> Runner:
        """What multiplies rows of x (rows, k), each by its `topk` experts, to `out` (rows * topk, n)."""
        gemm = vllm_ops.MOE.operator(_GEMM)
        given = shared | {
            "a": x,
            "c": out,
            "b_q_weight": self.codes,
            "b_bias": self.bias,
            "b_scales": self.scales,
            "global_scale": self.factors,
            "top_k": topk,
            "mul_topk_weights": weighted,
            "b_type_id": marlin_layout.FLOAT4_E2M1,
            "size_m": len(x),
            "size_n": self.n,
            "size_k": self.k,
            "use_atomic_add": False,
            "use_fp32_reduce": True,
        }
        nothing = dict.fromkeys(("a_scales", "b_zeros", "g_idx", "perm"))
        by_itself = dict.fromkeys(("thread_k", "thread_n", "blocks_per_sm"), -1)
        arguments = vllm_ops.arguments(gemm, given, nothing | by_itself | {"is_full_k": True, "is_zp_float": False})
        return lambda: gemm(*arguments)


def _layer(problem: MoeProblem, weights: ExpertWeights, rule: ScaleRule) -> tuple[MarlinExperts, MarlinExperts]:
    """Both products' weights. One expert's bfloat16 weights are there at a time."""
    assert problem.format is not None
    hidden, wide, fmt = problem.hidden, padded_intermediate(problem), problem.format

    def first(w: torch.Tensor) -> Quantized:
        return _padded(quantize(w, fmt, rule=rule), parts=2, rows=wide, k=hidden)

    def second(w: torch.Tensor) -> Quantized:
        return _padded(quantize(w, fmt, rule=rule), parts=1, rows=hidden, k=wide)

    def biases(of_expert: Callable[[int], torch.Tensor | None], parts: int, rows: int) -> list[torch.Tensor]:
        found = [b for e in range(problem.experts) if (b := of_expert(e)) is not None]
        return [marlin_layout.marlin_bias(_padded_rows(b[:, None], parts, rows)[:, 0]) for b in found]

    return (
        _stacked(2 * wide, hidden, map(first, weights.all_w13()), biases(weights.b13, 2, wide)),
        _stacked(hidden, wide, map(second, weights.all_w2()), biases(weights.b2, 1, hidden)),
    )


def padded_intermediate(problem: MoeProblem) -> int:
    """The next size from which both products have tiles."""
    size = -(-problem.intermediate // 64) * 64
    fits = marlin_layout.fits(2 * size, problem.hidden) and marlin_layout.fits(problem.hidden, size)
    return size if fits else -(-size // 128) * 128


def _stacked(n: int, k: int, weights: Iterable[Quantized], biases: Sequence[torch.Tensor]) -> MarlinExperts:
    laid_out = [(marlin_layout.repacked(w, n, k), *marlin_layout.marlin_scales(w)) for w in weights]
    codes, scales, factors = zip(*laid_out, strict=True)
    of_nvfp4 = [factor for factor in factors if factor is not None]
    return MarlinExperts(
        n,
        k,
        torch.stack(codes),
        torch.stack([s.view(torch.uint8) for s in scales]).view(scales[0].dtype),
        torch.cat(of_nvfp4) if of_nvfp4 else None,
        torch.stack(list(biases)) if biases else None,
    )


def _padded(w: Quantized, parts: int, rows: int, k: int) -> Quantized:
    """Zeros behind each of so many equal parts of the rows, up to `rows` each, and along k."""
    blocks = k // w.format.block_size - w.scales.shape[1]
    codes = pad(_padded_rows(w.codes, parts, rows), (0, k // 2 - w.codes.shape[1]))
    scales = pad(_padded_rows(w.scales.view(torch.uint8), parts, rows), (0, blocks))
    return replace(w, codes=codes, scales=scales.view(w.scales.dtype), k=k)


def _padded_rows(tensor: torch.Tensor, parts: int, rows: int) -> torch.Tensor:
    split = tensor.unflatten(0, (parts, -1))
    return pad(split, (0, 0, 0, rows - split.shape[1])).flatten(0, 1)
