"""MoE layers of two NVFP4 operands by FlashInfer: the part of the provider `flashinfer_cutlass`, one call of
`flashinfer.fused_moe.cutlass_fused_moe` (0.6.14).

x is handed over in bfloat16 and quantized within the call, as is what lies between the products, by encode scales that are
known beforehand (`nvfp4_moe`). Codes are int64 of 16 values, scales int32 of 4 in the 128 x 4 blocked layout, with the rows of
`up` before those of the gates. The launch is FlashInfer's own choice, without its autotuner.

For Hopper FlashInfer has experts of MXFP4 weights and bfloat16 activations. They are left out: they come as source, which nvcc
compiles at the first call, and have been compiled and run nowhere here.

Not run on a GPU so far: the calls are compared with signatures, and with the checks of its C++ binding.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from fp4bench.devices import Device
from fp4bench.formats import NVFP4, layouts
from fp4bench.problems import ExpertWeights, MoeInputs, MoeProblem
from fp4bench.providers import Runner, import_optional
from fp4bench.providers.nvfp4_moe import encode_scales
from fp4bench.quantize import quantize

MODULE = "flashinfer.fused_moe"
_MULTIPLE = 64  # of both sizes: rows of scales that fill int32, and tiles of 128 rows of gates and `up` together


def why_not_moe(problem: MoeProblem, device: Device) -> str | None:
    """What keeps `prepare_moe` from a problem on Blackwell, or None."""
    if device.capability is not None and device.capability[0] == 11:
        return (
            f"FlashInfer's experts by CUTLASS have no kernels for {device.name}, compute capability 11: "
            "https://github.com/flashinfer-ai/flashinfer/issues/3134"
        )
    if problem.hidden % _MULTIPLE:
        return f"FlashInfer's experts by CUTLASS take a hidden size that is a multiple of {_MULTIPLE}, not {problem.hidden}"
    if problem.intermediate % _MULTIPLE:
        return (
            f"FlashInfer's experts by CUTLASS take an intermediate size that is a multiple of {_MULTIPLE}, not "
            f"{problem.intermediate}: https://github.com/flashinfer-ai/flashinfer/issues/4653"
        )
    return None


def prepare_moe(problem: MoeProblem, inputs: MoeInputs) -> Runner:
    """Copies of the inputs share the weights; each has encode scales of its own. The output is the same on each call."""
    x = inputs.x
    if not problem.m:
        return lambda: torch.empty_like(x)
    module = import_optional(MODULE)
    assert module is not None  # why_not has asked
    first, second = inputs.weights.keep(("flashinfer", NVFP4), lambda: _layer(inputs.weights))
    x_scale, between_scale = encode_scales(problem, inputs)
    out = torch.empty_like(x)
    given = {
        "input": x,
        "token_selected_experts": inputs.topk_ids,
        "token_final_scales": inputs.topk_weights,
        "fc1_expert_weights": first.codes,
        "fc2_expert_weights": second.codes,
        "output_dtype": x.dtype,
        "quant_scales": [*first.scales_with(x_scale), *second.scales_with(between_scale)],
        "fc1_expert_biases": first.bias,
        "fc2_expert_biases": second.bias,
        "output": out,
    }
    if problem.activation.limit is not None:  # gate * sigmoid(alpha * gate) * (up + beta), both clamped; of each expert
        constants = {"alpha": problem.activation.alpha, "beta": 1.0, "limit": problem.activation.limit}
        for name, value in constants.items():
            given[f"swiglu_{name}"] = torch.full((problem.experts,), value, device=x.device)

    def run() -> torch.Tensor:
        module.cutlass_fused_moe(**given)
        return out

    return run


@dataclass(frozen=True, eq=False)
class _Experts:
    """codes: int64 (experts, n, k / 16). scales: int32 (experts, n in tiles, k / 64). encode_scales: float32 (experts).

    bias: bfloat16 (experts, n), or None.
    """

    codes: torch.Tensor
    scales: torch.Tensor
    encode_scales: torch.Tensor
    bias: torch.Tensor | None

    def scales_with(self, x_scale: torch.Tensor) -> list[torch.Tensor]:
        """As FlashInfer takes them: x's encode scale, block scales, and the factor of sums of code * scale products."""
        alphas = (1.0 / (x_scale.double() * self.encode_scales.double())).float()
        return [x_scale, self.scales, alphas]


def _layer(w: ExpertWeights) -> tuple[_Experts, _Experts]:
    up_first = (w13.roll(w.intermediate, dims=0) for w13 in w.all_w13())
    biases = [[b for e in range(w.experts) if (b := of_expert(e)) is not None] for of_expert in (w.b13, w.b2)]
    first = _quantized(up_first, [b.roll(w.intermediate, dims=0) for b in biases[0]])
    return first, _quantized(w.all_w2(), biases[1])


def _quantized(weights: Iterator[torch.Tensor], biases: list[torch.Tensor]) -> _Experts:
    """One expert's bfloat16 weights are there at a time."""
    codes, scales, encode_scales = [], [], []
    for w in weights:
        q = quantize(w.contiguous(), NVFP4)
        assert q.tensor_scale is not None
        shape = layouts.padded_shape(*q.scales.shape)
        codes.append(q.codes.view(torch.int64))
        scales.append(layouts.to_blocked(q.scales).view(torch.uint8).reshape(shape).view(torch.int32))
        encode_scales.append(q.tensor_scale)
    bias = torch.stack(biases) if biases else None
    return _Experts(torch.stack(codes), torch.stack(scales), torch.stack(encode_scales), bias)
