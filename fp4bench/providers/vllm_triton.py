"""vLLM's FP8 experts in Triton, which FP4 experts have to beat: `fused_experts` of vLLM 0.26.0, its launches and all.

Weights and activations are E4M3 with a float32 scale, amax / 448, a tensor, a row, or a block of 128 (`Fp8Scaling`). Weights
are quantized here, activations within the call, by the operators of vLLM's libraries; the launch is that of vLLM's table for
this GPU where it has one, else its default. Products are summed up in the tensor cores alone.

Its kernel scales tensors, rows with channels, or blocks. Rows with tensors, and tensors with channels, are the second with a
scale that is read again for every row, as vLLM does not offer it: the kernel is the same.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch

from fp4bench.devices import Device
from fp4bench.formats import ScaleRule
from fp4bench.problems import CUT_FP8_SUMS, Accumulation, ExpertWeights, Fp8Scaling, MoeInputs, MoeProblem, Problem
from fp4bench.providers import Phased, Runner, import_optional, vllm_fused_moe, vllm_moe, vllm_ops
from fp4bench.quantize import quantize_fp8_tiles

_QUANTIZE = {
    "tensor": "dynamic_scaled_fp8_quant",
    "token": "dynamic_per_token_scaled_fp8_quant",
    "block": "per_token_group_fp8_quant",
}
_BLOCK = 128
_E4M3_MAX = 448.0
_SMALLEST_AMAX = 1e-10  # of a block; vLLM's


class VllmTritonProvider:
    """FP8 MoE layers by `invoke_fused_moe_triton_kernel` of vLLM's `fused_moe.py`."""

    name = "vllm_triton"
    ops = ("moe",)
    modes = ("fp8",)
    rules: Mapping[str, tuple[ScaleRule, ...]] = {}

    def __init__(self) -> None:
        self.version = vllm_ops.MAIN.version() if vllm_ops.python_file(vllm_fused_moe.FILE) else None

    def why_not(self, problem: Problem, device: Device) -> str | None:
        assert isinstance(problem, MoeProblem)
        assert problem.fp8 is not None
        if not device.has_fp8:
            return f"{device.name} has no FP8 tensor cores (compute capability 8.9 or later)"
        assert device.capability is not None
        steps = (_QUANTIZE[problem.fp8.activations], vllm_moe.gate_operator(problem.activation))
        if reason := vllm_ops.MAIN.why_not(device.capability, *steps):
            return reason
        if reason := vllm_ops.MOE.why_not(device.capability, vllm_moe.ALIGN, vllm_moe.SUM):
            return reason
        if vllm_ops.python_file(vllm_fused_moe.FILE) is None:
            return f"this vLLM has no {vllm_fused_moe.FILE}: its Triton kernels are Python"
        if import_optional("triton") is None:
            return "Triton is not installed"
        if problem.fp8.activations == "block" and (problem.hidden % _BLOCK or problem.intermediate % _BLOCK):
            return (
                f"vLLM takes blocks of {_BLOCK} in sizes that hold whole ones, not {problem.hidden} and {problem.intermediate}"
            )
        return None

    def accumulation(self, problem: MoeProblem, device: Device) -> Accumulation:
        """Nothing but the tensor cores adds up."""
        return CUT_FP8_SUMS

    def prepare(self, problem: Any, inputs: MoeInputs) -> Runner:
        """Copies of the inputs share the quantized weights."""
        x, pairs = inputs.x, problem.m * problem.topk
        if not pairs:
            return lambda: torch.empty_like(x)
        path = vllm_ops.python_file(vllm_fused_moe.FILE)
        assert path is not None  # why_not has asked
        module = vllm_fused_moe.load(path)
        config = _launch(module, problem)
        first, second = inputs.weights.keep(("vllm_triton", problem.fp8), lambda: _layer(problem, inputs.weights))
        tiles, route = _routed(problem, inputs.topk_ids, config["BLOCK_SIZE_M"])
        sums, parts = x.new_empty(problem.m, problem.topk, first.n), x.new_empty(problem.m, problem.topk, problem.hidden)
        hidden, out = x.new_empty(pairs, problem.intermediate), torch.empty_like(x)
        codes, scales, quantize = _activations(x, problem.fp8)
        hidden_codes, hidden_scales, quantize_hidden = _activations(hidden, problem.fp8)

        def product(a: torch.Tensor, a_scales: torch.Tensor, w: _Experts, c: torch.Tensor, topk: int, weighted: bool) -> Runner:
            arguments = _arguments(problem.fp8, config, tiles, a, a_scales, w, c, inputs.topk_weights, topk, weighted)
            return lambda: module.invoke_fused_moe_triton_kernel(**arguments)

        return Phased(
            {
                "quantize": quantize,
                "route": route,
                "gemm1": product(codes, scales, first, sums, problem.topk, False),
                "activation": vllm_moe.gate(sums.view(pairs, first.n), hidden, problem.activation),
                "quantize2": quantize_hidden,
                "gemm2": product(hidden_codes, hidden_scales, second, parts, 1, True),
                "combine": vllm_moe.add_up(parts, out),
            }
        )


@dataclass(frozen=True, eq=False)
class _Experts:
    """codes: E4M3 (experts, n, k). scales: float32 (experts), (experts, n), or by blocks (experts, n / 128, k / 128)."""

    codes: torch.Tensor
    scales: torch.Tensor
    bias: torch.Tensor | None

    @property
    def n(self) -> int:
        return self.codes.shape[1]


def _launch(module: ModuleType, problem: MoeProblem) -> dict[str, int]:
    """Tile sizes and the like, as vLLM chooses them: its table's for the nearest m, else by default."""
    block = _BLOCK if problem.fp8 and problem.fp8.activations == "block" else 0
    tuned = module.get_moe_configs(problem.experts, problem.intermediate, "fp8_w8a8", block, block)
    if tuned:
        return dict(tuned[min(tuned, key=lambda m: abs(m - problem.m))])
    shape = [block, block] if block else None
    return dict(
        module.get_default_config(
            problem.m, problem.experts, problem.intermediate, problem.hidden, problem.topk, "fp8_w8a8", shape
        )
    )


def _arguments(
    scaling: Fp8Scaling,
    config: dict[str, int],
    tiles: vllm_moe.Tiles,
    a: torch.Tensor,
    a_scales: torch.Tensor,
    w: _Experts,
    c: torch.Tensor,
    topk_weights: torch.Tensor,
    topk: int,
    weighted: bool,
) -> dict[str, Any]:
    import triton.language as tl

    return {
        "A": a,
        "B": w.codes,
        "C": c,
        "A_scale": a_scales,
        "B_scale": w.scales,
        "B_bias": w.bias,
        "topk_weights": topk_weights,
        "sorted_token_ids": tiles.pairs if len(tiles.pairs) else None,
        "expert_ids": tiles.experts,
        "num_tokens_post_padded": tiles.rows,
        "mul_routed_weight": weighted,
        "top_k": topk,
        "config": config,
        "compute_type": tl.bfloat16,
        "use_fp8_w8a8": True,
        "use_int8_w8a8": False,
        "use_int8_w8a16": False,
        "use_int4_w4a16": False,
        "per_channel_quant": _by_rows(scaling),
        "block_shape": [_BLOCK, _BLOCK] if scaling.activations == "block" else None,
    }


def _routed(problem: MoeProblem, topk_ids: torch.Tensor, rows: int) -> tuple[vllm_moe.Tiles, Runner]:
    """Tiles, and what fills them. With few pairs for many experts each is a tile by itself, in no order (vLLM 0.26.0)."""
    pairs = topk_ids.numel()
    if 4 * pairs > problem.experts:
        return vllm_moe.tiles(topk_ids, problem.experts, rows)
    alone = vllm_moe.Tiles(topk_ids.new_empty(0), topk_ids.view(-1), topk_ids.new_empty(1))
    return alone, lambda: alone.rows.fill_(pairs * rows)


def _activations(x: torch.Tensor, scaling: Fp8Scaling) -> tuple[torch.Tensor, torch.Tensor, Runner]:
    """E4M3 codes and float32 scales of x (rows, k) for the kernel, and what fills them."""
    rows, k = x.shape
    codes = torch.empty_like(x, dtype=torch.float8_e4m3fn)
    shape = {"tensor": (1,), "token": (rows, 1), "block": (rows, k // _BLOCK)}[scaling.activations]
    scales = torch.empty(shape, dtype=torch.float32, device=x.device)
    operator = vllm_ops.MAIN.operator(_QUANTIZE[scaling.activations])
    if scaling.activations == "block":
        given: dict[str, Any] = {"input": x, "output_q": codes, "output_s": scales, "group_size": _BLOCK}
        given |= {"eps": _SMALLEST_AMAX, "fp8_min": -_E4M3_MAX, "fp8_max": _E4M3_MAX, "scale_ue8m0": False}
    else:
        given = {"result": codes, "input": x, "scale": scales}
    without = {"scale_ub": None, "dummy_is_scale_transposed": False, "dummy_is_tma_aligned": False}
    arguments = vllm_ops.arguments(operator, given, without)
    every = scales.view(1, 1).expand(rows, 1) if scaling.activations == "tensor" and _by_rows(scaling) else scales
    return codes, every, lambda: operator(*arguments)


def _by_rows(scaling: Fp8Scaling) -> bool:
    """Whether the kernel has to read a scale for each row or channel."""
    return "token" in scaling.activations or "channel" in scaling.weights


def _layer(problem: MoeProblem, weights: ExpertWeights) -> tuple[_Experts, _Experts]:
    """Both products' weights. One expert's bfloat16 weights are there at a time."""
    biases = [[b for e in range(problem.experts) if (b := of(e)) is not None] for of in (weights.b13, weights.b2)]
    b13, b2 = (torch.stack(found) if found else None for found in biases)
    return _quantized(problem, weights.all_w13(), b13), _quantized(problem, weights.all_w2(), b2)


def _quantized(problem: MoeProblem, weights: Iterator[torch.Tensor], bias: torch.Tensor | None) -> _Experts:
    scaling = problem.fp8
    assert scaling is not None
    quantized = (quantize_fp8_tiles(w, *scaling.weight_tile) for w in weights)
    codes, scales = zip(*((q.values, q.scales) for q in quantized), strict=True)
    stacked = torch.stack(scales)  # (experts, tiles of rows, tiles of k)
    if scaling.weights == "tensor":
        stacked = stacked.flatten()
        if _by_rows(scaling):
            stacked = stacked[:, None].expand(-1, codes[0].shape[0])
    elif scaling.weights == "channel":
        stacked = stacked[:, :, 0]
    return _Experts(torch.stack([c.view(torch.uint8) for c in codes]).view(codes[0].dtype), stacked, bias)
