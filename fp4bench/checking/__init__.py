"""Is an output right? Each problem's output against its reference, on the very tensors that are timed.

A module of its own, for comparing with a reference is not the reference.
"""

from typing import Any

import torch

from fp4bench.checking.agreement import Agreement, Check, WrongResultError, check_shape, compare, refuse, spread_rows
from fp4bench.checking.moe import moe_checker
from fp4bench.checking.ties import tie_steps
from fp4bench.formats import ScaleRule, e2m1
from fp4bench.problems import Accumulation, GemmInputs, GemmProblem, MoeProblem, Problem, QuantizeProblem
from fp4bench.quantize import Quantized, RowQuantized, quantize, quantize_fp8_rows
from fp4bench.reference import Operand, quantize_by_formula, values

__all__ = ["Agreement", "Check", "WrongResultError", "check", "checker"]

# Work beyond which only some rows, evenly spaced with the first and the last, are compared: about a second on two CPU cores,
# and 0.1 s at an H200's float64 rate (5 s at an RTX 5090's).
_REFERENCE_FLOPS = {"cpu": 4e10, "cuda": 5e12}
# The same for values of a quantization, whose reference takes some 50 bytes a value.
_REFERENCE_VALUES = {"cpu": 1 << 22, "cuda": 1 << 25}


def check(
    problem: Problem, inputs: Any, rule: ScaleRule | None, out: Any, accumulation: Accumulation | None = None
) -> Agreement:
    """Compare `out` with the reference of `problem` on `inputs`, as `checker` does."""
    return checker(problem, inputs, rule, accumulation)(out)


def checker(
    problem: Problem, inputs: Any, rule: ScaleRule | None, accumulation: Accumulation | None = None, copies: int = 1
) -> Check:
    """What compares outputs with the reference of `problem`; `fp4bench.quantize` makes a product's FP4 operands, by `rule`.

    copies: how many checkers share the time of one, where copies of the inputs have outputs of their own.
    accumulation: how a GEMM's products are added up, by default as its mode says; it bounds how far from the reference an
    output may be. The reference is computed once, however many outputs are compared. The check raises WrongResultError that
    names the first element that is wrong or not finite.
    """
    if isinstance(problem, QuantizeProblem):
        return _quantized_checker(problem, inputs)
    if isinstance(problem, MoeProblem):
        return moe_checker(problem, inputs, rule, accumulation or problem.mode.accumulation, copies)
    return _gemm_checker(problem, inputs, rule, accumulation or problem.mode.accumulation)


def _gemm_checker(problem: GemmProblem, inputs: GemmInputs, rule: ScaleRule | None, accumulation: Accumulation) -> Check:
    quantized = _operand(problem, problem.mode.activations, inputs.x, rule)
    x = values(quantized)
    w = values(_operand(problem, problem.mode.weights, inputs.w, rule))
    rows = spread_rows(problem.m, _REFERENCE_FLOPS[x.device.type] / (4 * problem.n * problem.k), x.device)
    x = x[rows]
    want, spread = x @ w.T, (x.square() @ w.square().T).sqrt()
    # A sum that cancels to 0 leaves float64's own roundings of decoded NVFP4 values.
    want = torch.where(want.abs() < 2.0**-40 * spread, 0.0, want)
    bound = _rounding_bound(problem.k, accumulation, want, spread, problem.mode.dtype)
    if problem.mode.quantizes and isinstance(quantized, RowQuantized):
        steps = tie_steps(inputs.x, quantized)[rows]
        tied = steps.any(dim=1)
        bound[tied] += steps[tied] @ w.abs().T

    def check(out: torch.Tensor) -> Agreement:
        check_shape(out, (problem.m, problem.n), problem.mode.dtype)
        return compare(out, rows, want, bound)

    return check


def _rounding_bound(
    k: int, accumulation: Accumulation, want: torch.Tensor, spread: torch.Tensor, stored: torch.dtype
) -> torch.Tensor:
    """How far from the reference right hardware may be, by element; `spread` is the root of the sum of k squared terms."""
    # Products of decoded operands are exact in float32. An addition to a partial sum s errs by at most u |s|, and the errors of
    # many behave like a random walk (Higham and Mary, SIAM J. Sci. Comput. 41(5), 2019); so do the partial sums of our random
    # inputs, which stay within 6 times the spread. Hence 6 u sqrt(additions) * 6 spread, and for the store the unit roundoff of
    # its dtype: 2**-8 of bfloat16, 2**-11 of float16, and of what lies below the normal numbers half a step, 2**-25 of float16.
    additions = max(1.0, k / accumulation.terms)
    summation = 36 * 2.0**-accumulation.bits * additions**0.5 * spread
    of_store = torch.finfo(stored)
    return summation + of_store.eps / 2 * (want.abs() + summation).clamp(min=of_store.smallest_normal)


def _operand(problem: GemmProblem, element: str, tensor: torch.Tensor, rule: ScaleRule | None) -> Operand:
    if element == "fp8":
        return quantize_fp8_rows(tensor)
    if element in ("bf16", "fp16"):
        return tensor
    assert problem.format is not None
    return quantize(tensor, problem.format, rule=rule, hadamard=problem.hadamard)


def _quantized_checker(problem: QuantizeProblem, x: torch.Tensor) -> Check:
    rows = spread_rows(problem.m, _REFERENCE_VALUES[x.device.type] / problem.k, x.device)
    want = quantize_by_formula(x, problem.format, problem.rule, problem.hadamard, rows)
    # A rotation's additions round in another order: then 1 code or scale in 10,000 may be the neighbour of the right one.
    allowed = 1e-4 if problem.hadamard else 0.0

    def check(out: Quantized) -> Agreement:
        _check_form(problem, out)
        codes, scale_bytes = e2m1.unpack(out.codes), out.scales.view(torch.uint8)
        codes_shape, scales_shape = ((problem.m, part.shape[1]) for part in (want.codes, want.scales))
        if codes.shape != codes_shape or scale_bytes.shape != scales_shape:
            raise WrongResultError(
                f"{tuple(codes.shape)} codes and {tuple(scale_bytes.shape)} scales, not {codes_shape} and {scales_shape}"
            )
        codes, scale_bytes = codes[rows], scale_bytes[rows]
        _check_tensor_scale(out.tensor_scale, want.tensor_scale, allowed)
        scale_off = scale_bytes != want.scales
        code_off = (codes != want.codes) & ~scale_off.repeat_interleave(problem.format.block_size, dim=-1)
        _check_bytes("scale", scale_bytes, want.scales, scale_off, scale_bytes.int() - want.scales.int(), allowed)
        _check_bytes("code", codes, want.codes, code_off, _signed(codes) - _signed(want.codes), allowed)
        return Agreement(code_off.double().mean().item(), not bool(scale_off.any() or code_off.any()), len(rows))

    return check


def _check_form(problem: QuantizeProblem, out: Quantized) -> None:
    for what, got, right in (
        ("format", out.format, problem.format),
        ("scale rule", out.rule, problem.rule),
        ("rotation", out.hadamard, problem.hadamard),
        ("shape", out.shape, (problem.m, problem.k)),
        ("dtype of the codes", out.codes.dtype, torch.uint8),
        ("dtype of the scales", out.scales.dtype, problem.format.scale_dtype),
    ):
        if got != right:
            raise WrongResultError(f"the {what} is {got}, not {right}")


def _check_tensor_scale(got: torch.Tensor | None, want: torch.Tensor | None, allowed: float) -> None:
    if got is None or want is None:
        right = got is want
    else:
        right = got.shape == () and got.dtype == torch.float32 and abs(got.item() / want.item() - 1) <= allowed
    if not right:
        raise WrongResultError(f"the tensor scale is {got}, not {want}")


def _check_bytes(
    what: str, got: torch.Tensor, want: torch.Tensor, off: torch.Tensor, steps: torch.Tensor, allowed: float
) -> None:
    """Refuse bytes that are off by more than a step, or more of them than allowed."""
    far = off & (steps.abs() > 1)
    bad = far if far.any() else off
    if far.any() or off.double().mean().item() > allowed:
        refuse(bad, f"{what} is wrong", lambda at: f"{got[at].item():#x} where the reference is {want[at].item():#x}")


def _signed(codes: torch.Tensor) -> torch.Tensor:
    """Codes as steps on the line of values: -7 to 7, both zeros 0."""
    magnitude = (codes & 7).int()
    return torch.where(codes > 7, -magnitude, magnitude)
