"""FlashInfer's providers: a module with the real signatures (0.6.14) that reads their layouts back, and why not."""

import sys
import types
from enum import Enum

import gemm_contract
import pytest
import torch

from fp4bench import providers as registry
from fp4bench.checking import WrongResultError, check
from fp4bench.devices import Device
from fp4bench.formats import MXFP4, NVFP4, ScaleRule, e2m1, layouts
from fp4bench.problems import W4A4, W4A4_NOQUANT, GemmInputs, GemmProblem
from fp4bench.providers import why_not
from fp4bench.providers.flashinfer import (
    FlashInferB12xProvider,
    FlashInferCudnnProvider,
    FlashInferCuteDslProvider,
    FlashInferCutlassProvider,
    FlashInferTrtllmProvider,
)
from fp4bench.quantize import quantize

H200 = Device("cuda:0", "NVIDIA H200", (9, 0), 132, 60 << 20)
B200 = Device("cuda:0", "NVIDIA B200", (10, 0), 148, 126 << 20)
RTX_5090 = Device("cuda:0", "NVIDIA GeForce RTX 5090", (12, 0), 170, 96 << 20)
MADE = (
    FlashInferCutlassProvider,
    FlashInferCudnnProvider,
    FlashInferCuteDslProvider,
    FlashInferTrtllmProvider,
    FlashInferB12xProvider,
)


class SfLayout(Enum):
    layout_128x4 = 0
    layout_8x4 = 1
    layout_linear = 2


def gemm(mode=W4A4, fmt=NVFP4, m=5, n=96, k=256, hadamard=None):
    return GemmProblem("tiny", "fc", 1, m, n, k, mode, fmt, hadamard)


def blocked(q):
    rows, columns = layouts.padded_shape(*q.scales.shape)
    return layouts.to_blocked(q.scales).view(torch.uint8).reshape(rows, columns)


def nvfp4_quantize(
    a, a_global_sf, sfLayout=SfLayout.layout_128x4, do_shuffle=False, sf_vec_size=16, enable_pdl=None, backend="cuda",  # noqa: N803
    per_token_activation=False, expanded_idx_to_permuted_idx=None,
):  # fmt: skip
    assert (sfLayout, do_shuffle, sf_vec_size, per_token_activation) == (SfLayout.layout_128x4, False, 16, False)
    assert (a_global_sf.shape, a_global_sf.dtype) == ((1,), torch.float32)
    q = quantize(a, NVFP4, tensor_scale=a_global_sf)
    return q.codes, blocked(q)


def mxfp4_quantize(a, backend="cuda", enable_pdl=None):
    assert backend == "cute-dsl"
    q = quantize(a, MXFP4, rule=ScaleRule.RCEIL)
    return q.codes, blocked(q)


def decoded(codes, scales, block):
    codes = e2m1.unpack(codes)
    rows, k = codes.shape
    assert scales.shape == layouts.padded_shape(rows, k // block)
    plain = layouts.from_blocked(scales.flatten(), rows, k // block)
    values = torch.exp2(plain.double() - 127) if block == 32 else plain.view(torch.float8_e4m3fn).double()
    return e2m1.decode(codes).double() * values.repeat_interleave(block, dim=1)


def shuffle_matrix_a(input_tensor, epilogue_tile_m):
    """Any order of rows but the plain one shows what is left out; the real one is FlashInfer's own."""
    assert (input_tensor.dtype, epilogue_tile_m, input_tensor.shape[0] % 128) == (torch.uint8, 128, 0)
    return input_tensor.flip(0)


def shuffle_matrix_sf_a(input_tensor, epilogue_tile_m, num_elts_per_sf=16):
    """Of plain rows of scales -> blocked."""
    return layouts.to_blocked(shuffle_matrix_a(input_tensor, epilogue_tile_m))


def in_order(rows):
    return rows.flip(0)


def blocked_in_order(scales):
    plain = layouts.from_blocked(scales.flatten(), *scales.shape)
    return layouts.to_blocked(in_order(plain)).reshape(scales.shape)


def mm_fp4(
    a, b, a_descale, b_descale, alpha=None, out_dtype=torch.bfloat16, out=None, block_size=16, use_8x4_sf_layout=False,
    backend="auto", use_nvfp4=True, enable_pdl=True,
):  # fmt: skip
    assert backend in ("cutlass", "cudnn", "cute-dsl", "trtllm", "b12x")
    assert (use_8x4_sf_layout, out) == (False, None)
    assert block_size == (16 if use_nvfp4 else 32)
    assert (alpha is None) is not use_nvfp4
    assert b.stride(0) == 1
    assert b_descale.stride(0) == 1
    b, b_descale = b.T, b_descale.T
    if backend == "trtllm":
        b, b_descale = in_order(b), blocked_in_order(b_descale)
    product = decoded(a, a_descale, block_size) @ decoded(b, b_descale, block_size).T
    return (product if alpha is None else alpha.double() * product).to(out_dtype)


@pytest.fixture
def flashinfer(monkeypatch):
    module = types.ModuleType("flashinfer")
    module.mm_fp4, module.SfLayout = mm_fp4, SfLayout
    module.nvfp4_quantize, module.mxfp4_quantize = nvfp4_quantize, mxfp4_quantize
    module.shuffle_matrix_a, module.shuffle_matrix_sf_a = shuffle_matrix_a, shuffle_matrix_sf_a
    monkeypatch.setitem(sys.modules, "flashinfer", module)
    monkeypatch.setattr(registry, "_version", lambda name: "0.6.14")


@pytest.mark.parametrize("mode", [W4A4, W4A4_NOQUANT], ids=str)
@pytest.mark.parametrize(
    ("make", "fmt"),
    [
        (FlashInferCutlassProvider, NVFP4),
        (FlashInferCudnnProvider, NVFP4),
        (FlashInferCuteDslProvider, NVFP4),
        (FlashInferCuteDslProvider, MXFP4),
    ],
)
def test_both_operands_arrive(make, fmt, mode, flashinfer):
    provider = make()
    for m in (1, 129):
        problem = gemm(mode, fmt, m=m)
        assert why_not(provider, problem, B200) is None
        inputs = problem.inputs()
        inputs = GemmInputs(inputs.x * 0.3, inputs.w * 37)
        run = provider.prepare(problem, inputs)
        assert check(problem, inputs, provider.rules[fmt.name][0], run()).rows == m
        before = run()
        inputs.x.neg_()
        assert torch.equal(run(), -before) is (mode is W4A4)


@pytest.mark.parametrize("make", MADE)
def test_it_keeps_the_contract_at_its_edges(make, flashinfer):
    provider = make()
    layers = gemm_contract.EDGES[provider.name]
    wanted = {(mode, fmt, layer) for mode in provider.modes for fmt in provider.rules for layer in layers}
    assert gemm_contract.check_edges(provider, RTX_5090 if make is FlashInferB12xProvider else B200) == wanted


def test_weights_in_plain_order_are_found(flashinfer, monkeypatch):
    monkeypatch.setattr(FlashInferTrtllmProvider, "_laid_out", FlashInferCutlassProvider._laid_out)
    problem = gemm(W4A4_NOQUANT, n=128)
    inputs = problem.inputs()
    out = FlashInferTrtllmProvider().prepare(problem, inputs)()
    with pytest.raises(WrongResultError):
        check(problem, inputs, ScaleRule.TWO_LEVEL, out)


@pytest.mark.parametrize(
    ("make", "problem", "device", "reason"),
    [
        (
            FlashInferCutlassProvider,
            gemm(),
            H200,
            "cutlass FP4 needs compute capability 10, 11, 12, which NVIDIA H200 is not",
        ),
        (FlashInferCutlassProvider, gemm(), RTX_5090, None),
        (
            FlashInferCuteDslProvider,
            gemm(),
            RTX_5090,
            "cute-dsl FP4 needs compute capability 10, which NVIDIA GeForce RTX 5090 is not",
        ),
        (FlashInferCudnnProvider, gemm(hadamard=32), B200, "FlashInfer has no rotation"),
        (FlashInferTrtllmProvider, gemm(), B200, "n that is a multiple of 128 and k of 128, not 96 and 256"),
        (FlashInferTrtllmProvider, gemm(n=128), B200, None),
        (FlashInferB12xProvider, gemm(), RTX_5090, None),
        (FlashInferB12xProvider, gemm(), B200, "b12x FP4 needs compute capability 12, which NVIDIA B200 is not"),
        (
            FlashInferCudnnProvider,
            gemm(n=72),
            B200,
            "n that is a multiple of 32 and k of 128, not 72 and 256",
        ),
    ],
)
def test_why_not(make, problem, device, reason, flashinfer):
    told = make().why_not(problem, device)
    assert told is None if reason is None else told.endswith(reason)


def test_without_the_package_there_is_a_reason():
    provider = FlashInferCutlassProvider()
    provider.version = None
    assert provider.why_not(gemm(), B200) == "flashinfer-python is not installed"
