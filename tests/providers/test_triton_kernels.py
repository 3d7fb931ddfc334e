"""triton_kernels' provider: modules with the names and signatures of vLLM's copy (0.26.0), and why not."""

import sys
import types

import pytest
import torch

from fp4bench.checking import check
from fp4bench.devices import Device
from fp4bench.formats import MXFP4, ScaleRule, e2m1
from fp4bench.problems import W4A16, GemmProblem
from fp4bench.providers import vllm_ops, why_not
from fp4bench.providers.triton_kernels import TritonKernelsProvider

A100 = Device("cuda:0", "NVIDIA A100", (8, 0), 108, 40 << 20)
H200 = Device("cuda:0", "NVIDIA H200", (9, 0), 132, 60 << 20)
B200 = Device("cuda:0", "NVIDIA B200", (10, 0), 148, 126 << 20)
RTX_5090 = Device("cuda:0", "RTX 5090", (12, 0), 170, 96 << 20)


def gemm(m=5, n=256, k=128):
    return GemmProblem("tiny", "fc", 1, m, n, k, W4A16, MXFP4)


class Wrapped(types.SimpleNamespace):
    """A tensor of triton_kernels: what was wrapped, its type, and the layout it is in."""


def wrap_torch_tensor(torch_tensor, dtype=None):
    return Wrapped(data=torch_tensor, dtype=dtype, layout=None)


def convert_layout(tensor, layout_cls, **layout_kwargs):
    assert layout_kwargs["mx_axis"] == 1
    return Wrapped(data=tensor.data, dtype=tensor.dtype, layout=layout_cls)


class PrecisionConfig(types.SimpleNamespace):
    pass


def matmul_ogs(
    x, w, bias, routing_data=None, gather_indx=None, scatter_indx=None, precision_config=None, betas=None, gammas=None,
    out_alpha=None, y=None, fused_activation=None, epilogue=None,
):  # fmt: skip
    scales = precision_config.weight_scale
    assert (bias, w.layout, w.dtype, scales.layout) == (None, "values", "FP4", "scales of 8")
    assert precision_config.out_dtype == torch.bfloat16
    assert precision_config.flex_ctx == {"rhs_data": "no flexpoint"}
    (codes,), (scale_bytes,) = w.data, scales.data  # one expert: (k / 2, n) and (k / 32 padded, n)
    values = torch.exp2(scale_bytes.double() - 127)
    codes = e2m1.unpack(codes.T.contiguous())
    weights = e2m1.decode(codes).double() * values.T[:, : codes.shape[1] // 32].repeat_interleave(32, dim=1)
    return (x.double() @ weights.T).to(torch.bfloat16)[None]


@pytest.fixture
def copy(tmp_path, monkeypatch):
    """vLLM's folder with a copy of stand-ins; yields the constraints that were set."""
    folder = tmp_path / "third_party" / "triton_kernels"
    folder.mkdir(parents=True)
    (folder / "__init__.py").write_text("", encoding="utf-8")
    (tmp_path / "_version.py").write_text("__version__ = version = '0.26.0'\n", encoding="utf-8")
    monkeypatch.setenv(vllm_ops.VARIABLE, str(tmp_path))
    monkeypatch.setattr(sys, "path", [*sys.path])
    constraints = {}
    parts = {
        "": {},
        ".matmul_ogs": {"matmul_ogs": matmul_ogs, "PrecisionConfig": PrecisionConfig, "FlexCtx": dict},
        ".numerics": {"InFlexData": lambda: "no flexpoint"},
        ".tensor": {"FP4": "FP4", "wrap_torch_tensor": wrap_torch_tensor, "convert_layout": convert_layout},
        ".tensor_details": {},
        ".tensor_details.layout": {
            "make_default_matmul_mxfp4_w_layout": lambda mx_axis: ("values", {"mx_axis": mx_axis}),
            "make_default_matmul_mxfp4_w_scale_layout": lambda mx_axis, num_warps=8: (
                f"scales of {num_warps}",
                {"mx_axis": mx_axis},
            ),
        },
        ".matmul_ogs_details": {},
        ".matmul_ogs_details.opt_flags": {"update_opt_flags_constraints": constraints.update},
    }
    for name, attributes in parts.items():
        module = types.ModuleType(f"triton_kernels{name}")
        vars(module).update(attributes)
        monkeypatch.setitem(sys.modules, module.__name__, module)
    return constraints


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
