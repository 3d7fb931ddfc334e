"""The provider of this package's own kernels. What it computes is in test_gemm_contract.py and tests/kernels."""

import pytest
import torch

from fp4bench.cases import Case
from fp4bench.devices import Device
from fp4bench.formats import FORMATS, MXFP4, NVFP4, ScaleRule
from fp4bench.problems import W4A4, W4A8, W4A16, W4A16_FP16, GemmProblem, MoeProblem, QuantizeProblem
from fp4bench.providers import triton_native, why_not
from fp4bench.providers.triton_native import TritonProvider

H200 = Device("cuda:0", "NVIDIA H200", (9, 0), 132, 60 << 20)
B200 = Device("cuda:0", "NVIDIA B200", (10, 0), 148, 126 << 20)


def problem(m=1, format=MXFP4, mode=W4A16):
    return GemmProblem("some", "o", 1, m, 64, 128, mode, format)


@pytest.mark.parametrize("format", [MXFP4, NVFP4])
@pytest.mark.parametrize("m", [1, 16, 1000])
def test_it_runs_on_hopper(m, format):
    provider = TritonProvider()
    provider.version = "3.6.0"
    assert why_not(provider, problem(m, format), H200) is None


def test_float16_activations_go_to_the_same_kernels(monkeypatch):
    from fp4bench.kernels import gemm

    assert why_not(TritonProvider(), problem(mode=W4A16_FP16), H200) is None
    seen = []
    monkeypatch.setattr(triton_native, "find_device", lambda name: H200)
    monkeypatch.setattr(gemm, "gemm", lambda x, weight, mode, **rest: seen.append((x.dtype, mode, rest["out"].dtype)))
    half = problem(mode=W4A16_FP16)
    TritonProvider().prepare(half, half.inputs())()
    assert seen == [(torch.float16, W4A16, torch.float16)]


def test_more_rows_than_decode_takes_need_the_gluon_that_their_kernel_is_written_for():
    from fp4bench.kernels import decode

    provider = TritonProvider()
    provider.version = "3.9.0"
    assert why_not(provider, problem(decode.MOST_ROWS), H200) is None
    assert "needs Triton 3.6, and 3.9.0 is installed" in why_not(provider, problem(decode.MOST_ROWS + 1), H200)


def test_it_has_the_rules_that_its_kernels_have():
    from fp4bench.kernels.quantize import RULES

    assert TritonProvider.rules == {name: tuple(rule for rule in fmt.rules if rule in RULES) for name, fmt in FORMATS.items()}
    quest = QuantizeProblem("some", "o", 1, 4, 128, MXFP4, ScaleRule.QUTLASS_QUEST)
    assert why_not(TritonProvider(), quest, H200) == "triton has no scale rule qutlass_quest"


def test_it_says_where_it_does_not(monkeypatch):
    assert "needs Hopper's wgmma" in why_not(TritonProvider(), problem(17), B200)
    assert why_not(TritonProvider(), problem(17, mode=W4A4), B200) is None
    assert "cpu" in why_not(TritonProvider(), problem(), Device("cpu", "cpu"))
    monkeypatch.setattr(triton_native, "import_optional", lambda name: None)
    assert why_not(TritonProvider(), problem(), H200) == "Triton is not installed"


def test_timing_without_launch_overlap_is_another_variant(monkeypatch):
    monkeypatch.setenv(triton_native.PDL_VARIABLE, "0")
    provider = TritonProvider()
    assert provider.version.endswith("+nopdl")
    assert Case(problem(), provider).facts()["provider_variant"] == "nopdl"
    monkeypatch.delenv(triton_native.PDL_VARIABLE)
    assert "nopdl" not in TritonProvider().version
    assert Case(problem(), TritonProvider()).facts()["provider_variant"] is None


def layer(mode=W4A16, format=NVFP4, m=1, hidden=128):
    return MoeProblem("some", "experts", 1, m, hidden, 64, 32, 4, mode, format)


def test_moe_layers_that_have_no_kernel():
    provider = TritonProvider()
    provider.version = "3.6.0"
    for m in (0, 1, 100, 2048):
        assert why_not(provider, layer(m=m), H200) is None
        assert why_not(provider, layer(W4A8, MXFP4, m), H200) is None
    assert why_not(provider, layer(W4A8), H200) == "nvfp4 does not fit E4M3, which FP8 activations multiply"
    assert why_not(provider, layer(hidden=33), H200) == "rows of 33 elements are not read in pairs"
    assert "NVIDIA B200" in why_not(provider, layer(), B200)
    provider.version = "3.9.0"
    assert why_not(provider, layer(m=64), H200) is None
    for wide in (layer(m=2048), layer(W4A8, MXFP4)):
        assert "needs Triton 3.6.*, and 3.9.0 is installed" in why_not(provider, wide, H200)
