"""Runs of values: 32 or more neighbours along k, whole blocks and whole rotations, that one thread owns.

So the largest magnitude of a block, the butterfly of a rotation and the packing of codes need registers only, and nothing is
shared between threads but the way out to memory.
"""

import triton
import triton.language as tl


@triton.jit
def runs_of_tile(tile, tiles_across, ROWS: tl.constexpr, RUNS: tl.constexpr, RUN: tl.constexpr):  # type: ignore[no-untyped-def]
    """Row and first column of each run of a tile. -> int32 (ROWS * RUNS), twice."""
    thread = tl.arange(0, ROWS * RUNS)
    row = (tile // tiles_across) * ROWS + thread // RUNS
    return row, ((tile % tiles_across) * RUNS + thread % RUNS) * RUN


@triton.jit
def load_runs(x, row, column, m, k, stride, RUN: tl.constexpr, WIDTH: tl.constexpr, WHOLE: tl.constexpr):  # type: ignore[no-untyped-def]
    """Runs of x as float32, 0 outside of it. -> (N, RUN).

    Loaded in parts of 16 bytes a thread and joined: loaded at once, Triton would deal a run out over threads.
    """
    place = x + (row.to(tl.int64) * stride + column)[:, None] + tl.arange(0, WIDTH)[None, :]
    inside = ((row < m) & (column < k))[:, None]
    parts = ()
    for i in tl.static_range(RUN // WIDTH):
        if not WHOLE:
            inside = (row < m)[:, None] & (column[:, None] + (i * WIDTH + tl.arange(0, WIDTH)[None, :]) < k)
        parts = parts + (tl.load(place + i * WIDTH, mask=inside, other=0.0).to(tl.float32),)
    for _ in tl.static_range(6):
        if len(parts) > 1:
            wider = ()
            for i in tl.static_range(len(parts) // 2):
                wider = wider + (side_by_side(parts[2 * i], parts[2 * i + 1], parts[0].shape[1]),)
            parts = wider
    return parts[0]  # type: ignore[misc]  # a tuple that has grown


@triton.jit
def side_by_side(a, b, WIDTH: tl.constexpr):  # type: ignore[no-untyped-def]
    """Columns of a and b in turn, WIDTH of each. (N, W), (N, W) -> (N, 2 W)."""
    shape: tl.constexpr = (a.shape[0], a.shape[1] // WIDTH, WIDTH)
    joined = tl.join(tl.reshape(a, shape), tl.reshape(b, shape))
    return tl.reshape(tl.permute(joined, (0, 1, 3, 2)), (a.shape[0], 2 * a.shape[1]))


@triton.jit
def pairs(v):  # type: ignore[no-untyped-def]
    """Even and odd columns. (N, W) -> (N, W / 2), twice."""
    return tl.split(tl.reshape(v, (v.shape[0], v.shape[1] // 2, 2)))


@triton.jit
def rotated(v, SIZE: tl.constexpr):  # type: ignore[no-untyped-def]
    """`fp4bench.hadamard.rotate` in the same order of the same additions. float32 (N, W) -> (N, W)."""
    n: tl.constexpr = v.shape[0]
    width: tl.constexpr = v.shape[1]
    for i in tl.static_range(7):
        if (2 << i) <= SIZE:
            a, b = tl.split(tl.permute(tl.reshape(v, (n, width // (2 << i), 2, 1 << i)), (0, 1, 3, 2)))
            v = tl.reshape(tl.permute(tl.join(a + b, a - b), (0, 1, 3, 2)), (n, width))
    if SIZE > 1:
        v = v * (SIZE**-0.5)
    return v


@triton.jit
def largest_of_blocks(even, odd, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    """Largest magnitude of each block, NaN if it holds one. float32 (N, W / 2), twice -> (N, W / BLOCK)."""
    blocks: tl.constexpr = 2 * even.shape[1] // BLOCK
    largest = tl.maximum(tl.abs(even), tl.abs(odd), propagate_nan=tl.PropagateNan.ALL)
    for _ in tl.static_range(7):
        if largest.shape[1] > blocks:
            a, b = pairs(largest)
            largest = tl.maximum(a, b, propagate_nan=tl.PropagateNan.ALL)
    return largest


@triton.jit
def spread(of_blocks, WIDTH: tl.constexpr):  # type: ignore[no-untyped-def]
    """A number of each block for each of its columns. (N, B) -> (N, WIDTH)."""
    shape: tl.constexpr = (of_blocks.shape[0], of_blocks.shape[1], WIDTH // of_blocks.shape[1])
    return tl.reshape(tl.broadcast_to(of_blocks[:, :, None], shape), (of_blocks.shape[0], WIDTH))


@triton.jit
def blocked_places(row, column, columns):  # type: ignore[no-untyped-def]
    """Offsets of scales in the 128x4 blocked layout of `columns` padded columns."""
    tile = (row // 128) * (columns // 4) + column // 4
    return tile * 512 + (row % 32) * 16 + (row % 128 // 32) * 4 + column % 4
