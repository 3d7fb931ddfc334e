"""MoE layers by Humming: the part of the provider `humming`, as vLLM 0.26.0 calls it (`HummingIndexedExperts`).

Humming has the products. What lies around them are vLLM's kernels: the order of tokens, the gate, and the weighted sum, in
Triton. Launches are Humming's choice for the number of pairs; its choice for the first product gives the rows of a tile.
"""

import json
from collections.abc import Iterator
from typing import Any

import torch

from fp4bench.formats import ScaleRule
from fp4bench.problems import ExpertWeights, MoeInputs, MoeProblem
from fp4bench.providers import Phased, Runner, import_optional, vllm_fused_moe, vllm_moe, vllm_ops
from fp4bench.quantize import quantize

_COMPUTE = json.dumps({"use_batch_invariant": False, "use_f16_accum": False, "gemm_type": "indexed"})
_ROWS = 64  # of a tile, where Humming has no launch for so many pairs


def why_not_moe(problem: MoeProblem, capability: tuple[int, int]) -> str | None:
    """What keeps `prepare_moe` from a problem, or None."""
    if vllm_ops.python_file(vllm_fused_moe.SUM_FILE) is None:
        return f"Humming's MoE layers go by vLLM's kernels around its own, and there is no {vllm_fused_moe.SUM_FILE} of vLLM"
    return vllm_ops.MOE.why_not(capability, vllm_moe.ALIGN) or vllm_ops.MAIN.why_not(
        capability, vllm_moe.gate_operator(problem.activation)
    )


def prepare_moe(problem: MoeProblem, inputs: MoeInputs, rule: ScaleRule, options: dict[str, Any]) -> Runner:
    """Copies of the inputs share the weights' layout.

    options: of every `HummingLayer` of these weights and activations.
    """
    x, pairs = inputs.x, problem.m * problem.topk
    if not pairs:
        return lambda: torch.empty_like(x)
    path = vllm_ops.python_file(vllm_fused_moe.SUM_FILE)
    assert path is not None  # why_not has asked
    add_up = vllm_fused_moe.load(path).moe_fused_mul_sum
    made = inputs.weights.keep(("humming", str(problem.mode), problem.format), lambda: _layers(problem, inputs, rule, options))
    (first, first_launches), (second, second_launches) = made
    tiles, align = vllm_moe.tiles(inputs.topk_ids, problem.experts, _rows(first_launches, pairs))
    sums, hidden = x.new_empty(pairs, 2 * problem.intermediate), x.new_empty(pairs, problem.intermediate)
    parts, out = x.new_empty(problem.m, problem.topk, problem.hidden), torch.empty_like(x)
    shared = {
        "sorted_ids": tiles.pairs,
        "expert_ids": tiles.experts,
        "num_tokens_padded": tiles.rows,
        "compute_config": _COMPUTE,
        "valid_shape_m": pairs,
    }
    first_config, second_config = json.dumps(first_launches), json.dumps(second_launches)
    flat = parts.view(pairs, problem.hidden)

    def combine() -> torch.Tensor:
        add_up(inputs=parts, topk_weights=inputs.topk_weights, outputs=out)
        return out

    return Phased(
        {
            "route": align,
            "gemm1": lambda: first(x, outputs=sums, top_k=problem.topk, tuning_config=first_config, **shared),
            "activation": vllm_moe.gate(sums, hidden, problem.activation),
            "gemm2": lambda: second(hidden, outputs=flat, top_k=1, tuning_config=second_config, **shared),
            "combine": combine,
        }
    )


def _rows(launches: list[Any], pairs: int) -> int:
    """Rows of a tile in the launch for so many pairs: launches are [more than, up to, configuration]."""
    return next((int(launch["block_shape"][0]) for least, most, launch in launches if least < pairs <= most), _ROWS)


def _layers(problem: MoeProblem, inputs: MoeInputs, rule: ScaleRule, options: dict[str, Any]) -> list[tuple[Any, list[Any]]]:
    """Both products: Humming's layer of all experts, and its launches by number of pairs."""
    module, tune, w = import_optional("humming.layer"), import_optional("humming.tune"), inputs.weights
    assert module is not None
    assert tune is not None
    found = []
    for n, k, weights, bias in (
        (2 * problem.intermediate, problem.hidden, w.all_w13(), _biases(w, first=True)),
        (problem.hidden, problem.intermediate, w.all_w2(), _biases(w, first=False)),
    ):
        with torch.device(inputs.x.device), torch.cuda.device_of(inputs.x):
            layer = module.HummingLayer(
                shape_n=n, shape_k=k, num_experts=problem.experts, has_bias=bias is not None, **_copied(options)
            )
        checkpoint = _checkpoint(problem, weights, rule)
        layer.load_from_tensors(checkpoint if bias is None else checkpoint | {"bias": bias})
        layer.transform()
        launches = tune.get_heuristics_config(layer.humming_config, gemm_type="indexed", device=inputs.x.device)
        found.append((layer, launches))
    return found


def _copied(options: dict[str, Any]) -> dict[str, Any]:
    """A layer writes defaults into its configurations."""
    return {name: dict(value) if isinstance(value, dict) else value for name, value in options.items()}


def _checkpoint(problem: MoeProblem, weights: Iterator[torch.Tensor], rule: ScaleRule) -> dict[str, torch.Tensor]:
    """As `humming._checkpoint`, with the experts before all else. One expert's bfloat16 weights are there at a time."""
    assert problem.format is not None
    codes, scales, tensor_scales = [], [], []
    for w in weights:
        q = quantize(w, problem.format, rule=rule)
        codes.append(q.codes)
        scales.append(q.scales.view(torch.uint8))
        if q.tensor_scale is not None:
            tensor_scales.append(1.0 / q.tensor_scale)
    found = {"weight": torch.stack(codes), "weight_scale": torch.stack(scales)}
    if tensor_scales:
        found["weight_scale"] = found["weight_scale"].view(problem.format.scale_dtype)
        found["weight_scale_2"] = torch.stack(tensor_scales)
    return found


def _biases(weights: ExpertWeights, first: bool) -> torch.Tensor | None:
    """bfloat16 (experts, n), or None."""
    of_expert = weights.b13 if first else weights.b2
    found = [b for e in range(weights.experts) if (b := of_expert(e)) is not None]
    return torch.stack(found) if found else None
