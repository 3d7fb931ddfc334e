"""A right output agrees; every wrong one planted here is refused, with a message that names the place."""

import re
from dataclasses import replace
from math import prod

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fp4bench import checking
from fp4bench.checking import Agreement, WrongResultError, check
from fp4bench.formats import FORMATS, MXFP4, NVFP4, ScaleRule, e2m1
from fp4bench.problems import (
    BF16,
    FP8,
    FP8_SUMS,
    FP16,
    W4A4,
    W4A4_NOQUANT,
    W4A8,
    W4A16,
    W4A16_FP16,
    GemmInputs,
    GemmProblem,
    QuantizeProblem,
)
from fp4bench.quantize import Quantized, quantize, quantize_fp8_rows
from fp4bench.reference import quantize_by_formula, values

M, N, K = 48, 40, 256


def gemm_problem(mode, fmt=None, hadamard=None, m=M, n=N, k=K):
    return GemmProblem("tiny", "fc", 1, m, n, k, mode, fmt, hadamard)


PROBLEMS = [
    gemm_problem(BF16),
    gemm_problem(FP8),
    gemm_problem(W4A16, MXFP4),
    gemm_problem(W4A16, NVFP4),
    gemm_problem(W4A8, MXFP4),
    gemm_problem(W4A8, NVFP4),
    gemm_problem(W4A4, MXFP4),
    gemm_problem(W4A4, NVFP4),
    gemm_problem(W4A4, MXFP4, hadamard=64),
    gemm_problem(W4A4_NOQUANT, NVFP4, hadamard=32),
]


def operand(problem, element, tensor, rule=None):
    """What the mode makes of a bfloat16 tensor, as float32."""
    if element == "fp4":
        tensor = quantize(tensor, problem.format, rule=rule, hadamard=problem.hadamard)
    return values(quantize_fp8_rows(tensor) if element == "fp8" else tensor).float()


def right_output(problem, inputs, rule=None, w_rule=None):
    """As right hardware does: float32 sums of the decoded operands, stored as bfloat16."""
    x = operand(problem, problem.mode.activations, inputs.x, rule)
    return (x @ operand(problem, problem.mode.weights, inputs.w, w_rule or rule).T).bfloat16()


@pytest.mark.parametrize("problem", PROBLEMS, ids=str)
def test_right_output_agrees(problem):
    inputs = problem.inputs()
    agreement = check(problem, inputs, None, right_output(problem, inputs))
    assert 0 < agreement.error < 2**-8  # the store to bfloat16
    assert agreement.rows == M


def test_a_product_of_float16_has_three_more_bits():
    problem = gemm_problem(W4A16_FP16, NVFP4)
    inputs = problem.inputs()
    out = inputs.x.float() @ operand(problem, "fp4", inputs.w).T
    assert inputs.x.dtype == torch.float16
    assert 0 < check(problem, inputs, None, out.half()).error < 2**-11
    with pytest.raises(WrongResultError, match="output is wrong"):
        check(problem, inputs, None, out.bfloat16().half())
    with pytest.raises(WrongResultError, match=r"^output is torch.bfloat16 \(48, 40\), not torch.float16 \(48, 40\)$"):
        check(problem, inputs, None, out.bfloat16())


def test_float16_below_its_normal_numbers_is_rounded_to_a_step():
    """Sums of about 2**-17, of which float16 keeps eight bits: right, and not right when they are a step off."""
    problem = gemm_problem(FP16)
    inputs = problem.inputs()
    inputs = GemmInputs(inputs.x * 2.0**-9, inputs.w * 2.0**-9)
    out = (inputs.x.double() @ inputs.w.double().T).half()
    assert out.abs().max() < torch.finfo(torch.float16).smallest_normal
    assert check(problem, inputs, None, out).exact
    with pytest.raises(WrongResultError, match=r"^output is wrong in "):
        check(problem, inputs, None, out + 2.0**-24)


@pytest.mark.parametrize("hadamard", [None, 64])
@pytest.mark.parametrize("rule", [ScaleRule.FLOOR, ScaleRule.CEIL, ScaleRule.EVEN, ScaleRule.RCEIL], ids=str)
def test_w4a4_output_of_ocp_mxfp4_is_exact(rule, hadamard):
    problem = gemm_problem(W4A4, MXFP4, hadamard)
    inputs = problem.inputs()
    assert check(problem, inputs, rule, right_output(problem, inputs, rule)).exact


# Of MXFP4 by the OCP rules the reference is exact, as their values are few bits. S and 3 are divided out of float64 sums here,
# as an ideal kernel does, and out of each float64 value there: only a sum of exactly 0 differs, and its weights are left out.
@pytest.mark.parametrize("hadamard", [None, 64])
@pytest.mark.parametrize(
    ("fmt", "rule"), [(NVFP4, ScaleRule.TWO_LEVEL), (MXFP4, ScaleRule.QUTLASS_ABS_MAX)], ids=["nvfp4", "qutlass"]
)
def test_w4a4_output_of_an_ideal_kernel_is_exact(fmt, rule, hadamard):
    problem = gemm_problem(W4A4, fmt, hadamard, m=192, n=160, k=2048)
    inputs = problem.inputs()
    not_zero = (ideal_sums(problem, inputs, rule) != 0).all(dim=0)
    assert not_zero.sum() > 140
    inputs = GemmInputs(inputs.x, inputs.w[not_zero])
    problem = replace(problem, n=len(inputs.w))
    out = ideal_sums(problem, inputs, rule).bfloat16()
    assert check(problem, inputs, rule, out) == Agreement(pytest.approx(2**-9.2, rel=0.05), True, 192)


def ideal_sums(problem, inputs, rule):
    """Sums of codes times block scales, which float32 holds exactly, and the other scales divided out at the end. float64."""
    x, w = (quantize(t, problem.format, rule=rule, hadamard=problem.hadamard) for t in (inputs.x, inputs.w))
    a, b = (values(replace(q, rule=ScaleRule.FLOOR, tensor_scale=None)) for q in (x, w))
    sums = a.float() @ b.float().T
    assert torch.equal(sums.double(), a @ b.T)
    factors = (1.0 if q.tensor_scale is None else q.tensor_scale.double() for q in (x, w))
    return sums.double() / prod(factors) / rule.gain**2


def test_an_output_within_the_bound_is_not_called_exact():
    problem = gemm_problem(BF16)
    inputs = problem.inputs()
    out = (inputs.x.double() @ inputs.w.double().T).bfloat16()
    assert check(problem, inputs, None, out).exact
    out.view(torch.int16).view(-1)[out.abs().argmin()] += 1  # the smallest sum is the least sure
    assert not check(problem, inputs, None, out).exact


def sums_of_14_bits(x, w):
    """As Hopper's FP8 tensor cores: 32 products at once, and of the sum so far 14 bits. float64 (m, k), (n, k) -> (m, n)."""
    total = torch.zeros(len(x), len(w), dtype=torch.float64)
    for k in range(0, x.shape[1], 32):
        total += x[:, k : k + 32] @ w[:, k : k + 32].T
        mantissa, exponent = torch.frexp(total)
        total = torch.ldexp((mantissa * 2**14).trunc() * 2.0**-14, exponent)
    return total


@pytest.mark.parametrize("mode", [W4A4, W4A4_NOQUANT], ids=str)
def test_less_exact_sums_are_refused_unless_the_provider_says_so(mode):
    problem = gemm_problem(mode, MXFP4, k=2048)
    inputs = problem.inputs()
    # Blocks of one size fit into 14 bits, sums and all: these differ.
    inputs.x.mul_(torch.exp2(torch.arange(2048) // 32 % 8.0))
    out = sums_of_14_bits(*(values(quantize(t, MXFP4)) for t in (inputs.x, inputs.w))).bfloat16()
    with pytest.raises(WrongResultError, match="output is wrong"):
        check(problem, inputs, None, out)
    agreement = check(problem, inputs, None, out, FP8_SUMS)
    assert not agreement.exact
    with pytest.raises(WrongResultError, match="output is wrong"):  # the wider bound still sees what is missing
        check(problem, inputs, None, right_output(problem, GemmInputs(inputs.x, inputs.w.roll(1, 1))), FP8_SUMS)


@pytest.mark.parametrize("m", [1, 2])
def test_few_rows_are_all_compared(m):
    problem = gemm_problem(W4A4, MXFP4, m=m)
    inputs = problem.inputs()
    assert check(problem, inputs, None, right_output(problem, inputs)).rows == m


def at_largest(out, change):
    """`change` applied to the bits of the largest element: there 1 ulp is the least against the bound."""
    out.view(torch.int16).view(-1)[out.abs().argmax()] += change
    return out


def swapped_rows(out):
    out[[3, 4]] = out[[4, 3]]
    return out


def filled(index, value):
    def fill(out):
        out[index] = value
        return out

    return fill


# Name: (what is done to a right output, the count and place in the message).
WRONG_GEMMS = {
    "2_ulps_up": (lambda out: at_largest(out, 2), r"output is wrong in 1 of 1920 elements, first at \[\d+, \d+\]: .* where"),
    "2_ulps_down": (lambda out: at_largest(out, -2), r"output is wrong in 1 of 1920 elements, first at \[\d+, \d+\]: .* where"),
    "one_nan": (filled((5, 7), torch.nan), r"output is not finite in 1 of 1920 elements, first at \[5, 7\]: nan$"),
    "one_inf": (filled((0, 39), torch.inf), r"output is not finite in 1 of 1920 elements, first at \[0, 39\]: inf$"),
    "one_minus_inf": (filled((47, 0), -torch.inf), r"output is not finite in 1 of 1920 elements, first at \[47, 0\]: -inf$"),
    "one_wrong_row": (lambda out: filled(17, out[17].roll(1))(out), r"wrong in \d\d of 1920 elements, first at \[17, \d\]: "),
    "swapped_rows": (swapped_rows, r"wrong in \d\d of 1920 elements, first at \[3, \d\]: "),
    "twice_alpha": (lambda out: out * 2, r"wrong in 1\d\d\d of 1920 elements, first at \[0, 0\]: "),
    "half_alpha": (lambda out: out / 2, r"wrong in 1\d\d\d of 1920 elements, first at \[0, 0\]: "),
    "zeroed_tile": (filled((slice(16, 32), slice(8, 24)), 0.0), r"wrong in 25\d of 1920 elements, first at \[16, 8\]: 0 where"),
    "all_zeros": (torch.zeros_like, r"wrong in 1[89]\d\d of 1920 elements, first at \[0, 0\]: 0 where"),
    "wrong_sign": (torch.neg, r"wrong in 19\d\d of 1920 elements, first at \[0, 0\]: "),
    "transposed": (lambda out: out.T, r"output is torch.bfloat16 \(40, 48\), not torch.bfloat16 \(48, 40\)$"),
    "a_row_short": (lambda out: out[:-1], r"output is torch.bfloat16 \(47, 40\), not torch.bfloat16 \(48, 40\)$"),
    "float32": (torch.Tensor.float, r"^output is torch.float32 \(48, 40\), not torch.bfloat16 \(48, 40\)$"),
    "float16": (torch.Tensor.half, r"^output is torch.float16 \(48, 40\), not torch.bfloat16 \(48, 40\)$"),
    "a_further_axis": (lambda out: out[None], r"output is torch.bfloat16 \(1, 48, 40\), not torch.bfloat16 \(48, 40\)$"),
}


@pytest.mark.parametrize("wrong", WRONG_GEMMS)
@pytest.mark.parametrize("problem", PROBLEMS, ids=str)
def test_wrong_output_is_refused(problem, wrong):
    inputs = problem.inputs(seed=1)  # whose largest output is of no row with FP8 ties, which may move
    spoil, message = WRONG_GEMMS[wrong]
    with pytest.raises(WrongResultError, match=message):
        check(problem, inputs, None, spoil(right_output(problem, inputs)))


def test_the_message_names_element_value_reference_and_bound():
    problem = gemm_problem(BF16, m=2, n=3, k=4)
    inputs = GemmInputs(torch.ones(2, 4, dtype=torch.bfloat16), torch.full((3, 4), 0.25, dtype=torch.bfloat16))
    out = torch.ones(2, 3, dtype=torch.bfloat16)
    out[1, 2] = 1.5
    message = "output is wrong in 1 of 6 elements, first at [1, 2]: 1.5 where the reference is 1 +- 0.0039"
    with pytest.raises(WrongResultError, match=f"^{re.escape(message)}$"):
        check(problem, inputs, None, out)


@pytest.mark.parametrize("problem", PROBLEMS, ids=str)
def test_a_dropped_tail_of_k_is_refused(problem):
    inputs = problem.inputs()
    x, w = (operand(problem, e, t) for e, t in ((problem.mode.activations, inputs.x), (problem.mode.weights, inputs.w)))
    with pytest.raises(WrongResultError, match="output is wrong"):
        check(problem, inputs, None, (x[:, : K - 32] @ w[:, : K - 32].T).bfloat16())


@pytest.mark.parametrize("k", [2048, 4096])
@pytest.mark.parametrize("problem", [gemm_problem(FP8), gemm_problem(W4A8, MXFP4), gemm_problem(W4A16, NVFP4)], ids=str)
def test_a_dropped_tail_of_k_is_refused_at_large_k(problem, k):
    problem = replace(problem, k=k)
    inputs = problem.inputs()
    x, w = (operand(problem, e, t) for e, t in ((problem.mode.activations, inputs.x), (problem.mode.weights, inputs.w)))
    with pytest.raises(WrongResultError, match="output is wrong"):
        check(problem, inputs, None, (x[:, : k - 32] @ w[:, : k - 32].T).bfloat16())


@pytest.mark.parametrize("mode", [W4A4, W4A16], ids=str)
@pytest.mark.parametrize("stated", MXFP4.rules, ids="stated-{}".format)
@pytest.mark.parametrize("used", MXFP4.rules, ids="used-{}".format)
def test_weights_quantized_by_another_rule_are_refused(used, stated, mode):
    problem = gemm_problem(mode, MXFP4)
    inputs = problem.inputs()
    out = right_output(problem, inputs, stated, w_rule=used)
    if used is stated:
        check(problem, inputs, stated, out)
        return
    with pytest.raises(WrongResultError, match="output is wrong"):
        check(problem, inputs, stated, out)


@pytest.mark.parametrize("fmt", FORMATS.values(), ids=str)
def test_weights_that_are_not_rotated_are_refused(fmt):
    problem = gemm_problem(W4A4, fmt, hadamard=64)
    inputs = problem.inputs()
    unrotated = right_output(replace(problem, hadamard=None), inputs)
    with pytest.raises(WrongResultError, match="output is wrong"):
        check(problem, inputs, None, unrotated)


@pytest.mark.parametrize("other", [FP8, W4A16, W4A4], ids=str)
def test_the_output_of_another_mode_is_refused(other):
    problem = gemm_problem(BF16)
    inputs = problem.inputs()
    with pytest.raises(WrongResultError, match="output is wrong"):
        check(problem, inputs, None, right_output(gemm_problem(other, MXFP4 if other.weights == "fp4" else None), inputs))


@given(st.data(), st.sampled_from(PROBLEMS[2:]))
@settings(max_examples=40, deadline=None, derandomize=True)
def test_one_code_of_one_weight_a_step_off_is_refused(data, problem):
    # The smallest mistake there is: the bound is worth something only if some of the 48 outputs of that weight show it.
    k = data.draw(st.sampled_from([32, 64, 128]), "k")
    row, column = data.draw(st.integers(0, N - 1), "row"), data.draw(st.integers(0, k - 1), "column")
    problem = replace(problem, k=k, hadamard=problem.hadamard and 32)
    inputs = problem.inputs(seed=data.draw(st.integers(0, 1000), "seed"))
    w = quantize(inputs.w, problem.format, hadamard=problem.hadamard)
    codes = e2m1.unpack(w.codes)
    code = int(codes[row, column])
    neighbours = [near for near in (code - 1, code + 1) if near // 8 == code // 8]
    codes[row, column] = data.draw(st.sampled_from(neighbours), "code")
    x = operand(problem, problem.mode.activations, inputs.x)
    out = (x @ values(replace(w, codes=e2m1.pack(codes))).float().T).bfloat16()
    with pytest.raises(WrongResultError, match=rf"output is wrong in \d+ of \d+ elements, first at \[\d+, {row}\]: "):
        check(problem, inputs, None, out)


@pytest.fixture
def few_rows(monkeypatch):
    """A budget for 3 rows of the problems here."""
    monkeypatch.setitem(checking._REFERENCE_FLOPS, "cpu", 3.5 * 4 * N * K)


@pytest.mark.parametrize("m", [2, 3, 4, 48, 1001])
def test_rows_beyond_the_budget_are_sampled(few_rows, m):
    problem = gemm_problem(W4A4, MXFP4, m=m)
    inputs = problem.inputs()
    agreement = check(problem, inputs, None, right_output(problem, inputs))
    assert agreement.rows == min(m, 3)
    assert agreement.exact


@pytest.mark.parametrize(("row", "caught"), [(0, True), (24, True), (47, True), (1, False), (46, False)])
def test_the_first_and_the_last_row_are_sampled(few_rows, row, caught):
    problem = gemm_problem(W4A4, MXFP4)
    inputs = problem.inputs()
    out = filled(row, 9.0)(right_output(problem, inputs))
    if not caught:
        check(problem, inputs, None, out)
        return
    with pytest.raises(WrongResultError, match=r"output is wrong in 40 of 120 elements"):
        check(problem, inputs, None, out)


def test_two_rows_are_compared_however_small_the_budget(monkeypatch):
    monkeypatch.setitem(checking._REFERENCE_FLOPS, "cpu", 1.0)
    problem = gemm_problem(BF16)
    inputs = problem.inputs()
    assert check(problem, inputs, None, right_output(problem, inputs)).rows == 2


@pytest.mark.parametrize("value", [torch.nan, torch.inf], ids=str)
def test_a_value_that_is_not_finite_is_refused_outside_the_sampled_rows(few_rows, value):
    problem = gemm_problem(W4A4, MXFP4)
    inputs = problem.inputs()
    out = filled((2, 11), value)(right_output(problem, inputs))
    with pytest.raises(WrongResultError, match=rf"not finite in 1 of 1920 elements, first at \[2, 11\]: {value}$"):
        check(problem, inputs, None, out)


QUANTIZE_PROBLEMS = [
    QuantizeProblem("tiny", "fc", 1, 64, 256, fmt, rule, hadamard)
    for fmt in FORMATS.values()
    for rule in fmt.rules
    for hadamard in (None, 64)
]


def right_codes(problem, x):
    """The formula's codes and scale bytes, for a test to spoil."""
    formula = quantize_by_formula(x, problem.format, problem.rule, problem.hadamard)
    return formula.codes.to(torch.uint8), formula.scales


def quantized(problem, x, codes, scale_bytes):
    """These codes and scale bytes with the formula's tensor scale, as a provider gives them."""
    fmt, rule, hadamard = problem.format, problem.rule, problem.hadamard
    s = quantize_by_formula(x, fmt, rule, hadamard).tensor_scale
    return Quantized(e2m1.pack(codes), scale_bytes.view(fmt.scale_dtype), s, fmt, rule, hadamard, problem.k)


@pytest.mark.parametrize("problem", QUANTIZE_PROBLEMS, ids=str)
def test_right_quantization_agrees(problem):
    x = problem.inputs()
    assert check(problem, x, None, quantized(problem, x, *right_codes(problem, x))) == Agreement(0.0, True, 64)
    eager = check(problem, x, None, quantize(x, problem.format, rule=problem.rule, hadamard=problem.hadamard))
    assert eager.error <= (1e-4 if problem.hadamard else 0)


@pytest.mark.parametrize("problem", QUANTIZE_PROBLEMS, ids=str)
def test_one_code_two_steps_off_is_refused(problem):
    x = problem.inputs()
    codes, scale_bytes = right_codes(problem, x)
    right = codes[5, 33].item()
    wrong = codes[5, 33] = (right + 2) % 8  # magnitudes 0 to 7: 2 or 6 steps
    message = f"code is wrong in 1 of 16384 elements, first at [5, 33]: {wrong:#x} where the reference is {right:#x}"
    with pytest.raises(WrongResultError, match=f"^{re.escape(message)}$"):
        check(problem, x, None, quantized(problem, x, codes, scale_bytes))


@pytest.mark.parametrize("problem", QUANTIZE_PROBLEMS, ids=str)
def test_one_scale_a_step_off_is_refused(problem):
    x = problem.inputs()  # with 512 or 1024 scales one is more than 1 in 10,000
    codes, scale_bytes = right_codes(problem, x)
    right = scale_bytes[63, 2].item()
    scale_bytes[63, 2] -= 1
    where = f"1 of {scale_bytes.numel()} elements, first at [63, 2]: {right - 1:#x} where the reference is {right:#x}"
    with pytest.raises(WrongResultError, match=f"^scale is wrong in {re.escape(where)}$"):
        check(problem, x, None, quantized(problem, x, codes, scale_bytes))


def one_step_down(codes, places):
    """Codes with the first `places` odd magnitudes one step down."""
    odd = (codes % 2 == 1).nonzero()[:places]
    codes[odd[:, 0], odd[:, 1]] -= 1
    return codes


@pytest.mark.parametrize("fmt", FORMATS.values(), ids=str)
@pytest.mark.parametrize(
    ("hadamard", "off", "accepted"),
    [(None, 1, False), (64, 1, True), (64, 2, False)],  # of 16384 codes: 1 is below 1 in 10,000, 2 are above
    ids=["no-rotation", "rotation", "rotation-too-many"],
)
def test_neighbouring_codes_are_accepted_only_under_a_rotation(fmt, hadamard, off, accepted):
    problem = QuantizeProblem("tiny", "fc", 1, 64, 256, fmt, fmt.default_rule, hadamard)
    x = problem.inputs()
    codes, scale_bytes = right_codes(problem, x)
    out = quantized(problem, x, one_step_down(codes, off), scale_bytes)
    if accepted:
        assert check(problem, x, None, out) == Agreement(1 / 16384, False, 64)
        return
    with pytest.raises(WrongResultError, match=rf"^code is wrong in {off} of 16384 elements, first at \[\d+, \d+\]: 0x"):
        check(problem, x, None, out)


@pytest.mark.parametrize(
    ("code", "other", "accepted"), [(0, 8, True), (8, 0, True), (1, 8, True), (9, 0, True), (1, 9, False), (9, 1, False)]
)
def test_neighbours_across_zero_are_counted_on_the_line_of_values(code, other, accepted):
    # 0 and 8 are the two zeros, 1 and 9 are 0.5 and -0.5.
    problem = QuantizeProblem("tiny", "fc", 1, 64, 256, MXFP4, ScaleRule.FLOOR, 64)
    x = problem.inputs()
    codes, scale_bytes = right_codes(problem, x)
    row, column = (codes == code).nonzero()[0].tolist()
    codes[row, column] = other
    out = quantized(problem, x, codes, scale_bytes)
    if accepted:
        assert check(problem, x, None, out) == Agreement(1 / 16384, False, 64)
        return
    message = f"code is wrong in 1 of 16384 elements, first at [{row}, {column}]: {other:#x} where the reference is {code:#x}"
    with pytest.raises(WrongResultError, match=f"^{re.escape(message)}$"):
        check(problem, x, None, out)


@pytest.mark.parametrize(("hadamard", "step", "accepted"), [(None, 1, False), (64, 1, True), (64, 2, False)])
def test_a_neighbouring_scale_is_accepted_only_under_a_rotation(hadamard, step, accepted):
    problem = QuantizeProblem("tiny", "fc", 1, 192, 2048, MXFP4, ScaleRule.FLOOR, hadamard)  # 12288 scales
    x = problem.inputs()
    codes, scale_bytes = right_codes(problem, x)
    right = scale_bytes[100, 7].item()
    scale_bytes[100, 7] += step
    codes[100, 7 * 32 : 8 * 32] = 0  # the codes under another scale are others
    out = quantized(problem, x, codes, scale_bytes)
    if accepted:
        assert check(problem, x, None, out) == Agreement(0.0, False, 192)
        return
    message = f"scale is wrong in 1 of 12288 elements, first at [100, 7]: {right + step:#x} where the reference is {right:#x}"
    with pytest.raises(WrongResultError, match=f"^{re.escape(message)}$"):
        check(problem, x, None, out)


def test_negative_zero_is_not_zero():
    problem = QuantizeProblem("tiny", "fc", 1, 2, 32, MXFP4, ScaleRule.FLOOR)
    x = torch.ones(2, 32, dtype=torch.bfloat16)
    x[1, 3] = -0.0
    codes, scale_bytes = right_codes(problem, x)
    assert codes[1, 3] == 8
    codes[1, 3] = 0
    message = r"^code is wrong in 1 of 64 elements, first at \[1, 3\]: 0x0 where the reference is 0x8$"
    with pytest.raises(WrongResultError, match=message):
        check(problem, x, None, quantized(problem, x, codes, scale_bytes))


def swapped_nibbles(q: Quantized) -> Quantized:
    return replace(q, codes=q.codes << 4 | q.codes >> 4)


def with_scale_bytes(q: Quantized, scale_bytes) -> Quantized:
    return replace(q, scales=scale_bytes.contiguous().view(q.scales.dtype))


# Name: (what is done to a right quantization, message). N stands for the number of scales in a row.
WRONG_QUANTIZATIONS = {
    "swapped_nibbles": (
        swapped_nibbles,
        r"code is wrong in \d+ of 16384 elements, first at \[\d+, \d+\]: 0x[0-9a-f] where the reference is 0x[0-9a-f]",
    ),
    "swapped_scales": (
        lambda q: with_scale_bytes(q, q.scales.view(torch.uint8).flip(0)),
        r"scale is wrong in \d+ of \d+ elements, first at \[\d+, \d+\]: 0x[0-9a-f]+ where the reference is 0x[0-9a-f]+",
    ),
    "a_row_short": (
        lambda q: with_scale_bytes(replace(q, codes=q.codes[:-1]), q.scales.view(torch.uint8)[:-1]),
        r"the shape is \(63, 256\), not \(64, 256\)",
    ),
    "another_k": (lambda q: replace(q, k=255), r"the shape is \(64, 255\), not \(64, 256\)"),
    "codes_of_another_k": (
        lambda q: replace(q, codes=q.codes[:, :-1]),
        r"\(64, 254\) codes and \(64, N\) scales, not \(64, 256\) and \(64, N\)",
    ),
    "no_scales": (
        lambda q: replace(q, scales=q.scales[:, :0]),
        r"\(64, 256\) codes and \(64, 0\) scales, not \(64, 256\) and \(64, N\)",
    ),
    "scales_a_row_short": (
        lambda q: replace(q, scales=q.scales[:-1]),
        r"\(64, 256\) codes and \(63, N\) scales, not \(64, 256\) and \(64, N\)",
    ),
    "flat_scales": (
        lambda q: replace(q, scales=q.scales.flatten()),
        r"\(64, 256\) codes and \(\d+,\) scales, not \(64, 256\) and \(64, N\)",
    ),
}


@pytest.mark.parametrize("wrong", WRONG_QUANTIZATIONS)
@pytest.mark.parametrize("problem", QUANTIZE_PROBLEMS, ids=str)
def test_wrong_quantization_is_refused(problem, wrong):
    x = problem.inputs()
    spoil, message = WRONG_QUANTIZATIONS[wrong]
    message = message.replace("N", str(problem.k // problem.format.block_size))
    with pytest.raises(WrongResultError, match=f"^{message}$"):
        check(problem, x, None, spoil(quantized(problem, x, *right_codes(problem, x))))


@pytest.mark.parametrize("fmt", FORMATS.values(), ids=str)
def test_of_wrong_codes_the_first_that_no_rotation_explains_is_named(fmt):
    problem = QuantizeProblem("tiny", "fc", 1, 64, 256, fmt, fmt.default_rule, 64)
    x = problem.inputs()
    codes, scale_bytes = right_codes(problem, x)
    codes = one_step_down(codes, 1)
    right = codes[60, 9].item()
    wrong = codes[60, 9] = (right + 2) % 8
    message = f"code is wrong in 1 of 16384 elements, first at [60, 9]: {wrong:#x} where the reference is {right:#x}"
    with pytest.raises(WrongResultError, match=f"^{re.escape(message)}$"):
        check(problem, x, None, quantized(problem, x, codes, scale_bytes))


@pytest.mark.parametrize("fmt", FORMATS.values(), ids=str)
def test_another_format_is_refused(fmt):
    (other,) = (known for known in FORMATS.values() if known is not fmt)
    problem = QuantizeProblem("tiny", "fc", 1, 64, 256, fmt, fmt.default_rule)
    x = problem.inputs()
    with pytest.raises(WrongResultError, match=f"^the format is {other}, not {fmt}$"):
        check(problem, x, None, quantize(x, other))


def nvfp4_with_tensor_scale(hadamard, change):
    problem = QuantizeProblem("tiny", "fc", 1, 64, 256, NVFP4, ScaleRule.TWO_LEVEL, hadamard)
    x = problem.inputs()
    right = quantized(problem, x, *right_codes(problem, x))
    return problem, x, replace(right, tensor_scale=change(right.tensor_scale))


def an_ulp_up(s):
    return torch.nextafter(s, torch.tensor(torch.inf))


WRONG_TENSOR_SCALES = {
    "none": lambda s: None,
    "decode_scale": lambda s: 1 / s,
    "negative": lambda s: -s,
    "one": lambda s: torch.tensor(1.0),
    "nan": lambda s: torch.tensor(torch.nan),
    "off_by_a_thousandth": lambda s: s * 1.001,
}


@pytest.mark.parametrize("hadamard", [None, 64])
@pytest.mark.parametrize("wrong", WRONG_TENSOR_SCALES)
def test_a_wrong_tensor_scale_is_refused(wrong, hadamard):
    problem, x, out = nvfp4_with_tensor_scale(hadamard, WRONG_TENSOR_SCALES[wrong])
    want = quantize_by_formula(x, NVFP4, ScaleRule.TWO_LEVEL, hadamard).tensor_scale
    with pytest.raises(WrongResultError, match=f"^the tensor scale is {re.escape(f'{out.tensor_scale}, not {want}')}$"):
        check(problem, x, None, out)


def test_a_tensor_scale_may_be_an_ulp_off_under_a_rotation_only():
    problem, x, out = nvfp4_with_tensor_scale(64, an_ulp_up)
    assert check(problem, x, None, out).exact
    problem, x, out = nvfp4_with_tensor_scale(None, an_ulp_up)
    with pytest.raises(WrongResultError, match=r"^the tensor scale is "):
        check(problem, x, None, out)


def test_mxfp4_with_a_tensor_scale_is_refused():
    problem = QuantizeProblem("tiny", "fc", 1, 64, 256, MXFP4, ScaleRule.FLOOR)
    x = problem.inputs()
    with pytest.raises(WrongResultError, match=r"^the tensor scale is 1\.0, not None$"):
        check(problem, x, None, replace(quantize(x, MXFP4), tensor_scale=torch.tensor(1.0)))


@pytest.mark.parametrize("used", MXFP4.rules, ids=str)
def test_another_scale_rule_is_refused(used):
    problem = QuantizeProblem("tiny", "fc", 1, 64, 256, MXFP4, ScaleRule.FLOOR)
    x = problem.inputs()
    out = quantize(x, MXFP4, rule=used)
    if used is ScaleRule.FLOOR:
        assert check(problem, x, None, out).exact
        return
    with pytest.raises(WrongResultError, match=f"^the scale rule is {used}, not floor$"):
        check(problem, x, None, out)
    with pytest.raises(WrongResultError, match=r"^scale is wrong in "):
        check(problem, x, None, replace(out, rule=ScaleRule.FLOOR))


@pytest.mark.parametrize("fmt", FORMATS.values(), ids=str)
def test_a_missing_rotation_is_refused(fmt):
    problem = QuantizeProblem("tiny", "fc", 1, 64, 256, fmt, fmt.default_rule, 64)
    x = problem.inputs()
    out = quantize(x, fmt)
    with pytest.raises(WrongResultError, match=r"^the rotation is None, not 64$"):
        check(problem, x, None, out)
    # One that is claimed and not done shows in what is rotated first: S, or the block scales where there is none.
    with pytest.raises(WrongResultError, match="^the tensor scale is " if fmt.has_tensor_scale else "^scale is wrong in "):
        check(problem, x, None, replace(out, hadamard=64))


@pytest.mark.parametrize("fmt", FORMATS.values(), ids=str)
def test_a_rotation_that_was_not_asked_for_is_refused(fmt):
    problem = QuantizeProblem("tiny", "fc", 1, 64, 256, fmt, fmt.default_rule)
    x = problem.inputs()
    with pytest.raises(WrongResultError, match=r"^the rotation is 64, not None$"):
        check(problem, x, None, quantize(x, fmt, hadamard=64))


def test_rows_of_a_quantization_are_sampled_beyond_the_budget(monkeypatch):
    problem = QuantizeProblem("tiny", "fc", 1, 100, 64, NVFP4, ScaleRule.TWO_LEVEL)
    monkeypatch.setattr(checking, "_REFERENCE_VALUES", {"cpu": 10 * problem.k})
    x = problem.inputs()
    x[50] *= 4  # the largest values, and with them the tensor scale, lie outside the sampled rows: 0, 11, 22, ... 99
    out = quantize(x, NVFP4)
    agreement = check(problem, x, problem.rule, out)
    assert (agreement.rows, agreement.exact) == (10, True)
    out.codes[99, 3] ^= 0x70
    with pytest.raises(WrongResultError, match="code is wrong in"):
        check(problem, x, problem.rule, out)
