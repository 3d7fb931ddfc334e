"""The eager provider is right in every mode, format and rotation, on shapes that fill no block and no tile."""

import pytest
import torch

from fp4bench.checking import check
from fp4bench.devices import Device, find_device
from fp4bench.formats import FORMATS, MXFP4
from fp4bench.problems import W4A4, W4A4_NOQUANT, W4A8, W4A16, W4A16_FP16, GemmProblem, QuantizeProblem
from fp4bench.providers.eager import EagerProvider
from fp4bench.quantize import Quantized

EAGER = EagerProvider()

# A rotation is for modes that quantize both operands to FP4.
VARIANTS = [(mode, None) for mode in (W4A16, W4A16_FP16, W4A8)] + [
    (mode, had) for mode in (W4A4, W4A4_NOQUANT) for had in (None, 16, 64)
]


@pytest.mark.parametrize("m", [1, 127, 129])
@pytest.mark.parametrize("fmt", FORMATS.values(), ids=str)
@pytest.mark.parametrize(("mode", "hadamard"), VARIANTS, ids=[f"{mode}-had{had}" for mode, had in VARIANTS])
def test_gemm_is_right(mode, hadamard, fmt, m):
    problem = GemmProblem("tiny", "fc", 1, m, n=51, k=205, mode=mode, format=fmt, hadamard=hadamard)
    assert EAGER.why_not(problem, find_device("cpu")) is None
    inputs = problem.inputs()
    run = EAGER.prepare(problem, inputs)
    out = run()
    assert out.dtype == (torch.float16 if mode is W4A16_FP16 else torch.bfloat16)
    agreement = check(problem, inputs, EAGER.rules[fmt.name][0], out)
    assert agreement.rows == m
    assert agreement.error < (2**-11 if mode is W4A16_FP16 else 2**-8)
    if fmt is MXFP4 and mode in (W4A4, W4A4_NOQUANT):  # this provider rounds NVFP4's values to float32
        assert agreement.exact
    # The reference and this provider share the decoding: the product without any quantization is not far.
    exact = inputs.x.double() @ inputs.w.double().T
    assert (out.double() - exact).norm() < 0.25 * exact.norm()
    assert torch.equal(run(), out)


@pytest.mark.parametrize("hadamard", [None, 16, 64])
@pytest.mark.parametrize(
    ("fmt", "rule"),
    [(fmt, rule) for fmt in FORMATS.values() for rule in fmt.rules],
    ids=[str(r) for f in FORMATS.values() for r in f.rules],
)
def test_quantization_is_right(fmt, rule, hadamard):
    assert rule in EAGER.rules[fmt.name]
    for m, k in ((1, 64), (127, 205), (129, 33)):
        problem = QuantizeProblem("tiny", "fc", 1, m, k, fmt, rule, hadamard)
        assert EAGER.why_not(problem, find_device("cpu")) is None
        x = problem.inputs()
        out = EAGER.prepare(problem, x)()
        assert isinstance(out, Quantized)
        assert out.shape == (m, k)
        assert check(problem, x, rule, out).rows == m


def test_activations_are_quantized_within_the_call_only_where_the_mode_says_so():
    for mode, follows in ((W4A4, True), (W4A4_NOQUANT, False), (W4A8, True)):
        problem = GemmProblem("tiny", "fc", 1, 4, 8, 32, mode, MXFP4)
        inputs = problem.inputs()
        run = EAGER.prepare(problem, inputs)
        before = run()
        inputs.x.mul_(2)
        assert torch.equal(run(), before) is not follows
        inputs.w.zero_()  # weights are quantized before
        assert run().any()


def test_it_runs_on_any_device():
    problem = GemmProblem("tiny", "fc", 1, 1, 1, 1, W4A16, MXFP4)
    assert EAGER.why_not(problem, Device("cuda:0", "A100", (8, 0))) is None
