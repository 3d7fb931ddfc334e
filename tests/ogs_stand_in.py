"""triton_kernels' modules, with the names and signatures of vLLM's copy (0.26.0)."""

import sys
import types

import torch

from fp4bench.formats import e2m1
from fp4bench.providers import vllm_ops


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


def install(tmp_path, monkeypatch):
    """vLLM's folder with a copy of stand-ins; returns the constraints that are set."""
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
        ".matmul_ogs_details.opt_flags": {
            "_opt_flags_constraints": constraints,
            "update_opt_flags_constraints": constraints.update,
            "reset_opt_flags_constraints": constraints.clear,
        },
    }
    for name, attributes in parts.items():
        module = types.ModuleType(f"triton_kernels{name}")
        vars(module).update(attributes)
        monkeypatch.setitem(sys.modules, module.__name__, module)
    return constraints
