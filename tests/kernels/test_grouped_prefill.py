"""The products of a MoE layer for many tokens an expert: compiled and read; what they compute is tested in test_moe.py."""

import re

import pytest
import torch

pytest.importorskip("triton", reason="needs Triton")

from compiling import compile_gluon, resources

from fp4bench.formats import MXFP4, NVFP4
from fp4bench.kernels import grouped_prefill, moe, prefill, routing
from fp4bench.kernels.experts import prepare_experts
from fp4bench.kernels.prefill_launch import PrefillConfig
from fp4bench.models import SILU
from fp4bench.quantize import quantize


def compiled(form, fmt, config, activation):
    """The kernel as it is compiled for sm_90a."""
    tiles, units = config.rows // 16, config.depth // 64
    per_unit = 16 if fmt.has_tensor_scale else 8
    dtype, element = {"bf16": (torch.bfloat16, "bf16"), "e4m3": (torch.float8_e4m3fn, "fp8e4nv")}[form]
    types = {
        "x_tiles": described(element, dtype, [min(config.columns, grouped_prefill._BOX), config.depth], 128),
        "words": described("i32", torch.int32, [tiles, 128 * units], 0),
        "scales": described("i32", torch.int32, [tiles, per_unit * units], 0),
        "out": "*bf16",
        **dict.fromkeys(("row_scale", "x_scale", "bias"), "*fp32"),
        **dict.fromkeys(("positions", "blocks"), "*i32"),
        **dict.fromkeys(("columns", "tiles", "n_tiles", "steps", "out_stride"), "i32"),
        **dict.fromkeys(("alpha", "limit"), "fp32"),
    }
    constants = {
        "REPEATS": config.rows // (64 * config.warpgroups),
        "WARPGROUPS": config.warpgroups,
        "COLUMNS": config.columns,
        "UNITS": units,
        "STAGES": config.stages,
        "FORM": form,
        "TWO_LEVEL": fmt.has_tensor_scale,
        "HAS_X_SCALE": form == "e4m3",
        "HAS_BIAS": True,
        "ACTIVATION": activation,
        "WHOLE": True,
        "REGISTERS": config.consumer_registers,
    }
    return compile_gluon(grouped_prefill._kernel, types, constants, warps=4, maxnreg=config.registers)


def described(element, dtype, block, swizzle):
    layout = prefill.descriptor(torch.empty(8, 4096, dtype=dtype), block, swizzle).layout
    return f"tensordesc<{element}{block},{layout!r}>"


@pytest.mark.triton_3_6
@pytest.mark.parametrize(
    ("form", "fmt", "activation", "config"),
    [
        ("bf16", NVFP4, "silu", moe.default_config(1024, 8, 256, 2048).first),
        ("e4m3", MXFP4, "", moe.default_config(4096, 8, 256, 2048, fp8=True).second),
    ],
    ids=["gate_up", "down"],
)
def test_it_compiles_to_wgmma_of_each_width_with_weights_in_registers(form, fmt, activation, config, tmp_path):
    binary = compiled(form, fmt, config, activation)
    depth = "k16" if form == "bf16" else "k32"
    products = re.findall(
        rf"wgmma\.mma_async\.sync\.aligned\.m64n(\d+){depth}\.f32\.{form}\.{form} \{{[^}}]*\}}, (.)", binary.asm["ptx"]
    )
    # For blocks of up to 16, 32, 64 pairs; the left operand is a list of registers, not a descriptor.
    assert set(products) == {(width, "{") for width in ("16", "32", "64", "128") if int(width) <= config.columns}
    assert "cp.async.bulk.tensor" in binary.asm["ptx"]
    # Rows of 7168 and 2048 columns are stored 16 bytes at a time: 2 bytes at a time took most of a product of k = 256.
    assert set(re.findall(r"st\.global\S*", binary.asm["ptx"])) == {"st.global.v4.b32"}
    assert binary.metadata.shared <= 227 * 1024
    _, stack = resources(binary, tmp_path)
    assert stack == 0


def test_operands_that_do_not_fit_are_refused():
    weight = prepare_experts([quantize(torch.randn(32, 64), MXFP4)], 1, gated=True)
    e4m3 = prepare_experts([quantize(torch.randn(32, 64), MXFP4)], 1, gated=True, operand=torch.float8_e4m3fn)
    nvfp4 = prepare_experts([quantize(torch.randn(32, 64), NVFP4)], 1, gated=True)
    config = PrefillConfig(columns=64)
    positions = torch.zeros(4, dtype=torch.int32)
    blocks = torch.zeros(routing.most_blocks(4, 1, 64), 4, dtype=torch.int32)
    x = torch.zeros(4, 64, dtype=torch.bfloat16)
    fp8 = x.to(torch.float8_e4m3fn)

    def call(x=x, weight=weight, blocks=blocks, out=x, activation=SILU, config=config):
        grouped_prefill.product(x, weight, positions, blocks, out, activation=activation, config=config)

    for change, why in (
        ({"x": x.float()}, "x is bfloat16 or float8"),
        ({"x": fp8}, "not for torch.float8_e4m3fn"),
        ({"x": fp8, "weight": nvfp4}, "not for torch.float8_e4m3fn"),
        ({"weight": e4m3}, "not for torch.bfloat16"),
        ({"config": PrefillConfig(columns=64, along_k=True)}, "shared k"),
        ({"x": fp8, "weight": e4m3}, "128 bytes"),
        ({"config": PrefillConfig(columns=64, stages=20)}, "shared memory"),
        ({"config": PrefillConfig(columns=256)}, "16, 32, 64 or 128 pairs"),
        ({"activation": None}, "does not fit weights"),
        ({"x": x[:3]}, "does not fit weights"),
        ({"out": x[:, :16]}, "is not for 4 x 16"),
        ({"blocks": blocks[:0]}, "up to 1 blocks of 64"),
    ):
        with pytest.raises(ValueError, match=why):
            call(**change)
