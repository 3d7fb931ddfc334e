"""OpenAI's triton_kernels: MXFP4 weights times bfloat16 activations by `matmul_ogs`, in the copy that vLLM brings along.

vLLM keeps it in its folder `third_party` (API of Triton 3.5); it needs torch and Triton alone. A folder that FP4BENCH_VLLM_LIBS
names may hold it too. Weights are quantized by this package's FLOOR rule and laid out once as vLLM's `_swizzle_mxfp4` does
(0.26.0): k along the second axis, in the layouts for values and scales of the GPU's generation. A dense layer is one expert,
and nothing is routed; MoE layers go the way of gpt-oss (`triton_kernels_moe`).

Launches are the library's own choice. vLLM forbids splits along k on Hopper, for the sake of its experts: on layers with few
columns that costs up to three times the time at a small m (down of Llama-3.3-70B at m = 1:
168 us, 60 us without; two NVIDIA H200).
"""

from collections.abc import Mapping
from typing import Any

import torch

from fp4bench.devices import Device
from fp4bench.formats import MXFP4, ScaleRule
from fp4bench.problems import GemmProblem, MoeProblem, Problem
from fp4bench.providers import Runner, vllm_ops
from fp4bench.providers.triton_kernels_layout import NAME, WARPS, Modules, laid_out
from fp4bench.providers.triton_kernels_moe import prepare_moe, why_not_moe
from fp4bench.quantize import quantize

_TILE = 32 * WARPS  # columns of a tile on Hopper


class TritonKernelsProvider:
    """MXFP4 (FLOOR) weights by `triton_kernels.matmul_ogs.matmul_ogs`."""

    name = "triton_kernels"
    ops = ("gemm", "moe")
    modes = ("w4a16",)
    rules: Mapping[str, tuple[ScaleRule, ...]] = {MXFP4.name: (ScaleRule.FLOOR,)}

    def __init__(self) -> None:
        self.version = vllm_ops.third_party_version(NAME)

    def why_not(self, problem: Problem, device: Device) -> str | None:
        if self.version is None:
            return f"vLLM's copy of triton_kernels is neither installed nor in a folder that {vllm_ops.VARIABLE} names"
        if device.capability is None or not (9, 0) <= device.capability < (11, 0):
            return f"triton_kernels has layouts for Hopper and for compute capability 10, which {device.name} is not"
        if isinstance(problem, MoeProblem):
            return why_not_moe(problem)
        assert isinstance(problem, GemmProblem)
        if problem.n % 32 or problem.k % 128:
            return f"triton_kernels is given n that is a multiple of 32 and k of 128, not {problem.n} and {problem.k}"
        if device.capability < (10, 0) and problem.n < _TILE:
            return f"triton_kernels' scales for Hopper come in tiles of {_TILE} columns, and n is {problem.n}"
        return None

    def prepare(self, problem: Any, inputs: Any) -> Runner:
        if isinstance(problem, MoeProblem):
            return prepare_moe(problem, inputs)
        modules = Modules()
        w = quantize(inputs.w, MXFP4, rule=ScaleRule.FLOOR)
        values, precision = laid_out([w], modules, torch.cuda.get_device_capability(inputs.x.device))
        ogs = modules.matmul_ogs
        shape = (problem.m, problem.n)
        return lambda: ogs.matmul_ogs(inputs.x, values, None, precision_config=precision).view(shape)
