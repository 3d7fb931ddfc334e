"""How operands are kept out of the L2."""

import pytest

from fp4bench.timing.graphs import L2_TIMES, MOST_COPIES, copies_needed, must_flush

L2 = 60 << 20


@pytest.mark.parametrize("bytes_touched", [1 << 20, 6 << 20, 45 << 20, 170 << 20, 1 << 30])
def test_a_call_meets_its_operands_again_only_after_three_times_the_l2(bytes_touched):
    copies = copies_needed(bytes_touched, L2)
    assert 1 <= copies <= MOST_COPIES
    assert must_flush(bytes_touched, L2) or copies * bytes_touched >= L2_TIMES * L2


def test_large_operands_are_copied_no_more_than_placement_needs():
    assert copies_needed(300 << 20, L2) == 4
    assert copies_needed(1 << 30, L2) == 2  # beyond what address translation holds
    assert copies_needed(5 << 30, L2) == 1
    assert not must_flush(5 << 30, L2)


def test_tiny_operands_are_not_copied_by_the_thousand():
    assert copies_needed(20_000, L2) == 1
    assert must_flush(20_000, L2)
