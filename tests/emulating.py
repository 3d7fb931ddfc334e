"""Tests of kernels that run on a GPU where there is one, and anywhere from their PTX."""

import pytest
import torch
import triton
from ptx_machine import Emulated

SMS = 4  # of the GPU that there would be

_FROM_PTX = (
    pytest.mark.skipif(not triton.__version__.startswith("3.6."), reason="for the PTX of Triton 3.6"),
    pytest.mark.skipif(torch.cuda.is_available(), reason="the GPU itself runs it"),
)


def devices(*kernels, counting=()):
    """A fixture: "cuda", or "cpu", where `kernels` run from their PTX (`ptx_machine`).

    kernels: module, name in it, and which arguments may be read before `griddepcontrol.wait`. counting: modules whose
    `count_sms` asks the GPU.
    """

    @pytest.fixture(params=[pytest.param("cuda", marks=pytest.mark.gpu), pytest.param("cpu", marks=_FROM_PTX, id="ptx")])
    def device(request, monkeypatch):
        if request.param == "cpu":
            for module, name, early in kernels:
                monkeypatch.setattr(module, name, Emulated(getattr(module, name), early=early))
            for module in counting:
                monkeypatch.setattr(module, "count_sms", lambda device: SMS)
        return request.param

    return device
