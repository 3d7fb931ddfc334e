"""Products, experts and quantization of odd shapes, for NVIDIA's compute-sanitizer, which sees reads and writes out of bounds:

    PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool memcheck --target-processes application-only \\
        --error-exitcode 9 python tests/kernels/sanitize.py [--planted] [decode | experts | quantize | quantize-3x192 ...]

Without torch's cache each tensor is an allocation of its own: one element beyond it is out of bounds. Results are compared with
references of the CPU, so that what was checked is what computes right. --planted reads one element too many: it has to be seen.
"""

import argparse
import os
from dataclasses import dataclass
from functools import partial

import torch
import triton
import triton.language as tl

from fp4bench.checking import check
from fp4bench.devices import Device, find_device
from fp4bench.formats import MXFP4, NVFP4, BlockFormat, layouts
from fp4bench.kernels import gemm, ops
from fp4bench.kernels import quantize as fused
from fp4bench.kernels.configs import Launch
from fp4bench.kernels.decode import DecodeConfig
from fp4bench.kernels.fp8_rows import Columns
from fp4bench.kernels.prefill_launch import PrefillConfig
from fp4bench.problems import W4A4, W4A8, W4A16, GemmProblem, Mode, MoeProblem
from fp4bench.providers.triton_moe import prepare_moe
from fp4bench.quantize import quantize, quantize_fp8_rows

CACHING = "PYTORCH_NO_CUDA_MEMORY_CACHING"


@dataclass(frozen=True)
class Product:
    """One product, by a launch of its own."""

    mode: Mode
    format: BlockFormat
    m: int
    n: int
    k: int
    launch: Launch

    def __str__(self) -> str:
        return f"{self.mode.name} {self.format.name} m={self.m}, n={self.n}, k={self.k}: {self.launch}"

    def weight(self, device: Device) -> gemm.Weight:
        """Its weight in the CPU's memory, in the order of `device`."""
        return gemm.lay_out(quantize(self.problem.inputs().w, self.format), self.mode, device)

    @property
    def problem(self) -> GemmProblem:
        return GemmProblem("odd", f"n{self.n}k{self.k}", 1, self.m, self.n, self.k, self.mode, self.format)


DECODES = (
    Product(W4A16, MXFP4, 1, 1, 2, DecodeConfig(tiles=1, warps=8)),
    Product(W4A16, NVFP4, 3, 51, 205, DecodeConfig(tiles=4, warps=4)),
    Product(W4A16, MXFP4, 9, 100, 333, DecodeConfig(tiles=5, warps=8, exchange=True, ahead=True)),
    Product(W4A16, NVFP4, 16, 337, 1090, DecodeConfig(tiles=7, warps=16, exchange=True, ahead=True, depth=2)),
    Product(W4A16, MXFP4, 2, 72, 1088, DecodeConfig(tiles=2, warps=16, ahead=True)),
    Product(W4A16, MXFP4, 16, 337, 1088, DecodeConfig(tiles=5, warps=16, slots=2)),
    Product(W4A16, NVFP4, 3, 51, 640, DecodeConfig(tiles=2, warps=4, slots=4, depth=2)),
)
# Shares of k, whole tiles, one warpgroup to four, tiles that hang over n and m, rows of x that are copied because TMA cannot
# read them, and scaled rows.
PREFILLS = (
    Product(W4A16, MXFP4, 1, 51, 205, PrefillConfig(rows=64, columns=8, warpgroups=1, ctas=2)),
    Product(W4A16, NVFP4, 17, 200, 1090, PrefillConfig(columns=32)),
    Product(W4A16, MXFP4, 129, 264, 330, PrefillConfig(columns=128, streamed=False)),
    Product(W4A16, MXFP4, 37, 300, 1088, PrefillConfig(rows=256, columns=64, warpgroups=4, stages=3)),
    Product(W4A8, MXFP4, 1, 51, 205, PrefillConfig(rows=64, columns=16, depth=128, warpgroups=1, ctas=2)),
    Product(W4A8, MXFP4, 77, 200, 1000, PrefillConfig(columns=64, depth=128)),
    Product(W4A8, MXFP4, 130, 72, 160, PrefillConfig(columns=128, depth=128, streamed=False)),
    Product(W4A4, NVFP4, 19, 136, 205, PrefillConfig(columns=32)),
    Product(W4A4, MXFP4, 131, 136, 205, PrefillConfig(columns=128, depth=128)),
)
MATRICES = ((1, 16), (3, 192), (5, 205), (7, 1000), (130, 72), (37, 384), (3, 4100), (2, 40000))

# Blocks of every width, one expert for all, an expert's rows that are no multiple of a tile, and k that is none of a unit; a
# short second product; biases.
EXPERTS = tuple(
    MoeProblem("odd", f"h{hidden}i{intermediate}", 1, m, hidden, intermediate, experts, topk, mode, format, bias=bias)
    for mode, format, m, hidden, intermediate, experts, topk, bias in (
        (W4A16, MXFP4, 1, 206, 51, 5, 2, True),
        (W4A16, NVFP4, 3, 206, 136, 5, 2, False),
        (W4A16, NVFP4, 20, 72, 640, 4, 2, True),
        (W4A16, MXFP4, 200, 330, 72, 3, 2, False),
        (W4A8, MXFP4, 1, 206, 51, 5, 2, True),
        (W4A8, MXFP4, 50, 206, 136, 5, 2, False),
        (W4A8, MXFP4, 70, 330, 200, 3, 2, False),
    )
)


def run_product(product: Product) -> Product:
    """The product on a GPU against the reference, twice in one workspace."""
    device = find_device("cuda")
    tensors, form = ops.flatten(product.weight(device))
    weight = ops.unflatten([tensor.cuda() for tensor in tensors], form)
    inputs = product.problem.inputs()
    x, how = inputs.x.cuda(), {"launch": product.launch}
    workspace = gemm.new_workspace(gemm.workspace_bytes(product.mode, weight, product.m, **how), "cuda")
    accumulation = gemm.accumulation(product.mode, product.format, product.m, device)
    for _ in range(2):
        out = torch.full((product.m, product.n), torch.nan, dtype=x.dtype, device="cuda")
        gemm.gemm(x, weight, product.mode, out=out, workspace=workspace, **how)
        check(product.problem, inputs, product.format.default_rule, out.cpu(), accumulation)
    return product


def run_experts(problem: MoeProblem) -> MoeProblem:
    """The layer on a GPU against the reference, twice."""
    inputs = problem.inputs("cuda")
    runner = prepare_moe(problem, inputs, pdl=True)
    for _ in range(2):
        check(problem, inputs, problem.format.default_rule, runner(), problem.mode.accumulation)
    return problem


def run_quantization(m: int, k: int) -> str:
    """Codes and scales against the eager ones, in both layouts, with and without rotation; FP8 rows and images."""
    x = torch.randn(m, k, generator=torch.Generator().manual_seed(m)).bfloat16()
    on_gpu = x.cuda()
    for format in (MXFP4, NVFP4):
        for hadamard in (None, 16, 64, 128):
            want, got = quantize(x, format, hadamard=hadamard), fused.quantize(on_gpu, format, hadamard=hadamard)
            blocked = fused.quantize(on_gpu, format, hadamard=hadamard, blocked=True)
            fused.fp4_as_bf16(on_gpu, format, hadamard=hadamard)
            _same(got.scales, want.scales, hadamard)
            _same(blocked.scales, layouts.to_blocked(want.scales), hadamard)
            _same(got.codes, want.codes, hadamard)
    for columns in Columns:
        rows = fused.quantize_fp8_rows(on_gpu, columns=columns)
        _same(rows.scales, quantize_fp8_rows(x).scales, None)
    fused.fp4_as_e4m3(on_gpu, hadamard=64)
    return "to FP4, images of FP4, and FP8 rows"


def _same(got: torch.Tensor, want: torch.Tensor, hadamard: int | None) -> None:
    """Equal bytes; a rotation sums in another order, by which at most one byte in 100 of so few may differ."""
    off = got.cpu().view(torch.uint8) != want.view(torch.uint8)
    if off.double().mean().item() > (0.01 if hadamard else 0.0):
        raise AssertionError(f"{int(off.sum())} of {off.numel()} bytes differ, with rotation {hadamard}")


@triton.jit
def _read(x, y, size: tl.constexpr):
    at = tl.arange(0, size)
    tl.store(y + at, tl.load(x + at))


def run_planted() -> None:
    """A read of 128 elements of a tensor of 127."""
    out = torch.empty(128, device="cuda")
    _read[(1,)](torch.zeros(127, device="cuda"), out, 128)
    torch.cuda.synchronize()


RUNS = {
    **{f"decode-{i}": partial(run_product, product) for i, product in enumerate(DECODES)},
    **{f"prefill-{i}": partial(run_product, product) for i, product in enumerate(PREFILLS)},
    **{f"experts-{i}": partial(run_experts, problem) for i, problem in enumerate(EXPERTS)},
    **{f"quantize-{m}x{k}": partial(run_quantization, m, k) for m, k in MATRICES},
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--planted", action="store_true", help="read out of bounds, and nothing else")
    parser.add_argument("parts", nargs="*", default=list(RUNS), help=f"how they begin: {', '.join(RUNS)}")
    asked = parser.parse_args()
    if os.environ.get(CACHING) != "1":
        parser.error(f"without {CACHING}=1 tensors share allocations, and reads beyond one are not seen")
    if asked.planted:
        run_planted()
        return
    chosen = [name for name in RUNS if name.startswith(tuple(asked.parts))]
    if not chosen:
        parser.error(f"nothing begins with {' or '.join(asked.parts)}")
    for name in chosen:
        print(f"{name}: {RUNS[name]()}", flush=True)


if __name__ == "__main__":
    main()
