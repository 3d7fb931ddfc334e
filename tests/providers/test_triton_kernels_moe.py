"""gpt-oss' experts by triton_kernels: vLLM's functions by stand-ins, weights and biases in their order, and why not."""

import sys
import types
from dataclasses import replace

import moe_contract
import pytest
import torch
from ogs_stand_in import install

from fp4bench.checking import WrongResultError
from fp4bench.devices import Device, find_device
from fp4bench.formats import MXFP4
from fp4bench.problems import SILU, W4A16, MoeProblem
from fp4bench.providers import triton_kernels_moe, vllm_fused_moe, vllm_ops, why_not
from fp4bench.providers.triton_kernels import TritonKernelsProvider

H200 = Device("cuda:0", "NVIDIA H200", (9, 0), 132, 60 << 20)

FILE = """
import torch
import vllm.model_executor.layers.fused_moe.modular_kernel as mk
from vllm.model_executor.layers.fused_moe.activation import MoEActivation
from vllm.model_executor.layers.fused_moe.utils import _resize_cache
from vllm.triton_utils import tl, triton
from vllm.utils.import_utils import has_triton_kernels
from ..utils import swiglu_limit_func

if has_triton_kernels():
    import triton_kernels.matmul_ogs_details.opt_flags as opt_flags

class Experts(mk.FusedMoEExpertsModular):
    activation: MoEActivation | None = MoEActivation.SILU

def make_routing_data(topk_ids, topk_weights, num_local_experts):
    return topk_weights.bfloat16(), topk_ids.short(), num_local_experts

def triton_kernel_fused_experts(output_tensor, hidden_states, w1, w2, routing_data, gather_indx, scatter_indx, topk,
        activation=MoEActivation.SWIGLUOAI, quant_config=None, swiglu_alpha=1.702, swiglu_limit=7.0,
        intermediate_cache=None):
    from stand_in_of_ogs import experts
    assert activation == MoEActivation.SWIGLUOAI and opt_flags._opt_flags_constraints == {"split_k": 1}
    cache = _resize_cache(intermediate_cache, (1, len(hidden_states) * topk, w1.data.shape[-1] // 2))
    experts(output_tensor, hidden_states, w1, w2, routing_data, gather_indx.long(), quant_config, swiglu_alpha,
            swiglu_limit, cache)
"""


def decoded(w, precision, expert):
    from fp4bench.formats import e2m1

    codes, scales = w.data[expert].T.contiguous(), precision.weight_scale.data[expert].T
    codes = e2m1.unpack(codes)
    values = torch.exp2(scales.double() - 127)[:, : codes.shape[1] // 32]
    return e2m1.decode(codes).double() * values.repeat_interleave(32, dim=1)


def experts(out, x, w1, w2, weights, ids, config, alpha, limit, cache):
    y = torch.zeros(x.shape, dtype=torch.float64)
    for token, choices in enumerate(ids.tolist()):
        for slot, expert in enumerate(choices):
            sums = x[token].double() @ decoded(w1, config.w1_precision, expert).T + config.w1_bias[expert].double()
            gate, up = sums[0::2].clamp(max=limit), sums[1::2].clamp(-limit, limit)
            at = cache[0, token * len(choices) + slot]
            at.copy_(gate * torch.sigmoid(alpha * gate) * (up + 1))
            part = at.double() @ decoded(w2, config.w2_precision, expert).T + config.w2_bias[expert].double()
            y[token] += weights[token, slot].double() * part
    out.copy_(y)


def moe(m=3, **changed):
    problem = MoeProblem("tiny", "experts", 1, m, 256, 256, 4, 2, W4A16, MXFP4, moe_contract.GPT_OSS, bias=True)
    return replace(problem, **changed)


@pytest.fixture
def vllm(tmp_path, monkeypatch):
    """The copy of triton_kernels, and vLLM's file that calls it; yields the constraints that are set."""
    pytest.importorskip("triton")
    constraints = install(tmp_path, monkeypatch)
    opt_flags = sys.modules["triton_kernels.matmul_ogs_details.opt_flags"]
    for name in ("triton_kernels", "triton_kernels.matmul_ogs_details"):  # packages, as `import a.b as c` wants them
        sys.modules[name].__path__ = []
    sys.modules["triton_kernels"].matmul_ogs_details = sys.modules["triton_kernels.matmul_ogs_details"]
    sys.modules["triton_kernels.matmul_ogs_details"].opt_flags = opt_flags
    sys.modules["triton_kernels"].__spec__ = types.SimpleNamespace()  # is there
    module = types.ModuleType("stand_in_of_ogs")
    module.experts = experts
    monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    file = tmp_path / vllm_fused_moe.OGS_FILE
    file.parent.mkdir(parents=True)
    file.write_text(FILE, encoding="utf-8")
    return constraints


def on_the_cpu(problem, monkeypatch):
    monkeypatch.setattr(moe_contract, "why_not", lambda provider, problem, device: why_not(provider, problem, H200))
    return moe_contract.check_moe(TritonKernelsProvider(), problem, Device("cpu", "Some CPU"))


def test_it_keeps_the_contract_and_leaves_no_constraint(vllm, monkeypatch):
    on_the_cpu(moe(), monkeypatch)
    assert vllm == {}


def test_gates_that_are_not_interleaved_would_be_found(vllm, monkeypatch):
    monkeypatch.setattr(triton_kernels_moe, "_interleaved", lambda w: w)
    with pytest.raises(WrongResultError):
        on_the_cpu(moe(), monkeypatch)


@pytest.mark.parametrize(
    ("changed", "reason"),
    [
        ({}, None),
        ({"hidden": 2880, "intermediate": 2880}, None),
        ({"activation": SILU, "bias": False}, "the activation of gpt-oss alone"),
        ({"intermediate": 360}, "multiples of 64, and at least 256, not 256 and 360"),
        ({"hidden": 192}, "multiples of 64, and at least 256, not 192 and 256"),
    ],
    ids=str,
)
def test_why_not(changed, reason, vllm):
    told = why_not(TritonKernelsProvider(), moe(**changed), H200)
    assert told is None if reason is None else reason in told


def test_without_vllm_s_file_it_says_so(vllm):
    vllm_ops.python_file(vllm_fused_moe.OGS_FILE).unlink()
    assert "has no model_executor/layers/fused_moe/experts/gpt_oss" in why_not(TritonKernelsProvider(), moe(), H200)


@pytest.mark.gpu
@pytest.mark.parametrize("m", [1, 19, 130])
@pytest.mark.parametrize(("hidden", "intermediate"), [(320, 576), (2880, 2880)])
def test_it_is_right_on_a_gpu(m, hidden, intermediate):
    """The contract's layers are too small for it."""
    provider, device, problem = TritonKernelsProvider(), find_device(), moe(m, hidden=hidden, intermediate=intermediate)
    if reason := why_not(provider, problem, device):
        pytest.skip(reason)
    moe_contract.check_moe(provider, problem, device)
