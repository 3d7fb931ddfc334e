"""Humming's provider: a layer with the real one's signature, that reads checkpoints as Humming does; and why not."""

import os
import sys
import types

import gemm_contract
import pytest
import torch

from fp4bench import providers as registry
from fp4bench.checking import check
from fp4bench.devices import Device
from fp4bench.formats import MXFP4, NVFP4, e2m1
from fp4bench.problems import W4A8, W4A16, W4A16_FP16, GemmInputs, GemmProblem
from fp4bench.providers import why_not
from fp4bench.providers.humming import _CHECKPOINTS, HummingProvider
from fp4bench.quantize import decode_fp8_rows, quantize_fp8_rows

CPU = Device("cpu", "Some CPU")
T4 = Device("cuda:0", "NVIDIA T4", (7, 5), 40, 4 << 20)
A100 = Device("cuda:0", "NVIDIA A100", (8, 0), 108, 40 << 20)
H200 = Device("cuda:0", "NVIDIA H200", (9, 0), 132, 60 << 20)


def gemm(mode=W4A16, fmt=MXFP4, m=5, n=72, k=160):
    return GemmProblem("tiny", "fc", 1, m, n, k, mode, fmt)


class HummingLayer:
    """With the arguments of humming.layer.HummingLayer (0.1.10 and 0.1.19), on the CPU."""

    def __init__(
        self, shape_n, shape_k, weight_config, input_config=None, pad_n_to_multiple=1, pad_k_to_multiple=1,
        num_experts=None, has_bias=False, torch_dtype=None,
    ):  # fmt: skip
        assert (pad_n_to_multiple, pad_k_to_multiple) == (256, 128)
        assert (num_experts, has_bias) == (None, False)
        self.dtype = torch_dtype
        self.shape, self.weight_config, self.input_config = (shape_n, shape_k), weight_config, input_config
        self.transformed = False
        weight_config["written"] = True  # as the real one writes defaults into it

    def load_from_tensors(self, tensors, prefix=""):
        n, k = self.shape
        codes = tensors.pop("weight")
        assert (codes.shape, codes.dtype) == ((n, k // 2), torch.uint8)
        scales = tensors.pop("weight_scale")
        if self.weight_config["quant_method"] == "mxfp4":
            assert (scales.shape, scales.dtype) == ((n, k // 32), torch.uint8)
            values = torch.exp2(scales.double() - 127)
        else:
            assert self.weight_config["quant_algo"] == "nvfp4"
            assert (scales.shape, scales.dtype) == ((n, k // 16), torch.float8_e4m3fn)
            tensor_scale = tensors.pop("weight_scale_2")
            assert (tensor_scale.shape, tensor_scale.dtype) == ((1,), torch.float32)
            values = scales.double() * tensor_scale.double()
        assert not tensors
        self.w = e2m1.decode(e2m1.unpack(codes)).double() * values.repeat_interleave(k // values.shape[1], dim=1)

    def transform(self):
        self.transformed = True

    def __call__(self, inputs):
        assert self.transformed
        assert inputs.dtype == self.dtype
        x = decode_fp8_rows(quantize_fp8_rows(inputs)) if self.input_config else inputs
        assert self.input_config in (None, {"dtype": "float8e4m3"})
        return (x.double() @ self.w.T).to(self.dtype)


@pytest.fixture
def humming(monkeypatch):
    package, layer = types.ModuleType("humming"), types.ModuleType("humming.layer")
    package.layer, layer.HummingLayer = layer, HummingLayer
    monkeypatch.setitem(sys.modules, "humming", package)
    monkeypatch.setitem(sys.modules, "humming.layer", layer)
    monkeypatch.setenv("HUMMING_TEST_TUNING_SOURCE", "")
    monkeypatch.setattr(registry, "_version", lambda name: "0.1.19")
    return HummingProvider()


@pytest.mark.parametrize(
    ("mode", "fmt"),
    [(W4A16, MXFP4), (W4A16, NVFP4), (W4A16_FP16, MXFP4), (W4A16_FP16, NVFP4), (W4A8, MXFP4)],
    ids=str,
)
def test_it_hands_over_a_checkpoint(mode, fmt, humming):
    for problem in (gemm(mode, fmt), gemm(mode, fmt, m=1, n=8, k=32)):
        assert why_not(humming, problem, H200) is None
        inputs = problem.inputs()
        inputs = GemmInputs(inputs.x, inputs.w * 37)
        run = humming.prepare(problem, inputs)
        assert check(problem, inputs, humming.rules[fmt.name][0], run(), humming.accumulation(problem, H200)).error < 2**-7
        assert check(problem, inputs, humming.rules[fmt.name][0], run()).rows == problem.m


def test_it_keeps_the_contract_at_its_edges(humming):
    layers = gemm_contract.EDGES["humming"]
    mx = {(mode, "mxfp4", layer) for mode in ("w4a16", "w4a16_fp16", "w4a8") for layer in layers if layer[1] % 32 == 0}
    nv = {(mode, "nvfp4", layer) for mode in ("w4a16", "w4a16_fp16") for layer in layers}
    assert gemm_contract.check_edges(humming, H200) == mx | nv


def test_the_bound_widens_where_many_thread_blocks_share_an_output(humming):
    """36 * 2**-9 of the spread are six roundings: with 21 parts of k (of 64 columns each, one tile) it is 21 of them."""
    terms = [humming.accumulation(gemm(n=n, k=k), H200).terms for n, k in ((128, 1024), (128, 1344), (8192, 8192))]
    assert terms[0] == 1024
    assert (1344 / terms[1]) ** 0.5 == pytest.approx(21 / 6, rel=0.01)
    assert terms[2] == 8192  # 5 parts
    assert [humming.accumulation(gemm(mode), H200).bits for mode in (W4A16, W4A16_FP16)] == [9, 12]


def test_each_layer_gets_its_own_configuration(humming):
    problem = gemm()
    assert humming.prepare(problem, problem.inputs())().shape == humming.prepare(problem, problem.inputs())().shape
    assert "written" not in _CHECKPOINTS["mxfp4"]


def test_humming_never_takes_itself_to_be_under_test(humming, monkeypatch):
    monkeypatch.delenv("HUMMING_TEST_TUNING_SOURCE")
    problem = gemm()
    humming.prepare(problem, problem.inputs())
    assert os.environ["HUMMING_TEST_TUNING_SOURCE"] == ""


@pytest.mark.parametrize(
    ("problem", "device", "reason"),
    [
        (gemm(), CPU, "Humming needs a CUDA GPU of compute capability 8.0 or later for bfloat16, which Some CPU is not"),
        (gemm(), A100, None),
        (gemm(), T4, "Humming needs a CUDA GPU of compute capability 8.0 or later for bfloat16, which NVIDIA T4 is not"),
        (gemm(W4A16_FP16), T4, None),
        (
            gemm(W4A16_FP16),
            CPU,
            "Humming needs a CUDA GPU of compute capability 7.5 or later for float16, which Some CPU is not",
        ),
        (gemm(W4A8), A100, "NVIDIA A100 has no FP8 tensor cores (compute capability 8.9 or later)"),
        (gemm(W4A8), H200, None),
        (gemm(W4A8, NVFP4), H200, "Humming takes at least 32 weights a scale beside FP8 activations, and NVFP4 has 16"),
        (gemm(n=51), H200, "Humming takes n that is a multiple of 8 and k of 32, not 51 and 160"),
        (gemm(k=176), H200, "Humming takes n that is a multiple of 8 and k of 32, not 72 and 176"),
        (gemm(fmt=NVFP4, k=176), H200, None),
        (gemm(fmt=NVFP4, k=168), H200, "Humming takes n that is a multiple of 8 and k of 16, not 72 and 168"),
    ],
    ids=str,
)
def test_why_not(problem, device, reason, humming):
    assert humming.why_not(problem, device) == reason


def test_without_the_package_there_is_a_reason():
    provider = HummingProvider()
    provider.version = None
    assert provider.why_not(gemm(), H200) == "humming-kernels is not installed"


def test_a_broken_package_raises_its_own_error(humming, monkeypatch, tmp_path):
    (tmp_path / "humming").mkdir()
    (tmp_path / "humming" / "__init__.py").write_text("raise ImportError('libcuda.so.1 is missing')", encoding="utf-8")
    for name in ("humming", "humming.layer"):
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.syspath_prepend(tmp_path)
    problem = gemm()
    with pytest.raises(ImportError, match="libcuda"):
        humming.prepare(problem, problem.inputs())
