"""Tests of kernels that run from their PTX where there is no GPU."""

import pytest
import torch
from ptx_machine import Emulated

SMS = 4  # of the GPU that there would be


def from_ptx(test):
    """A mark: kernels run from the PTX that Triton 3.6 makes of them, where no GPU runs them."""
    for mark in _FROM_PTX:
        test = mark(test)
    return test


_FROM_PTX = (
    pytest.mark.triton_3_6,
    pytest.mark.skipif(torch.cuda.is_available(), reason="the GPU itself runs it"),
)


def emulate(monkeypatch, *kernels, counting=()):
    """Kernels run from their PTX (`ptx_machine`) until the test ends.

    kernels: module, name in it, and which arguments may be read before `griddepcontrol.wait`. counting: modules whose
    `count_sms` asks the GPU.
    """
    for module, name, early in kernels:
        monkeypatch.setattr(module, name, Emulated(getattr(module, name), early=early))
    for module in counting:
        monkeypatch.setattr(module, "count_sms", lambda device: SMS)


def devices(*kernels):
    """A fixture: "cuda", or "cpu", where `kernels` run from their PTX."""

    @pytest.fixture(params=[pytest.param("cuda", marks=pytest.mark.gpu), pytest.param("cpu", marks=_FROM_PTX, id="ptx")])
    def device(request, monkeypatch):
        if request.param == "cpu":
            emulate(monkeypatch, *kernels)
        return request.param

    return device
