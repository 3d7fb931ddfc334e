"""Tests marked `gpu` are skipped where there is no GPU, and those marked `triton_3_6` with another Triton; one run of a project
is accepted for all tests that need one.
"""

import os

import pytest

# Triton 3.9 warns where it is not set, and warnings are errors here; our kernels state what they need.
os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")


def pytest_collection_modifyitems(items):
    import torch  # here, so that `pytest --help`, which two tests read, takes 0.5 s and not 2

    missing = {}
    if not torch.cuda.is_available():
        missing["gpu"] = "needs a CUDA GPU"
    if not _triton_version().startswith("3.6."):
        missing["triton_3_6"] = "needs Triton 3.6"
    for item in items:
        for name, reason in missing.items():
            if item.get_closest_marker(name):
                item.add_marker(pytest.mark.skip(reason=reason))


def _triton_version():
    try:
        import triton
    except ImportError:
        return ""
    return triton.__version__


@pytest.fixture(scope="session")
def first(tmp_path_factory):
    """A project whose first run was stored, and how that session ended."""
    from project import COMPARE, Project

    project = Project.create(tmp_path_factory.mktemp("first") / "project")
    return project, project.run(*COMPARE, "--benchmark-save=first", "--benchmark-save-data", "--benchmark-json=out/all.json")


@pytest.fixture(scope="session")
def accepted(first):
    """The project with its first run accepted."""
    project, _ = first
    return project, project.accept(project.runs / "0001_first.json")
