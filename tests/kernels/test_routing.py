"""Routing and the weighted sum: interpreted, against lists; and what their arguments must be."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

triton = pytest.importorskip("triton", reason="needs Triton")

from compiling import compile_triton  # noqa: E402

from fp4bench.kernels import routing  # noqa: E402
from fp4bench.kernels.experts import COLUMNS  # noqa: E402


def test_interpreted_each_expert_gets_its_pairs_in_order():
    environment = os.environ | {"TRITON_INTERPRET": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    script = Path(__file__).with_name("interpret_routing.py")
    done = subprocess.run([sys.executable, script], env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("rows", [1, 8, 16])
@pytest.mark.parametrize("experts", [1, 7, 256])
def test_no_routing_makes_more_blocks_than_the_bound_and_one_makes_as_many(experts, rows):
    for pairs in (0, 1, 7, 8, 100, 2048):
        # The worst: one pair to each expert that can have one, and the others to fill blocks of the first.
        begun = min(pairs, experts)
        worst = [1] * begun
        if begun:
            worst[0] += pairs - begun
        assert sum(-(-count // rows) for count in worst) == routing.most_blocks(pairs, experts, rows)
        even = [pairs // experts + (i < pairs % experts) for i in range(experts)]
        assert sum(-(-count // rows) for count in even) <= routing.most_blocks(pairs, experts, rows)


def test_arguments_that_do_not_fit_are_refused():
    ids = torch.zeros(4, 2, dtype=torch.int32)
    positions = torch.empty(8, dtype=torch.int32)
    blocks = torch.empty(routing.most_blocks(8, 4, 8), 4, dtype=torch.int32)
    for bad in (ids.long(), ids[:, :1], ids.expand(2, 4, 2).transpose(0, 1)):
        with pytest.raises(ValueError, match="choices are int32"):
            routing.order(bad, 4, 8, positions, blocks)
    with pytest.raises(ValueError, match="may make 4 blocks of 8"):
        routing.order(ids, 4, 8, positions, blocks[:-1])
    slots, weights, out = torch.zeros(4, 2, 6), torch.zeros(4, 2), torch.zeros(4, 6)
    with pytest.raises(ValueError, match="slots"):
        routing.combine(slots, ids, 4, weights.double(), out)
    with pytest.raises(ValueError, match="slots"):
        routing.combine(slots, ids, 4, weights, out[:, :5])
    for rows, gathered in ((torch.zeros(4, 6), torch.zeros(8, 30)), (torch.zeros(3, 6), torch.zeros(8, 32))):
        with pytest.raises(ValueError, match="8 pairs"):
            routing.gather(rows, positions, 2, gathered)
    rows = torch.zeros(4, 6).to(torch.float8_e4m3fn)
    with pytest.raises(ValueError, match="not padded to 32 columns"):
        routing.gather(rows, positions, 2, torch.zeros(8, 32).to(rows.dtype))


def test_rows_are_combined_and_gathered_16_bytes_at_a_time():
    """Where columns are a multiple of 16 as in real models; rows and slots, that is: choices and scales are single numbers."""
    types = {
        "slots": "*bf16",
        "ids": "*i32",
        "weights": "*fp32",
        "out": "*bf16",
        "n": "i32",
        "experts": "i32",
        "out_stride": "i32",
    }
    constants = {"TOPK": 8, "COLUMNS": 1024, "PDL": False}
    ptx = compile_triton(routing._combine, types, constants, set(types) - {"experts"}, warps=4).asm["ptx"]
    assert ptx.count("ld.global.v4.b32") == 8
    assert set(re.findall(r"st\.global\S*", ptx)) == {"st.global.v4.b32"}
    types = dict.fromkeys(("rows", "positions", "out"), "*i32") | dict.fromkeys(("scales", "out_scales"), "*fp32")
    types |= dict.fromkeys(("m", "topk", "k", "k_out", "stride", "out_stride"), "i32")
    constants = {"COLUMNS": 1024, "IN_ORDER": True, "HAS_SCALES": False}
    ptx = compile_triton(routing._gather, types, constants, set(types) - {"m", "topk"}, warps=4).asm["ptx"]
    assert ptx.count("ld.global.v4.b32") == ptx.count("st.global.v4.b32") == ptx.count("st.global") == 2


@pytest.mark.gpu
@pytest.mark.parametrize(("m", "topk", "experts"), [(1, 8, 256), (64, 8, 256), (2048, 8, 256), (2048, 4, 128), (300, 2, 9)])
@pytest.mark.parametrize("pdl", [False, True])
def test_a_gpu_orders_as_torch_does(m, topk, experts, pdl):
    generator = torch.Generator().manual_seed(m)
    ids = torch.stack([torch.randperm(experts, generator=generator)[:topk] for _ in range(m)]).int().cuda()
    positions = torch.full((ids.numel(),), -1, dtype=torch.int32, device="cuda")
    blocks = torch.full((routing.most_blocks(ids.numel(), experts, 8), 4), -1, dtype=torch.int32, device="cuda")
    routing.order(ids, experts, 8, positions, blocks, pdl=pdl)
    assert torch.equal(positions, ids.flatten().argsort(stable=True).int())
    counts = ids.flatten().bincount(minlength=experts)
    used = blocks[blocks[:, 2] > 0].long()
    assert torch.equal(torch.zeros_like(counts).index_add(0, used[:, 0], used[:, 2]), counts)
    assert torch.equal(used[:, 1], used[:, 2].cumsum(0) - used[:, 2])


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float8_e4m3fn], ids=str)
@pytest.mark.parametrize("k", [7168, 2880, 130])
def test_a_gpu_gathers_as_torch_does(k, dtype):
    in_order = dtype is torch.float8_e4m3fn
    rows = torch.randn(5, k + -k % 64 if in_order else k, generator=torch.Generator().manual_seed(k)).to(dtype).cuda()
    positions = torch.randperm(10, generator=torch.Generator().manual_seed(1), dtype=torch.int32).cuda()
    out = torch.full((10, k + -k % 64), 7.0, device="cuda").to(dtype)
    routing.gather(rows, positions, 2, out)
    tokens = torch.nn.functional.pad(rows.float()[positions.long() // 2], (0, out.shape[1] - rows.shape[1]))
    want = tokens if in_order else tokens.unflatten(1, (-1, 32))[..., torch.tensor(COLUMNS, device="cuda")].flatten(1)
    assert torch.equal(out.float(), want)
