"""The fused quantizer: interpreted against the eager truth, compiled for GPUs, and run on one if there is one."""

import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from subprocess import PIPE

import pytest
import torch

from fp4bench import quantize as eager
from fp4bench.formats import FORMATS, MXFP4, NVFP4, ScaleRule, layouts

triton = pytest.importorskip("triton", reason="needs Triton")

from compiling import compile_triton  # noqa: E402

from fp4bench.kernels import fp4_tiles, fp8_rows  # noqa: E402
from fp4bench.kernels import quantize as fused  # noqa: E402

RULES = [(fmt, rule) for fmt in FORMATS.values() for rule in fmt.rules if rule in fused.RULES]


def test_interpreted_it_has_the_bits_of_the_eager_truth():
    environment = os.environ | {"TRITON_INTERPRET": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    environment["OMP_NUM_THREADS"] = "1"  # two threads in each of two processes wait for each other on 2 cores: 23 s, not 17
    script = Path(__file__).with_name("interpret_quantize.py")
    halves = [subprocess.Popen([sys.executable, script, half], env=environment, stderr=PIPE, text=True) for half in "01"]
    errors = [half.communicate(timeout=300)[1] for half in halves]  # side by side: one after the other they took 33 s of CI
    assert [half.returncode for half in halves] == [0, 0], "\n".join(errors)


# --- Compiled ---------------------------------------------------------------------------------------------------------------


def compiled(kernel, types, constants, warps, capability):
    """A kernel for a GPU that need not be there, with arguments that are multiples of 16 as those of real layers are."""
    aligned = [name for name in types if types[name].startswith("*") or name in ("k", "stride", "k_padded", "k_out")]
    options = {"capability": capability, "enable_fp_fusion": False}
    return compile_triton(kernel, types, constants, aligned, warps=warps, **options).asm["ptx"]


def tiles(hadamard, capability, fmt=MXFP4, pdl=False):
    tile = fused.launch(4096, 8192, max(32, hadamard))
    types = {"x": "*bf16", "values": "*i32", "scales": "*u8"}
    types |= dict.fromkeys(("parts", "m", "k", "stride", "k_padded", "scale_rows", "scale_columns", "tiles_across"), "i32")
    given = "number" if fmt.has_tensor_scale else "none"
    constants = {"ROWS": tile.rows, "RUNS": tile.runs, "RUN": tile.run, "WIDTH": 8, "WHOLE": True, "BLOCK": fmt.block_size}
    constants |= {"RULE": fmt.default_rule.value, "HADAMARD": hadamard, "GIVEN": given, "BLOCKED": False, "IMAGE": False}
    constants |= {"HAS_CVT": capability >= 100, "PDL": pdl}
    if fmt.has_tensor_scale:
        types |= {"tensor_scale": "*fp32", "source": "fp32"}
    else:
        constants |= {"tensor_scale": None, "source": None}
    return compiled(fp4_tiles.quantize_tiles, types, constants, tile.warps, capability)


def rows(how, pdl=False):
    types = {"x": "*bf16", "values": "*fp8e4nv", "scales": "*fp32", "k": "i32", "stride": "i32", "k_out": "i32"}
    constants = {"RUNS": how.runs, "READ_RUNS": how.read_runs, "RUN": how.run, "ONCE": not how.read_runs, "PDL": pdl}
    constants |= {"WIDTH": 8, "WHOLE": True, "BLOCK": 32, "RULE": "floor", "HADAMARD": 1, "FP4": False, "COLUMNS": "fragments"}
    return compiled(fp8_rows.quantize_row, types, constants, how.warps, 90)


def spilled(ptx, capability):
    """Bytes of registers that ptxas put into local memory."""
    from triton import knobs

    with tempfile.NamedTemporaryFile(suffix=".ptx", mode="w") as file:
        file.write(ptx)
        file.flush()
        ptxas = knobs.nvidia.ptxas_blackwell  # the newer of two: it takes what Triton writes, also for older GPUs
        command = [ptxas.path, "-v", f"--gpu-name=sm_{capability}a", file.name, "-o", os.devnull]
        told = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    return sum(map(int, re.findall(r"(\d+) bytes spill", told)))


@pytest.mark.parametrize(("hadamard", "capability"), [(1, 90), (64, 90), (128, 90), (64, 100), (64, 120)])
def test_a_run_stays_in_the_registers_of_its_thread(hadamard, capability, monkeypatch):
    monkeypatch.setenv("TRITON_DEFAULT_FP_FUSION", "1")  # Triton 3.9 warns of a default that is not used
    ptx = tiles(hadamard, capability)
    # Each load is one of 16 bytes, and all of a run's are there; nothing goes from thread to thread before the codes do.
    assert ptx.count("ld.global") == ptx.count("ld.global.v4") == max(32, hadamard) * 2 // 16
    assert "shfl" not in ptx
    assert "st.shared" not in ptx[: ptx.rindex("ld.global")]
    assert ("cvt.rn.satfinite.e2m1x2.f32" in ptx) == (capability >= 100)
    # Contracted sums and products would be fma: the written-out ones are one a code where no instruction converts.
    assert ptx.count("fma.rn.f32") == (0 if capability >= 100 else max(32, hadamard))
    assert spilled(ptx, capability) == 0


def test_nvfp4_and_rows_compile_without_spills(monkeypatch):
    monkeypatch.setenv("TRITON_DEFAULT_FP_FUSION", "1")  # Triton 3.9 warns of a default that is not used
    assert spilled(tiles(64, 90, NVFP4), 90) == 0
    for m, k, loads in ((4096, 8192, 4), (128, 8192, 2), (64, 28672, 4), (4096, 28672, 8 + 2)):
        how = fused.fp8_launch(m, k)
        ptx = rows(how)
        assert ptx.count("cvt.rn.satfinite.e4m3x2.f32") == how.run * how.runs // (64 * how.warps)
        assert ptx.count("ld.global") == ptx.count("ld.global.v4") == loads
        assert spilled(ptx, 90) == 0


@pytest.mark.parametrize("kernel", [rows, tiles])
def test_overlapped_kernels_wait_before_they_touch_memory(kernel, monkeypatch):
    monkeypatch.setenv("TRITON_DEFAULT_FP_FUSION", "1")  # Triton 3.9 warns of a default that is not used
    arguments = {"how": fused.fp8_launch(1, 8192)} if kernel is rows else {"hadamard": 1, "capability": 90}
    ptx = kernel(**arguments, pdl=True)
    release, wait = (ptx.index(f"griddepcontrol.{name}") for name in ("launch_dependents", "wait"))
    assert release < wait < ptx.index("ld.global")
    assert wait < ptx.index("st.global")
    assert ptx.count("griddepcontrol") == 2
    assert "griddepcontrol" not in kernel(**arguments)


# --- Launches and refusals --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("m", [1, 2, 64, 4096])
@pytest.mark.parametrize("k", [1, 32, 200, 8192, 28672])
@pytest.mark.parametrize("run", [32, 128])
def test_a_tile_is_whole_warps_and_no_longer_than_a_row(m, k, run):
    tile = fused.launch(m, k, run)
    assert tile.rows * tile.runs in (32, 128)
    assert tile.runs == 1 or tile.runs * run < 2 * k
    assert tile.warps * 32 == tile.rows * tile.runs


@pytest.mark.parametrize("m", [1, 128, 129, 4096])
@pytest.mark.parametrize("k", [1, 64, 4096, 8192, 28672, 40000])
@pytest.mark.parametrize("hadamard", [None, 16, 128])
def test_a_program_has_threads_for_its_runs_and_runs_for_its_row(m, k, hadamard):
    for how in (fused.fp8_launch(m, k), fused.fp4_as_e4m3_launch(m, k, hadamard)):
        assert how.read_runs or how.run * how.runs >= k
        assert how.read_runs == 0 or how.read_runs >= how.runs
        assert how.run * how.runs < max(2 * k, how.run + 1)
        assert 32 * how.warps <= max(32, max(how.runs, how.read_runs))
    assert fused.fp4_as_e4m3_launch(m, k, hadamard).run % max(32, hadamard or 1) == 0


def test_what_the_kernel_has_not_is_refused():
    x = torch.ones(2, 256)
    with pytest.raises(ValueError, match="rotates by at most 128, not 256"):
        fused.quantize(x, MXFP4, hadamard=256)
    with pytest.raises(ValueError, match=r"blocked scales are those of a matrix, not of a tensor of shape \(1, 2, 256\)"):
        fused.quantize(x[None], MXFP4, blocked=True)
    with pytest.raises(TypeError, match=r"not torch\.float64"):
        fused.quantize(x.double(), MXFP4)
    with pytest.raises(ValueError, match="mxfp4 has no scale rule two_level"):
        fused.quantize(x, MXFP4, rule=ScaleRule.TWO_LEVEL)
    for image in (lambda rule: fused.fp4_as_e4m3(x, rule=rule), lambda rule: fused.fp4_as_bf16(x, MXFP4, rule=rule)):
        with pytest.raises(ValueError, match="qutlass_abs_max are 3 times too large"):
            image(ScaleRule.QUTLASS_ABS_MAX)


# --- On a GPU ---------------------------------------------------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.parametrize("hadamard", [None, 16, 32, 64, 128], ids="had{}".format)
@pytest.mark.parametrize(("fmt", "rule"), RULES, ids=str)
@pytest.mark.parametrize("shape", [(257, 4096), (7, 1000)], ids=str)
def test_a_gpu_has_the_bits_of_the_eager_truth(shape, fmt, rule, hadamard):
    x = torch.randn(shape, generator=torch.Generator().manual_seed(1)).bfloat16().cuda()
    want = eager.quantize(x, fmt, rule=rule, hadamard=hadamard)
    got = fused.quantize(x, fmt, rule=rule, hadamard=hadamard)
    blocked = fused.quantize(x, fmt, rule=rule, hadamard=hadamard, blocked=True)
    assert torch.equal(got.codes, want.codes)
    assert torch.equal(blocked.codes, want.codes)
    assert torch.equal(got.scales.view(torch.uint8), want.scales.view(torch.uint8))
    assert torch.equal(blocked.scales.view(torch.uint8), layouts.to_blocked(want.scales).view(torch.uint8))
    assert got.tensor_scale == want.tensor_scale


@pytest.mark.gpu
@pytest.mark.parametrize("shape", [(200, 8192), (65, 8192), (40, 28672), (1, 28672), (3, 4100), (5, 40000), (9, 1000)], ids=str)
def test_a_gpu_has_the_bits_of_eager_fp8_rows(shape):
    x = torch.randn(shape, generator=torch.Generator().manual_seed(1)).bfloat16().cuda()
    want, got = eager.quantize_fp8_rows(x), fused.quantize_fp8_rows(x)
    assert torch.equal(got.scales, want.scales)
    assert torch.equal(got.values.view(torch.uint8), want.values.view(torch.uint8))
