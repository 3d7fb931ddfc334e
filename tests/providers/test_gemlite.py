"""gemlite's provider: helper classes with the real ones' signatures, and why not."""

import sys
import types

import gemm_contract
import pytest
import torch

from fp4bench import providers as registry
from fp4bench.checking import check
from fp4bench.devices import Device
from fp4bench.formats import MXFP4, NVFP4, e2m1
from fp4bench.problems import W4A8, W4A16, GemmInputs, GemmProblem
from fp4bench.providers import why_not
from fp4bench.providers.gemlite import GemliteProvider
from fp4bench.quantize import decode_fp8_rows, quantize_fp8_rows

CPU = Device("cpu", "Some CPU")
A100 = Device("cuda:0", "NVIDIA A100", (8, 0), 108, 40 << 20)
H200 = Device("cuda:0", "NVIDIA H200", (9, 0), 132, 60 << 20)
B200 = Device("cuda:0", "NVIDIA B200", (10, 0), 148, 126 << 20)


def gemm(mode=W4A16, fmt=MXFP4, m=3, n=128, k=256):
    return GemmProblem("tiny", "fc", 1, m, n, k, mode, fmt)


def weights(codes, values):
    return e2m1.decode(e2m1.unpack(codes)).double() * values.repeat_interleave(2 * codes.shape[1] // values.shape[1], dim=1)


class _Helper:
    def __init__(self, device="cuda:0", dtype=None):
        assert (device, dtype) == ("cpu", torch.bfloat16)


class MxWeights(_Helper):
    def from_packed_weights(self, W_q_packed, scales, bias=None):  # noqa: N803
        assert scales.dtype == torch.float8_e8m0fnu
        w = weights(W_q_packed, torch.exp2(scales.view(torch.uint8).double() - 127))
        return lambda x: (x.double() @ w.T).bfloat16()


class NvWeights(_Helper):
    def from_packed_weights(self, weight_packed, bias=None, scales=None, meta_scale=None):
        assert scales.dtype == torch.float8_e4m3fn
        w = weights(weight_packed, scales.double() * (1.0 / meta_scale).double())
        return lambda x: (x.double() @ w.T).bfloat16()


class MxWeightsFp8(_Helper):
    def from_packed_weights(self, weight_packed, bias=None, scales=None):
        w = weights(weight_packed, torch.exp2(scales.view(torch.uint8).double() - 127))
        return lambda x: (decode_fp8_rows(quantize_fp8_rows(x)).double() @ w.T).bfloat16()


@pytest.fixture
def gemlite(monkeypatch):
    package, helper = types.ModuleType("gemlite"), types.ModuleType("gemlite.helper")
    helper.A16W4_MXFP, helper.A16W4_NVFP, helper.A8W4_MXFP_dynamic = MxWeights, NvWeights, MxWeightsFp8
    package.helper = helper
    monkeypatch.setitem(sys.modules, "gemlite", package)
    monkeypatch.setitem(sys.modules, "gemlite.helper", helper)
    monkeypatch.setattr(registry, "_version", lambda name: "0.6.0")
    return GemliteProvider()


@pytest.mark.parametrize(("mode", "fmt"), [(W4A16, MXFP4), (W4A16, NVFP4), (W4A8, MXFP4)], ids=str)
def test_it_hands_over_packed_weights(mode, fmt, gemlite):
    problem = gemm(mode, fmt)
    assert why_not(gemlite, problem, B200) is None
    inputs = problem.inputs()
    inputs = GemmInputs(inputs.x, inputs.w * 37)
    assert check(problem, inputs, gemlite.rules[fmt.name][0], gemlite.prepare(problem, inputs)()).rows == problem.m


def test_it_keeps_the_contract_at_its_edges(gemlite):
    kinds = (("w4a16", "mxfp4"), ("w4a16", "nvfp4"), ("w4a8", "mxfp4"))
    assert gemm_contract.check_edges(gemlite, B200) == {(*kind, layer) for kind in kinds for layer in ((128, 256), (384, 768))}


@pytest.mark.parametrize(
    ("problem", "device", "reason"),
    [
        (gemm(), CPU, "gemlite needs a CUDA GPU of compute capability 8.0 or later for bfloat16, which Some CPU is not"),
        (gemm(), A100, None),
        (gemm(W4A8), H200, None),
        (gemm(W4A8, NVFP4), B200, "gemlite has no NVFP4 weights beside FP8 activations"),
        (
            gemm(fmt=NVFP4),
            H200,
            "Triton's tl.dot_scaled takes E4M3 scales on Blackwell alone (3.6), which NVIDIA H200 is not: "
            "https://github.com/triton-lang/triton/pull/9772",
        ),
        (gemm(n=64), H200, "gemlite reads whole tiles: n a multiple of 128 and k of 256, not 64 and 256"),
        (gemm(k=128), H200, "gemlite reads whole tiles: n a multiple of 128 and k of 256, not 128 and 128"),
    ],
    ids=str,
)
def test_why_not(problem, device, reason, gemlite):
    assert gemlite.why_not(problem, device) == reason


def test_without_the_package_there_is_a_reason():
    provider = GemliteProvider()
    provider.version = None
    assert provider.why_not(gemm(), H200) == "gemlite is not installed"
