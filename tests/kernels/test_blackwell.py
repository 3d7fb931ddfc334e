"""Both operands FP4: interpreted against the reference, compiled for GPUs that have FP4 tensor cores, and not run on one."""

import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from fp4bench.formats import FORMATS, MXFP4, NVFP4, ScaleRule
from fp4bench.quantize import quantize

triton = pytest.importorskip("triton", reason="needs Triton")

from fp4bench.kernels import blackwell  # noqa: E402
from fp4bench.kernels.blackwell import BlackwellConfig, blocked, default_config, gemm  # noqa: E402

# What the tensor core computes, and with which scales.
MMA = {
    (100, "mxfp4"): r"tcgen05\.mma\.cta_group::1\.kind::mxf4\.block_scale\.(scale_vec::2X|block32)",  # Triton 3.6, 3.9
    (100, "nvfp4"): r"tcgen05\.mma\.cta_group::1\.kind::mxf4nvf4\.block_scale\.(scale_vec::4X|block16)",
    (120, "mxfp4"): r"mma\.sync\.\S+\.kind::mxf4nvf4\.block_scale\.scale_vec::2X\.f32\.e2m1\.e2m1\.f32\.ue8m0",
    (120, "nvfp4"): r"mma\.sync\.\S+\.kind::mxf4nvf4\.block_scale\.scale_vec::4X\.f32\.e2m1\.e2m1\.f32\.ue4m3",
}
SHARED_BYTES = {100: 227 << 10, 120: 99 << 10}  # that one block may have


def test_interpreted_it_is_the_reference():
    environment = os.environ | {"TRITON_INTERPRET": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    script = Path(__file__).with_name("interpret_blackwell.py")
    done = subprocess.run([sys.executable, script], env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr


def compiled(config, fmt, capability):
    """The kernel of a configuration for a GPU that need not be there."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    scale, columns = ("fp8e4nv" if fmt.has_tensor_scale else "u8"), config.k // fmt.block_size // 4
    types = {
        "x": f"tensordesc<u8[{config.rows}, {config.k // 2}]>",
        "x_scales": f"tensordesc<{scale}[1, {config.rows // 128}, {columns}, 2, 256]>",
        "w": f"tensordesc<u8[{config.columns}, {config.k // 2}]>",
        "w_scales": f"tensordesc<{scale}[1, {config.columns // 128}, {columns}, 2, 256]>",
        **{"out": "*bf16", "bias": "*bf16", "x_tensor_scale": "*fp32", "w_tensor_scale": "*fp32"},
        **{"m": "i32", "n": "i32", "steps": "i32", "alpha": "fp32"},
    }
    constants = {"ROWS": config.rows, "COLUMNS": config.columns, "K": config.k, "BLOCK": fmt.block_size}
    constants |= {"TENSOR_SCALES": fmt.has_tensor_scale, "HAS_BIAS": True, "STAGES": config.stages}
    source = ASTSource(blackwell._gemm, types | dict.fromkeys(constants, "constexpr"), constants)
    return triton.compile(source, target=GPUTarget("cuda", capability, 32), options={"num_warps": config.warps})


@pytest.mark.parametrize("fmt", FORMATS.values(), ids=str)
@pytest.mark.parametrize("capability", [100, 120])
def test_the_shipped_tiles_compile_to_block_scaled_mma(capability, fmt, monkeypatch):
    monkeypatch.setenv("TRITON_DEFAULT_FP_FUSION", "1")  # Triton 3.9 warns of a default that this does not depend on
    kernel = compiled(default_config(1024, 4096, (capability // 10, 0)), fmt, capability)
    ptx = kernel.asm["ptx"]
    assert f".target sm_{capability}a" in ptx
    assert re.search(MMA[capability, str(fmt)], ptx)
    assert "cp.async.bulk.tensor" in ptx
    # Scales go to tensor memory by the tensor core's own copy; those of NVFP4 too, since they come as E4M3 and not as bytes.
    assert ("tcgen05.cp" in ptx) == (capability == 100)
    assert kernel.metadata.shared <= SHARED_BYTES[capability]
    assert spilled(kernel, capability) == 0


def spilled(kernel, capability):
    """Bytes of registers that ptxas put into local memory."""
    import tempfile

    from triton import knobs

    with tempfile.NamedTemporaryFile(suffix=".ptx", mode="w") as file:
        file.write(kernel.asm["ptx"])
        file.flush()
        ptxas = knobs.nvidia.ptxas_blackwell if capability >= 100 else knobs.nvidia.ptxas
        command = [ptxas.path, "-v", f"--gpu-name=sm_{capability}a", file.name, "-o", os.devnull]
        told = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    return sum(map(int, re.findall(r"(\d+) bytes spill", told)))


@pytest.mark.parametrize("sizes", [(64, 128, 256), (128, 128, 64), (384, 128, 128)])
def test_a_tile_that_the_layout_of_scales_does_not_allow_is_refused(sizes):
    with pytest.raises(ValueError, match="rows, columns and k are powers of two from 128 on"):
        BlackwellConfig(*sizes)


def test_operands_are_what_tma_and_tensor_cores_can_read():
    w = blocked(quantize(torch.randn(2, 64), MXFP4))
    for x, message in (
        (blocked(quantize(torch.randn(2, 48), NVFP4)), "TMA reads rows of whole 16 bytes, not 24: pad k to a multiple of 32"),
        (replace(w, scales=w.scales[:4]), r"scales of shape \(4,\) are not those of 2 rows, blocked"),
        (replace(w, rule=ScaleRule.QUTLASS_ABS_MAX), "codes by the rule qutlass_abs_max are 3 times too large"),
    ):
        for operands in ((x, w), (w, x)):
            with pytest.raises(ValueError, match=message):
                gemm(*operands, torch.empty(2, 2), config=BlackwellConfig())


def test_operands_that_do_not_fit_together_are_refused():
    x, w = blocked(quantize(torch.randn(2, 64), MXFP4)), blocked(quantize(torch.randn(3, 64), MXFP4))
    for other, out in (
        (blocked(quantize(torch.randn(3, 96), MXFP4)), (2, 3)),
        (blocked(quantize(torch.randn(3, 64), NVFP4)), (2, 3)),
        (w, (3, 2)),
    ):
        with pytest.raises(ValueError, match="do not fit together"):
            gemm(x, other, torch.empty(out), config=BlackwellConfig())
