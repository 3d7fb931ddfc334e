"""MoE outputs: what hardware may round agrees, and is as far off as the bound says; what is wrong is refused."""

from dataclasses import replace
from functools import cache

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fp4bench.checking import WrongResultError, check, checker
from fp4bench.checking import moe as checking_moe
from fp4bench.formats import MXFP4, NVFP4
from fp4bench.models import SILU, Activation
from fp4bench.problems import BF16, FP8, FP8_SCALINGS, ROUTINGS, W4A4, W4A8, W4A16, MoeProblem, Routing
from fp4bench.providers.eager import EagerProvider
from fp4bench.quantize import quantize, quantize_fp8_rows, quantize_fp8_tiles
from fp4bench.reference import Routing as Choices
from fp4bench.reference import activate, moe, values

GPT_OSS = Activation("swiglu", alpha=1.702, limit=7.0)
LAYER = MoeProblem("tiny", "experts", 1, 24, 192, 160, 6, 3, BF16)
MODES = [
    (BF16, None, None),
    *((FP8, None, scaling) for scaling in FP8_SCALINGS.values()),
    *((mode, fmt, None) for mode in (W4A16, W4A8, W4A4) for fmt in (MXFP4, NVFP4)),
]
MODE_IDS = [" ".join(str(part) for part in mode if part) for mode in MODES]


def problem_of(mode, activation=SILU, **changes):
    mode, fmt, fp8 = mode
    return replace(LAYER, mode=mode, format=fmt, fp8=fp8, activation=activation, bias=activation is GPT_OSS, **changes)


def operand(problem, tensor, what):
    """What the mode makes of weights or activations, as float32."""
    element = getattr(problem.mode, what)
    if element == "fp4":
        tensor = quantize(tensor, problem.format)
    elif problem.fp8:
        tile = problem.fp8.weight_tile if what == "weights" else problem.fp8.activation_tile
        tensor = quantize_fp8_tiles(tensor, *tile)
    elif element == "fp8":
        tensor = quantize_fp8_rows(tensor)
    return values(tensor).float()


def unfused(problem, inputs, round_=lambda tensor: tensor.bfloat16().float()):
    """As separate kernels compute it: bfloat16 after each product, the activation, the weighting and each addition."""
    w, topk = inputs.weights, problem.topk
    x = operand(problem, inputs.x, "activations").repeat_interleave(topk, 0)
    experts = inputs.topk_ids.flatten().tolist()

    def product(rows, weight, bias):
        weight = cache(lambda e, drawn=weight: operand(problem, drawn(e), "weights").T)
        parts = [rows[i] @ weight(e) + (0 if bias(e) is None else bias(e)) for i, e in enumerate(experts)]
        return round_(torch.stack(parts))

    hidden = round_(activate(product(x, w.w13, w.b13), problem.activation))
    out = product(operand(problem, hidden, "activations"), w.w2, w.b2).unflatten(0, (-1, topk))
    weighted = round_(inputs.topk_weights[..., None] * out)
    total = torch.zeros_like(weighted[:, 0])
    for slot in range(topk):
        total = round_(total + weighted[:, slot])
    return total.bfloat16()


@pytest.mark.parametrize("activation", [SILU, GPT_OSS], ids=str)
@pytest.mark.parametrize("mode", MODES, ids=MODE_IDS)
def test_roundings_between_the_products_agree_and_the_bound_is_near(mode, activation):
    problem = problem_of(mode, activation, routing=Routing("zipf"))
    inputs = problem.inputs()
    agreement = check(problem, inputs, None, unfused(problem, inputs))
    assert agreement.rows == 24
    rows = torch.arange(24)
    want, variance = checking_moe._reference(problem, inputs, None, problem.mode.accumulation, rows)
    expected = variance.sum().sqrt() / want.norm()
    # Quantized again after other roundings, most values fall where they fell: then the error is that of the others alone.
    assert 0.1 * expected < agreement.error < checking_moe.OVERALL_BOUND * expected
    if problem.mode.activations == "bf16":
        assert agreement.error > 0.5 * expected
    assert expected < {"bf16": 0.01, "fp8": 0.06, "fp4": 0.25}[problem.mode.activations]


@pytest.mark.parametrize("mode", MODES[1:2] + MODES[5:6] + MODES[8:], ids=MODE_IDS[1:2] + MODE_IDS[5:6] + MODE_IDS[8:])
def test_another_scale_of_what_is_between_agrees(mode):
    """A static scale, of a provider that has one: each value is rounded anew, and none of them the same way."""
    problem = problem_of(mode)
    inputs = problem.inputs()
    first, second = (
        unfused(problem, inputs, lambda tensor, by=by: tensor * by if tensor.shape[-1] == 160 else tensor) for by in (1.0, 1.03)
    )
    check(problem, inputs, None, first)
    check(problem, inputs, None, (second.float() / 1.03).bfloat16())


WRONG = {
    "one element": lambda y: y.index_put((torch.tensor(3), torch.tensor(7)), y[3, 7] + y.abs().max()),
    "a row": lambda y: torch.cat((y[1:], y[:1])),
    "a little everywhere": lambda y: y * 1.12,
    "nothing": torch.zeros_like,
}


@pytest.mark.parametrize("mode", [MODES[0], MODES[1], *MODES[6:8]], ids=[MODE_IDS[i] for i in (0, 1, 6, 7)])
@pytest.mark.parametrize("wrong", WRONG)
def test_a_wrong_output_is_refused(mode, wrong):
    problem = problem_of(mode)
    inputs = problem.inputs()
    y = unfused(problem, inputs)
    compare = checker(problem, inputs, None)
    compare(y)
    with pytest.raises(WrongResultError, match=r"^output is wrong (in \d+ of \d+ elements|as a whole: off by)"):
        compare(WRONG[wrong](y))


@pytest.mark.parametrize("mode", MODES[:2] + MODES[6:10:2], ids=MODE_IDS[:2] + MODE_IDS[6:10:2])
def test_one_element_a_little_beyond_its_bound_is_refused(mode):
    problem = problem_of(mode)
    inputs = problem.inputs()
    want, variance = checking_moe._reference(problem, inputs, None, problem.mode.accumulation, torch.arange(24))
    y = want.bfloat16()
    check(problem, inputs, None, y)
    y[3, 7] = want[3, 7] + want[3, 7].sign() * (
        1.2 * checking_moe.ELEMENT_BOUND * variance[3, 7].sqrt() + want[3, 7].abs() / 32
    )
    with pytest.raises(WrongResultError, match=r"^output is wrong in 1 of 4608 elements, first at \[3, 7\]: "):
        check(problem, inputs, None, y)


def test_one_percent_everywhere_is_refused_where_activations_are_bfloat16():
    problem = problem_of(MODES[0])
    inputs = problem.inputs()
    compare = checker(problem, inputs, None)
    with pytest.raises(WrongResultError, match=r"^output is wrong as a whole: off by 1\.\d\d% of the reference, not 0\.\d\d%$"):
        compare((unfused(problem, inputs) * 1.013).bfloat16())


def test_outputs_that_are_none_are_refused():
    problem = problem_of(MODES[0])
    inputs = problem.inputs()
    y, compare = unfused(problem, inputs), checker(problem, inputs, None)
    with pytest.raises(WrongResultError, match=r"^output is torch\.float32 \(24, 192\), not torch\.bfloat16 \(24, 192\)$"):
        compare(y.float())
    with pytest.raises(WrongResultError, match=r"^output is torch\.bfloat16 \(23, 192\)"):
        compare(y[1:])
    y[5, 6] = torch.nan
    with pytest.raises(WrongResultError, match=r"^output is not finite in 1 of 4608 elements, first at \[5, 6\]: nan$"):
        compare(y)


@pytest.mark.parametrize("m", [0, 1])
@pytest.mark.parametrize("mode", MODES, ids=MODE_IDS)
def test_no_token_and_one(mode, m):
    problem = problem_of(mode, m=m)
    inputs = problem.inputs()
    agreement = check(problem, inputs, None, unfused(problem, inputs) if m else torch.zeros(0, 192, dtype=torch.bfloat16))
    assert agreement.rows == m


@settings(max_examples=15, deadline=None)
@given(name=st.sampled_from([*ROUTINGS]), m=st.integers(0, 9), topk=st.integers(1, 6), seed=st.integers(0, 9), data=st.data())
def test_outputs_permute_with_their_tokens(name, m, topk, seed, data):
    problem = replace(LAYER, m=m, hidden=64, intermediate=32, topk=topk, mode=W4A16, format=MXFP4, routing=Routing(name, seed))
    inputs = problem.inputs()
    order = torch.tensor(data.draw(st.permutations(range(m))), dtype=torch.int64)
    moved = replace(inputs, x=inputs.x[order], topk_ids=inputs.topk_ids[order], topk_weights=inputs.topk_weights[order])
    provider = EagerProvider()
    y = provider.prepare(problem, inputs)()
    check(problem, inputs, None, y)
    check(problem, moved, None, y[order])
    check(problem, moved, None, provider.prepare(problem, moved)())


@settings(max_examples=15, deadline=None)
@given(name=st.sampled_from([*ROUTINGS]), m=st.integers(1, 5), seed=st.integers(0, 9))
def test_experts_without_tokens_are_not_asked_for(name, m, seed):
    problem = replace(LAYER, m=m, experts=12, topk=2, routing=Routing(name, seed))
    inputs, asked = problem.inputs(), set()

    def weight(method):
        return lambda expert: (asked.add(expert), method(expert))[1]

    w = inputs.weights
    moe(inputs.x, weight(w.w13), weight(w.w2), Choices(inputs.topk_ids, inputs.topk_weights))
    assert asked == set(inputs.topk_ids.flatten().tolist())


def test_the_reference_is_that_of_the_plain_formula():
    problem = problem_of((W4A8, MXFP4, None), GPT_OSS)
    inputs = problem.inputs()
    w = inputs.weights
    want, _ = checking_moe._reference(problem, inputs, None, problem.mode.accumulation, torch.arange(24))
    plain = moe(
        quantize_fp8_rows(inputs.x),
        lambda e: quantize(w.w13(e), MXFP4),
        lambda e: quantize(w.w2(e), MXFP4),
        Choices(inputs.topk_ids, inputs.topk_weights),
        GPT_OSS,
        lambda hidden: quantize_fp8_rows(hidden.float()),
        w.b13,
        w.b2,
    )
    torch.testing.assert_close(want, plain, rtol=1e-12, atol=1e-12)


def test_tokens_are_left_out_where_their_experts_cost_too_much(monkeypatch):
    problem = problem_of(MODES[0])
    inputs = problem.inputs()
    y = unfused(problem, inputs)
    # Five experts of the six: a token needs three, so two tokens are left, and with two copies still two.
    monkeypatch.setitem(checking_moe._WEIGHT_VALUES, "cpu", 5 * 3 * 192 * 160)
    assert check(problem, inputs, None, y).rows == 2
    y[0, 0] += 1
    with pytest.raises(WrongResultError):
        check(problem, inputs, None, y)
    monkeypatch.setitem(checking_moe._WEIGHT_VALUES, "cpu", 6 * 3 * 192 * 160)
    assert checking_moe._rows(problem, 1, torch.device("cpu")).tolist() == list(range(24))
    assert checking_moe._rows(problem, 2, torch.device("cpu")).tolist() == [0, 23]


def test_steps_are_those_of_the_formats():
    # E2M1: 0 0.5 1 1.5 2 3 4 6. E4M3: three bits of significand, down to steps of 2**-9.
    assert checking_moe._step(torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6.0]), 1, 0.5).tolist() == [0.5, 0.5, 0.5, 0.5, 1, 1, 2, 2]
    assert checking_moe._step(torch.tensor([0, 2.0**-9, 2.0**-6, 1, 448]), 3, 2.0**-9).tolist() == [2.0**-9] * 3 + [0.125, 32]
