"""Where units of x lie in a warp's slots: the numbers that the kernel computes, asked here by numpy, and what `ldmatrix` does.

The copies and reads themselves run in `test_decode`, which has the kernel as it is compiled too.
"""

import numpy as np
import pytest

pytest.importorskip("triton", reason="needs Triton")

import ptx

from fp4bench.kernels import slots

each_number_of_rows = pytest.mark.parametrize("rows", [8, 16])


def slot_of(x):
    """What `ask` leaves in a slot. int (rows, 32), two elements of x each -> int (32 rows), by place."""
    slot = np.full(x.size, -1)
    for i in range(len(x) // 4):
        row, chunk = slots.asked.fn(i, ptx.LANES)
        at = slots.place.fn(row, chunk)
        assert (at % 16 == 0).all()
        for word in range(4):
            slot[at // 4 + word] = x[row, 4 * chunk + word]
    return slot


def ldmatrix(slot, addresses):
    """.m8n8.x4 by the PTX ISA: lanes 8 j to 8 j + 7 point to the rows of matrix j; lane 4 g + t gets word t of each row g."""
    return [slot[addresses[8 * j + ptx.LANES // 4] // 4 + ptx.LANES % 4] for j in range(4)]


@each_number_of_rows
def test_a_warp_asks_for_each_piece_of_x_once(rows):
    x = np.arange(rows * 32).reshape(rows, 32)
    assert sorted(slot_of(x)) == sorted(x.flatten())
    assert slots.slot_bytes.fn(rows) == 4 * x.size


def test_a_lane_asks_for_one_chunk_of_every_fourth_row():
    """`ask` has one address, from which it steps."""
    (row, chunk), *others = (slots.asked.fn(i, ptx.LANES) for i in range(4))
    for i, (later, same) in enumerate(others, start=1):
        assert (later == row + 4 * i).all()
        assert (same == chunk).all()


def test_a_lane_takes_from_places_that_its_first_tells():
    first = slots.place.fn(*slots.taken.fn(0, ptx.LANES))
    for i in range(4):
        assert (slots.later.fn(first, i) == slots.place.fn(*slots.taken.fn(i, ptx.LANES))).all()


@each_number_of_rows
def test_x_comes_back_as_the_right_operand(rows):
    x = np.arange(rows * 32).reshape(rows, 32)
    slot, g, t = slot_of(x), ptx.LANES // 4, ptx.LANES % 4
    for i in range(rows // 4):
        registers = ldmatrix(slot, slots.place.fn(*slots.taken.fn(i, ptx.LANES)))
        for pair, register in enumerate(registers):
            # As `decode` loads x straight into registers: 8 rows, 32 columns, pairs that are 8 columns apart.
            assert register.tolist() == x[g + 8 * (i // 2), 16 * (i % 2) + 4 * pair + t].tolist()


def banks(places):
    """Groups of four banks that eight lanes use, which are served at once."""
    return [len(set(places[start : start + 8] % 128 // 16)) for start in range(0, 32, 8)]


def test_lanes_that_are_served_at_once_have_banks_of_their_own():
    for i in range(4):
        assert banks(slots.place.fn(*slots.taken.fn(i, ptx.LANES))) == [8] * 4
        assert banks(slots.place.fn(*slots.asked.fn(i, ptx.LANES))) == [8] * 4
    row, chunk = slots.taken.fn(0, ptx.LANES)
    assert banks(row * 128 + chunk * 16) == [1] * 4  # as it would be with each chunk at its own number
