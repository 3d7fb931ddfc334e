"""What the MoE layers of every provider are held to: small layers whose sizes fill no tile, every routing, experts that differ.

Outputs are compared with the reference of the provider's own rule, within the bound of `fp4bench.checking.moe`.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch

from fp4bench.cases import Case
from fp4bench.checking import Agreement, checker
from fp4bench.devices import Device
from fp4bench.formats import FORMATS
from fp4bench.models import Activation
from fp4bench.problems import FP8_SCALINGS, MODES, ROUTINGS, SILU, ExpertWeights, MoeInputs, MoeProblem, Routing
from fp4bench.providers import Provider, modes_of, why_not

GPT_OSS = Activation("swiglu", alpha=1.702, limit=7.0)

# Hidden size, intermediate size, experts, experts of a token. 192 and 320 are multiples of 64 and not of 128, as 2880 is.
LAYERS = ((256, 128, 8, 2), (192, 320, 5, 4))
BATCHES = (1, 19, 130)


def problems(provider: Provider, layers: tuple[tuple[int, int, int, int], ...] = LAYERS) -> Iterator[MoeProblem]:
    """Every small layer that a provider declares, at m = 1, whether it can run here or not."""
    if "moe" not in provider.ops:
        return
    for mode in (MODES[name] for name in modes_of(provider, "moe")):
        for fmt in [FORMATS[name] for name in provider.rules] if mode.weights == "fp4" else [None]:
            for scaling in FP8_SCALINGS.values() if mode.weights == "fp8" else (None,):
                for activation, (hidden, intermediate, experts, topk) in zip((SILU, GPT_OSS), layers, strict=True):
                    yield MoeProblem(
                        "contract",
                        f"h{hidden}i{intermediate}",
                        1,
                        1,
                        hidden,
                        intermediate,
                        experts,
                        topk,
                        mode,
                        fmt,
                        activation,
                        bias=activation is GPT_OSS,
                        fp8=scaling,
                    )


def check_moe(provider: Provider, problem: MoeProblem, device: Device) -> dict[str, Agreement]:
    """Compare the provider's output with the reference for every kind of input. Raises WrongResultError.

    Then the values and choices are replaced where they are: what a runner takes from them before it is called shows.
    """
    assert why_not(provider, problem, device) is None
    agreements = {}
    for kind, (asked, inputs) in _inputs(problem, device.torch_name).items():
        case = Case(asked, provider)
        run, right = provider.prepare(asked, inputs), checker(asked, inputs, case.rule, case.accumulation(device))
        agreements[kind] = right(run())
        right(run())  # what a call leaves in workspaces must not spoil the next
    other = replace(asked, routing=Routing("zipf", seed=7)).inputs(device.torch_name, seed=11)
    for here, new in ((inputs.x, other.x), (inputs.topk_ids, other.topk_ids), (inputs.topk_weights, other.topk_weights)):
        here.copy_(new)
    agreements["replaced"] = checker(asked, inputs, case.rule, case.accumulation(device))(run())
    return agreements


def _inputs(problem: MoeProblem, device: str) -> dict[str, tuple[MoeProblem, MoeInputs]]:
    found = {}
    for name in ROUTINGS:
        routed = replace(problem, routing=Routing(name))
        found[name] = routed, routed.inputs(device)
    inputs = problem.inputs(device, seed=1)
    found["copy"] = problem, problem.copy(inputs, 1)
    inputs = problem.inputs(device, seed=2)
    outliers = inputs.x.clone()
    outliers[:, ::61] *= 30
    found["outliers"] = problem, replace(inputs, x=outliers)
    inputs = problem.inputs(device, seed=3)
    found["unequal"] = problem, replace(inputs, weights=Unequal(**_fields(inputs.weights)))
    return found


@dataclass(frozen=True, eq=False)
class Unequal(ExpertWeights):
    """Weights whose sizes, and with them their tensor scales, differ by expert, and those of w13 from those of w2."""

    def w13(self, expert: int) -> torch.Tensor:
        return super().w13(expert) * (0.3 + 0.37 * expert)

    def w2(self, expert: int) -> torch.Tensor:
        return super().w2(expert) * (5.1 - 0.61 * expert)


def _fields(weights: ExpertWeights) -> dict[str, object]:
    return {name: getattr(weights, name) for name in ("experts", "hidden", "intermediate", "bias", "device", "seed", "number")}
