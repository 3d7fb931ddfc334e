"""The kernels as torch operators: what they say of themselves without a GPU, and on one that it holds."""

from dataclasses import fields

import pytest
import torch

triton = pytest.importorskip("triton")

from torch._subclasses.fake_tensor import FakeTensorMode  # noqa: E402

from fp4bench.devices import Device, find_device  # noqa: E402
from fp4bench.formats import MXFP4, NVFP4, ScaleRule, layouts  # noqa: E402
from fp4bench.kernels import gemm, ops  # noqa: E402
from fp4bench.kernels.weights import PreparedWeight  # noqa: E402
from fp4bench.problems import MODES, W4A4, W4A8, W4A16  # noqa: E402
from fp4bench.quantize import decode, quantize  # noqa: E402

H200 = Device("cpu", "NVIDIA H200", (9, 0), 132, 60 << 20)
B200 = Device("cpu", "NVIDIA B200", (10, 0), 148, 126 << 20)


def weight_of(mode=W4A16, format=MXFP4, device=H200, n=40, k=128, spread=False):
    w = torch.randn(n, k, device="cuda" if device.capability and device.torch_name != "cpu" else "cpu")
    if spread:
        w[:, :32] *= 2.0**40
    return gemm.lay_out(quantize(w, format), mode, device)


@pytest.mark.parametrize(
    "weight", [weight_of(), weight_of(format=NVFP4), weight_of(W4A8, spread=True), weight_of(W4A4, NVFP4, B200)]
)
def test_a_weight_is_the_same_after_flattening(weight):
    tensors, form = ops.flatten(weight)
    restored = ops.unflatten(tensors, form)
    for field in fields(weight):
        before, after = getattr(weight, field.name), getattr(restored, field.name)
        assert isinstance(before, torch.Tensor | PreparedWeight) or before == after, field.name
    again, form_again = ops.flatten(restored)
    assert form_again == form
    assert len(again) == len(tensors)
    assert all(a is b for a, b in zip(again, tensors, strict=True))


def test_tensors_that_are_not_those_of_the_form():
    tensors, form = ops.flatten(weight_of(W4A8, spread=True))
    with pytest.raises(ValueError, match="are no mxfp4 weight of 2 parts"):
        ops.unflatten(tensors[:-1], form)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_fake_of_a_product_has_its_shape(dtype):
    tensors, form = ops.flatten(weight_of())
    with FakeTensorMode(allow_non_fake_inputs=True):
        out = torch.ops.fp4bench.gemm(torch.empty(7, 128, dtype=dtype), tensors, form, "w4a16")
    assert (out.shape, out.dtype) == ((7, 40), dtype)


@pytest.mark.parametrize("hadamard", [None, 64])
@pytest.mark.parametrize("blocked", [False, True])
@pytest.mark.parametrize("format", [MXFP4, NVFP4], ids=str)
def test_the_fakes_of_quantization_have_its_shapes(format, blocked, hadamard):
    x = torch.randn(7, 100).bfloat16()
    q = quantize(x, format, hadamard=hadamard)
    scales = layouts.to_blocked(q.scales) if blocked else q.scales
    with FakeTensorMode():
        fake = torch.empty(7, 100, dtype=torch.bfloat16)
        if format is MXFP4:
            made = torch.ops.fp4bench.quantize_mxfp4(fake, "floor", hadamard, blocked)
        else:
            made = torch.ops.fp4bench.quantize_nvfp4(fake, hadamard, None, blocked)
    assert [(t.shape, t.dtype) for t in made[:2]] == [(t.shape, t.dtype) for t in (q.codes, scales)]
    assert len(made) == (2 if format is MXFP4 else 3)


def test_the_fake_of_fp8_rows():
    with FakeTensorMode():
        values, scales = torch.ops.fp4bench.quantize_fp8_rows(torch.empty(7, 100, dtype=torch.bfloat16))
    assert (values.shape, values.dtype, scales.shape) == ((7, 100), torch.float8_e4m3fn, (7, 1))


# --- On a GPU ---------------------------------------------------------------------------------------------------------------

CHECKS = ("test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")


@pytest.mark.gpu
@pytest.mark.parametrize("m", [3, 200])
@pytest.mark.parametrize(("mode", "format"), [(W4A16, NVFP4), (W4A8, MXFP4), (W4A4, MXFP4)], ids=lambda v: str(v))
def test_a_product_is_an_operator(mode, format, m):
    tensors, form = ops.flatten(weight_of(mode, format, find_device("cuda")))
    x = torch.randn(m, 128, device="cuda").bfloat16()
    torch.library.opcheck(torch.ops.fp4bench.gemm, (x, tensors, form, mode.name, 0.5, None), test_utils=CHECKS)


@pytest.mark.gpu
def test_quantization_is_an_operator():
    x = torch.randn(9, 128, device="cuda").bfloat16()
    torch.library.opcheck(torch.ops.fp4bench.quantize_mxfp4, (x, ScaleRule.RCEIL.value, 64, True), test_utils=CHECKS)
    torch.library.opcheck(torch.ops.fp4bench.quantize_nvfp4, (x,), test_utils=CHECKS)
    torch.library.opcheck(torch.ops.fp4bench.quantize_fp8_rows, (x,), test_utils=CHECKS)


@pytest.mark.gpu
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of torch's own compiler
def test_products_compile_and_are_captured():
    device = find_device("cuda")
    w = quantize(torch.randn(64, 128, device="cuda"), MXFP4)
    tensors, form = ops.flatten(gemm.lay_out(w, MODES["w4a16"], device))
    x = torch.randn(20, 128, device="cuda").bfloat16()

    def layer(x):
        return torch.ops.fp4bench.gemm(torch.relu(x), tensors, form, "w4a16") + 1

    want = (torch.relu(x).double() @ decode(w, torch.float64).T).bfloat16() + 1
    torch.testing.assert_close(torch.compile(layer, fullgraph=True)(x), want)
    layer(x)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = layer(x)
    for _ in range(2):  # the second replay finds its workspace as the first did
        out.zero_()
        graph.replay()
        torch.testing.assert_close(out, want)
