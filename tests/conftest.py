"""Tests marked `gpu` are skipped where there is no GPU."""

import os

import pytest
import torch

# Triton 3.9 warns where it is not set, and warnings are errors here; our kernels state what they need.
os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")


def pytest_collection_modifyitems(items):
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="needs a CUDA GPU"))
