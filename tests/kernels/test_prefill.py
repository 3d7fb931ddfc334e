"""The wgmma kernel: its schedule, what it compiles to, and its products, from its PTX and on a GPU."""

import re
from functools import partial

import pytest
import torch

triton = pytest.importorskip("triton")

from compiling import resources  # noqa: E402
from emulating import emulate, from_ptx  # noqa: E402
from shipped import prefill_compilation  # noqa: E402

from fp4bench.formats import MXFP4, NVFP4  # noqa: E402
from fp4bench.kernels import prefill, prefill_launch, weights  # noqa: E402
from fp4bench.kernels.prefill_launch import PrefillConfig, Schedule, shares  # noqa: E402
from fp4bench.kernels.weights import WordOrder  # noqa: E402
from fp4bench.quantize import decode, decode_fp8_rows, quantize, quantize_fp8_rows  # noqa: E402
from fp4bench.reference import values  # noqa: E402


@pytest.mark.parametrize("m", [1, 17, 129, 5000])
@pytest.mark.parametrize(("n", "k"), [(16, 64), (8192, 8192), (57344, 8192), (10240, 28672)])
@pytest.mark.parametrize("streamed", [False, True])
def test_tiles_are_cut_into_shares_for_all_or_dealt_out_evenly(m, n, k, streamed):
    config = PrefillConfig(columns=64, streamed=streamed)
    schedule = Schedule.of(m, n // 16, k // 64, config, 132)
    assert schedule.tiles == -(-n // 128) * -(-m // 64)
    assert 1 <= schedule.ctas <= max(132, schedule.tiles)
    # Tiles in shares are cut evenly; the others are dealt out whole, the same number to each.
    whole = schedule.tiles - schedule.shared
    assert 0 <= schedule.shared <= schedule.tiles
    assert not streamed or whole % schedule.ctas == 0 or schedule.ctas == schedule.tiles or not schedule.shared


@pytest.mark.parametrize(("m", "n", "k"), [(512, 10240, 8192), (1024, 10240, 8192), (300, 57344, 8192), (129, 24320, 640)])
def test_in_pairs_no_more_than_two_ctas_share_a_tile(m, n, k):
    """Cut at the same places as in `_piece`: the slots and counters of `_meet` are for two, who are neighbours."""
    schedule = Schedule.of(m, n // 16, k // 64, PrefillConfig(columns=256, depth=64, pairs=True), 132)
    alone = Schedule.of(m, n // 16, k // 64, PrefillConfig(columns=256, depth=64), 132)
    assert (alone.sharers, schedule.sharers) == ("many", "two")
    assert schedule.shared == alone.shared + 132
    cuts = [cta * schedule.shared * schedule.steps // 132 for cta in range(133)]
    for tile in range(schedule.shared):
        begin, end = tile * schedule.steps, (tile + 1) * schedule.steps
        sharers = [cta for cta in range(132) if cuts[cta] < end and cuts[cta + 1] > begin]
        assert len(sharers) <= 2


def test_where_no_tile_is_cut_nobody_shares_one():
    whole = Schedule.of(512, 512, 128, PrefillConfig(columns=256, pairs=True), 128)
    assert (whole.shared, whole.sharers) == (0, "one")


@pytest.mark.parametrize("ctas", [1, 2, 3])
@pytest.mark.parametrize("k", [64, 512, 5120])
def test_no_share_of_the_cut_tiles_is_empty(k, ctas):
    """8 tiles of 20 steps for 396 CTAs left some without a step, and tiles without all their sums: garbage, on an H200."""
    config = PrefillConfig(rows=64, columns=8, depth=256, warpgroups=1, ctas=ctas)
    for n in range(64, 80000, 1472):
        schedule = Schedule.of(1, n // 16, k // 64, config, 132)
        assert (
            not schedule.shared
            or schedule.shared * schedule.steps >= prefill_launch.FEWEST_STEPS * schedule.ctas
            or schedule.ctas == schedule.tiles
        )


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"rows": 96}, "rows"),
        ({"columns": 48}, "columns"),
        ({"rows": 64}, "warpgroups"),
        ({"warpgroups": 4}, "warpgroups"),
        ({"rows": 256, "columns": 256}, "tile"),
        ({"columns": 64, "tail": PrefillConfig(columns=64)}, "tail"),
        ({"columns": 128, "tail": PrefillConfig(columns=64, tail=PrefillConfig(columns=32))}, "none of its own"),
        ({"columns": 256, "along_k": True}, "share the k"),
        ({"columns": 16, "stages": 5, "along_k": True}, "multiple of 2 stages"),
        ({"columns": 16, "warpgroups": 1, "along_k": True}, "share the k"),
        ({"streamed": False, "pairs": True}, "streamed"),
        ({"columns": 256, "pairs": True, "tail": PrefillConfig(columns=64)}, "one of both"),
    ],
)
def test_a_launch_that_cannot_be_is_refused(change, why):
    with pytest.raises(ValueError, match=why):
        PrefillConfig(**change)


@pytest.mark.parametrize("streamed", [False, True])
def test_a_copy_of_x_does_not_lie_on_the_counters_of_other_products(streamed):
    weight = weights.prepare(quantize(torch.randn(256, 1028), MXFP4))  # rows of 2056 bytes
    config = PrefillConfig(columns=64, streamed=streamed)
    workspace = torch.zeros(prefill.workspace_bytes(40, weight, torch.bfloat16, config, 132), dtype=torch.uint8)
    schedule = Schedule.of(40, weight.tiles, weight.units, config, 132)
    assert (schedule.shared > 0) == streamed
    prefill._carve(workspace, 40, weight, torch.bfloat16, schedule, config)[2].fill_(1)
    assert not workspace[: prefill.COUNTER_BYTES].any()


@pytest.mark.triton_3_6
@pytest.mark.parametrize(
    ("form", "fmt", "config", "shape"),
    [
        ("bf16", MXFP4, prefill_launch.default_config(32), "m64n32k16"),
        ("bf16", NVFP4, prefill_launch.default_config(64), "m64n64k16"),
        ("bf16", MXFP4, prefill_launch.default_config(1024), "m64n128k16"),
        ("bf16", MXFP4, PrefillConfig(columns=64, rows=256, warpgroups=4), "m64n64k16"),
        ("e4m3", MXFP4, PrefillConfig(columns=128, depth=128), "m64n128k32"),
        ("bytes", MXFP4, PrefillConfig(columns=64, depth=128), "m64n64k32"),
        ("bytes", MXFP4, PrefillConfig(columns=256, depth=128, stages=5), "m64n256k32"),
        ("bytes", MXFP4, PrefillConfig(columns=256, depth=128, stages=5, pairs=True), "m64n256k32"),
        ("bytes", MXFP4, PrefillConfig(rows=64, columns=32, depth=128, along_k=True), "m64n32k32"),
        ("bytes", MXFP4, PrefillConfig(rows=64, columns=128, depth=128, stages=8, along_k=True), "m64n128k32"),
        ("bf16", NVFP4, PrefillConfig(rows=64, columns=16, warpgroups=4, stages=8, along_k=True), "m64n16k16"),
    ],
)
def test_it_compiles_to_wgmma_with_weights_in_registers(form, fmt, config, shape, tmp_path):
    form, in_bytes = ("e4m3", True) if form == "bytes" else (form, False)
    kernel = prefill_compilation(form, fmt, config, in_bytes).binary()
    ptx = kernel.asm["ptx"]
    products = re.findall(rf"wgmma\.mma_async\.sync\.aligned\.{shape}\.f32\.{form}\.{form} \{{[^}}]*\}}, (.)", ptx)
    assert products
    assert set(products) == {"{"}  # the left operand is a list of registers, not a descriptor
    assert "cp.async.bulk.tensor" in ptx
    assert resources(kernel, tmp_path)[1] == 0


@pytest.mark.parametrize(
    ("n", "m", "launches"), [(10240, 512, 2), (8192, 512, 1), (10240, 256, 1), (1000, 600, 1), (57344, 1024, 2)]
)
def test_a_tail_takes_the_rows_that_fill_no_round(n, m, launches):
    config = PrefillConfig(columns=256, tail=PrefillConfig(columns=64, depth=128))
    weight = weights.prepare(quantize(torch.randn(n, 64), MXFP4))
    parts = shares(m, weight.tiles, config, 132)
    assert len(parts) == launches
    assert [first for first, _, _ in parts] == [0, *(last for _, last, _ in parts[:-1])]
    assert parts[-1][1] == weight.tiles
    assert all(not launch.tail for _, _, launch in parts)
    if launches == 2:
        (first, last, whole), (_, _, tail) = parts
        tiles = Schedule.of(m, last - first, 1, whole, 132).tiles
        assert 0.97 < tiles / 132 / round(tiles / 132) <= 1
        assert tail == config.tail


def test_a_tail_has_to_fit_as_well():
    weight = weights.prepare(quantize(torch.randn(64, 64), MXFP4), torch.float8_e4m3fn, WordOrder.BYTES)
    config = PrefillConfig(columns=256, depth=128, tail=PrefillConfig(depth=64))
    assert "64 columns" in prefill.why_not(512, weight, torch.float8_e4m3fn, config)
    assert prefill.fits(512, weight, torch.float8_e4m3fn, PrefillConfig(columns=256, depth=128, tail=LOW))


def test_both_launches_write_their_rows_of_the_output(monkeypatch):
    """The kernel by a stand-in: rows of the weight, of the bias and of the output belong together."""
    weight = weights.prepare(quantize(torch.randn(1032, 96), MXFP4))
    x, bias = torch.randn(300, 96).bfloat16(), torch.randn(1032)
    out = torch.full((300, 1032), torch.nan)

    def launch(x, part, into, config, workspace, x_scale, alpha, of_bias, pdl, sms):
        into.copy_(x.float() @ decode(weights.restore(part)).T + of_bias)
        return (1,), (), {}

    monkeypatch.setattr(prefill, "_launch", launch)
    monkeypatch.setattr(prefill, "count_sms", lambda device: 4)
    config = PrefillConfig(columns=256, tail=PrefillConfig(rows=64, along_k=True))
    assert len(shares(300, weight.tiles, config, 4)) == 2
    monkeypatch.setattr(prefill, "wgmma_product", {(1,): lambda: None})
    prefill.gemm(x, weight, out, config=config, bias=bias)
    torch.testing.assert_close(out, x.float() @ decode(weights.restore(weight)).T + bias)


LOW = PrefillConfig(rows=64, depth=128, stages=8, streamed=False, along_k=True)  # a tail's
FEW = [
    ("bf16", MXFP4, 256, 512, 64, PrefillConfig(columns=64, streamed=False)),
    ("bf16", MXFP4, 256, 512, 64, PrefillConfig(columns=64)),
    ("bf16", NVFP4, 256, 512, 64, PrefillConfig(columns=64)),
    ("fp16", MXFP4, 256, 512, 64, PrefillConfig(columns=64)),
    ("bf16", NVFP4, 136, 320, 129, PrefillConfig(columns=128)),
    ("e4m3", MXFP4, 256, 512, 64, PrefillConfig(columns=64, depth=128)),
    ("e4m3", MXFP4, 200, 1000, 77, PrefillConfig(columns=64, depth=128)),
    ("bytes", MXFP4, 200, 1000, 77, PrefillConfig(columns=64, depth=128)),
    ("bf16", MXFP4, 200, 1000, 300, PrefillConfig(rows=64, streamed=True, along_k=True)),
]
CASES = [
    *FEW,
    ("bf16", MXFP4, 1000, 1056, 37, PrefillConfig(columns=32)),
    ("bf16", MXFP4, 1000, 1056, 37, PrefillConfig(columns=64, rows=256, warpgroups=4)),
    ("e4m3", MXFP4, 1000, 1024, 37, PrefillConfig(columns=64, rows=256, depth=128, warpgroups=4)),
    ("bf16", MXFP4, 1024, 4096, 16, PrefillConfig(columns=16, rows=64, warpgroups=1, ctas=2)),
    ("bf16", MXFP4, 1000, 1056, 13, PrefillConfig(rows=64, columns=16, along_k=True)),
    ("bf16", NVFP4, 20480, 1000, 60, PrefillConfig(rows=64, columns=64, warpgroups=4, streamed=False, along_k=True)),
    ("bytes", MXFP4, 20480, 1000, 32, PrefillConfig(rows=64, columns=32, depth=128, stages=6, along_k=True)),
    ("bytes", MXFP4, 8192, 2048, 8, PrefillConfig(rows=64, columns=8, depth=256, stages=2, ctas=2, along_k=True)),
    ("bf16", MXFP4, 10240, 1024, 1024, PrefillConfig(columns=256)),
    ("bf16", MXFP4, 10240, 1024, 1024, PrefillConfig(columns=128, rows=256)),
    ("bytes", MXFP4, 1000, 1024, 7, PrefillConfig(columns=8, rows=64, depth=256, warpgroups=1, ctas=2)),
    ("bytes", MXFP4, 10240, 2048, 512, PrefillConfig(columns=256, depth=128)),
    ("bytes", MXFP4, 10240, 1024, 512, PrefillConfig(columns=256, depth=128, tail=PrefillConfig(columns=64, depth=128))),
    ("bytes", MXFP4, 10232, 1000, 500, PrefillConfig(columns=256, depth=128, tail=LOW)),
    ("bf16", NVFP4, 10232, 1024, 1000, PrefillConfig(columns=256, tail=PrefillConfig())),
    ("bytes", MXFP4, 10240, 2048, 512, PrefillConfig(columns=256, depth=128, stages=5, pairs=True)),
    ("bf16", NVFP4, 10232, 1024, 500, PrefillConfig(columns=256, pairs=True)),
    ("fp16", MXFP4, 20472, 1056, 300, PrefillConfig(rows=256, pairs=True)),
    ("bytes", MXFP4, 20472, 1000, 60, PrefillConfig(rows=64, columns=64, depth=128, warpgroups=1, ctas=2, pairs=True)),
    ("bytes", MXFP4, 1000, 1024, 37, PrefillConfig(columns=64, rows=256, depth=128, warpgroups=4)),
    *(("bf16", fmt, 1000, 1056, m, prefill_launch.default_config(m)) for fmt in (MXFP4, NVFP4) for m in (17, 60, 100, 300)),
]
# For four SMs.
SMALL = [
    *FEW,
    ("bf16", MXFP4, 520, 544, 37, PrefillConfig(columns=32)),
    ("bf16", MXFP4, 520, 544, 37, PrefillConfig(columns=64, rows=256, warpgroups=4)),
    ("e4m3", MXFP4, 520, 512, 37, PrefillConfig(columns=64, rows=256, depth=128, warpgroups=4)),
    ("bf16", MXFP4, 520, 544, 13, PrefillConfig(rows=64, columns=16, along_k=True)),
    ("bytes", MXFP4, 520, 512, 7, PrefillConfig(columns=8, rows=64, depth=256, warpgroups=1, ctas=2)),
    ("bytes", MXFP4, 520, 512, 37, PrefillConfig(columns=64, rows=256, depth=128, warpgroups=4)),
    ("bytes", MXFP4, 264, 1000, 60, PrefillConfig(rows=64, columns=64, depth=128, warpgroups=1, ctas=2, pairs=True)),
    ("bf16", NVFP4, 264, 1000, 100, PrefillConfig(columns=64, pairs=True)),
    ("bf16", MXFP4, 1032, 96, 300, PrefillConfig(columns=256, tail=PrefillConfig(rows=64, along_k=True))),
    *(("bf16", fmt, 520, 544, m, prefill_launch.default_config(m)) for fmt in (MXFP4, NVFP4) for m in (17, 100)),
]


def check(form, fmt, n, k, m, config, device):
    torch.manual_seed(n + k + m)
    form, order = ("e4m3", WordOrder.BYTES) if form == "bytes" else (form, WordOrder.HALVES)
    dtype = next(dtype for dtype, name in prefill._FORMS.items() if name == form)
    q = quantize(torch.randn(n, k, device=device) * k**-0.5, fmt)
    weight = weights.prepare(q, torch.bfloat16 if fmt.has_tensor_scale else dtype, order)
    x = torch.randn(m, k, device=device, dtype=torch.float16 if form == "fp16" else torch.bfloat16)
    x_scale, exact = None, x.double()
    if form == "e4m3":
        rows = quantize_fp8_rows(x)
        exact, x_scale = decode_fp8_rows(rows).double(), rows.scales.flatten()
        padded = torch.nn.functional.pad(rows.values.view(torch.uint8), (0, -k % 64))
        order = torch.tensor(weights.E4M3_ORDER, device=device)
        x = padded.unflatten(-1, (-1, 16))[..., order].flatten(-2).contiguous().view(torch.float8_e4m3fn)
    want = exact @ values(q).T
    sms = prefill.count_sms(torch.device(device))
    workspace = torch.zeros(prefill.workspace_bytes(m, weight, x.dtype, config, sms), dtype=torch.uint8, device=device)
    outs = []
    for pdl in (False, True, True) if device == "cuda" else (True,):
        out = torch.full((m, n), torch.nan, device=device, dtype=torch.float16 if form == "fp16" else torch.bfloat16)
        outs.append(prefill.gemm(x, weight, out, config=config, workspace=workspace, x_scale=x_scale, pdl=pdl))
    assert all(torch.equal(outs[0], out) for out in outs)
    # Rounding to bfloat16 alone is 0.0017 (0.0002 for float16); FP8 tensor cores add some 0.0003 (NVIDIA H200).
    assert (outs[0].double() - want).norm() / want.norm() < 2.5e-3


each_product = partial(pytest.mark.parametrize, ("form", "fmt", "n", "k", "m", "config"))


@pytest.mark.gpu
@pytest.mark.triton_3_6
@each_product(CASES)
def test_its_products_are_right_and_the_same_each_time(form, fmt, n, k, m, config):
    check(form, fmt, n, k, m, config, "cuda")


@from_ptx
@each_product(SMALL)
def test_the_ptx_computes_its_products(form, fmt, n, k, m, config, monkeypatch):
    emulate(monkeypatch, (prefill, "wgmma_product", ("words", "scales")), counting=[prefill])
    check(form, fmt, n, k, m, config, "cpu")
