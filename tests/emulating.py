"""Tests of kernels that run on a GPU where there is one, and anywhere from their PTX."""

import pytest
import triton
from ptx_machine import Emulated


def devices(*kernels):
    """A fixture: "cuda", or "cpu", where `kernels` run from their PTX (`ptx_machine`).

    kernels: module, name in it, and which arguments may be read before `griddepcontrol.wait`.
    """
    written_for_3_6 = pytest.mark.skipif(not triton.__version__.startswith("3.6."), reason="for the PTX of Triton 3.6")

    @pytest.fixture(params=[pytest.param("cuda", marks=pytest.mark.gpu), pytest.param("cpu", marks=written_for_3_6, id="ptx")])
    def device(request, monkeypatch):
        if request.param == "cpu":
            for module, name, early in kernels:
                monkeypatch.setattr(module, name, Emulated(getattr(module, name), early=early))
        return request.param

    return device
