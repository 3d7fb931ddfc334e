"""What the GEMMs of every provider are held to: inputs on which a wrong layout, scale, sign or alpha shows.

Outputs are compared with the float64 reference of the provider's own rule, whose operands `fp4bench.quantize` makes.
"""

from collections.abc import Callable, Iterator
from dataclasses import replace

import torch

from fp4bench.cases import Case
from fp4bench.checking import Agreement, checker
from fp4bench.devices import Device
from fp4bench.formats import FORMATS
from fp4bench.problems import MODES, GemmInputs, GemmProblem
from fp4bench.providers import Provider, why_not

# n and k: the smallest that a tensor core's tile fills, a layer that is wide, one that is deep, and odd sizes.
LAYERS = ((64, 128), (384, 256), (128, 1344), (72, 160), (51, 205))
BATCHES = (1, 16, 127, 129)
RAGGED = (1, 127, 129)
ROTATIONS = (None, 16, 32, 128)
# n and k by provider: the smallest that it takes, of each format or mode, and odd multiples of what it takes.
EDGES = {
    "torch": ((1, 1), (16, 16), (48, 80)),
    "torch_fast_fp8": ((16, 16), (48, 80)),
    "eager": ((1, 1), (3, 33)),
    "triton": ((1, 1), (8, 16), (33, 95)),
    "vllm_marlin": ((64, 128), (128, 64), (192, 384), (384, 192)),
    "humming": ((8, 16), (8, 32), (72, 144), (88, 96)),
    "gemlite": ((128, 256), (384, 768)),
    "triton_kernels": ((256, 128), (32, 128), (288, 384)),
    "torch_scaled_mm": ((16, 32), (48, 96)),
    "vllm_cutlass": ((32, 32), (96, 160)),
    "vllm_qutlass": ((8, 64), (8, 128), (24, 192), (24, 384)),
    "vllm_qutlass_quest": ((8, 128), (24, 384)),
    "flashinfer_cutlass": ((32, 128), (96, 384)),
    "flashinfer_cudnn": ((32, 128), (96, 384)),
    "flashinfer_cute_dsl": ((32, 128), (96, 384)),
    "flashinfer_trtllm": ((128, 128), (384, 384)),
    "flashinfer_b12x": ((32, 128), (96, 384)),
}


def problems(provider: Provider, layers: tuple[tuple[int, int], ...] = LAYERS) -> Iterator[GemmProblem]:
    """Every small problem that a provider declares, at m = 1, whether it can run here or not."""
    for mode in (MODES[name] for name in provider.modes):
        for fmt in [FORMATS[name] for name in provider.rules] if mode.weights == "fp4" else [None]:
            for hadamard in ROTATIONS if mode.activations == "fp4" else (None,):
                for n, k in layers:
                    yield GemmProblem("contract", f"n{n}k{k}", 1, 1, n, k, mode, fmt, hadamard)


def check_edges(provider: Provider, device: Device) -> set[tuple[str, str | None, tuple[int, int]]]:
    """Hold a provider to the contract at its edges, at ragged m, with stand-ins for its library: tensors are on the CPU,
    whatever GPU `device` is. -> Modes, formats and layers (n, k) that it took."""
    here, taken = replace(device, torch_name="cpu"), set()
    for problem in problems(provider, EDGES[provider.name]):
        if problem.hadamard in (None, 32) and why_not(provider, problem, here) is None:
            for m in RAGGED:
                check_gemm(provider, replace(problem, m=m), here)
            taken.add((problem.mode.name, problem.format and problem.format.name, (problem.n, problem.k)))
    return taken


def check_gemm(provider: Provider, problem: GemmProblem, device: Device) -> dict[str, Agreement]:
    """Compare the provider's output with the reference on every kind of input, twice each. Raises WrongResultError."""
    assert why_not(provider, problem, device) is None
    case, agreements = Case(problem, provider), {}
    for kind, make in INPUTS.items():
        inputs = make(problem, device.torch_name)
        run, right = provider.prepare(problem, inputs), checker(problem, inputs, case.rule, case.accumulation(device))
        agreements[kind] = right(run())
        right(run())  # what a call leaves in workspaces must not spoil the next
    return agreements


def _normal(problem: GemmProblem, device: str) -> GemmInputs:
    """Values as in the suite. The tensor scales of x and w differ, and are no powers of two."""
    return problem.inputs(device)


def _unequal(problem: GemmProblem, device: str) -> GemmInputs:
    """Tensor scales far apart, and on the other side of 1."""
    inputs = problem.inputs(device, seed=1)
    return GemmInputs(inputs.x * 0.037, inputs.w * 113.0)


def _codes(problem: GemmProblem, device: str) -> GemmInputs:
    """All 16 codes in each block of w, in another order for each row; blocks of a row differ by powers of two. x is one-hot,
    so that each output is one weight, and a permuted code or scale shows as such."""
    n, k, m = problem.n, problem.k, problem.m
    values = torch.tensor([0.0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6], device=device)
    rows, columns = torch.arange(n, device=device)[:, None], torch.arange(k, device=device)
    powers = torch.exp2((columns // 32 + rows).remainder(5).float() - 2)
    w = values[(5 * columns + rows) % 16] * powers
    x = torch.zeros(m, k, device=device)
    x[torch.arange(m), (37 * torch.arange(m) + k // 3) % k] = 1.5
    return GemmInputs(x.to(problem.mode.dtype), w.to(problem.mode.weight_dtype))


def _zeros(problem: GemmProblem, device: str) -> GemmInputs:
    """Blocks of zeros, a row of zeros in w, and in x where there are several."""
    inputs = problem.inputs(device, seed=2)
    x, w = inputs.x.clone(), inputs.w.clone()
    w[::2, :32], w[0], x[1:2] = 0.0, -0.0, 0.0
    return GemmInputs(x, w)


def _outliers(problem: GemmProblem, device: str) -> GemmInputs:
    """A value in 61 that is 30 times the others, and rows of w of unequal size."""
    inputs = problem.inputs(device, seed=3)
    x, w = inputs.x.clone(), inputs.w.clone()
    x[:, ::61] *= 30
    w[1::3] *= 2.0**-5
    return GemmInputs(x, w)


INPUTS: dict[str, Callable[[GemmProblem, str], GemmInputs]] = {
    "normal": _normal,
    "unequal": _unequal,
    "codes": _codes,
    "zeros": _zeros,
    "outliers": _outliers,
}
