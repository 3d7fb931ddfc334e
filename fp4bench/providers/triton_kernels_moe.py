"""MoE layers of gpt-oss by triton_kernels, as vLLM 0.26.0 calls it: the part of the provider `triton_kernels`.

Tokens are ordered, and the layer computed, by functions of vLLM's file (`vllm_fused_moe.OGS_FILE`): gate and up in turn, the
activation in the first product, the weighted sum in the second. Weights of a token's experts are rounded to bfloat16, and no
product is split along k, as vLLM has it; the latter is set during a call alone.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import torch

from fp4bench.formats import MXFP4, ScaleRule
from fp4bench.problems import ExpertWeights, MoeInputs, MoeProblem
from fp4bench.providers import Phased, Runner, vllm_fused_moe, vllm_ops
from fp4bench.providers.triton_kernels_layout import Modules, laid_out
from fp4bench.quantize import Quantized, quantize

_UNSPLIT = {"split_k": 1}


def why_not_moe(problem: MoeProblem) -> str | None:
    """What keeps `prepare_moe` from a problem, or None."""
    if vllm_ops.python_file(vllm_fused_moe.OGS_FILE) is None:
        return f"this vLLM has no {vllm_fused_moe.OGS_FILE}, which calls triton_kernels for experts"
    if problem.activation.limit is None:
        return "vLLM has triton_kernels apply the activation of gpt-oss alone"
    if problem.hidden % 64 or problem.intermediate % 64 or min(problem.hidden, problem.intermediate) < 256:
        sizes = f"{problem.hidden} and {problem.intermediate}"
        return f"triton_kernels is given experts with sizes that are multiples of 64, and at least 256, not {sizes}"
    return None


def prepare_moe(problem: MoeProblem, inputs: MoeInputs) -> Runner:
    """Copies of the inputs share the weights' layout."""
    x = inputs.x
    if not problem.m:
        return lambda: torch.empty_like(x)
    modules = Modules()  # before vLLM's file, which imports it
    path = vllm_ops.python_file(vllm_fused_moe.OGS_FILE)
    assert path is not None  # why_not has asked
    vllm = vllm_fused_moe.load(path)
    first, second, config = inputs.weights.keep("triton_kernels", lambda: _layer(problem, inputs.weights, modules))
    out, hidden = torch.empty_like(x), x.new_empty(1, problem.m * problem.topk, problem.intermediate)
    routed: list[Any] = []

    def route() -> None:
        routed[:] = vllm.make_routing_data(inputs.topk_ids, inputs.topk_weights, problem.experts)

    def experts() -> torch.Tensor:
        with _constrained(modules.opt_flags, _UNSPLIT):
            vllm.triton_kernel_fused_experts(
                out,
                x,
                first,
                second,
                *routed,
                problem.topk,
                activation=vllm.MoEActivation.SWIGLUOAI,
                quant_config=config,
                swiglu_alpha=problem.activation.alpha,
                swiglu_limit=problem.activation.limit,
                intermediate_cache=hidden,
            )
        return out

    return Phased({"route": route, "experts": experts})


@contextmanager
def _constrained(opt_flags: Any, constraints: dict[str, Any]) -> Iterator[None]:
    """triton_kernels' choice of launches under constraints, which are those of all its calls while they are set."""
    before = dict(opt_flags._opt_flags_constraints)
    opt_flags.update_opt_flags_constraints(constraints)
    try:
        yield
    finally:
        opt_flags.reset_opt_flags_constraints()
        opt_flags.update_opt_flags_constraints(before)


def _layer(problem: MoeProblem, weights: ExpertWeights, modules: Modules) -> tuple[Any, Any, SimpleNamespace]:
    """Both products' weights, and vLLM's configuration of scales and biases."""
    capability = torch.cuda.get_device_capability(weights.device)

    def quantized(w: torch.Tensor) -> Quantized:
        return quantize(w, MXFP4, rule=ScaleRule.FLOOR)

    first, first_precision = laid_out((quantized(_interleaved(w)) for w in weights.all_w13()), modules, capability)
    second, second_precision = laid_out(map(quantized, weights.all_w2()), modules, capability)
    config = SimpleNamespace(
        w1_precision=first_precision,
        w2_precision=second_precision,
        w1_bias=_biases(problem, weights.b13, _interleaved),
        w2_bias=_biases(problem, weights.b2, lambda b: b),
    )
    return first, second, config


def _interleaved(w: torch.Tensor) -> torch.Tensor:
    """Rows of gates and of what they gate in turn, of gates and then the others."""
    return w.unflatten(0, (2, -1)).transpose(0, 1).flatten(0, 1)


def _biases(
    problem: MoeProblem, of_expert: Callable[[int], torch.Tensor | None], order: Callable[[torch.Tensor], torch.Tensor]
) -> torch.Tensor | None:
    """float32 (experts, n), or None."""
    found = [order(b).float() for e in range(problem.experts) if (b := of_expert(e)) is not None]
    return torch.stack(found) if found else None
