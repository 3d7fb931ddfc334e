"""Humming's MoE layers: experts with the real layer's signature, vLLM's kernels around them by stand-ins, and why not."""

import json
import sys
import types
from dataclasses import replace

import moe_contract
import pytest
import torch
from vllm_moe_stand_in import CALLS, STEPS, tile_products
from vllm_stand_in import MOE, MOE_STEPS, operators

from fp4bench import providers as registry
from fp4bench.devices import Device
from fp4bench.formats import MXFP4, NVFP4, e2m1
from fp4bench.problems import W4A8, W4A16, MoeProblem
from fp4bench.providers import humming_moe, vllm_fused_moe, vllm_ops, why_not
from fp4bench.providers.humming import HummingProvider
from fp4bench.quantize import decode_fp8_rows, quantize_fp8_rows

H200 = Device("cuda:0", "NVIDIA H200", (9, 0), 132, 60 << 20)
SUM_FILE = """
from torch._subclasses.fake_tensor import FakeTensor
from vllm.platforms import current_platform
from vllm.triton_utils import tl, triton

def moe_fused_mul_sum(inputs, topk_weights, outputs=None, topk_ids=None, expert_map=None):
    assert inputs.is_contiguous() and topk_weights.is_contiguous()
    outputs.copy_((inputs.double() * topk_weights[..., None].double()).sum(dim=1))
    return outputs
"""


def moe(fmt=MXFP4, mode=W4A16, m=7, **changed):
    return replace(MoeProblem("tiny", "experts", 1, m, 128, 64, 4, 2, mode, fmt), **changed)


class HummingLayer:
    """With the arguments of humming.layer.HummingLayer (0.1.19), of experts, on the CPU."""

    def __init__(self, shape_n, shape_k, weight_config, input_config, pad_n_to_multiple, pad_k_to_multiple, num_experts,
                 has_bias, torch_dtype):  # fmt: skip
        assert (pad_n_to_multiple, pad_k_to_multiple, torch_dtype) == (256, 128, torch.bfloat16)
        self.shape, self.fp8, self.has_bias = (num_experts, shape_n, shape_k), input_config is not None, has_bias
        weight_config["written"] = True
        self.humming_config = None

    def load_from_tensors(self, tensors):
        experts, n, k = self.shape
        codes, scales = tensors["weight"], tensors["weight_scale"]
        assert (codes.shape, codes.dtype) == ((experts, n, k // 2), torch.uint8)
        values = torch.exp2(scales.double() - 127) if scales.dtype == torch.uint8 else scales.double()
        if "weight_scale_2" in tensors:
            assert (tensors["weight_scale_2"].shape, scales.dtype) == ((experts,), torch.float8_e4m3fn)
            values = values * tensors["weight_scale_2"].double()[:, None, None]
        self.w = e2m1.decode(e2m1.unpack(codes)).double() * values.repeat_interleave(k // values.shape[-1], dim=-1)
        self.bias = tensors.get("bias")
        assert (self.bias is not None) == self.has_bias

    def transform(self):
        self.humming_config = "transformed"

    def __call__(self, inputs, outputs, sorted_ids, expert_ids, num_tokens_padded, top_k, valid_shape_m, compute_config,
                 tuning_config):  # fmt: skip
        CALLS.append("humming")
        assert json.loads(compute_config)["gemm_type"] == "indexed"
        launch = next(each[2] for each in json.loads(tuning_config) if each[0] < valid_shape_m <= each[1])
        x = decode_fp8_rows(quantize_fp8_rows(inputs)) if self.fp8 else inputs
        bias = None if self.bias is None else self.bias.__getitem__
        rows, unused = int(num_tokens_padded), torch.ones(valid_shape_m)
        tile_products(lambda at: x[at], self.w.__getitem__, outputs, sorted_ids, expert_ids, rows, launch["block_shape"][0],
                      top_k, unused, False, bias)  # fmt: skip


def launches(layer_config, gemm_type, device):
    assert (layer_config, gemm_type) == ("transformed", "indexed")
    return [[0, 16, {"block_shape": [8, 128, 128]}], [16, 1 << 20, {"block_shape": [16, 128, 128]}]]


@pytest.fixture
def humming(tmp_path, monkeypatch):
    pytest.importorskip("triton")
    layer, tune = types.ModuleType("humming.layer"), types.ModuleType("humming.tune")
    layer.HummingLayer, tune.get_heuristics_config = HummingLayer, launches
    for module in (types.ModuleType("humming"), layer, tune):
        monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.setenv("HUMMING_TEST_TUNING_SOURCE", "")
    monkeypatch.setattr(registry, "_version", lambda name: "0.1.19")
    with (
        operators(MOE, STEPS, "MOE", monkeypatch, tmp_path) as moe_folder,
        operators(MOE_STEPS, STEPS, "MAIN", monkeypatch, tmp_path) as folder,
    ):
        (moe_folder / vllm_ops.MOE.files[-1]).rename(folder / vllm_ops.MOE.files[-1])
        file = folder / vllm_fused_moe.SUM_FILE
        file.parent.mkdir(parents=True)
        file.write_text(SUM_FILE, encoding="utf-8")
        yield folder


def on_the_cpu(problem, monkeypatch):
    monkeypatch.setattr(moe_contract, "why_not", lambda provider, problem, device: why_not(provider, problem, H200))
    return moe_contract.check_moe(HummingProvider(), problem, Device("cpu", "Some CPU"))


@pytest.mark.parametrize(("fmt", "mode"), [(MXFP4, W4A16), (NVFP4, W4A16), (MXFP4, W4A8)])
def test_it_keeps_the_contract(fmt, mode, humming, monkeypatch):
    on_the_cpu(moe(fmt, mode), monkeypatch)
    on_the_cpu(moe(fmt, mode, m=11, activation=moe_contract.GPT_OSS, bias=True), monkeypatch)  # of the second launch


def test_a_layer_is_these_launches(humming):
    problem = moe()
    run = HummingProvider().prepare(problem, problem.inputs())
    CALLS.clear()
    run()
    assert CALLS == ["align", "humming", "silu", "humming"]
    assert list(run.phases) == ["route", "gemm1", "activation", "gemm2", "combine"]


def test_a_tile_has_the_rows_of_the_launch(humming):
    assert [humming_moe._rows(launches("transformed", "indexed", None), pairs) for pairs in (1, 16, 17, 1 << 21)] == [
        8,
        8,
        16,
        64,
    ]


def test_why_not(humming):
    provider = HummingProvider()
    assert why_not(provider, moe(), H200) is None
    assert "multiples of 64, not 128 and 72" in why_not(provider, moe(intermediate=72), H200)
    assert "at least 32 weights a scale beside FP8" in why_not(provider, moe(NVFP4, W4A8), H200)
    (humming / vllm_fused_moe.SUM_FILE).unlink()
    assert "there is no model_executor/layers/fused_moe/moe_fused_mul_sum.py of vLLM" in why_not(provider, moe(), H200)
