"""A layer of experts: its parts' shapes, and its results at routings of every kind, on a GPU and from the kernels' PTX."""

import pytest
import torch

pytest.importorskip("triton", reason="needs Triton")

from emulating import emulate, from_ptx

from fp4bench.formats import MXFP4, NVFP4
from fp4bench.kernels import grouped, grouped_prefill, grouped_short, moe, routing
from fp4bench.kernels import quantize as quantization
from fp4bench.kernels.experts import COLUMNS, prepare_experts
from fp4bench.kernels.grouped import GroupedConfig
from fp4bench.kernels.grouped_short import ShortConfig
from fp4bench.kernels.moe import Layer, MoeConfig
from fp4bench.kernels.prefill_launch import PrefillConfig
from fp4bench.models import SILU, Activation
from fp4bench.quantize import decode, decode_fp8_rows, quantize, quantize_fp8_rows

SWIGLU = Activation("swiglu", 1.702, 7.0)


def randn(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def layer_of(experts, hidden, intermediate, fmt, activation=SILU, with_bias=False, device="cpu", operand=torch.bfloat16):
    """-> the layer as the kernels read it, and decoded: W13 and W2 of each expert in float64, and the biases."""
    first = [quantize(randn(2 * intermediate, hidden, seed=e).to(device) * hidden**-0.5, fmt) for e in range(experts)]
    second = [quantize(randn(hidden, intermediate, seed=99 + e).to(device) * intermediate**-0.5, fmt) for e in range(experts)]
    prepared = tuple(prepare_experts(w, experts, gated=w is first, operand=operand) for w in (first, second))
    biases = None, None
    if with_bias:
        biases = randn(experts, 2 * intermediate, seed=7).to(device), randn(experts, hidden, seed=8).to(device)
    in_tiles = (None if b is None else moe.bias_of_tiles(b, weight) for b, weight in zip(biases, prepared, strict=True))
    decoded = [
        (decode(a, torch.float64)[:, :hidden], decode(b, torch.float64)[:, :intermediate])
        for a, b in zip(first, second, strict=True)
    ]
    return Layer(*prepared, activation, *in_tiles), decoded, biases


def exact(x, ids, weights, decoded, biases, activation, fp8=False):
    """In float64, but for what lies between the products: rounded to the type of x. fp8: as x is, then to FP8 rows."""
    y = torch.zeros(x.shape, dtype=torch.float64, device=x.device)
    rounded = (lambda rows: decode_fp8_rows(quantize_fp8_rows(rows))) if fp8 else (lambda rows: rows)
    of_x = rounded(x).double()
    for expert, (first, second) in enumerate(decoded):
        token, slot = (ids == expert).nonzero(as_tuple=True)
        both = of_x[token] @ first.T
        if biases[0] is not None:
            both = both + biases[0][expert].double()
        gate, up = both.chunk(2, dim=1)
        if activation.name == "swiglu":
            gate, up = gate.clamp(max=activation.limit), up.clamp(-activation.limit, activation.limit) + 1
            between = gate * torch.sigmoid(activation.alpha * gate) * up
        else:
            between = gate * torch.sigmoid(gate) * up
        result = rounded(between.to(x.dtype)).double() @ second.T
        if biases[1] is not None:
            result = result + biases[1][expert].double()
        y.index_add_(0, token, result * weights[token, slot, None].double())
    return y


def test_what_does_not_belong_together_is_refused():
    layer, _, _ = layer_of(2, 64, 32, MXFP4)
    other, _, _ = layer_of(3, 64, 32, MXFP4)
    for first, second in (
        (layer.second, layer.second),
        (layer.first, layer.first),
        (layer.first, other.second),
        (layer_of(2, 96, 32, MXFP4)[0].first, layer.second),
    ):
        with pytest.raises(ValueError, match="layer"):
            Layer(first, second, SILU)
    for second in (GroupedConfig(16), ShortConfig(16), PrefillConfig()):
        with pytest.raises(ValueError, match="no blocks in common"):
            MoeConfig(GroupedConfig(8), second)
    space = moe.workspace(3, 2, layer, MoeConfig(GroupedConfig(), GroupedConfig()))
    x = torch.zeros(3, 64, dtype=torch.bfloat16)
    ids, weights = torch.zeros(3, 2, dtype=torch.int32), torch.zeros(3, 2)
    for bad, out in ((x[:2], x[:2]), (x, x[:, :32]), (x, x.float()), (x.half(), x.half())):
        with pytest.raises(ValueError, match="do not fit 3 tokens"):
            moe.phases(bad, ids, weights, layer, out, space=space, config=moe.default_config(3, 2, 2, 128))


def test_a_bias_lies_as_the_rows_of_its_weight():
    layer, _, (first, second) = layer_of(2, 70, 20, NVFP4, with_bias=True)
    # 20 rows of each side are three tiles: row 3 of the gate is row 3 of the first, row 17 of up the second of the third's.
    assert layer.first_bias.shape == layer.first.row_scale.shape == (2, 48)
    assert layer.first_bias[1, 3] == first[1, 3]
    assert layer.first_bias[1, 32 + 8 + 1] == first[1, 20 + 17]
    assert layer.first_bias[1, 32 + 4] == 0
    assert torch.equal(layer.second_bias, torch.nn.functional.pad(second, (0, 10)))


def test_blocks_are_as_wide_as_most_experts_need():
    blocks = {1: 8, 8: 8, 64: 8, 96: 8, 97: 16, 256: 16, 384: 16, 385: 64, 2560: 64, 2561: 128}
    assert {m: moe.default_config(m, 8, 256, 128).block for m in blocks} == blocks
    blocks = {1: 8, 8: 8, 12: 8, 13: 16, 48: 16, 49: 64, 320: 64, 321: 128}
    assert {m: moe.default_config(m, 2, 8, 128).block for m in blocks} == blocks
    blocks = {1: 16, 384: 16, 385: 32, 768: 32, 769: 64, 2560: 64, 2561: 128}
    assert {m: moe.default_config(m, 8, 256, 128, fp8=True).block for m in blocks} == blocks


def test_warps_share_k_where_it_is_long_and_have_all_of_it_where_it_is_short():
    splits = {320: 1, 448: 1, 512: 2, 1024: 4, 2880: 4}
    assert {i: moe.default_config(256, 8, 256, i).second.split for i in splits} == splits
    assert moe.default_config(64, 8, 256, 768).second.split is None
    for m, intermediate, block in ((256, 64, 16), (256, 256, 16), (64, 256, 8), (64, 512, 8)):
        assert moe.default_config(m, 8, 256, intermediate).second == ShortConfig(block)


def test_few_ctas_have_more_warps_and_more_on_the_way():
    deep = GroupedConfig(8, warps=8, depth=2)
    for m, intermediate, first in ((1, 256, deep), (4, 256, deep), (5, 256, None), (1, 1024, deep), (1, 2048, None)):
        assert moe.default_config(m, 8, 256, intermediate).first == (first or GroupedConfig(8, ahead=True))


def test_a_short_k_of_wide_blocks_has_more_ctas():
    ctas = {512: (2, 4), 513: (2, 2), 2048: (2, 2)}
    for intermediate, want in ctas.items():
        config = moe.default_config(1024, 8, 256, intermediate, fp8=True)
        assert (config.first.ctas, config.second.ctas) == want
    assert moe.default_config(1024, 8, 256, 512).second.ctas == 3


def routed(kind, m, topk, experts):
    """Choices of m tokens, each of `topk` different experts: any, one expert for all among them, or of the first few alone."""
    generator = torch.Generator().manual_seed(m)
    pool = {"any": experts, "hot": experts - 1, "few": topk}[kind]
    ids = torch.stack([torch.randperm(pool, generator=generator)[:topk] for _ in range(m)]).int()
    if kind == "hot":
        ids[:, 0] = experts - 1
    return ids


def wide(columns, depth=64, rows=128, stages=4, warpgroups=2, ctas=1):
    launch = PrefillConfig(rows, columns, depth, stages, warpgroups, ctas)
    return MoeConfig(launch, launch)


NARROW = [
    *(MoeConfig(GroupedConfig(block), GroupedConfig(block)) for block in (8, 16)),
    MoeConfig(GroupedConfig(8, ahead=True, warps=8), GroupedConfig(8, tiles=3)),
    MoeConfig(GroupedConfig(16, tiles=8, ahead=True), GroupedConfig(16, tiles=5, warps=8)),
    MoeConfig(GroupedConfig(32), GroupedConfig(32, tiles=2, warps=8)),
    MoeConfig(GroupedConfig(16, split=1), GroupedConfig(16, tiles=1, warps=8, split=2)),
    MoeConfig(GroupedConfig(8, warps=8, depth=2), GroupedConfig(8, depth=3)),
    MoeConfig(GroupedConfig(8), ShortConfig(8)),
    MoeConfig(GroupedConfig(16), ShortConfig(16, strip=2, ahead=2, warps=8)),
    MoeConfig(GroupedConfig(8), ShortConfig(8, strip=3, ahead=3)),
]
WIDE = [
    moe.default_config(40, 1, 1, 128),
    moe.default_config(1000, 1, 1, 128),
    wide(32, depth=128, rows=256),
]
FP8 = [
    moe.default_config(40, 1, 1, 128, fp8=True),
    moe.default_config(1000, 1, 1, 128, fp8=True),
]

# Sizes that divide by everything, and that do not: hidden by 8 and 64, intermediate by 8, 16 and 64.
LAYERS = [
    (16, 512, 256, 4, SILU, False),
    (8, 576, 200, 2, SWIGLU, True),
    (9, 130, 36, 3, SWIGLU, True),
]


# Tokens and how they are routed.
ROUTINGS = {
    "cuda": ((1, "any"), (5, "any"), (40, "any"), (40, "hot"), (40, "few"), (300, "any")),
    "cpu": ((17, "hot"),),
}


def check(configs, experts, hidden, intermediate, topk, activation, with_bias, fmt, device, *, fp8=False):
    operand = torch.float8_e4m3fn if fp8 else torch.bfloat16
    layer, decoded, biases = layer_of(experts, hidden, intermediate, fmt, activation, with_bias, device, operand)
    for m, kind in ROUTINGS[device]:
        x = randn(m, hidden, seed=3).bfloat16().to(device)
        ids, weights = routed(kind, m, topk, experts).to(device), torch.rand(m, topk, device=device)
        want = exact(x, ids, weights, decoded, biases, activation, fp8)
        for config in configs:
            space = moe.workspace(m, topk, layer, config, fp8=fp8)
            space.slots.fill_(torch.nan)
            # Where the columns lie; beyond them zeros are expected.
            of_column = (
                torch.tensor(COLUMNS).repeat(space.hidden.shape[1] // 32) + torch.arange(space.hidden.shape[1]) // 32 * 32
            )
            written = of_column if config.is_wide else torch.arange(space.hidden.shape[1])
            space.hidden[:, (written < intermediate).to(device)] = torch.nan
            outs = []
            for pdl in (False, True, True) if device == "cuda" else (True,):
                out = torch.full_like(x, torch.nan)
                outs.append(moe.run(x, ids, weights, layer, out, space=space, config=config, pdl=pdl))
            # Rounding to bfloat16, between the products, of each pair and of the result, is 0.0029 together. What lies between
            # may be rounded to another E4M3 number than the exact one, 1/16 off, and FP8 tensor cores add with 14 bits.
            error = (outs[0].double() - want).norm() / want.norm()
            assert error < (8e-3 if fp8 else 3.5e-3), (m, kind, config)
            assert all(torch.equal(outs[0], out) for out in outs)


@pytest.mark.gpu
@pytest.mark.parametrize("fmt", [MXFP4, NVFP4], ids=str)
@pytest.mark.parametrize("layer", LAYERS, ids=lambda layer: f"{layer[1]}x{layer[2]}")
def test_a_gpu_computes_the_layer(layer, fmt):
    check(NARROW, *layer, fmt, "cuda")


@pytest.mark.gpu
@pytest.mark.triton_3_6
@pytest.mark.parametrize("fmt", [MXFP4, NVFP4], ids=str)
@pytest.mark.parametrize("layer", LAYERS, ids=lambda layer: f"{layer[1]}x{layer[2]}")
def test_a_gpu_computes_the_layer_in_wide_blocks(layer, fmt):
    check(WIDE, *layer, fmt, "cuda")


@pytest.mark.gpu
@pytest.mark.triton_3_6
@pytest.mark.parametrize("layer", LAYERS, ids=lambda layer: f"{layer[1]}x{layer[2]}")
def test_a_gpu_computes_the_layer_in_fp8(layer):
    check(FP8, *layer, MXFP4, "cuda", fp8=True)


# The blocks are those of the last kernel but one.
EARLY = ("words", "scales", "row_scale", "bias", "blocks")
KERNELS = [
    (routing, "_order", ()),
    (routing, "_gather", ()),
    (grouped, "_grouped", EARLY),
    (grouped_short, "_short", EARLY),
    (grouped_prefill, "_kernel", ()),
    (quantization, "quantize_row", ()),
    (routing, "_combine", ()),
]


@from_ptx
@pytest.mark.parametrize(
    ("layer", "fmt", "configs", "fp8"),
    [
        (LAYERS[2], MXFP4, NARROW, False),
        (LAYERS[0], NVFP4, NARROW[-3:], False),
        (LAYERS[1], NVFP4, NARROW[6:7], False),
        (LAYERS[2], NVFP4, WIDE[:1], False),
        (LAYERS[1], MXFP4, WIDE[2:], False),
        (LAYERS[1], MXFP4, FP8[:1], True),
    ],
    ids=["narrow", "narrow aligned", "deep", "wide", "wider", "fp8"],
)
def test_the_ptx_computes_the_layer(layer, fmt, configs, fp8, monkeypatch):
    emulate(monkeypatch, *KERNELS, counting=[grouped_prefill])
    check(configs, *layer, fmt, "cpu", fp8=fp8)


@pytest.mark.gpu
def test_choices_of_other_gpus_count_for_nothing_and_a_token_does_not_see_the_others():
    layer, decoded, biases = layer_of(8, 256, 128, NVFP4, device="cuda")
    x = randn(33, 256).bfloat16().cuda()
    ids, weights = routed("any", 33, 4, 8).cuda(), torch.rand(33, 4, device="cuda")
    ids[::3, 1] = -1
    ids[5] = 8
    config = NARROW[0]  # for one token too: other kernels add in another order
    space = moe.workspace(33, 4, layer, config)
    out = moe.run(x, ids, weights, layer, torch.full_like(x, torch.nan), space=space, config=config)
    want = exact(x, ids, weights, decoded, biases, SILU)
    assert (out.double() - want).norm() / want.norm() < 3.5e-3
    assert out[5].eq(0).all()
    alone = moe.workspace(1, 4, layer, config)
    for token in (0, 7, 32):
        one = slice(token, token + 1)
        again = moe.run(x[one], ids[one], weights[one], layer, torch.empty_like(x[one]), space=alone, config=config)
        assert torch.equal(again, out[one])


@pytest.mark.gpu
def test_a_layer_in_a_cuda_graph_follows_its_inputs():
    layer, decoded, biases = layer_of(8, 256, 128, MXFP4, device="cuda")
    x, out = randn(20, 256).bfloat16().cuda(), torch.empty(20, 256, dtype=torch.bfloat16, device="cuda")
    ids, weights = routed("any", 20, 2, 8).cuda(), torch.rand(20, 2, device="cuda")
    config = moe.default_config(20, 2, 8, 128)
    space = moe.workspace(20, 2, layer, config)

    def call():
        return moe.run(x, ids, weights, layer, out, space=space, config=config, pdl=True)

    call()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
        call()
    for kind in ("hot", "few", "any"):
        ids.copy_(routed(kind, 20, 2, 8))
        x.copy_(randn(20, 256, seed=len(kind)))
        graph.replay()
        want = exact(x, ids, weights, decoded, biases, SILU)
        assert (out.double() - want).norm() / want.norm() < 3.5e-3
