"""Is a MoE layer's output right? The reference of some tokens, and how far from it right hardware may be.

What lies between the products is rounded or quantized, by hardware after other roundings than ours: a value next to a boundary
falls on either side of it, and moves by a whole step of its format. So an output is judged by the variance of such differences,
carried through the second product: each element to within 6 standard deviations, and all of them together to within 1.5. The
first bound finds a wrong element, the second what is wrong by little everywhere. Held to the largest difference that hardware
may make instead, an output could lack a whole expert in W4A4.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch

from fp4bench.checking.agreement import Agreement, Check, WrongResultError, check_shape, compare, spread_rows
from fp4bench.checking.ties import tie_steps
from fp4bench.formats import ScaleRule
from fp4bench.problems import Accumulation, Activation, MoeInputs, MoeProblem
from fp4bench.quantize import (
    Quantized,
    RowQuantized,
    TileQuantized,
    decode_fp8_tiles,
    quantize,
    quantize_fp8_rows,
    quantize_fp8_tiles,
    scale_values,
)
from fp4bench.reference import Operand, Weight, activate, grouped_gemm, values

ELEMENT_BOUND, OVERALL_BOUND = 6.0, 1.5

# Values of experts' weights that are decoded for a check. On a CPU about a second on two cores; on a GPU some 90 experts of
# DeepSeek-R1, and all of gpt-oss-120b. Beyond it tokens are left out, at least two stay.
_WEIGHT_VALUES = {"cpu": 3e7, "cuda": 4e9}

# A bfloat16 value v is off by at most 2**-8 |v|, evenly: a variance of a third of its square.
_BF16_VARIANCE = 2.0**-16 / 3


def moe_checker(
    problem: MoeProblem, inputs: MoeInputs, rule: ScaleRule | None, accumulation: Accumulation, copies: int = 1
) -> Check:
    """As `fp4bench.checking.checker`: compares outputs bfloat16 (m, hidden) with the reference on these inputs.

    Outputs may have been bfloat16 after each product, the activation, the weighting and each addition of the weighted sum.
    """
    rows = _rows(problem, copies, inputs.x.device)
    want, variance = _reference(problem, inputs, rule, accumulation, rows)
    bound = ELEMENT_BOUND * variance.sqrt() + 2.0**-8 * want.abs()
    overall = OVERALL_BOUND * variance.sum().sqrt().item()

    def check(out: torch.Tensor) -> Agreement:
        check_shape(out, (problem.m, problem.hidden))
        if not problem.m:
            return Agreement(0.0, True, 0)
        found = compare(out, rows, want, bound)
        norm = want.norm().item()
        if found.error * norm > overall:
            raise WrongResultError(
                f"output is wrong as a whole: off by {found.error:.2%} of the reference, not {overall / norm:.2%}"
            )
        return found

    return check


def _rows(problem: MoeProblem, copies: int, device: torch.device) -> torch.Tensor:
    """The tokens that are compared: all if their experts' weights are affordable, else as many as surely are."""
    affordable = _WEIGHT_VALUES[device.type] / copies / (3 * problem.hidden * problem.intermediate)  # experts
    few = problem.experts_hit <= affordable
    return spread_rows(problem.m, problem.m if few else affordable / problem.topk, device)


def _reference(
    problem: MoeProblem, inputs: MoeInputs, rule: ScaleRule | None, accumulation: Accumulation, rows: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Outputs and their variances, float64 (rows, hidden).

    What shares a scale over all rows of the intermediate shares it here over those compared, which is one more way to round.
    """
    if not problem.m:
        return torch.zeros_like(inputs.x, dtype=torch.float64), torch.zeros_like(inputs.x, dtype=torch.float64)
    quantizer = _Quantizer(problem, rule, accumulation)
    experts = inputs.topk_ids[rows].flatten()
    hidden, variance = _hidden(quantizer, inputs, rows, experts)
    out, variance = _outputs(quantizer, inputs, experts, hidden, variance)
    out, variance = (part.unflatten(0, (-1, problem.topk)) for part in (out, variance))
    weights = inputs.topk_weights[rows].double()[..., None]
    weighted = weights * out
    # The result of the product and that of the weighting, then each partial sum.
    roundings = 2 * weighted.square().sum(dim=1) + weighted.cumsum(dim=1).square().sum(dim=1)
    return weighted.sum(dim=1), (weights.square() * variance).sum(dim=1) + _BF16_VARIANCE * roundings


def _hidden(
    quantizer: "_Quantizer", inputs: MoeInputs, rows: torch.Tensor, experts: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Activated sums of the first product and their variances, float64 (pairs, intermediate)."""
    problem, w = quantizer.problem, inputs.weights
    quantized = quantizer.activations(inputs.x)
    x, ties = (part[rows].repeat_interleave(problem.topk, dim=0) for part in (values(quantized), _ties(inputs.x, quantized)))
    squares = [x.square(), ties.square()]
    sums, spread, tied = grouped_gemm(x, experts, lambda e: quantizer.weights(w.w13(e)), _bias(problem, w.b13), squares)
    variance = _sum_variance(spread, problem.hidden, quantizer.accumulation) + tied + _BF16_VARIANCE * sums.square()
    hidden = activate(sums, problem.activation)
    return hidden, _activated_variance(sums, variance, problem.activation) + _BF16_VARIANCE * hidden.square()


def _outputs(
    quantizer: "_Quantizer", inputs: MoeInputs, experts: torch.Tensor, hidden: torch.Tensor, variance: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Results of the second product and their variances, float64 (pairs, hidden), from the intermediate and its variances."""
    problem, w = quantizer.problem, inputs.weights
    between = quantizer.activations(hidden.float())
    second = values(between)
    squares = [second.square(), variance + 2 * _step_variance(between)]
    out, spread, carried = grouped_gemm(second, experts, lambda e: quantizer.weights(w.w2(e)), _bias(problem, w.b2), squares)
    return out, carried + _sum_variance(spread, problem.intermediate, quantizer.accumulation)


def _bias(problem: MoeProblem, of_expert: Callable[[int], torch.Tensor | None]) -> Weight | None:
    def bias(expert: int) -> torch.Tensor:
        found = of_expert(expert)
        assert found is not None
        return found

    return bias if problem.bias else None


def _sum_variance(squares: torch.Tensor, k: int, accumulation: Accumulation) -> torch.Tensor:
    """Of k products added up by hardware, from the sum of their squares: a GEMM is held to 6 times its root."""
    return (6 * 2.0**-accumulation.bits) ** 2 * max(1.0, k / accumulation.terms) * squares


def _activated_variance(sums: torch.Tensor, variance: torch.Tensor, activation: Activation) -> torch.Tensor:
    """What the activation makes of the variance of its arguments, by its slopes."""
    gate, up = sums.chunk(2, dim=-1)
    if activation.limit is not None:
        gate, up = gate.clamp(max=activation.limit), up.clamp(-activation.limit, activation.limit) + 1
    sigmoid = torch.sigmoid(activation.alpha * gate)
    of_gate, of_up = up * sigmoid * (1 + activation.alpha * gate * (1 - sigmoid)), gate * sigmoid
    gate_variance, up_variance = variance.chunk(2, dim=-1)
    return of_gate.square() * gate_variance + of_up.square() * up_variance


def _ties(x: torch.Tensor, quantized: Operand) -> torch.Tensor:
    """How far each value of x moves where it may be rounded the other way. float64, the shape of x."""
    if isinstance(quantized, RowQuantized | TileQuantized):
        return tie_steps(x, quantized)
    return torch.zeros_like(x, dtype=torch.float64)


def _step_variance(operand: Operand) -> torch.Tensor:
    """Of one quantization of each value: the square of the format's step there by 12. float64, the shape of the values."""
    if isinstance(operand, torch.Tensor):
        return torch.zeros_like(operand, dtype=torch.float64)  # kept, or rounded to bfloat16
    if isinstance(operand, Quantized):
        unit = scale_values(operand).double() / operand.rule.gain
        if operand.tensor_scale is not None:
            unit = unit / operand.tensor_scale.double()
        unit = unit.repeat_interleave(operand.format.block_size, dim=-1)[..., : operand.k]
        return _step(values(operand) / unit.clamp(min=1e-300), bits=1, least=0.5).square() * unit.square() / 12
    if isinstance(operand, RowQuantized):
        unit = operand.scales.double()
    else:
        unit = decode_fp8_tiles(replace(operand, values=torch.ones_like(operand.values)), torch.float64)
    return _step(values(operand) / unit, bits=3, least=2.0**-9).square() * unit.square() / 12


def _step(elements: torch.Tensor, bits: int, least: float) -> torch.Tensor:
    """The distance of neighbours at these values, of a float with so many stored bits of significand and a smallest step."""
    exponent = torch.frexp(elements).exponent.double() - 1
    return torch.where(elements == 0, least, torch.exp2(exponent - bits).clamp(min=least))


@dataclass(frozen=True)
class _Quantizer:
    """The operands of a problem's mode, and how its products are added up."""

    problem: MoeProblem
    rule: ScaleRule | None
    accumulation: Accumulation

    def weights(self, w: torch.Tensor) -> Operand:
        return self._quantized(w, self.problem.mode.weights, self.problem.fp8.weight_tile if self.problem.fp8 else None)

    def activations(self, x: torch.Tensor) -> Operand:
        return self._quantized(x, self.problem.mode.activations, self.problem.fp8.activation_tile if self.problem.fp8 else None)

    def _quantized(self, tensor: torch.Tensor, element: str, tile: tuple[int | None, int | None] | None) -> Operand:
        if element == "bf16":
            return tensor
        if element == "fp4":
            assert self.problem.format is not None
            return quantize(tensor, self.problem.format, rule=self.rule)
        return quantize_fp8_tiles(tensor, *tile) if tile else quantize_fp8_rows(tensor)
