"""MoE layers of two FP4 operands by CUTLASS: the part of the provider `vllm_cutlass`, as `run_cutlass_moe_fp4` and
`run_cutlass_moe_mxfp4` of vLLM 0.26.0.

Rows are brought into the order of their experts, quantized, multiplied by each expert's weights, gated and quantized in one
kernel, multiplied again, and brought back. NVFP4's encode scales of both activations are known beforehand (`nvfp4_moe`). vLLM
allocates scales for 163,840 tokens an expert on each call (560 MiB for 8 experts a token and k = 7168); here they are as many
as there can be.

Scales of MXFP4 are by EVEN: the machine code of 0.26.0 for compute capability 10.0 adds 2**21 to the bits of amax. Before
https://github.com/vllm-project/vllm/pull/43557 the rule was another one; 0.20.0, which has it, is refused for the lack of
`mxfp4_experts_quant_supported`.

Products find an expert's scales as if no tile were padded, n * k / block after those of the expert before, and the quantizer
stores them in whole tiles: of experts whose sizes fill none, all but the first would be multiplied by others' scales.

Not run on a GPU so far: the calls are compared with the schemas of the libraries.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch

from fp4bench.formats import MXFP4, NVFP4, BlockFormat, ScaleRule, layouts
from fp4bench.problems import ExpertWeights, MoeInputs, MoeProblem
from fp4bench.providers import Phased, Runner, vllm_moe, vllm_ops
from fp4bench.providers.nvfp4_moe import encode_scales
from fp4bench.quantize import quantize

_DATA, _SHUFFLE, _MX_SUPPORTED = "get_cutlass_moe_mm_data", "shuffle_rows", "mxfp4_experts_quant_supported"
_TILE = 128  # rows of a tile of scales, to which each expert's are padded


@dataclass(frozen=True)
class _Names:
    """A format's operators, and what the sizes of experts are multiples of that fill their tiles of scales, 128 rows of 4."""

    multiply: str
    quantize: str
    silu: str
    hidden: int
    intermediate: int


_OF = {
    NVFP4.name: _Names(
        "cutlass_fp4_group_mm", "scaled_fp4_experts_quant", "silu_and_mul_scaled_fp4_experts_quant", hidden=128, intermediate=64
    ),
    MXFP4.name: _Names(
        "cutlass_mxfp4_group_mm", "mxfp4_experts_quant", "silu_and_mul_mxfp4_experts_quant", hidden=128, intermediate=128
    ),
}


def why_not_moe(problem: MoeProblem, capability: tuple[int, int]) -> str | None:
    """What keeps `prepare_moe` from a problem, or None."""
    assert problem.format is not None
    if problem.bias:
        return "vLLM's FP4 experts by CUTLASS have no bias"
    names = _OF[problem.format.name]
    if problem.hidden % names.hidden or problem.intermediate % names.intermediate:
        return (
            f"vLLM's CUTLASS would take other experts' {problem.format} scales where the hidden size is no multiple of "
            f"{names.hidden} or the intermediate size none of {names.intermediate}, as here, {problem.hidden} and "
            f"{problem.intermediate}: https://github.com/vllm-project/vllm/pull/35497"
        )
    gates = names.silu if problem.activation.limit is None else vllm_moe.gate_operator(problem.activation)
    operators = (_DATA, names.multiply, names.quantize, gates, *([_MX_SUPPORTED] if problem.format is MXFP4 else []))
    if reason := vllm_ops.MAIN.why_not(capability, *operators) or vllm_ops.MOE.why_not(capability, _SHUFFLE):
        return reason
    major, minor = capability
    if problem.format is MXFP4 and not vllm_ops.MAIN.operator(_MX_SUPPORTED)(10 * major + minor):
        return f"this vLLM says that its MXFP4 experts do not run on compute capability {major}.{minor}"
    return None


def prepare_moe(problem: MoeProblem, inputs: MoeInputs, rule: ScaleRule) -> Runner:
    """Copies of the inputs share the weights; each has encode scales of its own."""
    assert problem.format is not None
    names, fmt = _OF[problem.format.name], problem.format
    x, pairs, device = inputs.x, problem.m * problem.topk, inputs.x.device
    if not pairs:
        return lambda: torch.empty_like(x)
    first, second = inputs.weights.keep(("vllm_cutlass", fmt), lambda: _layer(inputs.weights, fmt, rule))
    order = _Order.of(problem, device)
    rows, sums = x.new_empty(pairs, problem.hidden), x.new_empty(pairs, 2 * problem.intermediate)
    parts, back = x.new_empty(pairs, problem.hidden), x.new_empty(pairs, problem.hidden)
    out = torch.empty_like(x)
    x_scale = between_scale = None
    if fmt.has_tensor_scale:
        x_scale, between_scale = encode_scales(problem, inputs)
    x_operand = _Operand.empty(pairs, problem.hidden, problem.experts, fmt, x_scale, device)
    between = _Operand.empty(pairs, problem.intermediate, problem.experts, fmt, between_scale, device)

    if problem.activation.limit is None:
        activate = between.quantizer(names.silu, sums, order)
    else:
        hidden = x.new_empty(pairs, problem.intermediate)
        gate = vllm_moe.gate(sums, hidden, problem.activation)
        quantize_hidden = between.quantizer(names.quantize, hidden, order)

        def activate() -> None:
            gate(), quantize_hidden()

    bring_back = _shuffler(parts, order.back, back)

    def combine() -> torch.Tensor:
        bring_back()
        weighted = back.view(problem.m, problem.topk, -1) * inputs.topk_weights[..., None].to(x.dtype)
        return out.copy_(weighted.sum(dim=1))

    return Phased(
        {
            "route": order.filler(problem, inputs.topk_ids),
            "gather": _shuffler(x, order.there, rows),
            "quantize": x_operand.quantizer(names.quantize, rows, order),
            "gemm1": first.product(x_operand, sums, order.first_sizes, order),
            "activation": activate,
            "gemm2": second.product(between, parts, order.second_sizes, order),
            "combine": combine,
        }
    )


@dataclass(frozen=True, eq=False)
class _Order:
    """Where rows go, int32. there: the token of each row in the order of experts; back: the row of each pair (pairs).

    offsets, scale_offsets: the first row of each expert, and of its scales, which are padded to tiles (experts + 1).
    first_sizes, second_sizes: m, n, k of each expert's products (experts, 3).
    """

    there: torch.Tensor
    back: torch.Tensor
    offsets: torch.Tensor
    scale_offsets: torch.Tensor
    first_sizes: torch.Tensor
    second_sizes: torch.Tensor

    @classmethod
    def of(cls, problem: MoeProblem, device: torch.device) -> "_Order":
        pairs, experts = problem.m * problem.topk, problem.experts
        shapes = ((pairs,), (pairs,), (experts + 1,), (experts + 1,), (experts, 3), (experts, 3))
        return cls(*(torch.empty(shape, dtype=torch.int32, device=device) for shape in shapes))

    def filler(self, problem: MoeProblem, topk_ids: torch.Tensor) -> Runner:
        operator = vllm_ops.MAIN.operator(_DATA)
        given = {
            "topk_ids": topk_ids,
            "expert_offsets": self.offsets,
            "problem_sizes1": self.first_sizes,
            "problem_sizes2": self.second_sizes,
            "input_permutation": self.there,
            "output_permutation": self.back,
            "num_experts": problem.experts,
            "n": problem.intermediate,
            "k": problem.hidden,
            "blockscale_offsets": self.scale_offsets,
        }
        arguments = vllm_ops.arguments(operator, given, {"is_gated": True})
        return lambda: operator(*arguments)


@dataclass(frozen=True, eq=False)
class _Operand:
    """Quantized activations. codes: uint8 (pairs, k / 2).

    scales: int32 of four bytes each (rows in tiles, k / block / 4 in tiles).
    encode_scale: of NVFP4, float32 (experts), the same for all.
    """

    format: BlockFormat
    experts: int
    codes: torch.Tensor
    scales: torch.Tensor
    encode_scale: torch.Tensor | None

    @classmethod
    def empty(
        cls, pairs: int, k: int, experts: int, format: BlockFormat, encode_scale: torch.Tensor | None, device: torch.device
    ) -> "_Operand":
        rows = -(-pairs // _TILE) * _TILE + min(pairs, experts) * _TILE
        codes = torch.empty(pairs, k // 2, dtype=torch.uint8, device=device)
        scales = torch.zeros(rows, -(-k // format.block_size // 4), dtype=torch.int32, device=device)
        each = None if encode_scale is None else encode_scale.reshape(1).repeat(experts)
        return cls(format, experts, codes, scales, each)

    def quantizer(self, name: str, rows: torch.Tensor, order: _Order) -> Runner:
        operator = vllm_ops.MAIN.operator(name)
        given: dict[str, Any] = {
            "output": self.codes,
            "output_scale": self.scales,
            "input": rows,
            "input_offset_by_experts": order.offsets,
            "output_scale_offset_by_experts": order.scale_offsets,
        }
        given |= {"n_experts": self.experts} if self.encode_scale is None else {"input_global_scale": self.encode_scale}
        arguments = vllm_ops.arguments(operator, given, {})
        return lambda: operator(*arguments)


@dataclass(frozen=True, eq=False)
class _Experts:
    """codes: uint8 (experts, n, k / 2). scales: uint8, blocked (experts, n in tiles, k / block in tiles).

    encode_scales: of NVFP4, float32 (experts).
    """

    codes: torch.Tensor
    scales: torch.Tensor
    encode_scales: torch.Tensor | None

    def product(self, x: _Operand, out: torch.Tensor, sizes: torch.Tensor, order: _Order) -> Runner:
        operator = vllm_ops.MAIN.operator(_OF[x.format.name].multiply)
        # E8M0 scales are given as plain bytes.
        dtype = torch.uint8 if self.encode_scales is None else x.format.scale_dtype
        given = {
            "out": out,
            "a": x.codes,
            "b": self.codes,
            "a_blockscale": x.scales.view(dtype),
            "b_blockscales": self.scales.view(dtype),
            "problem_sizes": sizes,
            "expert_offsets": order.offsets[:-1],
            "sf_offsets": order.scale_offsets[:-1],
        }
        if x.encode_scale is not None and self.encode_scales is not None:
            given["alphas"] = (1.0 / (x.encode_scale.double() * self.encode_scales.double())).float()
        arguments = vllm_ops.arguments(operator, given, {})
        return lambda: operator(*arguments)


def _layer(weights: ExpertWeights, format: BlockFormat, rule: ScaleRule) -> tuple[_Experts, _Experts]:
    return _quantized(weights.all_w13(), format, rule), _quantized(weights.all_w2(), format, rule)


def _quantized(weights: Iterator[torch.Tensor], format: BlockFormat, rule: ScaleRule) -> _Experts:
    """One expert's bfloat16 weights are there at a time."""
    codes, scales, encode_scales = [], [], []
    for w in weights:
        q = quantize(w, format, rule=rule)
        codes.append(q.codes)
        shape = layouts.padded_shape(*q.scales.shape)
        scales.append(layouts.to_blocked(q.scales).view(torch.uint8).reshape(shape))
        if q.tensor_scale is not None:
            encode_scales.append(q.tensor_scale)
    return _Experts(torch.stack(codes), torch.stack(scales), torch.stack(encode_scales) if encode_scales else None)


def _shuffler(source: torch.Tensor, rows: torch.Tensor, target: torch.Tensor) -> Runner:
    """What copies the given rows of `source` to `target`, in their order."""
    operator = vllm_ops.MOE.operator(_SHUFFLE)
    given: dict[str, Any] = {"input_tensor": source, "dst2src_map": rows, "output_tensor": target}
    arguments = vllm_ops.arguments(operator, given, {})
    return lambda: operator(*arguments)
