"""Every provider's MoE layers keep the contract, on the device that is here; what one refuses is skipped by its own words."""

from dataclasses import replace

import moe_contract
import pytest
import torch

from fp4bench.checking import WrongResultError
from fp4bench.devices import find_device
from fp4bench.formats import NVFP4
from fp4bench.problems import W4A8, W4A16, MoeInputs, MoeProblem
from fp4bench.providers import providers, why_not
from fp4bench.providers.eager import EagerProvider

_BATCHES = moe_contract.BATCHES if torch.cuda.is_available() else (3,)


def _kinds():
    return [
        pytest.param(provider, problem, id=f"{provider.name}-{problem}")
        for provider in providers().values()
        for problem in moe_contract.problems(provider)
    ]


@pytest.mark.parametrize(("provider", "problem"), _kinds())
def test_moe_layers_keep_the_contract(provider, problem):
    device = find_device()
    if reason := why_not(provider, problem, device):
        pytest.skip(reason)
    for m in _BATCHES:
        moe_contract.check_moe(provider, replace(problem, m=m), device)


class Spoilt(EagerProvider):
    """The eager provider on inputs that something was done to."""

    def __init__(self, spoil):
        self.spoil = spoil

    def prepare(self, problem, inputs):
        return super().prepare(problem, self.spoil(inputs))


def spoil_weights(**changed):
    """Inputs whose weights have the changed methods."""

    def spoil(inputs):
        weights = inputs.weights
        kind = type("Other", (type(weights),), {name: change(getattr(type(weights), name)) for name, change in changed.items()})
        return replace(inputs, weights=kind(**moe_contract._fields(weights)))

    return spoil


def of_neighbour(method):
    return lambda self, expert: method(self, (expert + 1) % self.experts)


def halves_swapped(method):
    return lambda self, expert: torch.cat(method(self, expert).chunk(2)[::-1])


def interleaved(method):
    return lambda self, expert: method(self, expert).unflatten(0, (2, -1)).transpose(0, 1).flatten(0, 1)


def without_last_columns(method):
    return lambda self, expert: torch.cat(
        (method(self, expert)[:, :-16], torch.zeros(len(method(self, expert)), 16)), 1
    ).bfloat16()


def nothing(method):
    return lambda self, expert: torch.zeros_like(method(self, expert))


def before(inputs):
    """Inputs as they were when the layer was prepared."""
    return MoeInputs(inputs.x.clone(), inputs.topk_weights.clone(), inputs.topk_ids.clone(), inputs.weights)


SPOILT = {
    "another expert's first weight": spoil_weights(w13=of_neighbour),
    "another expert's second weight": spoil_weights(w2=of_neighbour),
    "gate and up swapped": spoil_weights(w13=halves_swapped),
    "gate and up interleaved": spoil_weights(w13=interleaved),
    "the end of the first k left out": spoil_weights(w13=without_last_columns),
    "the end of the second k left out": spoil_weights(w2=without_last_columns),
    "no first bias": spoil_weights(b13=nothing),
    "no second bias": spoil_weights(b2=nothing),
    "outputs not weighted": lambda inputs: replace(inputs, topk_weights=torch.full_like(inputs.topk_weights, 0.25)),
    "a choice left out": lambda inputs: replace(
        inputs, topk_weights=inputs.topk_weights * (torch.arange(4) < 3)[: inputs.topk_weights.shape[1]]
    ),
    "choices of before": before,
}


@pytest.mark.parametrize("mode", [W4A16, W4A8], ids=str)
@pytest.mark.parametrize("spoil", SPOILT)
def test_a_wrong_provider_does_not_keep_it(spoil, mode):
    problem = MoeProblem("contract", "h192i320", 1, 19, 192, 320, 5, 4, mode, NVFP4, moe_contract.GPT_OSS, bias=True)
    with pytest.raises(WrongResultError):
        moe_contract.check_moe(Spoilt(SPOILT[spoil]), problem, find_device("cpu"))


def test_the_right_provider_keeps_it():
    problem = MoeProblem("contract", "h192i320", 1, 19, 192, 320, 5, 4, W4A8, NVFP4, moe_contract.GPT_OSS, bias=True)
    found = moe_contract.check_moe(Spoilt(lambda inputs: inputs), problem, find_device("cpu"))
    assert set(found) == {"uniform", "zipf", "one_hot", "balanced", "copy", "outliers", "unequal", "replaced"}
    assert all(0 < agreement.error < 0.01 and agreement.rows == 19 for agreement in found.values())
