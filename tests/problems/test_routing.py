"""Which experts tokens go to: what holds of every routing, what each is named for, and recorded ones."""

import json
import re

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fp4bench.problems import ROUTINGS, Routing, read_routing


@st.composite
def draws(draw):
    """A routing and what to draw with it: tokens, experts, experts of a token."""
    experts = draw(st.integers(1, 40))
    name = draw(st.sampled_from([*ROUTINGS, "recorded"]))
    topk = draw(st.integers(1, experts))
    counts = tuple(draw(st.lists(st.integers(1, 99), min_size=experts, max_size=experts))) if name == "recorded" else None
    return Routing(name, draw(st.integers(0, 99)), counts), draw(st.integers(0, 30)), experts, topk


@settings(max_examples=150, deadline=None)
@given(draws())
def test_a_token_has_different_experts_and_weights_that_sum_to_one(drawn):
    routing, m, experts, topk = drawn
    choices = routing.choose(m, experts, topk)
    assert (choices.ids.shape, choices.ids.dtype) == ((m, topk), torch.int32)
    assert (choices.weights.shape, choices.weights.dtype) == ((m, topk), torch.float32)
    assert all(len(set(row)) == topk and set(row) <= set(range(experts)) for row in choices.ids.tolist())
    assert torch.allclose(choices.weights.sum(dim=1), torch.ones(m))
    assert (choices.weights > 0).all()
    assert (choices.weights.diff(dim=1) <= 0).all()
    loads = [choices.ids.eq(expert).sum().item() for expert in range(experts)]
    assert choices.hit == sum(load > 0 for load in loads)
    assert choices.most == max(loads, default=0)


@settings(max_examples=50, deadline=None)
@given(draws())
def test_a_draw_follows_from_the_seed(drawn):
    routing, m, experts, topk = drawn
    again = Routing(routing.name, routing.seed, routing.counts)
    assert torch.equal(routing.choose(m, experts, topk).ids, again.choose(m, experts, topk).ids)


@settings(max_examples=50, deadline=None)
@given(m=st.integers(0, 50), experts=st.integers(1, 40), data=st.data())
def test_balanced_loads_differ_by_one_at_most(m, experts, data):
    topk = data.draw(st.integers(1, experts))
    loads = Routing("balanced").choose(m, experts, topk).ids.flatten().bincount(minlength=experts)
    assert loads.max() - loads.min() <= 1


@settings(max_examples=50, deadline=None)
@given(m=st.integers(1, 50), experts=st.integers(1, 40), data=st.data())
def test_one_hot_sends_every_token_to_one_expert(m, experts, data):
    topk = data.draw(st.integers(1, experts))
    choices = Routing("one_hot").choose(m, experts, topk)
    assert choices.most == m
    if topk == 1:
        assert choices.hit == 1


def loads_of(routing, m=4000, experts=64, topk=4):
    return routing.choose(m, experts, topk).ids.flatten().bincount(minlength=experts).double()


def test_uniform_loads_are_even_and_zipf_loads_are_not():
    # 4000 tokens choose 4 of 64: 250 an expert, give or take 15.
    uniform, zipf = loads_of(Routing("uniform")), loads_of(Routing("zipf"))
    assert (uniform - 250).abs().max() < 6 * 250**0.5
    # The r-th expert's chance is 1/r, of which each token takes 4: the first is in nearly all, the 32nd in some 5 %.
    ordered = zipf.sort(descending=True).values
    assert ordered[0] > 0.6 * 4000
    assert ordered[31] < 0.1 * 4000
    assert ordered[0] < 4000


def test_slots_of_a_token_are_not_in_the_order_of_experts():
    ids = Routing("uniform").choose(500, 16, 2).ids
    assert 0.4 < (ids[:, 0] < ids[:, 1]).double().mean() < 0.6


def test_seeds_differ():
    first, second = (Routing("uniform", seed).choose(64, 64, 4).ids for seed in (0, 1))
    assert (first == second).double().mean() < 0.1
    assert (str(Routing("zipf")), str(Routing("zipf", 3))) == ("zipf", "zipf_s3")


def test_a_recorded_routing_follows_its_counts(tmp_path):
    path = tmp_path / "Layer 7.json"
    path.write_text(json.dumps({"counts": [0, 100, 300, 0, 600]}))
    routing = read_routing(path)
    assert re.fullmatch(r"layer_7_[0-9a-f]{6}", str(routing))
    loads = loads_of(routing, experts=5, topk=1)
    assert loads[[0, 3]].tolist() == [0, 0]
    assert loads / 4000 == pytest.approx([0, 0.1, 0.3, 0, 0.6], abs=0.03)
    path.write_text(json.dumps({"counts": [0, 100, 300, 1, 600]}))
    assert str(read_routing(path)) != str(routing)


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("{", "is not JSON"),
        ("[]", "has no counts"),
        ('{"counts": []}', "has no counts"),
        ('{"counts": [1, -1]}', "has no counts"),
        ('{"counts": [1, 0.5]}', "has no counts"),
        ('{"counts": [true]}', "has no counts"),
    ],
)
def test_a_file_that_records_no_routing_is_refused(tmp_path, text, why):
    path = tmp_path / "routing.json"
    path.write_text(text)
    with pytest.raises(ValueError, match=rf"^the routing .*routing\.json {why}"):
        read_routing(path)


def test_a_file_that_is_not_there_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"^cannot read the routing .*: No such file"):
        read_routing(tmp_path / "none.json")


@pytest.mark.parametrize(
    ("routing", "experts", "topk", "why"),
    [
        (Routing(), 4, 5, "a token has 1 to 4 experts, not 5"),
        (Routing(), 4, 0, "a token has 1 to 4 experts, not 0"),
        (Routing("r", counts=(1, 1)), 3, 1, "the routing r is of 2 experts, and the model has 3"),
        (Routing("r", counts=(1, 0, 1)), 3, 3, "the routing r has tokens at 2 experts, and each token needs 3"),
    ],
)
def test_what_cannot_be_chosen_is_refused(routing, experts, topk, why):
    with pytest.raises(ValueError, match=f"^{why}$"):
        routing.choose(8, experts, topk)


def test_unknown_names_are_refused():
    with pytest.raises(ValueError, match=r"^unknown routing 'random': known are uniform, zipf, one_hot, balanced, or the path"):
        Routing("random")
    with pytest.raises(ValueError, match=r"^a recorded routing cannot be named 'zipf'$"):
        Routing("zipf", counts=(1, 2))
