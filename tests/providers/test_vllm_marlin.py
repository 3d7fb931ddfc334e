"""Marlin's provider: operators of three versions that read its layouts back, the scales bit by bit, and why not."""

import gemm_contract
import pytest
import torch
from cuda_library import PTX, SASS
from marlin_reading import decode_s0e5m3, in_row_order, repack, weights
from vllm_stand_in import MARLIN, operators

from fp4bench.checking import WrongResultError, check
from fp4bench.devices import Device
from fp4bench.formats import MXFP4, NVFP4, ScaleRule
from fp4bench.problems import W4A16, W4A16_FP16, GemmInputs, GemmProblem
from fp4bench.providers import marlin_layout, providers, why_not
from fp4bench.providers.marlin_layout import marlin_scales
from fp4bench.providers.vllm_marlin import VllmMarlinProvider
from fp4bench.quantize import Quantized, quantize

CPU = Device("cpu", "Some CPU")
T4 = Device("cuda:0", "Tesla T4", (7, 5), 40, 4 << 20)
H200 = Device("cuda:0", "NVIDIA H200", (9, 0), 132, 60 << 20)
B200 = Device("cuda:0", "NVIDIA B200", (10, 0), 148, 126 << 20)


def gemm(fmt=MXFP4, m=5, n=128, k=192, mode=W4A16):
    return GemmProblem("tiny", "fc", 1, m, n, k, mode, fmt)


def marlin(a, b_q_weight, b_scales, global_scale, workspace, b_type_id=None, b_q_type=None, **rest):
    """What Marlin computes, from its layouts. (The weights are left as they were: `repack` is the library's.)"""
    assert {"size_m": len(a), "use_atomic_add": False, "use_fp32_reduce": True, "is_zp_float": False}.items() <= rest.items()
    assert all(value is None for name, value in rest.items() if name.endswith("_or_none") or name == "a_scales")
    assert rest.get("is_k_full", True)
    assert (b_type_id or b_q_type) == 562949953487106  # float4_e2m1f
    assert workspace.dtype == torch.int32
    assert len(workspace) == 132
    assert not workspace.any()
    w = weights(b_q_weight, b_scales, global_scale, a.dtype)
    return (a.double() @ w.T).to(a.dtype)


BEHIND = {"gptq_marlin_gemm": marlin, "marlin_gemm": marlin, "gptq_marlin_repack": repack}


@pytest.fixture
def vllm(tmp_path, monkeypatch):
    """vLLM of a version on a made-up H200 whose tensors are on the CPU."""
    monkeypatch.setattr(marlin_layout, "processors", lambda device: 132)
    return lambda version, **options: operators(MARLIN[version], BEHIND, "MAIN", monkeypatch, tmp_path, **options)


@pytest.mark.parametrize(("fmt", "mode"), [(MXFP4, W4A16), (NVFP4, W4A16), (NVFP4, W4A16_FP16)], ids=str)
@pytest.mark.parametrize("version", MARLIN)
def test_every_version_gets_what_it_wants(version, fmt, mode, vllm):
    problem = gemm(fmt, mode=mode)
    inputs = problem.inputs()
    inputs = GemmInputs(inputs.x, inputs.w * 37)  # a tensor scale that is no power of two
    with vllm(version):
        marlin_provider = VllmMarlinProvider()
        assert why_not(marlin_provider, problem, H200) is None
        run = marlin_provider.prepare(problem, inputs)
        assert check(problem, inputs, marlin_provider.rules[fmt.name][0], run()).rows == problem.m
        before = run()
        inputs.x.mul_(2)  # what is read on each call
        assert torch.equal(run(), before * 2)


def test_it_keeps_the_contract_at_its_edges(vllm):
    kinds = (("w4a16", "mxfp4"), ("w4a16", "nvfp4"), ("w4a16_fp16", "nvfp4"))
    with vllm("0.26.0"):
        taken = gemm_contract.check_edges(VllmMarlinProvider(), H200)
    assert taken == {(*kind, layer) for kind in kinds for layer in gemm_contract.EDGES["vllm_marlin"]}


def test_a_kernel_with_another_order_of_scales_would_be_found(vllm, monkeypatch):
    problem = gemm()
    inputs = problem.inputs()
    inputs.w[::3] *= 4
    with vllm("0.26.0"):
        monkeypatch.setattr(marlin_layout, "_COLUMNS_4", [0, 1, 2, 3])
        run = VllmMarlinProvider().prepare(problem, inputs)
        with pytest.raises(WrongResultError):
            check(problem, inputs, ScaleRule.FLOOR, run())


def test_float16_has_its_own_bias(vllm, monkeypatch):
    monkeypatch.setitem(marlin_layout._BIASES, torch.float16, 126)
    problem = gemm(NVFP4, mode=W4A16_FP16)
    inputs = problem.inputs()
    with vllm("0.26.0"):
        run = VllmMarlinProvider().prepare(problem, inputs)
        with pytest.raises(WrongResultError, match="not finite"):
            check(problem, inputs, ScaleRule.TWO_LEVEL, run())


def nvfp4_weights(scales, tensor_scale):
    codes = torch.zeros(scales.shape[0], scales.shape[1] * 8, dtype=torch.uint8)
    return Quantized(codes, scales, torch.tensor(tensor_scale), NVFP4, ScaleRule.TWO_LEVEL, None, scales.shape[1] * 16)


def test_every_scale_from_a_64th_of_1_on_is_kept_and_those_below_are_zero():
    scales = torch.arange(0x7F, dtype=torch.uint8).view(torch.float8_e4m3fn)
    scales = torch.cat((scales, scales[-1:])).reshape(64, 2)  # the largest is 448: nothing is moved up
    read, factor = marlin_scales(nvfp4_weights(scales, 3.0))
    values = scales.float()
    assert torch.equal(decode_s0e5m3(in_row_order(read)).T / 2**7, torch.where(values < 2**-6, 0, values))
    assert factor.dtype == torch.float32
    assert factor.item() == pytest.approx(2.0**119 / 3, rel=1e-7)


def test_small_scales_are_moved_up_by_a_power_of_two():
    scales = torch.full((64, 1), 0.4375).to(torch.float8_e4m3fn)  # 448 * 2**-10
    scales[5] = 2.0**-9
    read, factor = marlin_scales(nvfp4_weights(scales, 5.0))
    assert decode_s0e5m3(in_row_order(read))[0, [4, 5]].tolist() == [448 * 2**7, 2**8]
    assert factor.item() == pytest.approx(2.0**109 / 5, rel=1e-7)


def test_small_scales_stay_where_they_are_for_float16():
    scales = torch.full((64, 1), 0.4375).to(torch.float8_e4m3fn)
    scales[5] = 2.0**-9
    read, factor = marlin_scales(nvfp4_weights(scales, 5.0), torch.float16)
    assert decode_s0e5m3(in_row_order(read))[0, [4, 5]].tolist() == [56, 0]
    assert factor.item() == pytest.approx(2.0**7 / 5, rel=1e-7)


def test_scales_of_zero_alone_stay_zero():
    read, factor = marlin_scales(nvfp4_weights(torch.zeros(64, 2).to(torch.float8_e4m3fn), 1.0))
    assert not read.view(torch.uint8).any()
    assert factor.item() == 2.0**119


@pytest.mark.parametrize("bad", [-1.0, float("nan")])
def test_scales_that_s0e5m3_cannot_say_are_refused(bad):
    scales = torch.ones(64, 1)
    scales[7] = bad
    with pytest.raises(ValueError, match="Marlin takes no block scales that are negative or NaN"):
        marlin_scales(nvfp4_weights(scales.to(torch.float8_e4m3fn), 1.0))


def test_e8m0_scales_keep_every_byte():
    w = quantize(torch.randn(64, 64, generator=torch.Generator().manual_seed(1)), MXFP4)
    every = torch.arange(128, dtype=torch.uint8).reshape(64, 2) * 2 + 1  # 1 to 255, NaN
    scales, factor = marlin_scales(Quantized(w.codes, every.view(torch.float8_e8m0fnu), None, MXFP4, w.rule, None, 64))
    assert factor is None
    assert torch.equal(in_row_order(scales.view(torch.uint8)).T, every)


@pytest.mark.parametrize(
    ("device", "change", "reason"),
    [
        (CPU, {}, "Marlin needs a CUDA GPU of compute capability 8.0 or later for bfloat16, which Some CPU is not"),
        (T4, {}, "Marlin needs a CUDA GPU of compute capability 8.0 or later for bfloat16, which Tesla T4 is not"),
        (CPU, {"mode": W4A16_FP16, "fmt": NVFP4}, "compute capability 7.5 or later for float16, which Some CPU is not"),
        (T4, {"mode": W4A16_FP16, "fmt": NVFP4}, None),
        (H200, {"mode": W4A16_FP16, "fmt": NVFP4}, None),
        (H200, {"mode": W4A16_FP16}, "Marlin has no MXFP4 weights beside float16 activations"),
        (H200, {}, None),
        (H200, {"m": 1}, None),
        (H200, {"n": 64, "k": 128}, None),
        (
            H200,
            {"n": 64, "k": 64},
            "Marlin takes n that is a multiple of 64 and k of 128, or n of 128 and k of 64, not 64 and 64",
        ),
        (H200, {"n": 100}, "Marlin takes n that is a multiple of 64 and k of 128, or n of 128 and k of 64, not 100 and 192"),
        (B200, {}, "has code for sm_90 compute_75, not for compute capability 10.0"),
    ],
    ids=str,
)
def test_why_not(device, change, reason, vllm):
    targets = ((SASS, 90), *([] if device is B200 else [(PTX, 75)]))
    with vllm("0.26.0", targets=targets):
        told = VllmMarlinProvider().why_not(gemm(**change), device)
    reason = reason and reason.replace(" compute_75", "")
    assert told is None if reason is None else reason in told


def test_it_is_in_the_registry_and_knows_its_version(vllm):
    assert isinstance(providers()["vllm_marlin"], VllmMarlinProvider)
    with vllm("0.26.0"):
        assert VllmMarlinProvider().version == "0.26.0 (sm_90)"
