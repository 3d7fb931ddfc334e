"""Which rows of x an expert gets, in blocks, and what becomes of their results: the two ends of a MoE layer, on the GPU.

A **pair** is one of a token's choices: pair token * topk + slot. `order` sorts pairs by expert, within an expert by number, in
one launch of a program an expert and without any exchange between them: each counts all choices. A **block** is up to `rows`
pairs of one expert that stand together in that order; `experts` with no pair have none. How many blocks there are is known on
the GPU alone, `most_blocks` is the bound that a launch is made for.
"""

from math import ceil

import torch
import triton
import triton.language as tl
from triton.language.extra import cuda

# Fields of a block in memory, int32 each: its expert, its first position in the order, its pairs, and, of the first block
# alone, how many blocks there are.
BLOCK_FIELDS = 4

# Choices that a program has in registers at a time: 16 a thread. 8192 choices of 256 experts take 16.5 us on an H200; with 16
# warps and 8192 at a time they took 20.6, as each program counts the choices of all experts.
_CHUNK = 2048
_COLUMNS = 1024  # of the output, that a program of `combine` computes


def most_blocks(pairs: int, experts: int, rows: int) -> int:
    """The most blocks that so many pairs can make: an expert begins each, beyond that each is full."""
    begun = min(pairs, experts)
    return begun + (pairs - begun) // rows


def order(
    ids: torch.Tensor, experts: int, rows: int, positions: torch.Tensor, blocks: torch.Tensor, *, pdl: bool = False
) -> None:
    """Sort the pairs of ids (m, topk), int32 and contiguous, by expert, and cut them into blocks of up to `rows`.

    positions: int32 (m * topk), gets the pairs in their order. blocks: int32 (most_blocks, BLOCK_FIELDS), gets the blocks in
    the order of their experts; those that are left over have 0 pairs. Choices outside of 0 .. experts - 1 (an expert of another
    GPU) are left out; the positions of as many pairs at the end are then not written.
    """
    pairs = ids.numel()
    if ids.dtype != torch.int32 or positions.shape != (pairs,) or not ids.is_contiguous():
        raise ValueError(
            f"choices are int32 and contiguous with a position for each, not {ids.dtype}, {tuple(positions.shape)}"
        )
    if blocks.shape != (most_blocks(pairs, experts, rows), BLOCK_FIELDS) or not blocks.is_contiguous():
        raise ValueError(f"{pairs} pairs of {experts} experts may make {most_blocks(pairs, experts, rows)} blocks of {rows}")
    if pairs == 0:
        return
    _order[(experts,)](
        ids,
        positions,
        blocks,
        pairs,
        experts,
        blocks.shape[0],
        rows,
        BINS=max(32, triton.next_power_of_2(experts)),
        CHUNK=min(_CHUNK, max(32, triton.next_power_of_2(pairs))),
        PDL=pdl,
        num_warps=4,
        **_launch(pdl),
    )


def gather(
    rows: torch.Tensor,
    positions: torch.Tensor,
    topk: int,
    out: torch.Tensor,
    scales: torch.Tensor | None = None,
    out_scales: torch.Tensor | None = None,
) -> None:
    """The rows of tokens in the order of pairs, their columns as wgmma needs them for weights of `experts`.

    rows: (m, k), bfloat16, the last axis contiguous. out: (pairs, k padded to 32 or more), zero for columns from k on; position
    p of it has column `experts.COLUMNS[p]` of each 32.
    Or rows and out: float8_e4m3fn, contiguous, of the same k, a multiple of 32, in the order `fp8_rows.Columns.EXPERTS`.
    scales: float32 (m), of the rows; out_scales: float32 (pairs). Both or neither.
    """
    pairs, k = positions.shape[0], rows.shape[1]
    if (
        out.shape[0] != pairs
        or out.shape[1] < k
        or out.shape[1] % 32
        or out.dtype != rows.dtype
        or pairs != rows.shape[0] * topk
    ):
        raise ValueError(f"{pairs} pairs of {tuple(rows.shape)} {rows.dtype} do not fit {tuple(out.shape)} {out.dtype}")
    in_order = rows.dtype is torch.float8_e4m3fn
    if in_order and not (out.shape[1] == k and rows.is_contiguous() and out.is_contiguous()):
        raise ValueError(f"rows {tuple(rows.shape)} {rows.dtype} are not contiguous, or not padded to {out.shape[1]} columns")
    if pairs == 0:
        return
    bits = torch.int32 if in_order else torch.int16
    rows, out = rows.view(bits), out.view(bits)
    columns = min(4096 // rows.element_size(), triton.next_power_of_2(out.shape[1]))
    _gather[(pairs, ceil(out.shape[1] / columns))](
        rows,
        positions,
        out,
        positions if scales is None else scales,
        positions if out_scales is None else out_scales,
        rows.shape[0],
        topk,
        rows.shape[1],
        out.shape[1],
        rows.stride(0),
        out.stride(0),
        COLUMNS=columns,
        IN_ORDER=in_order,
        HAS_SCALES=scales is not None,
        num_warps=4,
    )


def combine(
    slots: torch.Tensor, ids: torch.Tensor, experts: int, weights: torch.Tensor, out: torch.Tensor, *, pdl: bool = False
) -> torch.Tensor:
    """out[token] = the sum over slots j, in their order, of weights[token, j] * slots[token, j], in float32, rounded once.

    slots: any float (m, topk, n), contiguous. weights: float32 (m, topk), contiguous. out: (m, n), the last axis contiguous.
    Slots whose choice in `ids` is outside of 0 .. experts - 1 do not count, and are not read. Returns out.
    """
    m, topk, n = slots.shape
    if out.shape != (m, n) or weights.shape != (m, topk) or ids.shape != (m, topk) or weights.dtype != torch.float32:
        raise ValueError(f"{tuple(slots.shape)} slots, {tuple(weights.shape)} {weights.dtype} weights, out {tuple(out.shape)}")
    if m == 0:
        return out
    columns = min(_COLUMNS, triton.next_power_of_2(n))
    _combine[(m, ceil(n / columns))](
        slots, ids, weights, out, n, experts, out.stride(0), TOPK=topk, COLUMNS=columns, PDL=pdl, num_warps=4, **_launch(pdl)
    )
    return out


def _launch(pdl: bool) -> dict[str, bool]:
    """The option of overlapped launch, where it is wanted: Triton's interpreter has none."""
    return {"launch_pdl": True} if pdl else {}


@triton.jit(do_not_specialize=["pairs", "experts", "most", "rows"])
def _order(  # type: ignore[no-untyped-def]
    ids,
    positions,
    blocks,
    pairs,
    experts,
    most,
    rows,
    BINS: tl.constexpr,
    CHUNK: tl.constexpr,
    PDL: tl.constexpr,
):
    if PDL:
        cuda.gdc_wait()
        cuda.gdc_launch_dependents()
    own = tl.program_id(0)
    lane = tl.arange(0, CHUNK)
    counts = tl.zeros((BINS,), tl.int32)
    for start in range(0, pairs, CHUNK):
        choice = tl.load(ids + start + lane, mask=start + lane < pairs, other=-1)
        counts += tl.histogram(tl.maximum(choice, 0), BINS, mask=(choice >= 0) & (choice < experts))
    expert = tl.arange(0, BINS)
    first = tl.sum(tl.where(expert < own, counts, 0), axis=0)
    count = tl.sum(tl.where(expert == own, counts, 0), axis=0)
    needed = (counts + rows - 1) // rows
    first_block = tl.sum(tl.where(expert < own, needed, 0), axis=0)
    all_blocks = tl.sum(needed, axis=0)

    place = first
    for start in range(0, pairs, CHUNK):
        choice = tl.load(ids + start + lane, mask=start + lane < pairs, other=-1)
        is_own = choice == own
        rank = tl.cumsum(is_own.to(tl.int32), axis=0)
        tl.store(positions + place + rank - 1, start + lane, mask=is_own)
        place += tl.sum(is_own.to(tl.int32), axis=0)

    for i in range(0, (count + rows - 1) // rows):
        block = blocks + (first_block + i) * 4
        tl.store(block, own)
        tl.store(block + 1, first + i * rows)
        tl.store(block + 2, tl.minimum(rows, count - i * rows))
    if own == 0:
        tl.store(blocks + 3, all_blocks)
    for i in range(all_blocks + own, most, experts):
        tl.store(blocks + i * 4 + 2, 0)


@triton.jit(do_not_specialize=["m", "topk"])
def _gather(  # type: ignore[no-untyped-def]
    rows,
    positions,
    out,
    scales,
    out_scales,
    m,
    topk,
    k,
    k_out,
    stride,
    out_stride,
    COLUMNS: tl.constexpr,
    IN_ORDER: tl.constexpr,
    HAS_SCALES: tl.constexpr,
):
    position = tl.program_id(0)
    # Positions of choices that were left out hold anything: no row that is read must lie outside.
    token = tl.minimum(tl.maximum(tl.load(positions + position) // topk, 0), m - 1)
    place = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    value = tl.load(rows + token.to(tl.int64) * stride + place, mask=place < k, other=0)
    if not IN_ORDER:
        # Columns of 32 are lane t's pair h of word j, the even or the odd one of a pair (e).
        value = tl.permute(tl.reshape(value, (COLUMNS // 32, 4, 2, 2, 2)), (0, 2, 3, 1, 4))
        value = tl.reshape(value, (COLUMNS,))
    tl.store(out + position.to(tl.int64) * out_stride + place, value, mask=place < k_out)
    if HAS_SCALES:
        if tl.program_id(1) == 0:
            tl.store(out_scales + position, tl.load(scales + token))


@triton.jit(do_not_specialize=["experts"])
def _combine(  # type: ignore[no-untyped-def]
    slots,
    ids,
    weights,
    out,
    n,
    experts,
    out_stride,
    TOPK: tl.constexpr,
    COLUMNS: tl.constexpr,
    PDL: tl.constexpr,
):
    if PDL:
        cuda.gdc_wait()
        cuda.gdc_launch_dependents()
    token = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    total = tl.zeros((COLUMNS,), tl.float32)
    for slot in tl.static_range(TOPK):
        pair = token * TOPK + slot
        choice = tl.load(ids + pair)
        # One comparison makes the mask: the interpreter of Triton 3.9 takes none that a scalar's was combined with. It is one
        # with a number of columns, the same for 16 neighbours: so they are loaded together.
        counted = tl.where((choice >= 0) & (choice < experts), n, 0)
        value = tl.load(slots + pair * n + column, mask=column < counted, other=0.0)
        total += tl.load(weights + pair) * value.to(tl.float32)
    tl.store(out + token * out_stride + column, total.to(out.dtype.element_ty), mask=column < n)
