"""The products of a MoE layer for few tokens an expert: compiled and read. Their assembly is that of test_decode.py, which runs
it in numpy; what they compute is tested on a GPU only, in test_moe.py."""

import re

import pytest
import torch

triton = pytest.importorskip("triton", reason="needs Triton")

from compiling import compile_gluon, resources  # noqa: E402

from fp4bench.formats import MXFP4  # noqa: E402
from fp4bench.kernels import grouped, routing  # noqa: E402
from fp4bench.kernels.experts import prepare_experts  # noqa: E402
from fp4bench.kernels.grouped import GroupedConfig  # noqa: E402
from fp4bench.models import SILU, Activation  # noqa: E402
from fp4bench.quantize import quantize  # noqa: E402


def compiled(k=7168, block=8, two_level=True, tiles=4, warps=4, activation="silu", **constants):
    units = -(-k // 64)
    types = {"x": "*bf16", "out": "*bf16" if activation else "*fp32", "row_scale": "*fp32", "bias": "*fp32"}
    types |= dict.fromkeys(("positions", "blocks", "words", "scales"), "*i32")
    types |= dict.fromkeys(("columns", "k", "tiles", "topk", "x_stride", "out_stride"), "i32")
    types |= {"alpha": "fp32", "limit": "fp32"}
    constants = {
        **{"UNITS": units, "STEPS": -(-units // warps), "TILES": tiles, "WARPS": warps, "BLOCK": block},
        **{"TWO_LEVEL": two_level, "HAS_BIAS": False, "ACTIVATION": activation, "ALL_COLUMNS": k % 64 == 0},
        **{"EXCHANGE": True, "AHEAD": False},
        **constants,
    }
    return compile_gluon(grouped._grouped, types, constants, warps=warps)


@pytest.mark.parametrize(
    ("variant", "most_registers"),
    [
        ({}, 84),  # six CTAs of four warps an SM
        ({"activation": "", "k": 2048}, 84),
        ({"block": 16}, 128),
        ({"two_level": False, "activation": "swiglu", "HAS_BIAS": True, "k": 2880}, 84),
    ],
    ids=["gate_up", "down", "sixteen", "gpt-oss"],
)
def test_it_compiles_to_mma_on_16_byte_loads_without_spills(variant, most_registers, tmp_path):
    binary = compiled(**variant)
    text = binary.asm["ptx"]
    assert "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32" in text
    weights = r"ld\.global\S*evict_first\S*\.v4\.b32"
    # Of each block of up to 8 and of up to 16 pairs: a unit of each of four tiles for each step of the loop.
    assert len(re.findall(weights, text)) == (4 * 3 if variant.get("block") == 16 else 4 * 2)
    before, _, after = text.partition("griddepcontrol.wait")
    if variant.get("activation") == "":
        # Weights first, then the wait for the kernel before, then x.
        assert len(re.findall(weights, before)) == 4
        assert "mma.sync" not in before
    else:
        # The blocks are of the kernel before, and with them which weights.
        assert "ld.global" not in before
    # No kernel after this one starts before this one may read what the kernel before wrote.
    assert text.index("griddepcontrol.wait") < text.index("griddepcontrol.launch_dependents")
    # No shared memory before the sums meet.
    assert "st.shared" not in after[: after.index("mma.sync")]
    registers, stack = resources(binary, tmp_path)
    assert stack == 0
    assert registers <= most_registers


@pytest.mark.parametrize("change", [{"block": 4}, {"tiles": 0}, {"tiles": 9}, {"warps": 2}, {"warps": 16}], ids=str)
def test_a_launch_that_cannot_be_is_refused(change):
    with pytest.raises(ValueError, match="block is 8 or 16, tiles is 1 to 8, warps 4 or 8"):
        GroupedConfig(**change)


def test_operands_that_do_not_fit_are_refused():
    weight = prepare_experts([quantize(torch.randn(32, 66), MXFP4)], 1, gated=True)
    plain = prepare_experts([quantize(torch.randn(66, 16), MXFP4)], 1, gated=False)
    positions = torch.zeros(4, dtype=torch.int32)
    blocks = torch.zeros(routing.most_blocks(4, 1, 8), 4, dtype=torch.int32)
    x, hidden = torch.zeros(4, 66, dtype=torch.bfloat16), torch.zeros(4, 64, dtype=torch.bfloat16)
    out = torch.zeros(4, 66)

    def first(x=x, weight=weight, out=hidden, blocks=blocks, bias=None, activation=SILU):
        options = {"topk": 1, "activation": activation, "config": GroupedConfig(), "bias": bias}
        grouped.gate_up(x, weight, positions, blocks, out, **options)

    def second(x=hidden, weight=plain, out=out):
        grouped.down(x, weight, positions, blocks, out, config=GroupedConfig())

    for call, why in (
        (lambda: first(weight=plain), "do not fit gated weights"),
        (lambda: first(x=x[:, :64]), "do not fit gated weights"),
        (lambda: first(out=hidden[:, :16]), "do not fit gated weights"),
        (lambda: first(x=torch.zeros(4, 67, dtype=torch.bfloat16)[:, :66]), "contiguous pairs"),
        (lambda: first(blocks=blocks[:0]), "up to 1 blocks of 8"),
        (lambda: first(activation=Activation("gelu")), "no activation gelu"),
        (lambda: first(bias=torch.zeros(1, 16)), "bias is float32"),
        (lambda: second(weight=weight), "do not fit weights"),
        (lambda: second(x=hidden[:, :16]), "do not fit weights"),
        (lambda: second(out=torch.zeros(4, 132)[:, ::2]), "contiguous"),
    ):
        with pytest.raises(ValueError, match=why):
            call()
