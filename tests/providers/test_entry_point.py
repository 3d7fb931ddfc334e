"""The example provider, the one that README shows, installed as a package of its own and found by its entry point."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLE = Path(__file__).parents[1] / "example_provider"

USE = """
from fp4bench.checking import check
from fp4bench.devices import find_device
from fp4bench.formats import MXFP4
from fp4bench.problems import W4A16, GemmProblem
from fp4bench.providers import providers

example = providers()["example"]
for m, n, k in [(1, 33, 100), (129, 64, 256)]:
    problem = GemmProblem("tiny", "fc", 1, m, n, k, W4A16, MXFP4)
    assert example.why_not(problem, find_device("cpu")) is None
    inputs = problem.inputs()
    agreement = check(problem, inputs, example.rules["mxfp4"][0], example.prepare(problem, inputs)())
    print(problem.case_id(example.name), agreement.rows)
"""


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    """A folder that holds the installed example and nothing else. Built from a copy: setuptools leaves a build folder."""
    folder = tmp_path_factory.mktemp("example")
    shutil.copytree(EXAMPLE, folder / "source", ignore=shutil.ignore_patterns("__pycache__", "build", "*.egg-info"))
    offline = ["--no-index", "--no-deps", "--no-build-isolation", "--no-cache-dir", "--disable-pip-version-check"]
    run(["-m", "pip", "install", "--quiet", *offline, "--target", folder / "site", folder / "source"])
    return folder / "site"


def run(arguments, **environment):
    done = subprocess.run(
        [sys.executable, *map(str, arguments)], env=os.environ | environment, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_an_installed_provider_is_found_and_right(installed):
    assert run(["-c", USE], PYTHONPATH=str(installed)).splitlines() == [
        "gemm-mxfp4-w4a16-example-tiny.fc.tp1-m1 1",
        "gemm-mxfp4-w4a16-example-tiny.fc.tp1-m129 129",
    ]


def test_the_example_is_short():
    lines = (EXAMPLE / "example_provider.py").read_text(encoding="utf-8").splitlines()
    assert len([line for line in lines if line.strip()]) <= 15
