"""The products of a MoE layer for few tokens an expert. Their assembly runs here, in numpy (`ptx`), against decoded weights;
the kernel around it is compiled and read. What the whole computes is tested in test_moe.py."""

import re

import numpy as np
import ptx
import pytest
import torch

triton = pytest.importorskip("triton", reason="needs Triton")

from compiling import compile_gluon, resources  # noqa: E402

from fp4bench.formats import MXFP4, NVFP4  # noqa: E402
from fp4bench.kernels import grouped, routing  # noqa: E402
from fp4bench.kernels.experts import prepare_experts  # noqa: E402
from fp4bench.kernels.grouped import GroupedConfig  # noqa: E402
from fp4bench.models import SILU, Activation  # noqa: E402
from fp4bench.quantize import decode, quantize  # noqa: E402

# --- The assembly, run in numpy ---------------------------------------------------------------------------------------------


def emulated(stack, x, dtype):
    """x W^T of the first expert without the epilogue, as a warp computes it. x (8, 16 or 32, k) -> float64 (rows, 16 tiles)."""
    columns = len(x)
    text = grouped._product(columns, stack.format.has_tensor_scale, dtype is torch.float16)
    words, scales = (tensor[0].numpy().view(np.uint32) for tensor in (stack.words, stack.scales))
    g, t = ptx.LANES // 4, ptx.LANES % 4
    out = np.zeros((columns, 16 * stack.tiles))
    for tile in range(stack.tiles):
        acc = [np.zeros(32) for _ in range(columns // 2)]
        for unit in range(stack.units):
            of_lane = scales[tile, unit][g, t // 2] if stack.format.has_tensor_scale else scales[tile, unit][g]
            # A lane's 16 bytes of 32 columns of a row of x, as they stand there.
            loaded = []
            for rows in range(0, columns, 8):
                for i in range(8):
                    column = 64 * unit + 32 * (i // 4) + 8 * t + 2 * (i % 4)
                    both = torch.stack((x[rows + g, column], x[rows + g, column + 1]), dim=-1)
                    loaded.append(ptx.registers(both, dtype))
            operands = [*acc, *(words[tile, unit, :, j] for j in range(4)), *[of_lane] * 4, *loaded, *acc]
            acc = ptx.run(text, operands)[: len(acc)]
        for i, sums in enumerate(acc):
            out[8 * (i // 4) + 2 * t + i % 2, 16 * tile + g + 8 * (i % 4 // 2)] = sums
    return out * stack.row_scale[0].double().numpy()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
@pytest.mark.parametrize("fmt", [MXFP4, NVFP4], ids=str)
@pytest.mark.parametrize("columns", [8, 16, 32])
def test_the_assembly_multiplies_exactly(columns, fmt, dtype):
    generator = torch.Generator().manual_seed(columns)
    x = torch.randn(columns, 128, generator=generator).to(dtype)
    w = torch.randn(32, 128, generator=generator) * torch.exp2(torch.randn(32, 8, generator=generator)).repeat_interleave(16, 1)
    q = quantize(w, fmt)
    stack = prepare_experts([q], 1, gated=False, operand=dtype)
    want = (x.double() @ decode(q, torch.float64).T).numpy()
    # Sums of multiples of a power of two: float64 is exact. Only 1 / S is rounded, to float32.
    np.testing.assert_allclose(emulated(stack, x, dtype), want, rtol=0 if fmt is MXFP4 else 2e-7)


# --- Compiled, not run ------------------------------------------------------------------------------------------------------


def compiled(k=7168, block=8, two_level=True, tiles=4, warps=4, activation="silu", **constants):
    units = -(-k // 64)
    types = {"x": "*bf16", "out": "*bf16" if activation else "*fp32", "row_scale": "*fp32", "bias": "*fp32"}
    types |= dict.fromkeys(("positions", "blocks", "words", "scales"), "*i32")
    types |= dict.fromkeys(("columns", "k", "tiles", "topk", "x_stride", "out_stride"), "i32")
    types |= {"alpha": "fp32", "limit": "fp32"}
    constants = {
        **{"UNITS": units, "STEPS": -(-units // warps), "TILES": tiles, "WARPS": warps, "SPLIT": warps, "BLOCK": block},
        **{"TWO_LEVEL": two_level, "HAS_BIAS": False, "ACTIVATION": activation, "ALL_COLUMNS": k % 64 == 0},
        **{"ALIGNED": True, "AHEAD": False, "DEPTH": 1},
        **constants,
    }
    return compile_gluon(grouped._grouped, types, constants, warps=warps)


@pytest.mark.parametrize(
    ("variant", "most_registers"),
    [
        ({}, 84),  # six CTAs of four warps an SM
        ({"activation": "", "k": 2048}, 84),
        ({"block": 16}, 128),
        ({"activation": "", "k": 256, "SPLIT": 1, "STEPS": 4}, 84),
        ({"two_level": False, "activation": "swiglu", "HAS_BIAS": True, "k": 2880}, 84),
        ({"warps": 8, "DEPTH": 2}, 128),  # two CTAs of eight
    ],
    ids=["gate_up", "down", "sixteen", "short", "gpt-oss", "deep"],
)
def test_it_compiles_to_mma_on_16_byte_loads_without_spills(variant, most_registers, tmp_path):
    binary = compiled(**variant)
    text = binary.asm["ptx"]
    assert "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32" in text
    weights = r"ld\.global\S*evict_first\S*\.v4\.b32"
    # Of each block of up to 8 and of up to 16 pairs: a unit of each of four tiles for each step of the loop.
    assert len(re.findall(weights, text)) == (4 * 3 if variant.get("block") == 16 else 4 * (1 + variant.get("DEPTH", 1)))
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


@pytest.mark.parametrize(
    "change", [{"block": 12}, {"block": 40}, {"tiles": 0}, {"tiles": 9}, {"warps": 2}, {"warps": 16}], ids=str
)
def test_a_launch_that_cannot_be_is_refused(change):
    with pytest.raises(ValueError, match="block is 8, 16, 24 or 32, tiles is 1 to 8, warps 4 or 8"):
        GroupedConfig(**change)
    with pytest.raises(ValueError, match="split divides warps"):
        GroupedConfig(warps=4, split=8)
    for change in ({"depth": 0}, {"depth": 2, "ahead": True}):
        with pytest.raises(ValueError, match="depth is at least 1, and 1 with ahead"):
            GroupedConfig(**change)


def test_operands_that_do_not_fit_are_refused():
    weight = prepare_experts([quantize(torch.randn(32, 66), MXFP4)], 1, gated=True)
    plain = prepare_experts([quantize(torch.randn(66, 16), MXFP4)], 1, gated=False)
    e4m3 = prepare_experts([quantize(torch.randn(32, 66), MXFP4)], 1, gated=True, operand=torch.float8_e4m3fn)
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
        (lambda: first(weight=e4m3), "for grouped_prefill alone"),
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
