"""The 128x4 blocked layout: cuBLAS documentation, "1D Block Scaling Factors Layout"."""

import contract
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from fp4bench.formats import layouts

# One empty, one tile exactly, one row either side of it, columns that are no multiple of 4.
SHAPES = [(1, 1), (1, 4), (127, 3), (128, 4), (129, 5), (130, 8), (128, 0), (0, 4), (0, 0), (300, 13)]
PADDED = {(1, 1): (128, 4), (128, 4): (128, 4), (129, 5): (256, 8), (256, 8): (256, 8), (257, 9): (384, 12), (0, 4): (0, 4)}


def offset(row, column, columns):
    """Where the byte of a scale lies, from the documentation."""
    tiles_across = -(-columns // 4)
    tile = (row // 128) * tiles_across + column // 4
    return tile * 512 + (row % 32) * 16 + (row % 128 // 32) * 4 + column % 4


def random_bytes(*shape):
    return torch.randint(1, 256, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


def test_scales_lie_where_the_contract_says():
    contract.check_blocked_layout(layouts.to_blocked)


@pytest.mark.parametrize(("shape", "padded"), PADDED.items(), ids=str)
def test_shapes_are_padded_to_whole_tiles(shape, padded):
    assert layouts.padded_shape(*shape) == padded
    assert layouts.to_blocked(random_bytes(*shape)).shape == (padded[0] * padded[1],)


@pytest.mark.parametrize(("rows", "columns"), SHAPES, ids=str)
def test_every_scale_lies_at_its_offset_and_the_padding_is_zero(rows, columns):
    scales = random_bytes(rows, columns)
    blocked = layouts.to_blocked(scales).tolist()
    for row in range(rows):
        for column in range(columns):
            at = offset(row, column, columns)
            assert blocked[at] == scales[row, column], (row, column)
            blocked[at] = 0  # no scale is 0: a byte taken twice would be seen
    assert not any(blocked)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(st.integers(0, 300), st.integers(0, 20), st.lists(st.integers(0, 3), max_size=2))
@example(127, 3, [])
@example(128, 4, [3])
@example(129, 5, [2, 2])
@example(130, 7, [0])
def test_from_blocked_is_the_inverse_of_to_blocked(rows, columns, lead):
    scales = random_bytes(*lead, rows, columns)
    blocked = layouts.to_blocked(scales)
    assert torch.equal(layouts.from_blocked(blocked, rows, columns), scales)


def test_each_expert_is_blocked_on_its_own():
    scales = random_bytes(3, 130, 5)
    blocked = layouts.to_blocked(scales)
    assert blocked.shape == (3, 256 * 8)
    for expert in range(3):
        assert torch.equal(blocked[expert], layouts.to_blocked(scales[expert]))
    assert torch.equal(layouts.from_blocked(blocked, 130, 5), scales)


@pytest.mark.parametrize("dtype", [torch.float8_e8m0fnu, torch.float8_e4m3fn, torch.uint8], ids=str)
def test_the_dtype_of_the_scales_is_kept(dtype):
    scales = random_bytes(130, 5).view(dtype)
    blocked = layouts.to_blocked(scales)
    assert blocked.dtype == dtype
    back = layouts.from_blocked(blocked, 130, 5)
    assert back.dtype == dtype
    assert torch.equal(back.view(torch.uint8), scales.view(torch.uint8))


def test_views_are_taken():
    scales = random_bytes(8, 260)
    assert torch.equal(layouts.to_blocked(scales.T), layouts.to_blocked(scales.T.contiguous()))
    assert torch.equal(layouts.to_blocked(scales[:, ::2]), layouts.to_blocked(scales[:, ::2].contiguous()))
    blocked = layouts.to_blocked(random_bytes(2, 128, 4))
    assert torch.equal(layouts.from_blocked(blocked[::2], 128, 4), layouts.from_blocked(blocked, 128, 4)[::2])


def test_bytes_that_do_not_fill_the_tiles_are_refused():
    with pytest.raises(ValueError, match="blocked scales of 129 x 5 take 2048 bytes, not 645"):
        layouts.from_blocked(random_bytes(645), 129, 5)
