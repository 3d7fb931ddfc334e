"""Every provider's GEMMs keep the contract, on the device that is here; what a provider refuses is skipped by its own words."""

from dataclasses import replace

import gemm_contract
import pytest
import torch

from fp4bench.checking import WrongResultError
from fp4bench.devices import find_device
from fp4bench.formats import MXFP4
from fp4bench.problems import W4A16, GemmProblem
from fp4bench.providers import providers, why_not
from fp4bench.providers.eager import EagerProvider
from fp4bench.quantize import dequantize, quantize

# On a CPU only the eager provider runs FP4, and its own tests are wider.
_BATCHES = gemm_contract.BATCHES if torch.cuda.is_available() else (3,)
_LAYERS = gemm_contract.LAYERS if torch.cuda.is_available() else ((64, 128), (51, 205))


def _kinds():
    """Problems that differ in m alone share a layout, and what is compiled for it."""
    return [
        pytest.param(provider, problem, id=f"{provider.name}-{problem}")
        for provider in providers().values()
        for problem in gemm_contract.problems(provider, dict.fromkeys((*_LAYERS, *gemm_contract.EDGES.get(provider.name, ()))))
    ]


@pytest.mark.parametrize(("provider", "problem"), _kinds())
def test_gemms_keep_the_contract(provider, problem):
    device = find_device()
    if reason := why_not(provider, problem, device):
        pytest.skip(reason)
    for m in _BATCHES:
        gemm_contract.check_gemm(provider, replace(problem, m=m), device)


def test_every_provider_has_its_edges():
    assert set(providers()) == set(gemm_contract.EDGES) | {"vllm_triton"}
    assert "gemm" not in providers()["vllm_triton"].ops


class Spoilt(EagerProvider):
    """Decodes its weights, spoils them, and multiplies."""

    def __init__(self, spoil):
        self.spoil = spoil

    def prepare(self, problem, inputs):
        w = self.spoil(dequantize(quantize(inputs.w, problem.format)))
        return lambda: (inputs.x.float() @ w.T).bfloat16()


SPOILT = {
    "sign of one weight": lambda w: torch.where(torch.arange(w.shape[1]) == 7, -w, w),
    "neighbours swapped": lambda w: w.unflatten(1, (-1, 2)).flip(2).flatten(1),
    "scales of two rows swapped": lambda w: torch.cat((w[1:2] * 2, w[:1] / 2, w[2:])),
    "alpha": lambda w: w * 1.02,
}


@pytest.mark.parametrize("spoil", SPOILT)
def test_a_wrong_provider_does_not_keep_it(spoil):
    problem = GemmProblem("contract", "n64k128", 1, 16, 64, 128, W4A16, MXFP4)
    gemm_contract.check_gemm(Spoilt(lambda w: w), problem, find_device("cpu"))
    with pytest.raises(WrongResultError):
        gemm_contract.check_gemm(Spoilt(SPOILT[spoil]), problem, find_device("cpu"))
