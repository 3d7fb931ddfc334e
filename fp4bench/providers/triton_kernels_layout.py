"""MXFP4 weights as triton_kernels reads them, and the parts of it that are used."""

import sys
from collections.abc import Iterable
from importlib import import_module
from typing import Any

import torch
from torch.nn.functional import pad

from fp4bench.providers import vllm_ops
from fp4bench.quantize import Quantized

NAME = "triton_kernels"

WARPS = 8  # that the layout of scales is made for: the default of the library and of vLLM


class Modules:
    """The parts of triton_kernels that are used, imported from where vLLM keeps it."""

    def __init__(self) -> None:
        folder = str(vllm_ops.third_party(NAME))
        if folder not in sys.path:
            sys.path.append(folder)
        self.matmul_ogs = import_module(f"{NAME}.matmul_ogs")
        self.numerics = import_module(f"{NAME}.numerics")
        self.tensor = import_module(f"{NAME}.tensor")
        self.layout = import_module(f"{NAME}.tensor_details.layout")
        self.opt_flags = import_module(f"{NAME}.matmul_ogs_details.opt_flags")


def laid_out(weights: Iterable[Quantized], modules: Modules, capability: tuple[int, int]) -> tuple[Any, Any]:
    """MXFP4 weights (n, k) of experts: triton_kernels' tensor (experts, k, n), and the `PrecisionConfig` with its scales.

    On compute capability 10 it also sets what vLLM sets there, for all later calls.
    """
    parts = [(w.codes, w.scales.view(torch.uint8)) for w in weights]
    codes, scales = (torch.stack(part) for part in zip(*parts, strict=True))
    if capability[0] == 9:
        scales = pad(scales, (0, -scales.shape[-1] % 4))
    else:
        modules.opt_flags.update_opt_flags_constraints({"is_persistent": True, "epilogue_subtile": 1})
    layout, tensor = modules.layout, modules.tensor
    value_layout, value_options = layout.make_default_matmul_mxfp4_w_layout(mx_axis=1)
    scale_layout, scale_options = layout.make_default_matmul_mxfp4_w_scale_layout(mx_axis=1, num_warps=WARPS)
    values = tensor.wrap_torch_tensor(codes.transpose(-2, -1), dtype=tensor.FP4)
    laid_out_scales = tensor.convert_layout(tensor.wrap_torch_tensor(scales.transpose(-2, -1)), scale_layout, **scale_options)
    ogs = modules.matmul_ogs
    flexible = ogs.FlexCtx(rhs_data=modules.numerics.InFlexData())
    precision = ogs.PrecisionConfig(weight_scale=laid_out_scales, flex_ctx=flexible, out_dtype=torch.bfloat16)
    return tensor.convert_layout(values, value_layout, **value_options), precision
