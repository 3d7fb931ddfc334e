"""Quantization of activations by every selected format, rule, rotation and provider: checked, then timed."""

import pytest


@pytest.mark.cases("quantize")
def test_quantize(case, bench):
    bench(case)
