"""Quantization by its formulas, GEMM and MoE on decoded values, in float64: what outputs are compared with.

Plain and slow on purpose. Never imports kernels or providers.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import lcm

import torch
from torch.nn.functional import pad, silu

from fp4bench.formats import BlockFormat, ScaleRule, scales
from fp4bench.hadamard import hadamard_matrix
from fp4bench.models import SILU, Activation
from fp4bench.quantize import Quantized, RowQuantized, TileQuantized, decode, decode_fp8_tiles

Operand = torch.Tensor | Quantized | RowQuantized | TileQuantized

Weight = Callable[[int], Operand]
"""The weight or bias of an expert by its number."""


def values(operand: Operand) -> torch.Tensor:
    """What an operand stands for, in float64. A rotated operand stays rotated, its padding with it."""
    if isinstance(operand, Quantized):
        return decode(operand, torch.float64)
    if isinstance(operand, RowQuantized):
        return operand.values.double() * operand.scales.double()
    if isinstance(operand, TileQuantized):
        return decode_fp8_tiles(operand, torch.float64)
    return operand.double()


def gemm(x: Operand, w: Operand, bias: torch.Tensor | None = None) -> torch.Tensor:
    """x @ w.T + bias on decoded values. (m, k), (n, k), (n) -> float64 (m, n)."""
    y = values(x) @ values(w).T
    return y if bias is None else y + bias.double()


@dataclass(frozen=True, eq=False)
class Routing:
    """Which experts each token goes to, and with what weight: int64 and float64 (m, topk)."""

    ids: torch.Tensor
    weights: torch.Tensor


def route(logits: torch.Tensor, topk: int) -> Routing:
    """The `topk` likeliest experts of each token, their weights a softmax over the chosen. float (m, experts) -> Routing."""
    top = logits.double().topk(topk, dim=-1)
    return Routing(top.indices, top.values.softmax(dim=-1))


def silu_and_mul(gate_up: torch.Tensor) -> torch.Tensor:
    """Gated SiLU; the first half of the columns is the gate. (..., 2 * intermediate) -> (..., intermediate)."""
    gate, up = gate_up.chunk(2, dim=-1)
    return silu(gate) * up


def activate(gate_up: torch.Tensor, activation: Activation) -> torch.Tensor:
    """What experts do between their products, by `Activation`. (..., 2 * intermediate) -> (..., intermediate)."""
    if activation.name == "silu":
        return silu_and_mul(gate_up)
    gate, up = gate_up.chunk(2, dim=-1)
    gate, up = gate.clamp(max=activation.limit), up.clamp(min=-(activation.limit or torch.inf), max=activation.limit)
    return gate * torch.sigmoid(activation.alpha * gate) * (up + 1)


def grouped_gemm(
    rows: torch.Tensor, experts: torch.Tensor, weight: Weight, bias: Weight | None = None, squares: Sequence[torch.Tensor] = ()
) -> tuple[torch.Tensor, ...]:
    """Each row times the weight of its expert, plus its bias; weights of experts without rows are not asked for.

    rows: float64 (pairs, k). experts: int (pairs). weight: of an expert, (n, k); bias: (n).
    squares: float64 (pairs, k) each; these times the squared weights, (pairs, n) each, follow the products (pairs, n).
    """
    found: list[torch.Tensor] = []
    for expert in experts.unique().tolist():
        at = (experts == expert).nonzero()[:, 0]
        w = values(weight(expert))
        products = [rows[at] @ w.T, *(square[at] @ w.square().T for square in squares)]
        if bias is not None:
            products[0] += values(bias(expert))
        found = found or [p.new_empty(len(rows), p.shape[1]) for p in products]
        for whole, part in zip(found, products, strict=True):
            whole[at] = part
    return tuple(found)


def moe(
    x: Operand,
    gate_up: Weight,
    down: Weight,
    routing: Routing,
    activation: Activation = SILU,
    between: Callable[[torch.Tensor], Operand] = values,
    gate_up_bias: Weight | None = None,
    down_bias: Weight | None = None,
) -> torch.Tensor:
    """The sum over a token's experts e of weight * (between(act(x @ gate_up(e).T + bias)) @ down(e).T + bias).

    x (m, hidden), gate_up(e) (2 * intermediate, hidden), down(e) (hidden, intermediate) -> float64 (m, hidden).
    between: what becomes of the intermediate, (pairs, intermediate), a token's slots one below the other: its quantization.
    """
    m, topk = routing.ids.shape
    rows, experts = values(x).repeat_interleave(topk, dim=0), routing.ids.flatten()
    if not m:
        return values(x).clone()
    (sums,) = grouped_gemm(rows, experts, gate_up, gate_up_bias)
    (out,) = grouped_gemm(values(between(activate(sums, activation))), experts, down, down_bias)
    return (routing.weights.double()[..., None] * out.unflatten(0, (m, topk))).sum(dim=1)


@dataclass(frozen=True, eq=False)
class Formula:
    """What the formulas give for (..., k) values: codes uint8 (..., k padded), one code each; scale bytes uint8 (..., blocks);
    NVFP4's encode scale, float32 ()."""

    codes: torch.Tensor
    scales: torch.Tensor
    tensor_scale: torch.Tensor | None


def quantize_by_formula(
    x: torch.Tensor, format: BlockFormat, rule: ScaleRule, hadamard: int | None = None, rows: torch.Tensor | None = None
) -> Formula:
    """Codes and scale bytes by the formulas of the rules, with frexp and a search among the code values.

    A second way to what `fp4bench.quantize.quantize` gives, sharing only the cast to E4M3 with it. Finite values only.
    rows: int64, the rows of a (m, k) tensor that are wanted; the tensor scale is that of all rows.
    """
    blocks = _blocks(x if rows is None else x[rows], format, hadamard)
    amax = blocks.abs().amax(dim=-1).float()
    if format.has_tensor_scale:
        parts = [x] if rows is None else x.split(len(rows))
        tensor_scale = _encode_scale(torch.stack([_largest(_blocks(part, format, hadamard)) for part in parts]))
        scale_bytes, elements = _two_level(blocks, amax, tensor_scale)
    else:
        tensor_scale = None
        scale_bytes, elements = _power_of_two(blocks, amax, rule)
    return Formula(_nearest_codes(elements).flatten(-2), scale_bytes, tensor_scale)


def _blocks(x: torch.Tensor, format: BlockFormat, hadamard: int | None) -> torch.Tensor:
    """Padded, rotated (to float32) and cut into blocks. float (..., k) -> float64 (..., blocks, block size)."""
    padded = pad(x.double(), (0, -x.shape[-1] % lcm(format.block_size, hadamard or 1)))
    if hadamard:
        matrix = hadamard_matrix(hadamard, torch.float64, x.device)
        padded = (padded.unflatten(-1, (-1, hadamard)) @ matrix).flatten(-2).float().double()
    return padded.unflatten(-1, (-1, format.block_size))


def _largest(blocks: torch.Tensor) -> torch.Tensor:
    return blocks.abs().amax().float() if blocks.numel() else torch.zeros((), device=blocks.device)


def _power_of_two(blocks: torch.Tensor, amax: torch.Tensor, rule: ScaleRule) -> tuple[torch.Tensor, torch.Tensor]:
    # amax = mantissa * 2**exponent with the mantissa in [0.5, 1), so floor(log2(amax)) is exponent - 1.
    mantissa, exponent = torch.frexp(amax)
    if rule is ScaleRule.FLOOR:
        e = exponent - 1 - 2
    elif rule is ScaleRule.CEIL:
        e = exponent - 1 - 2 + (mantissa > 0.5)
    elif rule is ScaleRule.EVEN:
        e = exponent - 1 - 2 + (mantissa >= 0.875)
    elif rule is ScaleRule.RCEIL:
        mantissa, exponent = torch.frexp(amax * (1.0 / 6.0))
        e = torch.where(mantissa > 0, exponent - 1 + (mantissa > 0.5), -127)
    elif rule is ScaleRule.QUTLASS_ABS_MAX:
        e = torch.frexp(amax + 1e-8).exponent - 1
    else:
        deviation = blocks.std(dim=-1, correction=0).float().double()
        e = torch.frexp((deviation * (2.92247856 / 6.0) + 1e-8).float()).exponent - 1
    nothing = (amax == 0) & (rule not in (ScaleRule.QUTLASS_ABS_MAX, ScaleRule.QUTLASS_QUEST))
    e = torch.where(nothing, -127, e.clamp(-127, 127))
    elements = (blocks * torch.exp2(-e.double())[..., None]).float() * rule.gain
    return (e + 127).to(torch.uint8), elements.double()


def _encode_scale(amax: torch.Tensor) -> torch.Tensor:
    tensor_amax = amax.max()
    quotient = torch.full_like(tensor_amax, 2688.0) / tensor_amax
    return torch.where(tensor_amax > 0, quotient.clamp(max=torch.finfo(torch.float32).max), 1.0)


def _two_level(blocks: torch.Tensor, amax: torch.Tensor, encode_scale: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    # Float32 step by step: the order of the roundings is part of the rule.
    block_scales = scales.e4m3_encode(amax * (encode_scale * (1.0 / 6.0)))
    multiplier = 1.0 / (block_scales.float() * (1.0 / encode_scale))
    elements = blocks.float() * multiplier.clamp(max=torch.finfo(torch.float32).max)[..., None]
    return block_scales.view(torch.uint8), elements.double()


def _nearest_codes(elements: torch.Tensor) -> torch.Tensor:
    """E2M1 codes by counting the midpoints below a magnitude; a tie goes up where that leads to an even code."""
    midpoints = (0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0)
    magnitude = elements.abs()
    codes = torch.zeros(elements.shape, dtype=torch.uint8, device=elements.device)
    for code_below, midpoint in enumerate(midpoints):
        codes += magnitude >= midpoint if code_below % 2 else magnitude > midpoint
    return codes + 8 * elements.signbit().to(torch.uint8)
