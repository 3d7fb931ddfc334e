"""QuTLASS's provider: operators with the schemas of two versions that do what QuTLASS documents, and why not."""

import gemm_contract
import pytest
import torch
from cuda_library import SASS
from vllm_stand_in import QUTLASS, operators

from fp4bench.checking import WrongResultError, check
from fp4bench.devices import Device
from fp4bench.formats import MXFP4, NVFP4, ScaleRule, e2m1, layouts, scales
from fp4bench.problems import W4A4, W4A4_NOQUANT, GemmInputs, GemmProblem
from fp4bench.providers import vllm_qutlass, why_not
from fp4bench.providers.vllm_qutlass import VllmQutlassProvider, VllmQutlassQuestProvider
from fp4bench.quantize import quantize

H200 = Device("cuda:0", "NVIDIA H200", (9, 0), 132, 60 << 20)
B200 = Device("cuda:0", "NVIDIA B200", (10, 0), 148, 126 << 20)
RTX_5090 = Device("cuda:0", "NVIDIA GeForce RTX 5090", (12, 0), 170, 96 << 20)
TARGETS = ((SASS, 100, 1 << 21),)


def gemm(mode=W4A4, fmt=MXFP4, m=5, n=72, k=256, hadamard=None):
    return GemmProblem("tiny", "fc", 1, m, n, k, mode, fmt, hadamard)


def rotated(A, R):  # noqa: N803
    assert R.dtype == torch.bfloat16
    return (A.float().unflatten(1, (-1, R.shape[0])) @ R.float()).flatten(1)


def fill(OUT, OUT_sf, q):  # noqa: N803
    """As QuTLASS does it: codes, and scales one row after the other, whatever the shape of their buffer."""
    OUT.copy_(q.codes)
    OUT_sf.view(torch.uint8).view(-1)[: q.scales.numel()] = q.scales.view(torch.uint8).flatten()
    return OUT.clone(), OUT_sf.clone()


def abs_max(A, R, OUT, OUT_sf):  # noqa: N803
    return fill(OUT, OUT_sf, quantize(rotated(A, R), MXFP4, rule=ScaleRule.QUTLASS_ABS_MAX))


def quest(A, R, OUT, OUT_sf):  # noqa: N803
    return fill(OUT, OUT_sf, quantize(rotated(A, R), MXFP4, rule=ScaleRule.QUTLASS_QUEST))


def nv(A, R, OUT, OUT_sf, global_scale):  # noqa: N803
    assert global_scale.numel() == 1
    return fill(OUT, OUT_sf, quantize(rotated(A, R), NVFP4, tensor_scale=global_scale))


def decoded(codes, scales):
    codes = e2m1.unpack(codes)
    rows, k = codes.shape
    block = 32 if scales.dtype == torch.float8_e8m0fnu else 16
    plain = layouts.from_blocked(scales, rows, k // block)
    values = torch.exp2(plain.view(torch.uint8).double() - 127) if block == 32 else plain.double()
    return e2m1.decode(codes).double() * values.repeat_interleave(block, dim=1)


def multiply(A, B, A_sf, B_sf, alpha):  # noqa: N803
    assert (alpha.shape, alpha.dtype) == ((1,), torch.float32)
    return (alpha.double() * (decoded(A, A_sf) @ decoded(B, B_sf).T)).bfloat16()


BEHIND = {
    "matmul_mxf4_bf16_tn": multiply,
    "matmul_nvf4_bf16_tn": multiply,
    "fusedQuantizeMxAbsMax": abs_max,
    "fusedQuantizeMxQuest": quest,
    "fusedQuantizeNv": nv,
    "fusedQuantizeNvAbsMax": nv,
}


@pytest.fixture
def vllm(tmp_path, monkeypatch):
    return lambda version: operators(QUTLASS[version], BEHIND, "QUTLASS", monkeypatch, tmp_path, targets=TARGETS)


@pytest.mark.parametrize("hadamard", [None, 32, 128])
@pytest.mark.parametrize(
    ("version", "fmt", "made"),
    [
        ("0.26.0", MXFP4, VllmQutlassProvider),
        ("0.26.0", MXFP4, VllmQutlassQuestProvider),
        ("0.26.0", NVFP4, VllmQutlassProvider),
        ("0.33.0", NVFP4, VllmQutlassProvider),
    ],
    ids=lambda value: getattr(value, "name", value),
)
@pytest.mark.parametrize("mode", [W4A4, W4A4_NOQUANT], ids=str)
def test_it_is_put_together_as_it_is_meant(mode, version, fmt, made, hadamard, vllm):
    with vllm(version):
        provider = made()
        problem = gemm(mode, fmt, m=129, hadamard=hadamard)
        assert why_not(provider, problem, B200) is None
        inputs = problem.inputs()
        inputs = GemmInputs(inputs.x * 0.3, inputs.w * 37)
        run = provider.prepare(problem, inputs)
        rule, accumulation = provider.rules[fmt.name][0], provider.accumulation(problem, B200)
        assert check(problem, inputs, rule, run(), accumulation).rows == 129
        before = run()
        inputs.x.neg_()
        assert torch.equal(run(), -before) is (mode is W4A4)


@pytest.mark.parametrize("made", [VllmQutlassProvider, VllmQutlassQuestProvider])
def test_it_keeps_the_contract_at_its_edges(made, vllm):
    with vllm("0.26.0"):
        provider = made()
        taken = gemm_contract.check_edges(provider, B200)
    wanted = {(mode, "mxfp4", layer) for mode in provider.modes for layer in ((8, 128), (24, 384))}
    if made is VllmQutlassProvider:
        wanted |= {(mode, "nvfp4", layer) for mode in provider.modes for layer in gemm_contract.EDGES["vllm_qutlass"]}
    assert taken == wanted


def test_an_alpha_of_1_as_in_its_benchmarks_would_be_found(vllm, monkeypatch):
    monkeypatch.setattr(vllm_qutlass, "_alpha", lambda rule, x, w, device: torch.ones(1, device=device))
    problem = gemm()
    inputs = problem.inputs()
    with vllm("0.26.0"):
        provider = VllmQutlassProvider()
        out = provider.prepare(problem, inputs)()
        with pytest.raises(WrongResultError):
            check(problem, inputs, ScaleRule.QUTLASS_ABS_MAX, out, provider.accumulation(problem, B200))


def test_an_alpha_of_abs_max_under_quest_would_be_found(vllm, monkeypatch):
    monkeypatch.setattr(vllm_qutlass, "_alpha", lambda rule, x, w, device: torch.full((1,), 1 / 9, device=device))
    problem = gemm()
    inputs = problem.inputs()
    with vllm("0.26.0"):
        provider = VllmQutlassQuestProvider()
        out = provider.prepare(problem, inputs)()
        with pytest.raises(WrongResultError):
            check(problem, inputs, ScaleRule.QUTLASS_QUEST, out, provider.accumulation(problem, B200))


def test_the_operators_of_the_two_methods_are_not_swapped(vllm):
    problem = gemm(m=129, n=256)
    inputs = problem.inputs()
    with vllm("0.26.0"):
        provider = VllmQutlassQuestProvider()
        out = provider.prepare(problem, inputs)()
        assert check(problem, inputs, ScaleRule.QUTLASS_QUEST, out).exact
        with pytest.raises(WrongResultError):
            check(problem, inputs, ScaleRule.FLOOR, out)


def test_quest_allows_a_scale_one_below_the_right_one_and_none_far_below(vllm, monkeypatch):
    """Of one block in each row of both operands, which is far more than the rotation's 1e-4 make of random values."""

    def lowered(steps):
        def encode(extent, rule):
            found = right(extent, rule)
            if rule is ScaleRule.QUTLASS_QUEST:
                found.view(torch.uint8)[:: problem.k // 32] -= steps  # `quantize` asks for whole rows, block after block
            return found

        return encode

    right, problem = scales.e8m0_encode, gemm(m=129, n=256, k=1024)
    inputs = problem.inputs()
    with vllm("0.26.0"):
        provider = VllmQutlassQuestProvider()
        bound = provider.accumulation(problem, B200)
        monkeypatch.setattr(scales, "e8m0_encode", lowered(1))
        near = provider.prepare(problem, inputs)()
        monkeypatch.setattr(scales, "e8m0_encode", lowered(8))
        far = provider.prepare(problem, inputs)()
        monkeypatch.undo()
    assert not check(problem, inputs, ScaleRule.QUTLASS_QUEST, near, bound).exact
    with pytest.raises(WrongResultError):
        check(problem, inputs, ScaleRule.QUTLASS_QUEST, far, bound)


@pytest.mark.parametrize(
    ("problem", "device", "reason"),
    [
        (gemm(), H200, "QuTLASS needs Blackwell (compute capability 10.0 or later), which NVIDIA H200 is not"),
        (gemm(hadamard=16), B200, "QuTLASS rotates mxfp4 by 32, 64, 128, not by 16"),
        (gemm(fmt=NVFP4, hadamard=16), B200, None),
        (gemm(n=51), B200, "QuTLASS takes mxfp4 with n a multiple of 8 and k of 128 and of the rotation, not 51 and 256"),
        (gemm(k=192), B200, "QuTLASS takes mxfp4 with n a multiple of 8 and k of 128 and of the rotation, not 72 and 192"),
        (gemm(fmt=NVFP4, k=192), B200, None),
        (
            gemm(fmt=NVFP4, k=192, hadamard=128),
            B200,
            "QuTLASS takes nvfp4 with n a multiple of 8 and k of 64 and of the rotation, not 72 and 192",
        ),
        (gemm(), RTX_5090, "this vLLM's _qutlass_C.abi3.so has code for sm_100f, not for compute capability 12.0"),
    ],
    ids=str,
)
def test_why_not(problem, device, reason, vllm):
    with vllm("0.26.0"):
        assert VllmQutlassProvider().why_not(problem, device) == reason
        if problem.format is MXFP4:
            assert VllmQutlassQuestProvider().why_not(problem, device) == reason


def test_quest_has_mxfp4_alone():
    assert why_not(VllmQutlassQuestProvider(), gemm(fmt=NVFP4), B200) == "vllm_qutlass_quest has no format nvfp4"
