"""The decode kernel. Its inline assembly runs here, in numpy (`ptx`), against the decoded weight; the kernel around it, which
Triton's interpreter cannot run because of that assembly, is compiled and its PTX and registers are read. The whole runs from
its PTX (`ptx_machine`), and on a GPU.
"""

import re
from dataclasses import replace
from math import log2

import contract
import numpy as np
import pytest
import torch

from fp4bench.formats import MXFP4, NVFP4, ScaleRule
from fp4bench.kernels.weights import WINDOWS, prepare
from fp4bench.quantize import Quantized, decode, quantize

triton = pytest.importorskip("triton", reason="needs Triton")

import ptx  # noqa: E402
from compiling import dumped, resources  # noqa: E402
from emulating import devices, emulate, from_ptx  # noqa: E402
from shipped import H200, decode_compilation  # noqa: E402

from fp4bench.kernels import configs, slots  # noqa: E402
from fp4bench.kernels import decode as kernel  # noqa: E402
from fp4bench.kernels.decode import DecodeConfig, fits, gemm  # noqa: E402

FORMATS = [MXFP4, NVFP4]
TYPES = [torch.bfloat16, torch.float16]

each_format = pytest.mark.parametrize("fmt", FORMATS, ids=str)
each_type = pytest.mark.parametrize("dtype", TYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))


def randn(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


# --- The assembly, run in numpy ---------------------------------------------------------------------------------------------


def unit_of_x(x, unit, dtype):
    """The B operand of a unit as the kernel loads it: registers of 8 pairs for each 8 rows of x. x (8 or 16, k padded)."""
    g, t = ptx.LANES // 4, ptx.LANES % 4
    loaded = []
    for block in range(x.shape[0] // 8):
        for pair in range(8):
            column = 64 * unit + 8 * pair + 2 * t
            both = torch.stack((x[g + 8 * block, column], x[g + 8 * block, column + 1]), dim=-1)
            loaded.append(ptx.registers(both, dtype))
    return loaded


def emulated(weight, x, dtype):
    """x W^T without the epilogue, unit by unit as a warp computes it. x (8 or 16, k) -> float64 (rows of x, 16 tiles)."""
    columns, two_level = x.shape[0], weight.format.has_tensor_scale
    text = kernel._product(columns, two_level, dtype is torch.float16)
    padded = torch.nn.functional.pad(x, (0, 64 * weight.units - x.shape[1]))
    words, scales = (tensor.numpy().view(np.uint32) for tensor in (weight.words, weight.scales))
    g, t = ptx.LANES // 4, ptx.LANES % 4
    out = np.zeros((columns, 16 * weight.tiles))
    for tile in range(weight.tiles):
        acc = [np.zeros(32) for _ in range(columns // 2)]
        for unit in range(weight.units):
            lane_words = [words[tile, unit, :, j] for j in range(4)]
            lane_scales = [scales[tile, unit][g].reshape(32, -1)[:, i] for i in range(2 if two_level else 1) for _ in range(4)]
            operands = [*acc, *lane_words, *lane_scales, *unit_of_x(padded, unit, dtype), *acc]
            # The accumulators are read and written in the same registers.
            acc = ptx.run(text, operands)[: len(acc)]
        for i, sums in enumerate(acc):
            out[8 * (i // 4) + 2 * t + i % 2, 16 * tile + g + 8 * (i % 4 // 2)] = sums
    return out


def product(weight, x, dtype):
    return emulated(weight, x, dtype)[:, : weight.n] * weight.row_scale[: weight.n].double().numpy()


def exact(x, q):
    return (x.double() @ decode(q, torch.float64)[:, : x.shape[1]].T).numpy()


@each_type
@each_format
@pytest.mark.parametrize("columns", [8, 16])
def test_the_assembly_multiplies_exactly(columns, fmt, dtype):
    x = randn(columns, 130).to(dtype)
    q = quantize(randn(18, 130, seed=1) * torch.exp2(randn(18, 1, seed=2) * 8), fmt)
    # x, codes and scales are multiples of a power of two: float64 sums them exactly. Only 1 / S is rounded, to float32.
    np.testing.assert_allclose(product(prepare(q, dtype), x, dtype), exact(x, q), rtol=0 if fmt is MXFP4 else 2e-7)


@each_type
@each_format
def test_the_assembly_decodes_every_code_with_every_scale(fmt, dtype):
    # x is the unit matrix, so that the product is the decoded weight itself.
    byte = np.arange(0x7F) if fmt is NVFP4 else np.arange(254 - WINDOWS[dtype], 255)
    columns = np.resize(byte, (len(byte) + 15) // 16 * 16).reshape(16, -1).repeat(2, axis=1).astype(np.uint8)
    columns[:, 0] = byte.max()  # each row's largest, so that all are within the window of it
    codes = torch.tensor([[0x10, 0x32, 0x54, 0x76, 0x98, 0xBA, 0xDC, 0xFE]], dtype=torch.uint8)
    k = columns.shape[1] * fmt.block_size
    q = Quantized(
        codes.repeat(16, k // 16),
        torch.from_numpy(columns).view(fmt.scale_dtype),
        torch.tensor(1.0) if fmt.has_tensor_scale else None,
        fmt,
        fmt.default_rule,
        None,
        k,
    )
    weight = prepare(q, dtype)
    assert weight.rest is None
    want = decode(q, torch.float64).numpy()
    for start in range(0, k, 16):
        x = torch.zeros(16, k)
        x[torch.arange(16), start + torch.arange(16)] = 1.0
        unit = start // 64
        part = replace(
            weight,
            words=weight.words[:, unit : unit + 1].contiguous(),
            scales=weight.scales[:, unit : unit + 1].contiguous(),
            k=64,
        )
        got = product(part, x[:, 64 * unit : 64 * unit + 64], dtype)
        np.testing.assert_array_equal(got, want[:, start : start + 16].T)


@each_type
def test_blocks_beyond_the_window_are_added_by_the_rest(dtype):
    x = randn(8, 128).to(dtype)
    byte = torch.tensor([[254, 100, 253 - WINDOWS[dtype], 0]], dtype=torch.uint8).view(MXFP4.scale_dtype)
    q = Quantized(torch.full((1, 64), 0x35, dtype=torch.uint8), byte, None, MXFP4, ScaleRule.FLOOR, None, 128)
    parts = [prepare(q, dtype)]
    while parts[-1].rest:
        parts.append(parts[-1].rest)
    np.testing.assert_array_equal(sum(product(part, x, dtype) for part in parts), exact(x, q))


def test_a_lane_group_transposes_its_registers():
    values = [np.arange(32, dtype=np.uint32) * 4 + i for i in range(4)]
    operands = ptx.run(kernel._transpose(), [None] * 4 + values + [ptx.LANES.astype(np.uint32)] * 4)
    for i in range(4):
        # Register i is what lane i of the group had in register t.
        assert operands[i].tolist() == [4 * (lane // 4 * 4 + i) + lane % 4 for lane in range(32)]


def test_the_emulator_sees_a_wrong_instruction():
    x, q = randn(8, 64).bfloat16(), quantize(randn(16, 64, seed=1), MXFP4)
    broken = kernel._product(8, False, False).replace("0x00400040", "0x00400000")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kernel, "_product", lambda *_: broken)
        assert not np.array_equal(product(prepare(q), x, torch.bfloat16), exact(x, q))


# --- Compiled, not run ------------------------------------------------------------------------------------------------------


def compiled(*what, **how):
    return decode_compilation(*what, **how).binary()


@pytest.mark.gluon
@pytest.mark.parametrize(
    "variant",
    [
        {"tiles": 4, "warps": 16},
        {"tiles": 4, "warps": 8, "fmt": NVFP4, "dtype": torch.float16, "columns": 16},
        {"tiles": 2, "warps": 16, "k": 28672, "columns": 16, "EXCHANGE": True, "AHEAD": True, "DEPTH": 2},
    ],
    ids=["mxfp4", "nvfp4", "exchange"],
)
def test_it_compiles_to_mma_on_16_byte_loads_without_spills(variant, tmp_path):
    binary = compiled(**variant)
    text = binary.asm["ptx"]
    kind = "f16" if variant.get("dtype") is torch.float16 else "bf16"
    assert f"mma.sync.aligned.m16n8k16.row.col.f32.{kind}.{kind}.f32" in text
    assert re.search(r"ld\.global\S*\.v4\.b32", text)
    assert ("shfl.sync.bfly" in text) == variant.get("EXCHANGE", False)
    # Weights first, then the wait for the kernel before, then x.
    before, _, after = text.partition("griddepcontrol.wait")
    assert len(re.findall(r"ld\.global\S*\.v4\.b32", before)) == variant["tiles"] * variant.get("DEPTH", 1)
    # Words and scales with the rest of their lines; x, which comes from the L2, without.
    assert before.count("L2::128B") == 2 * variant["tiles"] * variant.get("DEPTH", 1) == before.count("ld.global")
    # A unit's words past L1, behind all of its scales; in float16 beside them, for want of registers.
    loads = ["words" if ".v4" in one else "scales" for one in re.findall(r"ld\.global(\S*)", before)]
    unit = ["scales"] * variant["tiles"] + ["words"] * variant["tiles"]
    assert loads == (["words", "scales"] * variant["tiles"] if kind == "f16" else unit * variant.get("DEPTH", 1))
    assert len(re.findall(r"ld\.global\.L1::no_allocate\.L2::128B\.v4\.b32", before)) == loads.count("words")
    assert "mma.sync" not in before
    assert "mma.sync" in after
    # No shared memory before the sums meet.
    assert "shared" not in after[: after.rindex("mma.sync")].replace(".shared_", "")
    registers, stack = resources(binary, tmp_path)
    assert stack == 0
    assert registers * 32 * variant["warps"] <= 65536
    # A scale is multiplied from its half of a register, without an instruction that spreads it.
    scaled = re.findall(r"HMUL2.*;", dumped(binary, "-sass", tmp_path))
    assert len(scaled) >= 16 * variant["tiles"]
    assert all("H0_H0" in one or "H1_H1" in one for one in scaled)


@pytest.mark.gluon
def test_units_that_are_not_there_are_not_loaded():
    text = compiled(k=8192 + 64).asm["ptx"]
    loads = re.findall(r"(@p )?ld\.global\S*L2::128B", text)
    assert loads
    assert all(loads)
    assert not any(re.findall(r"(@p )?ld\.global\S*L2::128B", compiled().asm["ptx"]))


@pytest.mark.gluon
def test_gate_up_is_one_wave_of_ctas(tmp_path):
    """At m = 1 and 8 as shipped: 896 CTAs on 132 SMs, of 128 threads. With more registers a second wave took 17 % (an H100)."""
    launch = configs.choose(configs.Work("bf16", "mxfp4", 1, 57344, 8192), H200)
    assert launch == configs.choose(configs.Work("bf16", "mxfp4", 8, 57344, 8192), H200)
    kernel = compiled(tiles=launch.tiles, warps=launch.warps, AHEAD=launch.ahead, DEPTH=launch.depth, SLOTS=launch.slots)
    registers, _ = resources(kernel, tmp_path)
    assert 65536 // (32 * launch.warps * (-(-registers // 8) * 8)) * 132 >= 57344 // (16 * launch.tiles)


@pytest.mark.gluon
@pytest.mark.parametrize(
    "variant",
    [
        {"tiles": 4, "columns": 16, "SLOTS": 2},
        {"tiles": 5, "columns": 16, "SLOTS": 2},
        {"tiles": 4, "columns": 8, "SLOTS": 4, "DEPTH": 2},
        {"tiles": 5, "columns": 8, "SLOTS": 4, "DEPTH": 2},
        {"tiles": 5, "columns": 8, "fmt": NVFP4, "SLOTS": 4, "DEPTH": 2},
        {"tiles": 5, "columns": 16, "fmt": NVFP4, "SLOTS": 2},
        {"tiles": 5, "columns": 8, "fmt": NVFP4, "dtype": torch.float16, "SLOTS": 4, "DEPTH": 2},
    ],
    ids=["o at 16", "qkv at 16", "o at 8", "qkv at 8", "nvfp4 at 8", "nvfp4 at 16", "nvfp4 as float16"],
)
def test_through_slots_a_warp_waits_for_its_own_copies_alone_and_spills_nothing(variant, tmp_path):
    binary = compiled(warps=16, **variant)
    text = binary.asm["ptx"]
    before, _, after = text.partition("griddepcontrol.wait")
    loop = after[: after.rindex("mma.sync")]
    assert "ldmatrix.sync" in loop
    # x behind the wait for the kernel before, 16 bytes a lane, and never exchanged.
    assert "cp.async" not in before
    assert re.search(r"cp\.async\.cg\.shared\.global \[%r\d+\], \[%rd\d+\], 16, %r\d+;", loop)
    assert "shfl.sync" not in text
    # No barrier of the CTA before the sums meet.
    assert "bar.sync" not in loop.replace("bar.warp.sync", "")
    assert "barrier" not in loop
    # The ring is all that is allocated, so that it lies where it is taken for.
    ring = 16 * variant["SLOTS"] * slots.slot_bytes.fn(variant["columns"])
    sums = 2048 * 4 * -(-variant["tiles"] * variant["columns"] // 32) * 4
    assert binary.metadata.shared == max(ring, sums)
    registers, stack = resources(binary, tmp_path)
    # The launches were tuned with Triton 3.6; that of 3.9 leaves 16 bytes of "qkv at 8" on the stack.
    assert stack <= (0 if triton.__version__.startswith("3.6.") else 16)
    assert registers * 32 * 16 <= 65536


@pytest.mark.parametrize("depth", [1, 2])
@pytest.mark.parametrize("wanted", [1, 2, 3, 4])
def test_a_warp_waits_for_the_unit_that_it_takes(wanted, depth):
    for steps in range(depth, 20):
        number = min(wanted, steps)
        asked, end = list(range(number)), (steps - depth) // depth * depth
        for step in range(steps):  # as `_through_slots` goes about it
            last = step - end
            younger = number - 1 if last < 0 else kernel._younger.fn(last, steps - end, number)
            assert asked[len(asked) - 1 - younger] == step
            if last < 0 or last + number < steps - end:
                asked.append(step + number)


def test_x_goes_through_slots_where_it_can_be_copied():
    weight = prepare(quantize(randn(80, 64 * 64), MXFP4))
    x, out = torch.zeros(16, 64 * 64 + 8, dtype=torch.bfloat16), torch.zeros(16, 80, dtype=torch.bfloat16)

    def slots_of(x, **launch):
        return kernel._launch(x, weight, out, DecodeConfig(**launch), 1.0, None, False)[2]["SLOTS"]

    assert slots_of(x[:, :-8], warps=16, slots=3) == 3
    assert slots_of(x[:, 8:], warps=16, slots=3) == 3
    assert slots_of(x[:, 7:-1], warps=16, slots=3) == 0
    assert slots_of(x[:, :-9], warps=16, slots=3) == 0
    assert slots_of(x[:, : 3 * 64], warps=16, slots=3) == 3


@pytest.mark.gluon
@pytest.mark.parametrize("capability", [100, 120])
def test_it_compiles_for_blackwell(capability):
    for slots_of_x in (0, 2):
        text = compiled(capability, tiles=2, warps=4, SLOTS=slots_of_x).asm["ptx"]
        assert "mma.sync.aligned.m16n8k16" in text
        assert ("cp.async.cg" in text) == (slots_of_x > 0)


@pytest.mark.gluon
def test_odd_sizes_read_x_by_masked_halves():
    text = compiled(k=8192 + 65, tiles=1, warps=4, ALL_COLUMNS=False, PAIRS=False).asm["ptx"]
    assert re.search(r"@%p\d+ ld\.global\.b16", text)
    assert "ld.global.b32 { %r" not in text.partition("griddepcontrol.wait")[2].partition("mma.sync")[0].replace("@", "")


# --- Arguments --------------------------------------------------------------------------------------------------------------


def test_what_fits():
    weight = prepare(quantize(randn(16, 64), MXFP4))
    assert [m for m in range(40) if fits(m, weight)] == list(range(1, 17))
    assert not fits(1, replace(weight, rest=weight))


def test_candidates_are_distinct_and_exchange_x_only_where_rows_share_the_loads():
    for m in (1, 16):
        found = kernel.candidates(m)
        assert len(set(found)) == len(found)
        assert any(config.exchange for config in found) == (m > 2)


@pytest.mark.parametrize(
    ("change", "why"),
    [
        *(({name: value}, "tiles is 1 to 8") for name, value in (("tiles", 0), ("tiles", 9), ("warps", 2), ("depth", 0))),
        *(({"slots": value}, "slots is 0 to 4") for value in (-1, 5)),
    ],
    ids=str,
)
def test_a_config_that_cannot_be_is_refused(change, why):
    with pytest.raises(ValueError, match=why):
        DecodeConfig(**change)


# --- The whole, from its PTX and on a GPU -----------------------------------------------------------------------------------

DECODE = (kernel, "_decode", ("words", "scales"))
device = devices(DECODE)

# Shapes that divide, and that do not: n by 16 and by the tiles of a CTA, k by 2, by 64 and by the warps' units.
LAUNCHES = [
    (256, 2048, DecodeConfig(tiles=4, warps=16)),
    (100, 333, DecodeConfig(tiles=5, warps=8, exchange=True, ahead=True)),
    (1, 2, DecodeConfig(tiles=1, warps=8)),
    (337, 2880, DecodeConfig(tiles=7, warps=16, depth=2, ahead=True, exchange=True)),
    (48, 64, DecodeConfig(tiles=2, warps=4, depth=2)),
    (256, 2048, DecodeConfig(tiles=4, warps=16, slots=2)),
    (337, 2880, DecodeConfig(tiles=7, warps=8, slots=4, depth=2)),
    (80, 4096, DecodeConfig(tiles=5, warps=16, slots=1, depth=2)),
    (100, 640, DecodeConfig(tiles=2, warps=4, slots=3)),
]


def check(q, dtype, m, config, *, alpha=1.0, with_bias=False, pdl=False):
    """The kernel against float64: each element within the error of float32 sums (as fp4bench.checking has it) and the store."""
    n, k = q.shape
    x = randn(m, k, seed=3).to(dtype).to(q.codes.device)
    bias = randn(n, seed=4).to(x) if with_bias else None
    out = torch.full((m, n), torch.nan, dtype=dtype, device=x.device)
    gemm(x, prepare(q, dtype), out, config=config, alpha=alpha, bias=bias, pdl=pdl)
    w = decode(q, torch.float64)[:, :k].double()
    want, spread = x.double() @ w.T * alpha, (x.double().square() @ w.square().T).sqrt() * alpha
    if bias is not None:
        want = want + bias.double()
    summation = 36 * 2.0**-24 * k**0.5 * spread
    bound = summation + torch.finfo(dtype).eps / 2 * (want.abs() + summation) + torch.finfo(dtype).smallest_normal * 2.0**-10
    assert torch.equal(out.isnan(), want.isnan())
    assert bool(((out.double() - want).abs() <= bound)[~want.isnan()].all())
    return out


def weight(n, k, fmt, device="cpu"):
    return quantize((randn(n, k) * k**-0.5 * torch.exp2(randn(n, 1, seed=1) * 2)).to(device), fmt)


@pytest.mark.gpu
@each_type
@each_format
@pytest.mark.parametrize(("n", "k", "config"), LAUNCHES, ids=[f"{n}x{k}" for n, k, _ in LAUNCHES])
def test_products_on_a_gpu(n, k, config, fmt, dtype):
    q = weight(n, k, fmt, "cuda")
    for m in (1, 2, 5, 8, 9, 16):
        first = check(q, dtype, m, config, alpha=0.5, with_bias=m % 2 == 1)
        assert torch.equal(first, check(q, dtype, m, config, alpha=0.5, with_bias=m % 2 == 1, pdl=True))


@from_ptx
@pytest.mark.parametrize(("n", "k", "config"), LAUNCHES, ids=[f"{n}x{k}" for n, k, _ in LAUNCHES])
def test_products_from_ptx(n, k, config, monkeypatch):
    emulate(monkeypatch, DECODE)
    check(weight(n, k, MXFP4), torch.bfloat16, 16, config, alpha=0.5)
    check(weight(n, k, NVFP4), torch.float16 if n % 2 else torch.bfloat16, 5, config, with_bias=True)


@each_type
@each_format
def test_contract_blocks(fmt, dtype, device):
    binades = 60 if dtype == torch.bfloat16 else 12  # of the largest value: float16 holds no sums of more
    for block in contract.BLOCKS:
        if block.format == fmt.name and abs(log2(max(map(abs, block.values), default=0.0) or 1.0)) < binades:
            q = quantize(block.tensor(device), fmt, rule=ScaleRule(block.rule), tensor_scale=block.tensor_scale)
            check(q, dtype, 3, DecodeConfig())


def test_strided_rows_and_a_nan_row(device):
    w = randn(64, 256).to(device)
    w[5, 7] = torch.nan
    weight = prepare(quantize(w, MXFP4))
    x = randn(4, 512).bfloat16().to(device)[:, :256]
    out = torch.full((4, 100), torch.nan, dtype=torch.bfloat16, device=device)
    gemm(x, weight, out[:, :64], config=DecodeConfig())
    assert out[:, 64:].isnan().all()
    assert out[:, :64].isnan().any(dim=0).nonzero().flatten().tolist() == [5]
