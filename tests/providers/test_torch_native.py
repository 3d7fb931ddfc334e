"""torch's own products: BF16 anywhere, FP8 where the GPU has it, and a reason where it has not."""

import pytest
import torch

from fp4bench.checking import check
from fp4bench.devices import Device
from fp4bench.problems import BF16, FP8, FP16, GemmProblem
from fp4bench.providers import why_not
from fp4bench.providers.torch_native import TorchFastFp8Provider, TorchProvider

TORCH = TorchProvider()

CPU = Device("cpu", "made-up CPU")
A100 = Device("cuda:0", "NVIDIA A100-SXM4-80GB", (8, 0), 108, 40 << 20)
RTX_4090 = Device("cuda:0", "NVIDIA GeForce RTX 4090", (8, 9), 128, 72 << 20)
H200 = Device("cuda:0", "NVIDIA H200", (9, 0), 132, 50 << 20)


def problem(mode, m=16, n=64, k=128):
    return GemmProblem("tiny", "fc", 1, m, n, k, mode)


@pytest.mark.parametrize("device", [CPU, A100, RTX_4090, H200], ids=str)
@pytest.mark.parametrize("mode", [BF16, FP16], ids=str)
def test_sixteen_bits_run_anywhere_in_any_shape(mode, device):
    assert TORCH.why_not(problem(mode), device) is None
    assert TORCH.why_not(problem(mode, m=1, n=51, k=205), device) is None


@pytest.mark.parametrize(
    ("device", "shape", "reason"),
    [
        (CPU, {}, "made-up CPU has no FP8 tensor cores (compute capability 8.9 or later)"),
        (A100, {}, "NVIDIA A100-SXM4-80GB has no FP8 tensor cores (compute capability 8.9 or later)"),
        (RTX_4090, {}, None),
        (H200, {}, None),
        (H200, {"m": 1}, None),
        (H200, {"m": 17}, None),
        (H200, {"n": 65}, "torch._scaled_mm takes n and k that are multiples of 16, not 65 and 128"),
        (H200, {"k": 136}, "torch._scaled_mm takes n and k that are multiples of 16, not 64 and 136"),
        (H200, {"n": 8, "k": 8}, "torch._scaled_mm takes n and k that are multiples of 16, not 8 and 8"),
    ],
    ids=lambda value: str(value) if isinstance(value, (Device, dict)) else "",
)
def test_fp8_says_why_not(device, shape, reason):
    assert TORCH.why_not(problem(FP8, **shape), device) == reason


@pytest.mark.parametrize(("mode", "dtype"), [(BF16, torch.bfloat16), (FP16, torch.float16)], ids=str)
@pytest.mark.parametrize("m", [1, 127, 129])
def test_sixteen_bits_are_right(m, mode, dtype):
    gemm = problem(mode, m=m, n=51, k=205)
    inputs = gemm.inputs()
    assert inputs.w.dtype == dtype
    out = TORCH.prepare(gemm, inputs)()
    assert out.dtype == dtype
    assert check(gemm, inputs, None, out).rows == m


@pytest.mark.parametrize(("provider", "fast"), [(TORCH, False), (TorchFastFp8Provider(), True)], ids=["torch", "fast"])
def test_fp8_sums_as_the_provider_says(provider, fast, monkeypatch):
    """A CPU has no such product, so that it is compared by what it is called with."""
    gemm, seen = problem(FP8), []

    def scaled_mm(a, b, *, scale_a, scale_b, out_dtype, use_fast_accum):
        seen.append(use_fast_accum)
        return ((a.float() * scale_a) @ (b.float() * scale_b)).to(out_dtype)

    monkeypatch.setattr(torch, "_scaled_mm", scaled_mm)
    inputs = gemm.inputs()
    assert check(gemm, inputs, None, provider.prepare(gemm, inputs)()).rows == 16
    assert seen == [fast]


def test_fast_sums_are_of_fp8_products_alone():
    fast = TorchFastFp8Provider()
    assert why_not(fast, problem(FP8), H200) is None
    assert why_not(fast, problem(BF16), H200) == "torch_fast_fp8 has no mode bf16"
