"""MoE layers in BF16 by torch's grouped products: the part of the provider `torch`."""

from typing import Any

import torch
from torch.nn.functional import silu

from fp4bench.devices import Device
from fp4bench.problems import MoeInputs, MoeProblem
from fp4bench.providers import Runner


def why_not_moe(problem: MoeProblem, device: Device) -> str | None:
    """What keeps `prepare_moe` from a problem, or None."""
    if device.is_cuda and device.capability is not None and device.capability < (9, 0):
        return f"torch._grouped_mm needs compute capability 9.0 or later, and {device.name} has less"
    if problem.hidden % 8 or problem.intermediate % 8:
        return f"torch._grouped_mm takes sizes that are multiples of 8, not {problem.hidden} and {problem.intermediate}"
    return None


def prepare_moe(problem: MoeProblem, inputs: MoeInputs) -> Runner:
    """Pairs sorted by expert, two grouped products, and back. Nothing waits for the device: a CUDA graph can hold it."""
    w = inputs.weights
    w13, w2, b13, b2 = w.keep("torch bf16", lambda: (inputs.w13.mT, inputs.w2.mT, inputs.b13, inputs.b2))
    numbers = torch.arange(problem.experts, dtype=torch.int32, device=inputs.x.device)

    def run() -> torch.Tensor:
        experts, order = inputs.topk_ids.flatten().sort(stable=True)
        ends = torch.searchsorted(experts, numbers, right=True, out_int32=True)
        sums = _grouped_mm(inputs.x[order // problem.topk], w13, ends)
        hidden = _activated(problem, sums if b13 is None else sums + b13[experts])
        out = _grouped_mm(hidden, w2, ends)
        out = out if b2 is None else out + b2[experts]
        slots = torch.empty_like(out).index_copy_(0, order, out).unflatten(0, (problem.m, problem.topk))
        return (inputs.topk_weights[..., None] * slots).sum(dim=1).to(torch.bfloat16)

    return run


def _grouped_mm(rows: torch.Tensor, weights: torch.Tensor, ends: torch.Tensor) -> torch.Tensor:
    """Rows up to the first end by the first weight, and so on. (pairs, k), (experts, k, n), int32 (experts) -> (pairs, n)."""
    grouped: Any = torch._grouped_mm  # public since 2.10, as torch.nn.functional.grouped_mm
    return grouped(rows, weights, offs=ends)


def _activated(problem: MoeProblem, sums: torch.Tensor) -> torch.Tensor:
    how = problem.activation
    gate, up = sums.chunk(2, dim=-1)
    if how.limit is None:
        return silu(gate) * up
    gate, up = gate.clamp(max=how.limit), up.clamp(-how.limit, how.limit) + 1
    return gate * torch.sigmoid(how.alpha * gate) * up
