"""What compute-sanitizer is shown can run; and where it and a GPU are there, it sees nothing but what was planted."""

import os
import runpy
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")

from fp4bench.devices import Device
from fp4bench.kernels import decode, gemm, moe, prefill
from fp4bench.kernels.decode import DecodeConfig
from fp4bench.providers.triton_moe import why_not_moe

SCRIPT = Path(__file__).with_name("sanitize.py")
SHOWN = runpy.run_path(str(SCRIPT))
H200 = Device("cpu", "NVIDIA H200", (9, 0), 132, 60 << 20)
OPERANDS = {"bf16": torch.bfloat16, "e4m3": torch.float8_e4m3fn}


@pytest.mark.parametrize(
    "product", SHOWN["DECODES"] + SHOWN["PREFILLS"], ids=lambda p: f"{p.mode}-{p.format}-{p.m}-{p.n}-{p.k}"
)
def test_each_product_is_one_that_its_launch_computes(product):
    weight = product.weight(H200)
    assert weight.rest is None  # a weight in parts has a launch of its own
    if isinstance(product.launch, DecodeConfig):
        assert decode.fits(product.m, weight)
        x, out = (torch.empty(product.m, columns, dtype=torch.bfloat16) for columns in (product.k, product.n))
        constants = decode._launch(x, weight, out, product.launch, 1.0, None, False)[2]
        assert (constants["SLOTS"] > 0) == (product.launch.slots > 0)
    else:
        operand = OPERANDS[gemm.operand_of(product.mode, product.format, product.m, H200)]
        assert prefill.why_not(product.m, weight, operand, product.launch) is None
        prefill.workspace_bytes(product.m, weight, operand, product.launch, H200.sm_count)


@pytest.mark.parametrize("problem", SHOWN["EXPERTS"], ids=str)
def test_each_layer_is_one_that_the_kernels_compute(problem):
    assert why_not_moe(problem, "3.6.0", "3.6.") is None


def test_layers_have_blocks_of_every_width():
    def config(problem):
        fp8 = problem.mode.name == "w4a8"
        return moe.default_config(problem.m, problem.topk, problem.experts, problem.intermediate, fp8=fp8)

    assert {config(problem).block for problem in SHOWN["EXPERTS"]} >= {8, 16, 32, 64, 128}
    assert {type(config(problem).second).__name__ for problem in SHOWN["EXPERTS"]} == {
        "GroupedConfig",
        "ShortConfig",
        "PrefillConfig",
    }


def refusal(part, monkeypatch, capsys):
    """What the script says of a part that it refuses."""
    monkeypatch.setattr(sys, "argv", [str(SCRIPT), part])
    with pytest.raises(SystemExit) as refused:
        SHOWN["main"]()
    assert refused.value.code == 2
    return capsys.readouterr().err


def test_without_its_own_allocations_the_script_refuses(monkeypatch, capsys):
    monkeypatch.delenv(SHOWN["CACHING"], raising=False)
    assert "reads beyond one are not seen" in refusal("decode", monkeypatch, capsys)


def test_a_part_that_there_is_not_is_refused(monkeypatch, capsys):
    monkeypatch.setenv(SHOWN["CACHING"], "1")
    assert "nothing begins with quantise" in refusal("quantise", monkeypatch, capsys)


def sanitized(*arguments, tool="memcheck"):
    sanitizer = shutil.which("compute-sanitizer") or "/usr/local/cuda/bin/compute-sanitizer"
    if not Path(sanitizer).exists():
        pytest.skip("needs compute-sanitizer of the CUDA toolkit")
    command = [sanitizer, "--tool", tool, "--target-processes", "application-only", "--error-exitcode", "9"]
    environment = os.environ | {SHOWN["CACHING"]: "1"}
    return subprocess.run([*command, sys.executable, SCRIPT, *arguments], env=environment, capture_output=True, text=True)


@pytest.mark.gpu
def test_a_planted_read_out_of_bounds_is_seen():
    done = sanitized("--planted")
    assert done.returncode != 0
    assert "Invalid __global__ read" in done.stdout


@pytest.mark.gpu
@pytest.mark.parametrize("part", ["decode", "prefill", "experts", *(f"quantize-{m}x{k}" for m, k in SHOWN["MATRICES"])])
def test_nothing_is_read_out_of_bounds(part):
    done = sanitized(part)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    assert "ERROR SUMMARY: 0 errors" in done.stdout
