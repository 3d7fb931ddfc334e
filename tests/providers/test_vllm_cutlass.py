"""vLLM's CUTLASS provider: operators with the real schemas that read its layouts back, and why not."""

import gemm_contract
import pytest
import torch
from cuda_library import SASS
from vllm_stand_in import CUTLASS, operators

from fp4bench.checking import check
from fp4bench.devices import Device
from fp4bench.formats import NVFP4, ScaleRule, e2m1, layouts
from fp4bench.problems import W4A4, W4A4_NOQUANT, GemmInputs, GemmProblem
from fp4bench.providers import why_not
from fp4bench.providers.vllm_cutlass import VllmCutlassProvider, alpha
from fp4bench.quantize import quantize

H200 = Device("cuda:0", "NVIDIA H200", (9, 0), 132, 60 << 20)
B200 = Device("cuda:0", "NVIDIA B200", (10, 0), 148, 126 << 20)
TARGETS = ((SASS, 100, 1 << 21),)


def gemm(mode=W4A4, m=5, n=96, k=160, hadamard=None):
    return GemmProblem("tiny", "fc", 1, m, n, k, mode, NVFP4, hadamard)


def decoded(codes, scales):
    """What codes and blocked scales stand for, without the tensor scale."""
    codes = e2m1.unpack(codes)
    rows, k = codes.shape
    assert scales.shape == layouts.padded_shape(rows, k // 16)
    assert scales.dtype == torch.float8_e4m3fn
    values = layouts.from_blocked(scales.flatten(), rows, k // 16).double()
    return e2m1.decode(codes).double() * values.repeat_interleave(16, dim=1)


def multiply(out, a, b, block_scale_a, block_scale_b, alpha):
    assert (alpha.shape, alpha.dtype) == ((1,), torch.float32)
    out.copy_(alpha.double() * (decoded(a, block_scale_a) @ decoded(b, block_scale_b).T))


def quantize_into(input, input_scale, is_sf_swizzled_layout, output, output_scale):
    assert is_sf_swizzled_layout is True
    assert (input_scale.shape, output_scale.dtype) == ((1,), torch.int32)
    q = quantize(input, NVFP4, tensor_scale=input_scale)
    rows, columns = layouts.padded_shape(*q.scales.shape)
    assert output_scale.shape == (rows, columns // 4)
    output.copy_(q.codes)
    output_scale.copy_(layouts.to_blocked(q.scales).reshape(rows, columns).view(torch.int32))


def functional(input, input_scale, is_sf_swizzled_layout):
    raise AssertionError("the form that allocates")


BEHIND = {
    "cutlass_scaled_fp4_mm": multiply,
    "scaled_fp4_quant": functional,
    "scaled_fp4_quant.out": quantize_into,
    "cutlass_scaled_mm_supports_fp4": lambda cuda_device_capability: cuda_device_capability in (100, 120),
}


@pytest.fixture
def vllm(tmp_path, monkeypatch):
    with operators(CUTLASS, BEHIND, "MAIN", monkeypatch, tmp_path, targets=TARGETS):
        yield VllmCutlassProvider()


@pytest.mark.parametrize("mode", [W4A4, W4A4_NOQUANT], ids=str)
def test_both_operands_arrive(mode, vllm):
    for m in (1, 129):
        problem = gemm(mode, m=m)
        assert why_not(vllm, problem, B200) is None
        inputs = problem.inputs()
        inputs = GemmInputs(inputs.x * 0.3, inputs.w * 37)
        run = vllm.prepare(problem, inputs)
        assert check(problem, inputs, ScaleRule.TWO_LEVEL, run()).rows == m
        before = run().clone()
        inputs.x.neg_()
        assert torch.equal(run(), -before) is (mode is W4A4)


def test_it_keeps_the_contract_at_its_edges(vllm):
    layers = gemm_contract.EDGES["vllm_cutlass"]
    assert gemm_contract.check_edges(vllm, B200) == {(mode, "nvfp4", layer) for mode in vllm.modes for layer in layers}


def test_alpha_undoes_both_encode_scales():
    assert alpha(torch.tensor(3.0), torch.tensor(7.0)).tolist() == pytest.approx([1 / 21], rel=1e-7)


@pytest.mark.parametrize(
    ("problem", "device", "reason"),
    [
        (gemm(), H200, "vLLM's CUTLASS FP4 needs Blackwell (compute capability 10.0 or later), which NVIDIA H200 is not"),
        (gemm(hadamard=32), B200, "vLLM's CUTLASS FP4 has no rotation"),
        (gemm(n=80), B200, "vLLM's CUTLASS FP4 takes n and k that are multiples of 32, not 80 and 160"),
        (
            gemm(),
            Device("cuda:0", "B300", (10, 3)),
            "this vLLM says that its FP4 kernels do not run on compute capability 10.3",
        ),
        (gemm(), B200, None),
    ],
    ids=str,
)
def test_why_not(problem, device, reason, vllm):
    assert vllm.why_not(problem, device) == reason
