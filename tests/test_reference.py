"""The reference itself, against numpy, a dense MoE written another way, and blocks worked out by hand."""

from dataclasses import replace
from itertools import product

import numpy as np
import pytest
import torch
from torch.nn.functional import linear, silu

from fp4bench.formats import FORMATS, MXFP4, NVFP4, ScaleRule
from fp4bench.models import SILU, Activation
from fp4bench.problems import BF16, MoeProblem
from fp4bench.quantize import decode, quantize, quantize_fp8_rows
from fp4bench.reference import Routing, gemm, moe, quantize_by_formula, route, silu_and_mul, values

ACTIVATIONS = {"silu": SILU, "swiglu": Activation("swiglu", alpha=1.702, limit=7.0)}


def normal(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def test_gemm_multiplies_x_by_w_transposed():
    x = torch.tensor([[1.0, 2.0, 3.0], [0.0, -1.0, 0.5]], dtype=torch.bfloat16)
    w = torch.tensor([[4.0, 0.0, 1.0], [1.0, 1.0, 1.0], [-2.0, 8.0, 0.0], [0.0, 0.0, 0.0]], dtype=torch.bfloat16)
    bias = torch.tensor([0.0, 0.25, 0.0, -1.0], dtype=torch.bfloat16)
    assert gemm(x, w).dtype == torch.float64
    assert gemm(x, w).tolist() == [[7.0, 6.0, 14.0, 0.0], [0.5, -0.5, -8.0, 0.0]]
    assert gemm(x, w, bias).tolist() == [[7.0, 6.25, 14.0, -1.0], [0.5, -0.25, -8.0, -1.0]]


def test_gemm_is_that_of_numpy_in_float64():
    x, w = normal(17, 99, dtype=torch.float32), normal(5, 99, seed=1, dtype=torch.float32)
    expected = np.einsum("mk,nk->mn", x.numpy().astype(np.float64), w.numpy().astype(np.float64))
    np.testing.assert_allclose(gemm(x, w).numpy(), expected, rtol=1e-13, atol=1e-13)


def test_gemm_multiplies_what_quantized_operands_stand_for():
    x, w = torch.zeros(1, 32), torch.zeros(2, 32)
    x[0, :4] = torch.tensor([6.0, 1.25, -0.3, 100.0])  # scale 2**4: 0.375 -> 0.5, 0, -0, 6.25 -> 6
    w[0, :4] = torch.tensor([4.0, 0.0, 0.0, 3.2])  # scale 1: 4, 0, 0, 3
    w[1, :4] = torch.tensor([1.0, 1.0, 1.0, -0.6])  # scale 2**-2: 4, 4, 4, -2.4 -> -2
    qx, qw = quantize(x, MXFP4), quantize(w, MXFP4)
    assert gemm(qx, qw).tolist() == [[8 * 4 + 96 * 3, 8 * 1 + 96 * -0.5]]


def test_values_of_every_operand_are_float64():
    x = normal(3, 64, dtype=torch.float32)
    for operand in (x, x.bfloat16(), quantize_fp8_rows(x), quantize(x, MXFP4), quantize(x, NVFP4, hadamard=32)):
        assert values(operand).dtype == torch.float64
    assert torch.equal(values(x), x.double())


def test_values_are_not_rounded_to_float32():
    # A third of 4, a seventh of 27, and products of 24 bits with a scale of 24: none is a float32.
    abs_max = quantize(torch.full((1, 32), 1.25), MXFP4, rule=ScaleRule.QUTLASS_ABS_MAX)  # 3.75 to 4
    assert values(abs_max).unique().tolist() == [4 / 3]
    two_level = quantize(torch.full((1, 16), 4.0), NVFP4, tensor_scale=torch.tensor(7.0))
    # 4 * 7 / 6 = 4.67 to 4.5, and 4 * 7 / 4.5 = 6.2 to 6
    assert values(two_level).unique().tolist() == [6 * 4.5 / 7]
    rows = quantize_fp8_rows(torch.tensor([[3.0, 1.0]]))
    scale = float(np.float32(3) / np.float32(448))
    assert values(rows).tolist() == [[448 * scale, 144 * scale]]  # 149.3 to 144


def test_values_beyond_float32_are_finite():
    q = quantize(torch.full((1, 32), torch.finfo(torch.float32).max), MXFP4, rule=ScaleRule.CEIL)
    assert values(q).unique().tolist() == [2.0**128]


@pytest.mark.parametrize("fmt", FORMATS.values(), ids=str)
@pytest.mark.parametrize("k", [1024, 4096])
def test_w4a4_sums_of_gaussian_data_are_exact_in_float32(fmt, k):
    # Codes times block scales, before the one division by NVFP4's tensor scales: sum |a * b| stays below 2**24 quanta.
    x, w = (quantize(normal(64, k, seed=seed, dtype=torch.bfloat16), fmt) for seed in (1, 2))
    x, w = (decode(replace(q, tensor_scale=None)) for q in (x, w))
    assert torch.equal((x @ w.T).double(), x.double() @ w.double().T)


def test_bfloat16_sums_are_not_exact_in_float32():
    x, w = normal(64, 4096, dtype=torch.bfloat16).float(), normal(64, 4096, seed=1, dtype=torch.bfloat16).float()
    assert not torch.equal((x @ w.T).double(), x.double() @ w.double().T)


def dense_moe(x, gate_up, down, routing):
    """Every expert on every token, weighted by a one-hot matrix: (m, hidden) float64."""
    one_hot = torch.nn.functional.one_hot(routing.ids, len(gate_up)).double()  # (m, topk, experts)
    weights = torch.einsum("mte,mt->me", one_hot, routing.weights)
    gate, up = torch.einsum("mh,eih->mei", x, gate_up).split(down.shape[2], dim=2)
    hidden = gate / (1 + torch.exp(-gate)) * up
    return torch.einsum("mei,ehi,me->mh", hidden, down, weights)


def moe_inputs(m, experts=8, hidden=24, intermediate=12):
    gate_up, down = normal(experts, 2 * intermediate, hidden, seed=1), normal(experts, hidden, intermediate, seed=2)
    return normal(m, hidden), gate_up, down, normal(m, experts, seed=3)


@pytest.mark.parametrize("topk", [1, 2, 8])
@pytest.mark.parametrize("m", [0, 1, 2, 33])
def test_moe_is_the_dense_one(m, topk):
    x, gate_up, down, logits = moe_inputs(m)
    routing = route(logits, topk)
    y = moe(x, gate_up.__getitem__, down.__getitem__, routing)
    assert (y.shape, y.dtype) == ((m, 24), torch.float64)
    torch.testing.assert_close(y, dense_moe(x, gate_up, down, routing), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("expert", [0, 3, 7])
def test_moe_with_all_tokens_on_one_expert_is_that_expert(expert):
    x, gate_up, down, _ = moe_inputs(16)
    routing = Routing(torch.full((16, 1), expert), torch.ones(16, 1, dtype=torch.float64))
    y = moe(x, gate_up.__getitem__, down.__getitem__, routing)
    torch.testing.assert_close(y, gemm(silu_and_mul(gemm(x, gate_up[expert])), down[expert]), rtol=1e-12, atol=1e-12)


def test_moe_experts_without_tokens_do_not_count():
    x, gate_up, down, _ = moe_inputs(16)
    routing = route(torch.tensor([[0.0, 1.0] + [-9.0] * 6] * 16), 2)
    y = moe(x, gate_up.__getitem__, down.__getitem__, routing)
    gate_up[2:], down[2:] = torch.nan, torch.nan
    assert torch.equal(moe(x, gate_up.__getitem__, down.__getitem__, routing), y)
    assert y.isfinite().all()


def test_moe_permutes_with_its_tokens():
    x, gate_up, down, logits = moe_inputs(33)
    order = torch.randperm(33, generator=torch.Generator().manual_seed(4))
    y = moe(x, gate_up.__getitem__, down.__getitem__, route(logits, 2))
    permuted = moe(x[order], gate_up.__getitem__, down.__getitem__, route(logits[order], 2))
    torch.testing.assert_close(permuted, y[order], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("fmt", FORMATS.values(), ids=str)
def test_moe_takes_quantized_experts(fmt):
    x, gate_up, down, logits = moe_inputs(9, hidden=64, intermediate=32)
    packed = [[quantize(w.float(), fmt) for w in stack] for stack in (gate_up, down)]
    decoded = [torch.stack([decode(q, torch.float64) for q in stack]) for stack in packed]
    routing = route(logits, 2)
    torch.testing.assert_close(
        moe(x, *(stack.__getitem__ for stack in packed), routing), dense_moe(x, *decoded, routing), rtol=1e-12, atol=1e-12
    )


def test_moe_of_no_tokens_is_empty():
    _, gate_up, down, _ = moe_inputs(1)
    nothing = Routing(torch.zeros(0, 2, dtype=torch.int64), torch.zeros(0, 2, dtype=torch.float64))
    assert moe(torch.zeros(0, 24), gate_up.__getitem__, down.__getitem__, nothing).shape == (0, 24)


@pytest.mark.parametrize("name", ["silu", "swiglu"])
def test_moe_is_what_torch_computes_in_bfloat16(name):
    """A plain layer in torch's own bfloat16 operators, token by token, with biases; weights as they come."""
    problem = MoeProblem("t", "experts", 1, 17, 48, 40, 8, 3, BF16, activation=ACTIVATIONS[name], bias=name == "swiglu")
    inputs = problem.inputs(seed=5)
    w, ids, weights = inputs.weights, inputs.topk_ids, inputs.topk_weights
    plain = torch.zeros(17, 48)
    for token, slot in product(range(17), range(3)):
        expert = int(ids[token, slot])
        gate, up = linear(inputs.x[token], w.w13(expert), w.b13(expert)).chunk(2)
        if name == "silu":
            hidden = silu(gate) * up
        else:
            gate, up = gate.clamp(max=7.0), up.clamp(-7.0, 7.0)
            hidden = gate * torch.sigmoid(1.702 * gate) * (up + 1)
        plain[token] += weights[token, slot] * linear(hidden, w.w2(expert), w.b2(expert)).float()
    biases = (w.b13, w.b2) if problem.bias else (None, None)
    y = moe(inputs.x, w.w13, w.w2, Routing(ids, weights), problem.activation, values, *biases)
    assert (plain.double() - y).norm() / y.norm() < 0.01  # bfloat16 rounds by up to 2**-8 = 0.004, a few times
    assert y.norm() / 17**0.5 / 48**0.5 > 0.1


def test_what_is_between_the_products_is_quantized_as_one_matrix():
    x, gate_up, down, logits = moe_inputs(9, hidden=64, intermediate=32)
    seen = []

    def between(hidden):
        seen.append(hidden)
        return quantize(hidden.float(), FORMATS["nvfp4"])

    y = moe(x, gate_up.__getitem__, down.__getitem__, route(logits, 2), between=between)
    assert [hidden.shape for hidden in seen] == [(18, 32)]
    exact = dense_moe(x, gate_up, down, route(logits, 2))
    assert 0.02 < (y - exact).norm() / exact.norm() < 0.2  # the error of four bits


def test_route_picks_the_largest_logits():
    routing = route(torch.tensor([[0.0, 3.0, -1.0, 2.0], [5.0, 4.0, 4.5, -8.0]]), 2)
    assert routing.ids.tolist() == [[1, 3], [0, 2]]
    e = np.exp
    expected = [[e(3) / (e(3) + e(2)), e(2) / (e(3) + e(2))], [e(5) / (e(5) + e(4.5)), e(4.5) / (e(5) + e(4.5))]]
    np.testing.assert_allclose(routing.weights.numpy(), expected, rtol=1e-14)


@pytest.mark.parametrize("topk", [1, 3, 8])
def test_route_weights_sum_to_one_over_distinct_experts(topk):
    routing = route(normal(50, 8), topk)
    assert routing.ids.shape == routing.weights.shape == (50, topk)
    torch.testing.assert_close(routing.weights.sum(dim=1), torch.ones(50, dtype=torch.float64), rtol=1e-14, atol=0)
    assert all(len(set(row)) == topk for row in routing.ids.tolist())


def test_silu_and_mul_takes_the_gate_from_the_first_half():
    gate_up = torch.tensor([[0.0, 1.0, -2.0, 7.0, 10.0, 3.0]], dtype=torch.float64)
    expected = [[0.0, 10 / (1 + np.exp(-1)), -6 / (1 + np.exp(2))]]
    np.testing.assert_allclose(silu_and_mul(gate_up).numpy(), expected, rtol=1e-14)


# The first four values of a block of 32, the rest zeros -> by rule, the scale byte and the first four codes.
# Codes 0 to 7 are 0 0.5 1 1.5 2 3 4 6, with 8 for the sign; QuTLASS holds 3 times the value.
BLOCKS = {
    # 7 is 1.75 * 2**2: FLOOR scales by 2**0, QuTLASS by 2**2, the others by 2**1.
    (7.0, 1.0, -0.25, 0.75): {
        ScaleRule.FLOOR: (127, [7, 2, 8, 2]),  # 7 saturates; -0.25 ties to -0, 0.75 to 1
        ScaleRule.CEIL: (128, [6, 1, 8, 1]),  # 3.5 ties to 4, 0.5, -0.125, 0.375
        ScaleRule.EVEN: (128, [6, 1, 8, 1]),
        ScaleRule.RCEIL: (128, [6, 1, 8, 1]),
        ScaleRule.QUTLASS_ABS_MAX: (129, [7, 2, 8, 1]),  # 5.25, 0.75 ties to 1, -0.1875, 0.5625
        ScaleRule.QUTLASS_QUEST: (126, [7, 4, 9, 3]),  # std 1.23 times 0.487 is 0.60: 14, 2, -0.5, 1.5
    },
    # 6.5 is 1.625 * 2**2: EVEN rounds up from 1.75 on, RCEIL above 6.
    (6.5, 2.5, -5.0, 1.25): {
        ScaleRule.FLOOR: (127, [7, 4, 14, 2]),  # 2.5 ties to 2, -5 to -4, 1.25 to 1
        ScaleRule.CEIL: (128, [5, 2, 12, 1]),  # 3.25, 1.25 ties to 1, -2.5 to -2, 0.625
        ScaleRule.EVEN: (127, [7, 4, 14, 2]),
        ScaleRule.RCEIL: (128, [5, 2, 12, 1]),
        ScaleRule.QUTLASS_ABS_MAX: (129, [6, 4, 14, 2]),  # 4.875, 1.875, -3.75, 0.9375
        ScaleRule.QUTLASS_QUEST: (126, [7, 6, 15, 4]),  # 1.52 to 0.74: 13, 5 ties to 4, -10, 2.5 ties to 2
    },
    # 6 is the largest code: only CEIL scales it down.
    (6.0, 4.0, -1.75, 3.5): {
        ScaleRule.FLOOR: (127, [7, 6, 12, 6]),  # -1.75 ties to -2, 3.5 to 4
        ScaleRule.CEIL: (128, [5, 4, 10, 4]),  # 3, 2, -0.875, 1.75 ties to 2
        ScaleRule.EVEN: (127, [7, 6, 12, 6]),
        ScaleRule.RCEIL: (127, [7, 6, 12, 6]),
        ScaleRule.QUTLASS_ABS_MAX: (129, [6, 5, 11, 5]),  # 4.5, 3, -1.3125, 2.625
        ScaleRule.QUTLASS_QUEST: (126, [7, 7, 14, 7]),  # 1.40 to 0.68: 12, 8, -3.5 ties to -4, 7
    },
    # A power of two: the four OCP rules agree.
    (4.0, 0.3, -3.0, 2.5): {
        ScaleRule.FLOOR: (127, [6, 1, 13, 4]),
        ScaleRule.CEIL: (127, [6, 1, 13, 4]),
        ScaleRule.EVEN: (127, [6, 1, 13, 4]),
        ScaleRule.RCEIL: (127, [6, 1, 13, 4]),
        ScaleRule.QUTLASS_ABS_MAX: (129, [5, 0, 12, 4]),  # 3, 0.225, -2.25, 1.875
        ScaleRule.QUTLASS_QUEST: (125, [7, 2, 15, 7]),  # 0.98 to 0.48: 16, 1.2, -12, 10
    },
    # Zeros: byte 0; for QuTLASS floor(log2(1e-8)) is -27.
    (0.0, 0.0, 0.0, 0.0): {
        ScaleRule.FLOOR: (0, [0, 0, 0, 0]),
        ScaleRule.CEIL: (0, [0, 0, 0, 0]),
        ScaleRule.EVEN: (0, [0, 0, 0, 0]),
        ScaleRule.RCEIL: (0, [0, 0, 0, 0]),
        ScaleRule.QUTLASS_ABS_MAX: (100, [0, 0, 0, 0]),
        ScaleRule.QUTLASS_QUEST: (100, [0, 0, 0, 0]),
    },
    # The smallest float32, a sixth of which is 0: byte 0, and codes of 0 with their signs.
    (2.0**-149, -(2.0**-149), 0.0, 0.0): {
        ScaleRule.FLOOR: (0, [0, 8, 0, 0]),
        ScaleRule.CEIL: (0, [0, 8, 0, 0]),
        ScaleRule.EVEN: (0, [0, 8, 0, 0]),
        ScaleRule.RCEIL: (0, [0, 8, 0, 0]),
        ScaleRule.QUTLASS_ABS_MAX: (100, [0, 8, 0, 0]),
        ScaleRule.QUTLASS_QUEST: (100, [0, 8, 0, 0]),
    },
}


@pytest.mark.parametrize("rule", MXFP4.rules, ids=str)
@pytest.mark.parametrize("block", BLOCKS, ids=str)
def test_formula_of_every_mxfp4_rule(block, rule):
    x = torch.zeros(1, 32)
    x[0, :4] = torch.tensor(block)
    formula = quantize_by_formula(x, MXFP4, rule)
    byte, first = BLOCKS[block][rule]
    assert (formula.scales.tolist(), formula.codes.tolist()) == ([[byte]], [first + 28 * [0]])
    assert formula.tensor_scale is None


def test_formula_of_nvfp4_scales_blocks_by_the_tensor():
    # S = 2688 / 6 = 448. Block scales amax * 448 / 6: 448 (0x7E), 112 = 1.75 * 2**6 (0x6E), 0.
    # Codes hold x / (scale / 448): x, 4 * x, anything for zeros.
    x = torch.zeros(1, 48)
    x[0, :4] = torch.tensor([6.0, -1.25, 2.5, 0.2])
    x[0, 16:20] = torch.tensor([0.25, 1.5, -0.75, 0.3])
    formula = quantize_by_formula(x, NVFP4, ScaleRule.TWO_LEVEL)
    assert (formula.tensor_scale.dtype, formula.tensor_scale.shape) == (torch.float32, ())
    assert formula.tensor_scale.item() == 448
    assert formula.scales.tolist() == [[0x7E, 0x6E, 0]]
    assert formula.codes.tolist() == [[7, 10, 4, 0] + 12 * [0] + [2, 7, 13, 2] + 12 * [0] + 16 * [0]]


@pytest.mark.parametrize(
    ("amax", "expected"),
    [
        (0.0, 1.0),
        (7.0, 384.0),  # 2688 times the float32 1 / 7 would be 384.00003
        (1e-38, torch.finfo(torch.float32).max),  # 2688 / 1e-38 is beyond float32
    ],
)
def test_formula_of_the_tensor_scale(amax, expected):
    x = torch.zeros(2, 16)
    x[1, 3] = -amax
    assert quantize_by_formula(x, NVFP4, ScaleRule.TWO_LEVEL).tensor_scale.item() == expected


def test_formula_rotates_by_hadamard_blocks_and_pads():
    # Times 8: rows 0 and 1 of Sylvester's 4 x 4 matrix, entries +-0.5, hence 4 4 4 4 and 4 -4 4 -4.
    x = torch.zeros(1, 36)
    x[0, 0] = x[0, 5] = 8
    x[0, 33] = -8
    formula = quantize_by_formula(x, MXFP4, ScaleRule.FLOOR, hadamard=4)
    assert formula.scales.tolist() == [[127, 127]]
    assert formula.codes.tolist() == [[6, 6, 6, 6, 6, 14, 6, 14] + 24 * [0] + [14, 6, 14, 6] + 28 * [0]]
