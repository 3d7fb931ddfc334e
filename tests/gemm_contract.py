"""What the GEMMs of every provider are held to: inputs on which a wrong layout, scale, sign or alpha shows.

Outputs are compared with the float64 reference of the provider's own rule, whose operands `fp4bench.quantize` makes.
"""

from collections.abc import Callable, Iterator

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
ROTATIONS = (None, 16, 32, 128)


def problems(provider: Provider, layers: tuple[tuple[int, int], ...] = LAYERS) -> Iterator[GemmProblem]:
    """Every small problem that a provider declares, at m = 1, whether it can run here or not."""
    for mode in (MODES[name] for name in provider.modes):
        for fmt in [FORMATS[name] for name in provider.rules] if mode.weights == "fp4" else [None]:
            for hadamard in ROTATIONS if mode.activations == "fp4" else (None,):
                for n, k in layers:
                    yield GemmProblem("contract", f"n{n}k{k}", 1, 1, n, k, mode, fmt, hadamard)


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
