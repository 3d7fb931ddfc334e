"""OpenAI's triton_kernels: MXFP4 weights times bfloat16 activations by `matmul_ogs`, in the copy that vLLM brings along.

vLLM keeps it in its folder `third_party` (API of Triton 3.5); it needs torch and Triton alone. A folder that FP4BENCH_VLLM_LIBS
names may hold it too. Weights are quantized by this package's FLOOR rule and laid out once as vLLM's `_swizzle_mxfp4` does
(0.26.0): k along the second axis, in the layouts for values and scales of the GPU's generation. The layer is one expert;
nothing is routed.

Launches are the library's own choice. vLLM forbids splits along k on Hopper, for the sake of its experts: on layers with few
columns that costs up to three times the time at a small m (down of Llama-3.3-70B at m = 1:
168 us, 60 us without; two NVIDIA H200).
"""

import sys
from collections.abc import Mapping
from importlib import import_module
from typing import Any

import torch
from torch.nn.functional import pad

from fp4bench.devices import Device
from fp4bench.formats import MXFP4, ScaleRule
from fp4bench.problems import GemmProblem, Problem
from fp4bench.providers import Runner, vllm_ops
from fp4bench.quantize import Quantized, quantize

_NAME = "triton_kernels"

_WARPS = 8  # that the layout of scales is made for: the default of the library and of vLLM
_TILE = 32 * _WARPS  # columns of a tile on Hopper


class TritonKernelsProvider:
    """MXFP4 (FLOOR) weights by `triton_kernels.matmul_ogs.matmul_ogs`."""

    name = "triton_kernels"
    ops = ("gemm",)
    modes = ("w4a16",)
    rules: Mapping[str, tuple[ScaleRule, ...]] = {MXFP4.name: (ScaleRule.FLOOR,)}

    def __init__(self) -> None:
        self.version = vllm_ops.third_party_version(_NAME)

    def why_not(self, problem: Problem, device: Device) -> str | None:
        assert isinstance(problem, GemmProblem)
        if self.version is None:
            return f"vLLM's copy of triton_kernels is neither installed nor in a folder that {vllm_ops.VARIABLE} names"
        if device.capability is None or not (9, 0) <= device.capability < (11, 0):
            return f"triton_kernels has layouts for Hopper and for compute capability 10, which {device.name} is not"
        if problem.n % 32 or problem.k % 128:
            return f"triton_kernels is given n that is a multiple of 32 and k of 128, not {problem.n} and {problem.k}"
        if device.capability < (10, 0) and problem.n < _TILE:
            return f"triton_kernels' scales for Hopper come in tiles of {_TILE} columns, and n is {problem.n}"
        return None

    def prepare(self, problem: Any, inputs: Any) -> Runner:
        modules = _Modules()
        w = quantize(inputs.w, MXFP4, rule=ScaleRule.FLOOR)
        values, scales = _laid_out(w, modules, torch.cuda.get_device_capability(inputs.x.device))
        ogs = modules.matmul_ogs
        flexible = ogs.FlexCtx(rhs_data=modules.numerics.InFlexData())
        precision = ogs.PrecisionConfig(weight_scale=scales, flex_ctx=flexible, out_dtype=torch.bfloat16)
        shape = (problem.m, problem.n)
        return lambda: ogs.matmul_ogs(inputs.x, values, None, precision_config=precision).view(shape)


class _Modules:
    """The parts of triton_kernels that are used, imported from where vLLM keeps it."""

    def __init__(self) -> None:
        folder = str(vllm_ops.third_party(_NAME))
        if folder not in sys.path:
            sys.path.append(folder)
        self.matmul_ogs = import_module(f"{_NAME}.matmul_ogs")
        self.numerics = import_module(f"{_NAME}.numerics")
        self.tensor = import_module(f"{_NAME}.tensor")
        self.layout = import_module(f"{_NAME}.tensor_details.layout")
        self.opt_flags = import_module(f"{_NAME}.matmul_ogs_details.opt_flags")


def _laid_out(w: Quantized, modules: Any, capability: tuple[int, int]) -> tuple[Any, Any]:
    """Codes and scales of (n, k) weights as triton_kernels' tensors of one expert: (1, k, n) and (1, k / 32, n)."""
    codes, scales = w.codes[None], w.scales.view(torch.uint8)[None]
    if capability[0] == 9:
        scales = pad(scales, (0, -scales.shape[-1] % 4))
    else:
        modules.opt_flags.update_opt_flags_constraints({"is_persistent": True, "epilogue_subtile": 1})
    layout, tensor = modules.layout, modules.tensor
    value_layout, value_options = layout.make_default_matmul_mxfp4_w_layout(mx_axis=1)
    scale_layout, scale_options = layout.make_default_matmul_mxfp4_w_scale_layout(mx_axis=1, num_warps=_WARPS)
    values = tensor.wrap_torch_tensor(codes.transpose(-2, -1), dtype=tensor.FP4)
    return (
        tensor.convert_layout(values, value_layout, **value_options),
        tensor.convert_layout(tensor.wrap_torch_tensor(scales.transpose(-2, -1)), scale_layout, **scale_options),
    )
