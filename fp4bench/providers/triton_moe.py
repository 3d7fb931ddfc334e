"""MoE layers by the kernels of this package: what the provider `triton` does with a problem of operation "moe"."""

from collections.abc import Iterator
from typing import Any

import torch

from fp4bench.problems import ExpertWeights, MoeInputs, MoeProblem
from fp4bench.providers import Phased, Runner
from fp4bench.quantize import Quantized

MODES = ("w4a16", "w4a8")


def why_not_moe(problem: MoeProblem, version: str, gluon: str) -> str | None:
    """What keeps the kernels from computing a layer on a Hopper GPU, or None. gluon: the Triton that the wgmma kernels need."""
    if problem.mode.name == "w4a8" and problem.format is not None and problem.format.has_tensor_scale:
        return f"{problem.format} does not fit E4M3, which FP8 activations multiply"
    if problem.hidden % 2:
        return f"rows of {problem.hidden} elements are not read in pairs"
    if not version.startswith(gluon) and _is_wide(problem):
        return f"for so many tokens an expert, and for FP8, its kernel needs Triton {gluon}*, and {version} is installed"
    return None


def prepare_moe(problem: MoeProblem, inputs: MoeInputs, pdl: bool) -> Runner:
    """Copies of a case's inputs share the weights, and what is made of them here. The output is the same on each call.

    Raises ValueError for a weight that is a sum of weights.
    """
    from fp4bench.kernels import moe

    assert problem.format is not None
    fp8 = problem.mode.name == "w4a8"
    layer = inputs.weights.keep(("triton", problem.format, fp8), lambda: _layer(problem, inputs.weights, fp8))
    config = moe.default_config(problem.m, problem.topk, problem.experts, problem.intermediate, fp8=fp8)
    space = moe.workspace(problem.m, problem.topk, layer, config, fp8=fp8)
    out = torch.empty_like(inputs.x)
    phases = moe.phases(inputs.x, inputs.topk_ids, inputs.topk_weights, layer, out, space=space, config=config, pdl=pdl)
    return Phased(phases)


def _layer(problem: MoeProblem, weights: ExpertWeights, fp8: bool) -> Any:
    """-> `kernels.moe.Layer`. One expert's bfloat16 weights are there at a time."""
    from fp4bench.kernels import moe
    from fp4bench.kernels.experts import prepare_experts
    from fp4bench.kernels.quantize import quantize

    def quantized(parts: Iterator[torch.Tensor]) -> Iterator[Quantized]:
        assert problem.format is not None
        return (quantize(part, problem.format) for part in parts)

    def stacked(parts: Iterator[torch.Tensor | None]) -> torch.Tensor:
        return torch.stack([part for part in parts if part is not None])

    operand = torch.float8_e4m3fn if fp8 else torch.bfloat16
    first = prepare_experts(quantized(weights.all_w13()), problem.experts, gated=True, operand=operand)
    second = prepare_experts(quantized(weights.all_w2()), problem.experts, gated=False, operand=operand)
    if not problem.bias:
        return moe.Layer(first, second, problem.activation)
    b13, b2 = (stacked(map(one, range(problem.experts))) for one in (weights.b13, weights.b2))
    return moe.Layer(first, second, problem.activation, moe.bias_of_tiles(b13, first), moe.bias_of_tiles(b2, second))


def _is_wide(problem: MoeProblem) -> bool:
    from fp4bench.kernels import moe

    fp8 = problem.mode.name == "w4a8"
    return moe.default_config(problem.m, problem.topk, problem.experts, problem.intermediate, fp8=fp8).is_wide
