"""Encode scales of a MoE layer's NVFP4 activations, known beforehand, as servers have them: of x its own, of what lies between
the products that of these inputs, which float32 products find once.
"""

import torch

from fp4bench.formats import NVFP4
from fp4bench.problems import MoeInputs, MoeProblem
from fp4bench.quantize import decode, quantize

_LARGEST = 448.0 * 6.0  # block scale times code: what a tensor's largest value becomes


def encode_scales(problem: MoeProblem, inputs: MoeInputs) -> tuple[torch.Tensor, torch.Tensor]:
    """Of x, and of what lies between the products. float32 () each."""
    return _encode_scale(inputs.x), _encode_scale(_between(problem, inputs))


def _encode_scale(values: torch.Tensor) -> torch.Tensor:
    amax = values.abs().amax().float()
    return torch.where(amax > 0, torch.full_like(amax, _LARGEST) / amax, 1.0)


def _between(problem: MoeProblem, inputs: MoeInputs) -> torch.Tensor:
    """What lies between the products, by float32 products of quantized operands, (pairs, intermediate)."""
    x, w, ids = decode(quantize(inputs.x, NVFP4)), inputs.weights, inputs.topk_ids.flatten()
    between = x.new_empty(len(ids), problem.intermediate)
    for expert in ids.unique().tolist():
        at = (ids == expert).nonzero()[:, 0]
        sums = x[at // problem.topk] @ decode(quantize(w.w13(expert), NVFP4)).T
        if (bias := w.b13(expert)) is not None:
            sums += bias
        gate, up = sums.chunk(2, dim=-1)
        if (limit := problem.activation.limit) is not None:
            gate, up = gate.clamp(max=limit), up.clamp(-limit, limit) + 1
        between[at] = gate * torch.sigmoid(problem.activation.alpha * gate) * up
    return between
