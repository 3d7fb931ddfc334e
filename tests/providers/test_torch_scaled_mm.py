"""torch's block-scaled product: the real function's signature, layouts read back, and why not."""

import inspect

import gemm_contract
import pytest
import torch
import torch.nn.functional as functional

from fp4bench.checking import check
from fp4bench.devices import Device
from fp4bench.formats import MXFP4, NVFP4, e2m1, layouts
from fp4bench.problems import W4A4, W4A4_NOQUANT, GemmInputs, GemmProblem
from fp4bench.providers import why_not
from fp4bench.providers.torch_scaled_mm import TorchScaledMmProvider

H200 = Device("cuda:0", "NVIDIA H200", (9, 0), 132, 60 << 20)
B200 = Device("cuda:0", "NVIDIA B200", (10, 0), 148, 126 << 20)
RTX_5090 = Device("cuda:0", "RTX 5090", (12, 0), 170, 96 << 20)
PROVIDER = TorchScaledMmProvider()

SIGNATURE = inspect.signature(functional.scaled_mm)


def gemm(mode=W4A4, fmt=MXFP4, m=5, n=144, k=160, hadamard=None):
    return GemmProblem("tiny", "fc", 1, m, n, k, mode, fmt, hadamard)


def decoded(codes, scales):
    """(rows, k) of what scaled_mm takes for one operand, as cuBLAS reads it."""
    assert codes.dtype == torch.float4_e2m1fn_x2
    codes = e2m1.unpack(codes.contiguous().view(torch.uint8))
    block = 32 if scales[0].dtype == torch.float8_e8m0fnu else 16
    rows, k = codes.shape
    block_scales = layouts.from_blocked(scales[0], rows, k // block)
    values = torch.exp2(block_scales.view(torch.uint8).double() - 127) if block == 32 else block_scales.double()
    if len(scales) == 2:
        assert (scales[1].shape, scales[1].dtype) == ((), torch.float32)
        values = values * scales[1].double()
    return e2m1.decode(codes).double() * values.repeat_interleave(block, dim=1)


def scaled_mm(*arguments, **rest):
    given = SIGNATURE.bind(*arguments, **rest).arguments
    kinds, swizzles = functional.ScalingType, functional.SwizzleType
    if len(given["scale_a"]) == 1:
        recipe, swizzle = [kinds.BlockWise1x32], [swizzles.SWIZZLE_32_4_4]
    else:
        recipe, swizzle = [kinds.BlockWise1x16, kinds.TensorWise], [swizzles.SWIZZLE_32_4_4, swizzles.NO_SWIZZLE]
    assert given["scale_recipe_a"] == given["scale_recipe_b"] == recipe
    assert given["swizzle_a"] == given["swizzle_b"] == swizzle
    assert given["mat_b"].stride(0) == 1  # column-major, as cuBLAS wants it
    x = decoded(given["mat_a"], given["scale_a"])
    return (x @ decoded(given["mat_b"].T, given["scale_b"]).T).to(given["output_dtype"])


@pytest.mark.parametrize("hadamard", [None, 32])
@pytest.mark.parametrize("fmt", [MXFP4, NVFP4], ids=str)
@pytest.mark.parametrize("mode", [W4A4, W4A4_NOQUANT], ids=str)
def test_both_operands_arrive(mode, fmt, hadamard, monkeypatch):
    monkeypatch.setattr(functional, "scaled_mm", scaled_mm)
    for m in (1, 129):
        problem = gemm(mode, fmt, m=m, hadamard=hadamard)
        assert why_not(PROVIDER, problem, B200) is None
        inputs = problem.inputs()
        inputs = GemmInputs(inputs.x * 0.3, inputs.w * 37)
        run = PROVIDER.prepare(problem, inputs)
        assert check(problem, inputs, PROVIDER.rules[fmt.name][0], run()).rows == m
        before = run()
        inputs.x.mul_(2)
        assert torch.equal(run(), before) is (mode is W4A4_NOQUANT)


def test_it_keeps_the_contract_at_its_edges(monkeypatch):
    monkeypatch.setattr(functional, "scaled_mm", scaled_mm)
    taken = gemm_contract.check_edges(PROVIDER, B200)
    layers = gemm_contract.EDGES["torch_scaled_mm"]
    assert taken == {(mode, fmt, layer) for mode in PROVIDER.modes for fmt in PROVIDER.rules for layer in layers}


@pytest.mark.parametrize(
    ("problem", "device", "reason"),
    [
        (gemm(), H200, "NVIDIA H200 has no FP4 tensor cores (Blackwell, compute capability 10.0 or later)"),
        (gemm(), B200, None),
        (gemm(), RTX_5090, "torch takes MXFP4 on compute capability 10 alone (2.11), which RTX 5090 is not"),
        (gemm(fmt=NVFP4), RTX_5090, None),
        (gemm(k=144), B200, "torch's scaled_mm takes FP4 with k a multiple of 32 and n of 16, not 144 and 144"),
        (gemm(n=72), B200, "torch's scaled_mm takes FP4 with k a multiple of 32 and n of 16, not 160 and 72"),
        (gemm(hadamard=64), B200, "k = 160 is not a multiple of the rotation of 64"),
    ],
    ids=str,
)
def test_why_not(problem, device, reason):
    assert PROVIDER.why_not(problem, device) == reason


def test_an_older_torch_is_a_reason(monkeypatch):
    monkeypatch.delattr(functional, "scaled_mm")
    assert PROVIDER.why_not(gemm(), B200) == f"torch {torch.__version__} has no torch.nn.functional.scaled_mm"
