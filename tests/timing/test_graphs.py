"""How operands are kept out of the L2."""

import pytest

from fp4bench.devices import find_device
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


@pytest.mark.gpu
def test_graphs_of_one_memory_find_the_same_places_whatever_was_before():
    import torch

    from fp4bench.timing.graphs import GraphMemory, TimedGraph

    device = find_device("cuda")
    memory, places = GraphMemory(1 << 30, device.torch_name), []

    def call(size):
        made = torch.zeros(size, dtype=torch.int8, device=device.torch_name)
        places.append(made.data_ptr())
        return made

    def capture(*sizes):
        places.clear()
        TimedGraph([lambda size=size: call(size) for size in sizes], 2, device, memory=memory)
        return list(places)

    first = capture(1000, 50 << 20)
    assert len(set(first)) == 4  # rounds do not share outputs: the first round's live until the second's are made
    capture(300 << 20, 1000, 20_000, 3 << 20)
    assert capture(1000, 50 << 20) == first
