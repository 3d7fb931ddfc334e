"""MoE layers by eager quantization and decoding, expert by expert in float32: the part of the provider `eager`."""

from collections.abc import Callable

import torch

from fp4bench.formats import BlockFormat
from fp4bench.problems import MoeInputs, MoeProblem
from fp4bench.providers import Runner
from fp4bench.quantize import Quantized, RowQuantized, decode, decode_fp8_rows, quantize, quantize_fp8_rows

Rows = torch.Tensor | Quantized | RowQuantized


def prepare_moe(problem: MoeProblem, inputs: MoeInputs) -> Runner:
    """Weights are quantized once, and decoded on each call if a token needs them. It waits for the device: no CUDA graph."""
    fmt, w = problem.format, inputs.weights
    assert fmt is not None
    layer = w.keep(
        "eager " + fmt.name, lambda: [tuple(quantize(part, fmt) for part in (w.w13(e), w.w2(e))) for e in range(w.experts)]
    )
    activations = _activations(problem, fmt)
    act = _activation(problem)

    def run() -> torch.Tensor:
        x = _decoded(activations(inputs.x))
        experts = inputs.topk_ids.flatten()
        pairs = x.new_empty(len(experts), problem.intermediate)
        hit = [(expert, (experts == expert).nonzero()[:, 0]) for expert in experts.unique().tolist()]
        for expert, at in hit:
            sums = x[at // problem.topk] @ decode(layer[expert][0]).T
            pairs[at] = act(_plus(sums, w.b13(expert)))
        pairs = _decoded(activations(pairs))
        out = x.new_empty(len(experts), problem.hidden)
        for expert, at in hit:
            out[at] = _plus(pairs[at] @ decode(layer[expert][1]).T, w.b2(expert))
        weighted = inputs.topk_weights[..., None] * out.unflatten(0, (problem.m, problem.topk))
        return weighted.sum(dim=1).to(torch.bfloat16)

    return run


def _activations(problem: MoeProblem, fmt: BlockFormat) -> Callable[[torch.Tensor], Rows]:
    if problem.mode.activations == "fp4":
        return lambda x: quantize(x, fmt)
    return quantize_fp8_rows if problem.mode.activations == "fp8" else torch.Tensor.float


def _activation(problem: MoeProblem) -> Callable[[torch.Tensor], torch.Tensor]:
    how = problem.activation

    def act(sums: torch.Tensor) -> torch.Tensor:
        gate, up = sums.chunk(2, dim=-1)
        if how.limit is not None:
            gate, up = gate.clamp(max=how.limit), up.clamp(-how.limit, how.limit) + 1
        return gate * torch.sigmoid(how.alpha * gate) * up

    return act


def _decoded(rows: Rows) -> torch.Tensor:
    if isinstance(rows, Quantized):
        return decode(rows)
    return decode_fp8_rows(rows) if isinstance(rows, RowQuantized) else rows


def _plus(sums: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    return sums if bias is None else sums + bias.float()
