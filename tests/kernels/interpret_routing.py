"""Run by test_routing.py in a process whose Triton interprets: the order of pairs and their blocks, and sums over slots."""

import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from interpreting import put_right

from fp4bench.kernels import routing
from fp4bench.kernels.experts import COLUMNS

UNTOUCHED = -7


def ordered(ids, experts, rows):
    """-> positions and blocks, made over what no order can be."""
    positions = torch.full((ids.numel(),), UNTOUCHED, dtype=torch.int32)
    blocks = torch.full((routing.most_blocks(ids.numel(), experts, rows), routing.BLOCK_FIELDS), UNTOUCHED, dtype=torch.int32)
    routing.order(ids, experts, rows, positions, blocks)
    return positions, blocks


def check_order(ids, experts, rows):
    positions, blocks = ordered(ids, experts, rows)
    choices = ids.flatten().tolist()
    want = sorted((pair for pair in range(len(choices)) if 0 <= choices[pair] < experts), key=lambda pair: choices[pair])
    assert positions[: len(want)].tolist() == want
    assert positions[len(want) :].eq(UNTOUCHED).all()
    # Each expert's pairs are cut into full blocks and what is left, none for an expert without; the other blocks are empty.
    expected, first = [], 0
    for expert in range(experts):
        pairs = choices.count(expert)
        expected += [[expert, first + i, min(rows, pairs - i)] for i in range(0, pairs, rows)]
        first += pairs
    assert blocks[: len(expected), :3].tolist() == expected
    assert blocks[len(expected) :, 2].eq(0).all()
    assert blocks[:1, 3].tolist() == [len(expected)] * len(blocks[:1])


@st.composite
def choices(draw):
    """(m, topk) choices: any, all of one expert, or of few of many; some of an expert that is elsewhere."""
    experts = draw(st.sampled_from([1, 3, 12]))
    m, topk = draw(st.integers(0, 40)), draw(st.integers(1, 4))
    highest = draw(st.sampled_from([0, experts - 1, experts - 1, experts]))
    lowest = draw(st.sampled_from([0, 0, -1]))
    ids = draw(st.lists(st.integers(lowest, highest), min_size=m * topk, max_size=m * topk))
    return torch.tensor(ids, dtype=torch.int32).view(m, topk), experts


@settings(max_examples=25, deadline=None, database=None)
@given(choices(), st.sampled_from([1, 8, 16]))
@example((torch.zeros(0, 2, dtype=torch.int32), 4), 8)
@example((torch.tensor([[3]], dtype=torch.int32), 4), 8)
@example((torch.full((25, 1), 2, dtype=torch.int32), 4), 8)
def check_any_order(choices, rows):
    check_order(*choices, rows)


def check_several_chunks():
    """More pairs than a program has in registers at a time, an expert's among all of them."""
    ids = torch.randint(0, 5, (routing._CHUNK // 2 + 10, 3), generator=torch.Generator().manual_seed(1), dtype=torch.int32)
    check_order(ids, 5, 16)


@settings(max_examples=8, deadline=None, database=None)
@given(choices(), st.randoms(use_true_random=False))
def check_tokens_in_another_order(choices, random):
    """The same tokens under other numbers: each expert gets the same ones."""
    ids, experts = choices
    tokens = list(range(len(ids)))
    random.shuffle(tokens)

    def of_experts(ids, name):
        positions, blocks = ordered(ids, experts, 8)
        found = {}
        for expert, first, pairs, _ in blocks[blocks[:, 2] > 0].tolist():
            found.setdefault(expert, []).extend(name(pair) for pair in positions[first : first + pairs].tolist())
        return {expert: sorted(pairs) for expert, pairs in found.items()}

    topk = ids.shape[1]
    as_they_were = of_experts(ids, lambda pair: divmod(pair, topk))
    assert of_experts(ids[tokens], lambda pair: (tokens[pair // topk], pair % topk)) == as_they_were


def check_gather():
    generator = torch.Generator().manual_seed(2)
    for m, topk, k, dtype in ((3, 2, 5, torch.bfloat16), (2, 3, 4160, torch.float8_e4m3fn), (0, 2, 8, torch.bfloat16)):
        rows = torch.randn(m, k + 3, generator=generator).to(dtype)[:, :k]
        if dtype is torch.float8_e4m3fn:
            rows = rows.contiguous()
        scales, out_scales = torch.rand(m, generator=generator), torch.full((m * topk,), torch.nan)
        positions = torch.randperm(m * topk, generator=generator, dtype=torch.int32)
        out = torch.full((m * topk, k + -k % 64), 7.0).to(dtype)
        with_scales = dtype is torch.float8_e4m3fn
        routing.gather(rows, positions, topk, out, *((scales, out_scales) if with_scales else ()))
        tokens = positions.long() // topk
        natural = torch.nn.functional.pad(rows.float()[tokens], (0, -k % 64)).unflatten(1, (-1, 32))
        want = natural if with_scales else natural[..., torch.tensor(COLUMNS)]
        if with_scales:
            assert torch.equal(out_scales, scales[tokens])
        assert torch.equal(out.float(), want.flatten(1))
    # Positions that were never written do not lead out of x.
    out = torch.zeros(4, 32, dtype=torch.bfloat16)
    lost = torch.tensor([-(2**31), 2**31 - 1, 0, 9], dtype=torch.int32)
    routing.gather(torch.ones(2, 32, dtype=torch.bfloat16), lost, 2, out)
    assert out.eq(1).all()


def check_combine():
    generator = torch.Generator().manual_seed(0)
    for m, topk, n in ((1, 1, 5), (3, 4, 1030), (0, 2, 8)):
        slots, weights = torch.randn(m, topk, n, generator=generator), torch.rand(m, topk, generator=generator)
        ids = torch.randint(0, 4, (m, topk), generator=generator, dtype=torch.int32)
        if m > 1:
            ids[1, 2], ids[2, 0] = -1, 4  # of another GPU: never written
            slots[1, 2] = slots[2, 0] = torch.nan
        out = torch.full((m, n + 3), torch.nan, dtype=torch.bfloat16)
        routing.combine(slots, ids, 4, weights, out[:, :n])
        want = torch.zeros(m, n)
        for slot in range(topk):
            own = ((ids[:, slot] >= 0) & (ids[:, slot] < 4))[:, None]
            want += torch.where(own, weights[:, slot, None] * slots[:, slot], 0.0)
        assert torch.equal(out[:, :n], want.bfloat16())
        assert out[:, n:].isnan().all()


if __name__ == "__main__":
    put_right()
    check_any_order()
    check_several_chunks()
    check_tokens_in_another_order()
    check_gather()
    check_combine()
