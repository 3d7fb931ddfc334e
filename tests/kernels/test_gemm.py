"""Which kernel multiplies what, and what it is given. Kernels are stood in for by torch where there is no GPU."""

import pytest
import torch

triton = pytest.importorskip("triton")

from fp4bench.checking import WrongResultError, check  # noqa: E402
from fp4bench.devices import Device, find_device  # noqa: E402
from fp4bench.formats import MXFP4, NVFP4  # noqa: E402
from fp4bench.kernels import decode, gemm, prefill, weights  # noqa: E402
from fp4bench.kernels import quantize as quantizers  # noqa: E402
from fp4bench.kernels.fp8_rows import Columns  # noqa: E402
from fp4bench.kernels.prefill_launch import PrefillConfig  # noqa: E402
from fp4bench.problems import CUT_FP8_SUMS, W4A4, W4A4_NOQUANT, W4A8, W4A16, GemmProblem  # noqa: E402
from fp4bench.quantize import decode as values_of  # noqa: E402
from fp4bench.quantize import quantize, quantize_fp8_rows  # noqa: E402

# Tensors of the CPU, launches of an H200.
H200 = Device("cpu", "NVIDIA H200", (9, 0), 132, 60 << 20)
B200 = Device("cpu", "NVIDIA B200", (10, 0), 148, 126 << 20)
FP4_BY_FP4 = [(mode, format) for mode in (W4A4, W4A4_NOQUANT) for format in (MXFP4, NVFP4)]
MODES = [(W4A16, MXFP4), (W4A16, NVFP4), (W4A8, MXFP4), *FP4_BY_FP4]


def in_fragment_order(rows):
    """(m, k) in the order that `weights.E4M3_ORDER` describes, k padded to 64."""
    m, k = rows.shape
    padded = torch.nn.functional.pad(rows.float(), (0, -k % 64))
    return padded.view(m, -1, 16)[:, :, list(weights.E4M3_ORDER)].reshape(m, -1)


def in_logical_order(rows):
    m, k = rows.shape
    logical = torch.empty(m, k // 16, 16)
    logical[:, :, list(weights.E4M3_ORDER)] = rows.float().view(m, -1, 16)
    return logical.reshape(m, k)


def product(x, weight, out, x_scale, alpha, bias):
    """What a kernel computes of x (m, k) in logical order, in float64; `weight.rest` is not its business."""
    w = values_of(weights.restore(gemm.replace(weight, rest=None)), torch.float64)
    k = min(x.shape[1], w.shape[1])  # either may be padded with zeros
    y = x[:, :k].double() @ w[:, :k].T * alpha
    if x_scale is not None:
        y *= x_scale.double()[:, None]
    out.copy_(y + (0 if bias is None else bias.double()))


@pytest.fixture
def calls(monkeypatch):
    """Stand-ins for the kernels, and the list of those that were called."""
    called = []

    def wide(x, weight, out, *, config, workspace, x_scale, alpha, bias, pdl):
        called.append("prefill")
        assert workspace is None or not workspace[: prefill.COUNTER_BYTES].any()
        product(in_logical_order(x) if x.dtype == torch.float8_e4m3fn else x, weight, out, x_scale, alpha, bias)

    def narrow(x, weight, out, *, config, alpha, bias, pdl):
        called.append("decode")
        product(x, weight, out, None, alpha, bias)

    def fp8_rows(x, *, columns, out, pdl):
        rows = quantize_fp8_rows(x)
        assert columns is Columns.FRAGMENTS
        out.values.copy_(in_fragment_order(rows.values))
        out.scales.copy_(rows.scales)

    def as_e4m3(x, *, rule, hadamard, out, pdl):
        v = values_of(quantize(x, MXFP4, rule=rule, hadamard=hadamard), torch.float64)
        scale = 2.0 ** torch.frexp(v.abs().amax(1, keepdim=True))[1] * 2.0**-8
        out.values.copy_(in_fragment_order(v / scale))
        out.scales.copy_(scale)

    def as_bf16(x, format, *, rule, hadamard, out, pdl):
        q = quantize(x, format, rule=rule, hadamard=hadamard)
        if q.tensor_scale is not None:
            out.tensor_scale.copy_(q.tensor_scale)
            q = gemm.replace(q, tensor_scale=torch.ones(()))
        values = values_of(q, torch.float64)
        out.values.zero_()[:, : values.shape[1]] = values.bfloat16()

    monkeypatch.setattr(prefill, "gemm", wide)
    monkeypatch.setattr(decode, "gemm", narrow)
    monkeypatch.setattr(quantizers, "quantize_fp8_rows", fp8_rows)
    monkeypatch.setattr(quantizers, "fp4_as_e4m3", as_e4m3)
    monkeypatch.setattr(quantizers, "fp4_as_bf16", as_bf16)
    monkeypatch.setattr(gemm, "device_of", lambda tensor: H200)
    return called


def problem(mode, format, m, n, k, hadamard=None):
    return GemmProblem("some", "layer", 1, m, n, k, mode, format, hadamard)


def computed(problem, inputs, device=H200, **how):
    mode = problem.mode
    weight = gemm.lay_out(quantize(inputs.w, problem.format, hadamard=problem.hadamard), mode, device)
    x = gemm.activations(inputs.x, weight, mode) if mode is W4A4_NOQUANT else inputs.x
    return gemm.gemm(x, weight, mode, **how)


@pytest.mark.parametrize("hadamard", [None, 64])
@pytest.mark.parametrize(("m", "n", "k"), [(1, 40, 96), (17, 24, 200), (130, 48, 72)])
@pytest.mark.parametrize(("mode", "format"), MODES, ids=lambda v: str(v))
def test_operands_are_what_the_kernels_multiply(calls, mode, format, m, n, k, hadamard):
    if hadamard and mode.activations != "fp4":
        pytest.skip("no rotation")
    p = problem(mode, format, m, n, k, hadamard)
    inputs = p.inputs("cpu")
    out = computed(p, inputs)
    assert out.dtype == torch.bfloat16
    check(p, inputs, format.default_rule, out, gemm.accumulation(mode, format, m, H200))
    unscaled = mode is W4A16 or (mode.activations == "fp4" and not format.has_tensor_scale)
    assert calls == ["decode" if m == 1 and unscaled else "prefill"]


def test_columns_in_another_order_are_seen(calls, monkeypatch):
    p = problem(W4A8, MXFP4, 140, 32, 128)
    inputs = p.inputs("cpu")
    monkeypatch.setitem(globals(), "in_fragment_order", lambda rows: rows.float())
    with pytest.raises(WrongResultError):
        check(p, inputs, MXFP4.default_rule, computed(p, inputs))


@pytest.mark.parametrize("pdl", [True, False])
@pytest.mark.parametrize(
    ("mode", "m", "quantizer"), [(W4A8, 5, "quantize_fp8_rows"), (W4A4, 5, "fp4_as_bf16"), (W4A4, 140, "fp4_as_e4m3")]
)
def test_the_kernels_of_a_call_overlap_all_or_none(mode, m, quantizer, pdl, calls, monkeypatch):
    seen = []
    for module, name in ((quantizers, quantizer), (prefill, "gemm"), (decode, "gemm")):
        kernel = getattr(module, name)
        monkeypatch.setattr(
            module, name, lambda *args, kernel=kernel, **how: (seen.append(how["pdl"]), kernel(*args, **how))[1]
        )
    p = problem(mode, MXFP4, m, 32, 128)
    computed(p, p.inputs("cpu"), pdl=pdl)
    assert seen == [pdl, pdl]


def test_alpha_and_bias_reach_the_epilogue(calls):
    p = problem(W4A8, MXFP4, 5, 32, 128)
    inputs, bias = p.inputs("cpu"), torch.linspace(-3, 3, 32)
    plain = computed(p, inputs).float()
    out = computed(p, inputs, alpha=0.75, bias=bias).float()
    torch.testing.assert_close(out, 0.75 * plain + bias, rtol=0.02, atol=0.02)


def spread_weight(n=32, k=128):
    """Blocks of one row that lie 2**40 apart: no E4M3 window holds both."""
    w = torch.randn(n, k, generator=torch.Generator().manual_seed(3))
    w[::2, :32] *= 2.0**20
    w[::2, 32:64] *= 2.0**-20
    return w.bfloat16()


@pytest.mark.parametrize("mode", [W4A8, W4A16])
def test_a_weight_in_parts_is_summed_in_float32(calls, mode):
    w, x = spread_weight(), torch.randn(20, 128).bfloat16()
    x[:, :32] = 0  # then the small blocks are what the result is made of
    q = quantize(w, MXFP4)
    weight = gemm.lay_out(q, mode, H200)
    assert weight.rest is not None
    out = gemm.gemm(x, weight, mode)
    rows = quantize_fp8_rows(x)
    exact = (rows.values.double() * rows.scales if mode is W4A8 else x.double()) @ values_of(q, torch.float64).T
    torch.testing.assert_close(out.double(), exact, rtol=2**-8, atol=0)
    assert len(calls) >= 2


def test_operands_by_mode_and_rows():
    assert gemm.operand_of(W4A16, MXFP4, 5000, H200) == "bf16"
    for mode, few in ((W4A8, "e4m3"), (W4A4, "bf16"), (W4A4_NOQUANT, "bf16")):
        assert gemm.operand_of(mode, MXFP4, gemm.E4M3_ROWS - 1, H200) == few
        assert gemm.operand_of(mode, MXFP4, gemm.E4M3_ROWS, H200) == "e4m3"
        assert gemm.operand_of(mode, NVFP4, 5000, B200) == "fp4"
    assert gemm.operand_of(W4A4, NVFP4, 5000, H200) == "bf16"
    assert gemm.accumulation(W4A4, MXFP4, gemm.E4M3_ROWS, H200) is CUT_FP8_SUMS
    assert gemm.accumulation(W4A4, MXFP4, 1, H200) is None
    assert gemm.accumulation(W4A8, MXFP4, 500, H200) is CUT_FP8_SUMS


def test_scaled_rows_are_not_for_the_decode_kernel():
    assert not gemm.work_of(W4A16, NVFP4, 1, 64, 64, H200).x_scaled
    assert not gemm.work_of(W4A4, MXFP4, 1, 64, 64, H200).x_scaled
    assert gemm.work_of(W4A4, NVFP4, 1, 64, 64, H200).x_scaled
    assert gemm.work_of(W4A8, MXFP4, 1, 64, 64, H200).x_scaled


def test_what_has_no_kernel():
    assert gemm.why_not(W4A8, NVFP4, 1, 64, None, H200) == "an E4M3 operand has no room for the scales of nvfp4"
    assert "Hopper's wgmma" in gemm.why_not(W4A16, MXFP4, 17, 64, None, B200)
    assert "k is 48" in gemm.why_not(W4A4, NVFP4, 1, 48, None, B200)
    assert gemm.why_not(W4A4, NVFP4, 1, 48, 64, B200) is None  # the rotation pads it
    assert "not for an A100" in gemm.why_not(W4A4, MXFP4, 1, 64, None, Device("cpu", "an A100", (8, 0), 108, 40 << 20))


def test_a_workspace_that_is_too_small_is_refused(calls):
    p = problem(W4A8, MXFP4, 40, 32, 128)
    inputs = p.inputs("cpu")
    with pytest.raises(ValueError, match=r"the workspace is uint8 \(\d+,\) or larger"):
        computed(p, inputs, workspace=torch.zeros(100, dtype=torch.uint8))


def test_products_without_counters_leave_those_of_others_alone(calls):
    whole = PrefillConfig(depth=128, streamed=False)  # no tile is cut along k
    made = []
    for mode, m, launch in ((W4A4, 1, None), (W4A8, 40, whole), (W4A8, 40, None)):
        p = problem(mode, MXFP4, m, 256, 1024)
        inputs = p.inputs("cpu")
        weight = gemm.lay_out(quantize(inputs.w, MXFP4), mode, H200)
        made.append((mode, inputs.x, weight, launch, gemm.workspace_bytes(mode, weight, m, launch=launch)))
    workspace = gemm.new_workspace(max(size for *_, size in made), "cpu")
    for mode, x, weight, launch, _ in made:
        gemm.gemm(x, weight, mode, workspace=workspace, launch=launch)
        assert not workspace[: prefill.COUNTER_BYTES].any()
    assert calls == ["decode", "prefill", "prefill"]


def test_operands_that_do_not_fit(calls):
    weight = gemm.lay_out(quantize(torch.randn(32, 128), MXFP4), W4A16, H200)
    with pytest.raises(TypeError, match="bfloat16 or float16, not"):
        gemm.gemm(torch.randn(4, 128), weight, W4A16)
    with pytest.raises(ValueError, match=r"x is \(m, 128\)"):
        gemm.gemm(torch.randn(4, 64).bfloat16(), weight, W4A16)
    with pytest.raises(ValueError, match="takes what `activations` made"):
        gemm.gemm(torch.randn(4, 128).bfloat16(), weight, W4A4_NOQUANT)
    assert gemm.gemm(torch.randn(0, 128).bfloat16(), weight, W4A16).shape == (0, 32)


# --- On a GPU ---------------------------------------------------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.parametrize(("m", "n", "k"), [(1, 136, 320), (16, 72, 2880), (129, 392, 200), (300, 264, 1056)])
@pytest.mark.parametrize(("mode", "format"), MODES, ids=lambda v: str(v))
def test_products_on_a_gpu(mode, format, m, n, k):
    device = find_device("cuda")
    p = problem(mode, format, m, n, k, 64 if mode is W4A4 else None)
    inputs = p.inputs("cuda")
    check(p, inputs, format.default_rule, computed(p, inputs, device), gemm.accumulation(mode, format, m, device))


@pytest.mark.gpu
@pytest.mark.parametrize("mode", [W4A8, W4A16])
def test_a_weight_in_parts_on_a_gpu(mode):
    w, x = spread_weight(72, 256).cuda(), torch.randn(20, 256, device="cuda").bfloat16()
    x[:, :32] = 0
    q = quantize(w, MXFP4)
    weight = gemm.lay_out(q, mode, find_device("cuda"))
    assert weight.rest is not None
    bias = torch.randn(72, device="cuda")
    out = gemm.gemm(x, weight, mode, alpha=0.5, bias=bias)
    rows = quantize_fp8_rows(x)
    exact = (rows.values.double() * rows.scales if mode is W4A8 else x.double()) @ values_of(q, torch.float64).T * 0.5 + bias
    assert ((out.double() - exact).norm() / exact.norm()).item() < 4e-3


@pytest.mark.gpu
def test_one_workspace_serves_products_of_any_size_in_turn():
    device = find_device("cuda")
    sizes = [(40, 1024, 4096), (200, 264, 512), (17, 2048, 8192), (1024, 392, 512)]
    problems = [problem(W4A16, MXFP4, *size) for size in sizes]
    made = []
    for p in problems:
        inputs = p.inputs("cuda")
        made.append((inputs, gemm.lay_out(quantize(inputs.w, MXFP4), W4A16, device)))
    size = max(gemm.workspace_bytes(W4A16, weight, p.m) for p, (_, weight) in zip(problems, made, strict=True))
    workspace = gemm.new_workspace(size, "cuda")
    for _ in range(2):
        for p, (inputs, weight) in zip(problems, made, strict=True):
            out = gemm.gemm(inputs.x, weight, W4A16, workspace=workspace)
            check(p, inputs, MXFP4.default_rule, out)
