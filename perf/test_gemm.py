"""GEMM of every selected layer, batch size, mode, format, rotation and provider: checked, then timed."""

import pytest


@pytest.mark.cases("gemm")
def test_gemm(case, bench):
    bench(case)
