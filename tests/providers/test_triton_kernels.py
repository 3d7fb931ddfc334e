"""triton_kernels' provider: modules with the names and signatures of vLLM's copy (0.26.0), and why not."""

import gemm_contract
import pytest
import torch
from ogs_stand_in import install

from fp4bench.checking import check
from fp4bench.devices import Device
from fp4bench.formats import MXFP4, ScaleRule
from fp4bench.problems import W4A16, GemmProblem
from fp4bench.providers import vllm_ops, why_not
from fp4bench.providers.triton_kernels import TritonKernelsProvider

A100 = Device("cuda:0", "NVIDIA A100", (8, 0), 108, 40 << 20)
H200 = Device("cuda:0", "NVIDIA H200", (9, 0), 132, 60 << 20)
B200 = Device("cuda:0", "NVIDIA B200", (10, 0), 148, 126 << 20)
RTX_5090 = Device("cuda:0", "RTX 5090", (12, 0), 170, 96 << 20)


def gemm(m=5, n=256, k=128):
    return GemmProblem("tiny", "fc", 1, m, n, k, W4A16, MXFP4)


@pytest.fixture
def copy(tmp_path, monkeypatch):
    """The constraints that are set."""
    return install(tmp_path, monkeypatch)


@pytest.mark.parametrize(
    ("capability", "constraints"), [((9, 0), {}), ((10, 0), {"is_persistent": True, "epilogue_subtile": 1})]
)
def test_one_expert_in_its_layouts(capability, constraints, copy, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    provider = TritonKernelsProvider()
    for problem in (gemm(), gemm(m=1, k=640), gemm(m=513, n=288)):
        assert why_not(provider, problem, H200) is None
        inputs = problem.inputs()
        out = provider.prepare(problem, inputs)()
        assert check(problem, inputs, ScaleRule.FLOOR, out).rows == problem.m
    assert copy == constraints


@pytest.mark.parametrize(
    ("device", "layers"), [(H200, {(256, 128), (288, 384)}), (B200, set(gemm_contract.EDGES["triton_kernels"]))]
)
def test_it_keeps_the_contract_at_its_edges(device, layers, copy, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: device.capability)
    assert gemm_contract.check_edges(TritonKernelsProvider(), device) == {("w4a16", "mxfp4", layer) for layer in layers}


def test_its_version_is_that_of_vllm(copy):
    assert TritonKernelsProvider().version == "vLLM 0.26.0"


@pytest.mark.parametrize(
    ("problem", "device", "reason"),
    [
        (gemm(), A100, "triton_kernels has layouts for Hopper and for compute capability 10, which NVIDIA A100 is not"),
        (gemm(), RTX_5090, "triton_kernels has layouts for Hopper and for compute capability 10, which RTX 5090 is not"),
        (gemm(), B200, None),
        (gemm(n=51), H200, "triton_kernels is given n that is a multiple of 32 and k of 128, not 51 and 128"),
        (gemm(n=96), B200, None),
        (gemm(n=96), H200, "triton_kernels' scales for Hopper come in tiles of 256 columns, and n is 96"),
        (gemm(k=160), H200, "triton_kernels is given n that is a multiple of 32 and k of 128, not 256 and 160"),
    ],
    ids=str,
)
def test_why_not(problem, device, reason, copy):
    assert TritonKernelsProvider().why_not(problem, device) == reason


def test_a_folder_without_it_is_a_reason(tmp_path, monkeypatch):
    monkeypatch.setenv(vllm_ops.VARIABLE, str(tmp_path))
    provider = TritonKernelsProvider()
    assert provider.version is None
    told = f"vLLM's copy of triton_kernels is neither installed nor in a folder that {vllm_ops.VARIABLE} names"
    assert provider.why_not(gemm(), H200) == told
