"""The second product of a MoE layer where k is short: compiled and read. Its assembly is `grouped`'s, run in numpy in
test_grouped.py; what the whole computes is tested in test_moe.py."""

import re

import pytest
import torch

triton = pytest.importorskip("triton", reason="needs Triton")

from compiling import compile_gluon, resources  # noqa: E402

from fp4bench.formats import MXFP4  # noqa: E402
from fp4bench.kernels import grouped_short, routing  # noqa: E402
from fp4bench.kernels.experts import prepare_experts  # noqa: E402
from fp4bench.kernels.grouped_short import ShortConfig  # noqa: E402
from fp4bench.quantize import quantize  # noqa: E402


def compiled(units=4, block=8, ahead=1, two_level=True, with_bias=False):
    types = {"x": "*bf16", "out": "*fp32" if block == 8 else "*bf16", "row_scale": "*fp32", "bias": "*fp32"}
    types |= dict.fromkeys(("positions", "blocks", "words", "scales"), "*i32")
    types |= dict.fromkeys(("columns", "k", "tiles", "x_stride", "out_stride"), "i32")
    constants = {"UNITS": units, "STRIP": 7, "AHEAD": ahead, "WARPS": 4, "BLOCK": block}
    constants |= {"TWO_LEVEL": two_level, "HAS_BIAS": with_bias}
    return compile_gluon(grouped_short._short, types, constants, warps=4)


@pytest.mark.parametrize(
    ("variant", "most_registers"),
    [
        ({}, 128),  # four CTAs of four warps an SM
        ({"ahead": 2, "two_level": False}, 128),
        ({"block": 16}, 168),  # three
        ({"units": 8, "with_bias": True}, 168),
    ],
    ids=["eight", "two-ahead", "sixteen", "long"],
)
def test_the_next_tile_is_on_its_way_while_one_is_multiplied_and_nothing_is_spilled(variant, most_registers, tmp_path):
    binary = compiled(**variant)
    text = binary.asm["ptx"]
    units, ahead = variant.get("units", 4), variant.get("ahead", 1)
    weights = r"ld\.global\S*evict_first\S*\.v4\.b32"
    before, _, after = text.partition("griddepcontrol.wait")
    # Weights first, then the wait for the kernel before, then x.
    assert len(re.findall(weights, before)) == units * ahead
    assert "mma.sync" not in before
    assert text.index("griddepcontrol.wait") < text.index("griddepcontrol.launch_dependents")
    # Each loop begins with the loads of a tile; no sums meet.
    assert re.search(weights, after[: after.index("mma.sync")])
    assert len(re.findall(weights, after)) == units * (variant.get("block", 8) // 8)
    assert "st.shared" not in text
    assert "bar.sync" not in text
    registers, stack = resources(binary, tmp_path)
    assert stack == 0
    assert registers <= most_registers


@pytest.mark.parametrize("change", [{"block": 32}, {"ahead": 0}, {"strip": 1, "ahead": 2}, {"warps": 2}], ids=str)
def test_a_launch_that_cannot_be_is_refused(change):
    with pytest.raises(ValueError, match="block is 8 or 16, ahead 1 to 3 and no more than strip, warps 4 or 8"):
        ShortConfig(**change)


def test_operands_that_do_not_fit_are_refused():
    positions = torch.zeros(4, dtype=torch.int32)

    def run(k, block=8, rows=1):
        weight = prepare_experts([quantize(torch.randn(32, k), MXFP4)], 1, gated=False)
        blocks = torch.zeros(rows * routing.most_blocks(4, 1, block), 4, dtype=torch.int32)
        x = torch.zeros(4, -(-k // 64) * 64, dtype=torch.bfloat16)
        grouped_short.down(x, weight, positions, blocks, torch.zeros(4, 32), config=ShortConfig(block))

    with pytest.raises(ValueError, match="x of 578 columns and 8 rows takes more than 64 registers"):
        run(578)
    with pytest.raises(ValueError, match="more than 64 registers"):
        run(258, block=16)
    with pytest.raises(ValueError, match="up to 1 blocks of 8"):
        run(64, rows=2)
    assert [grouped_short.fits(k, 16) for k in (1, 256, 257)] == [True, True, False]
