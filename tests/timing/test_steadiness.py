"""Samples are taken anew where a graph's launches are cheap: on a simulated GPU, whose graphs of a rare moment are."""

import pytest

from fp4bench.devices import find_device
from fp4bench.timing import steadiness
from fp4bench.timing.steadiness import Steadiness

TAKES = 0.3


class Machine:
    """A chain of launches takes 24 us, and 20.5 in graphs captured within the given spans of time; a case takes 0.3 s."""

    def __init__(self, *spans, noise=0.0):
        self.spans, self.noise, self.now, self.taken = spans, noise, -1.0, 0

    def look(self):
        self.noise = -self.noise
        took = (20.5 if any(start <= self.now < stop for start, stop in self.spans) else 24.0) * (1 + self.noise)
        return took, took * 1980

    def sleep(self, seconds):
        self.now += seconds

    def take(self):
        """What launches cost in the graph of these samples."""
        self.taken += 1
        look = self.look()
        self.now += TAKES
        return look


def taken(machine, cases=20):
    """Whether each of `cases` measurements kept samples of cheap launches, and how often it was taken anew."""
    steady = Steadiness(machine.look(), machine.sleep)
    machine.now = 0.0  # a process sets up for longer
    found = [steady.under(machine.take, lambda look: look) for _ in range(cases)]
    return [(look[0] < 22, retaken) for look, retaken in found]


@pytest.mark.parametrize("start", [0.15, 0.4, 1.0, 2.05, 3.3])
def test_no_case_keeps_samples_of_a_rare_moment(start):
    found = taken(Machine((start, start + 1.0)))
    assert [rare for rare, _ in found] == [False] * 20
    assert 0 < sum(retaken for _, retaken in found) <= 4


def test_nor_of_a_moment_of_five_seconds():
    found = taken(Machine((2.05, 7.05)))
    assert [rare for rare, _ in found] == [False] * 20
    assert sum(retaken for _, retaken in found) == 4


def test_without_the_looks_a_case_would_keep_them(monkeypatch):
    monkeypatch.setattr(steadiness, "_APART", 1.0)
    assert any(rare for rare, _ in taken(Machine((2.05, 3.05))))


@pytest.mark.parametrize("changed", ["seconds", "cycles"])
def test_a_lower_clock_is_no_other_state(changed):
    class Hot(Machine):
        """Its clock is a tenth lower after every third case, and launches take as many nanoseconds, or as many cycles."""

        def look(self):
            seconds, cycles = super().look()
            hot = 1.1 if self.taken % 3 == 0 else 1.0
            return (seconds * hot, cycles) if changed == "seconds" else (seconds, cycles / hot)

    assert [retaken for _, retaken in taken(Hot(noise=0.005))] == [0] * 20


def test_noise_of_half_a_percent_costs_nothing():
    machine = Machine(noise=0.005)
    assert [retaken for _, retaken in taken(machine)] == [0] * 20
    assert machine.taken == 20


def test_a_process_that_begins_in_a_rare_moment_finds_the_usual_one():
    found = taken(Machine((-1.1, -0.9)))
    assert found[0] == (False, 3)  # until looks enough agree
    assert sum(retaken for _, retaken in found[1:]) == 0


def test_a_state_that_stays_becomes_the_usual_one():
    found = taken(Machine((2.0, 1e9)), cases=40)
    assert found[-20:] == [(True, 0)] * 20


def test_a_device_that_is_never_steady_is_given_up():
    class Wild(Machine):
        def look(self):
            return (24.0 * (1 + 0.1 * (self.taken % 3)),)

    machine = Wild()
    found = taken(machine, cases=50)
    assert machine.taken <= 50 + 4 * 3
    # Nobody may read of one that was off that a look found nothing.
    assert sorted((retaken for _, retaken in found[-30:]), key=str) == [0] * 10 + [None] * 20


@pytest.mark.gpu
def test_looks_at_graphs_repeat():
    from fp4bench.timing.clock import clock_for
    from fp4bench.timing.cuda_clock import _launch_cost
    from fp4bench.timing.graphs import TimedGraph

    device = find_device("cuda")
    chain = clock_for(device)._launches
    graphs = (TimedGraph([chain], 1, device, chain=chain) for _ in range(50))
    looks = sorted(_launch_cost([graph.read()])[1] for graph in graphs)
    assert looks[0] > 0
    # Half of them, for a rare moment may be met while this runs.
    assert looks[37] / looks[12] < 1.02


def test_calls_of_many_kernels_are_chains():
    from fp4bench.timing.graphs import is_chain

    assert is_chain(("49 kernels, sha256 0123456789ab",))
    assert is_chain(None)  # without the CUDA bindings nobody knows
    assert not is_chain(("gemm(132,1,1)x(384,1,1)",))
    assert not is_chain(tuple(f"kernel{i}(1,1,1)x(32,1,1)" for i in range(8)))


@pytest.mark.gpu
def test_a_gpu_clock_takes_samples_anew_where_a_look_is_off(monkeypatch):
    import torch

    from fp4bench.timing import cuda_clock
    from fp4bench.timing.clock import clock_for

    clock = clock_for(find_device("cuda"))
    x = torch.zeros(1 << 20, device="cuda")

    def chain():
        for _ in range(10):
            x.add_(1.0)

    cost, looks = cuda_clock._launch_cost, iter(range(1000))

    def first_is_off(readings):
        share = 0.85 if next(looks) == 0 else 1.0
        return tuple(value * share for value in cost(readings))

    monkeypatch.setattr(cuda_clock, "_launch_cost", first_is_off)
    assert clock.measure([lambda: x.add_(1.0)], x.nbytes).retaken is None
    assert next(looks) == 0
    looks = iter(range(1000))
    assert clock.measure([chain], x.nbytes).retaken >= 1
    assert clock_for(find_device("cuda"), "sustained")._steadiness is None
