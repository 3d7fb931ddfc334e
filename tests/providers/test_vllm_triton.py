"""vLLM's FP8 experts: its file run without its package, its operators by stand-ins, every scaling, and why not."""

import sys
from dataclasses import replace

import moe_contract
import pytest
import torch
from cuda_library import SASS
from vllm_moe_stand_in import FUSED_MOE, STEPS
from vllm_stand_in import MOE, MOE_STEPS, operators

from fp4bench.checking import check
from fp4bench.devices import Device
from fp4bench.problems import FP8, FP8_SCALINGS, PER_BLOCK, PER_TENSOR, PER_TOKEN, MoeProblem
from fp4bench.providers import providers, vllm_fused_moe, vllm_ops, why_not
from fp4bench.providers.vllm_triton import VllmTritonProvider

H200 = Device("cuda:0", "NVIDIA H200", (9, 0), 132, 60 << 20)
A100 = Device("cuda:0", "NVIDIA A100", (8, 0), 108, 40 << 20)


def moe(scaling=PER_TENSOR, m=11, **changed):
    problem = MoeProblem("tiny", "experts", 1, m, 128, 128, 8, 2, FP8, fp8=scaling)
    return replace(problem, **changed)


@pytest.fixture
def vllm(tmp_path, monkeypatch):
    """vLLM with its file, and the device that is asked about on the CPU."""
    pytest.importorskip("triton")
    with (
        operators(MOE, STEPS, "MOE", monkeypatch, tmp_path) as moe_folder,
        operators(MOE_STEPS, STEPS, "MAIN", monkeypatch, tmp_path) as folder,
    ):
        (moe_folder / vllm_ops.MOE.files[-1]).rename(folder / vllm_ops.MOE.files[-1])
        file = folder / vllm_fused_moe.FILE
        file.parent.mkdir(parents=True)
        file.write_text(FUSED_MOE, encoding="utf-8")
        yield folder


def on_the_cpu(provider, problem, monkeypatch):
    monkeypatch.setattr(moe_contract, "why_not", lambda provider, problem, device: why_not(provider, problem, H200))
    return moe_contract.check_moe(provider, problem, Device("cpu", "Some CPU"))


@pytest.mark.parametrize("scaling", FP8_SCALINGS.values(), ids=str)
@pytest.mark.parametrize("m", [1, 11])
def test_every_scaling_is_right(scaling, m, vllm):
    provider, problem = VllmTritonProvider(), moe(scaling, m)
    assert why_not(provider, problem, H200) is None
    inputs = problem.inputs()
    run = provider.prepare(problem, inputs)
    for _ in range(2):
        assert check(problem, inputs, None, run(), provider.accumulation(problem, H200)).rows == m


def test_biases_and_clamped_gates_keep_the_contract(vllm, monkeypatch):
    problem = MoeProblem("tiny", "experts", 1, 7, 192, 96, 5, 4, FP8, None, moe_contract.GPT_OSS, True, fp8=PER_TOKEN)
    on_the_cpu(VllmTritonProvider(), problem, monkeypatch)


def loaded(folder):
    return vllm_fused_moe.load(folder / vllm_fused_moe.FILE)


@pytest.mark.parametrize(("m", "alone"), [(1, True), (2, False)])
def test_few_pairs_are_tiles_by_themselves(m, alone, vllm):
    problem = moe(m=m)
    VllmTritonProvider().prepare(problem, problem.inputs())()
    assert [unsorted for _, unsorted in loaded(vllm).SEEN] == [alone, alone]


def test_launches_are_the_table_s_for_the_nearest_m_else_the_default(vllm, monkeypatch):
    module, problem = loaded(vllm), moe(PER_BLOCK)
    VllmTritonProvider().prepare(problem, problem.inputs())()
    assert module.SEEN[-1][0]["of"] == (11, 8, 128, 128, 2, "fp8_w8a8", [128, 128])
    monkeypatch.setattr(module, "TUNED", {16: {"BLOCK_SIZE_M": 32}, 32: {"BLOCK_SIZE_M": 64}})
    VllmTritonProvider().prepare(problem, problem.inputs())()
    assert module.SEEN[-1][0] == {"BLOCK_SIZE_M": 32}


def test_no_tokens_are_no_work(vllm):
    problem = moe(m=0)
    assert VllmTritonProvider().prepare(problem, problem.inputs())().shape == (0, 128)


def test_a_layer_s_weights_are_made_once(vllm):
    problem = moe()
    inputs = problem.inputs()
    provider = VllmTritonProvider()
    runs = [provider.prepare(problem, problem.copy(inputs, number)) for number in (0, 0)]
    assert torch.equal(runs[0](), runs[1]())
    assert [key[0] for key in inputs.weights._kept] == ["vllm_triton"]


def test_vllm_is_not_imported_and_no_stand_in_stays(vllm):
    module = loaded(vllm)
    assert not [name for name in sys.modules if name.split(".")[0] == "vllm"]
    with pytest.raises(RuntimeError, match="FusedMoEExpertsModular of vLLM is called, which fp4bench does not have"):
        module.old()


@pytest.mark.parametrize(
    ("device", "changed", "reason"),
    [
        (H200, {}, None),
        (A100, {}, "NVIDIA A100 has no FP8 tensor cores"),
        (H200, {"scaling": PER_BLOCK, "intermediate": 192}, "blocks of 128 in sizes that hold whole ones, not 128 and 192"),
    ],
)
def test_why_not(device, changed, reason, vllm):
    told = why_not(VllmTritonProvider(), moe(**changed), device)
    assert told is None if reason is None else reason in told


def test_without_its_file_it_is_not_installed(vllm):
    (vllm / vllm_fused_moe.FILE).unlink()
    provider = VllmTritonProvider()
    assert provider.version is None
    assert "has no model_executor/layers/fused_moe/fused_moe.py" in provider.why_not(moe(), H200)


def test_a_library_for_other_gpus_is_a_reason(vllm, tmp_path, monkeypatch):
    b200 = Device("cuda:0", "NVIDIA B200", (10, 0), 148, 126 << 20)
    with operators(MOE_STEPS, STEPS, "MAIN", monkeypatch, tmp_path, targets=((SASS, 90),)) as folder:
        (folder / vllm_fused_moe.FILE).parent.mkdir(parents=True)
        assert "has code for sm_90, not for compute capability 10.0" in VllmTritonProvider().why_not(moe(), b200)


def test_it_is_in_the_registry(vllm):
    assert isinstance(providers()["vllm_triton"], VllmTritonProvider)
    assert VllmTritonProvider().version == "0.26.0 (sm_90)"
