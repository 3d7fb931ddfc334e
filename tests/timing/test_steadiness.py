"""Samples are taken anew where the GPU was in a rare state: on a simulated one, whose launches are cheaper for a second."""

import pytest

from fp4bench.devices import find_device
from fp4bench.timing import steadiness
from fp4bench.timing.steadiness import Steadiness

TAKES = 0.3


class Machine:
    """A launch chain takes 24 us, and 20.5 within the given spans of time; sampling a case takes 0.3 s."""

    def __init__(self, *spans, noise=0.0):
        self.spans, self.noise, self.now, self.taken = spans, noise, 0.0, 0

    def look(self):
        self.now += 1e-3
        self.noise = -self.noise
        took = (20.5 if any(start <= self.now < stop for start, stop in self.spans) else 24.0) * (1 + self.noise)
        return took, took * 1980

    def sleep(self, seconds):
        self.now += seconds

    def take(self):
        """Whether samples are of the rare state, which a median shows from half of them on."""
        self.taken += 1
        start, self.now = self.now, self.now + TAKES
        rare = sum(max(0.0, min(stop, self.now) - max(begin, start)) for begin, stop in self.spans)
        return rare > TAKES / 2


def taken(machine, cases=20):
    """What `cases` measurements gave, and how often each was taken anew."""
    steady = Steadiness(machine.look, machine.sleep)
    return [steady.under(machine.take) for _ in range(cases)]


@pytest.mark.parametrize("start", [0.15, 0.4, 1.0, 2.05, 3.3])
def test_no_case_keeps_samples_of_a_rare_state_of_a_second(start):
    found = taken(Machine((start, start + 1.0)))
    assert [rare for rare, _ in found] == [False] * 20
    assert 0 < sum(retaken for _, retaken in found) <= 4


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


def test_a_process_that_begins_in_the_rare_state_finds_the_usual_one():
    found = taken(Machine((0.0, 0.2)))
    assert found[0] == (False, 3)  # until looks enough agree
    assert sum(retaken for _, retaken in found[1:]) == 0


def test_a_state_that_stays_becomes_the_usual_one():
    found = taken(Machine((2.0, 1e9)), cases=40)
    assert sum(retaken for _, retaken in found[-20:]) == 0


def test_a_device_that_is_never_steady_is_given_up():
    class Wild(Machine):
        def look(self):
            super().look()
            return (24.0 * (1 + 0.1 * (self.taken % 3)),)

    machine = Wild()
    found = taken(machine, cases=50)
    assert machine.taken <= 50 + 4 * 3 + 50 * 0.1
    # Nobody may read of them that looks found nothing.
    assert {retaken for _, retaken in found} == {None}


@pytest.mark.gpu
def test_looks_at_a_gpu_repeat():
    from fp4bench.timing.cuda_clock import _launches

    look = _launches(find_device("cuda"), 0.01)
    looks = sorted(look()[0] for _ in range(50))
    assert looks[0] > 0
    # Half of them, for the rare state may be met while this runs.
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

    from fp4bench.timing.clock import clock_for

    clock = clock_for(find_device("cuda"))
    x = torch.zeros(1 << 20, device="cuda")

    def chain():
        for _ in range(10):
            x.add_(1.0)

    assert clock._steadiness is not None

    def scaled(seen, share):
        return tuple(value * share for value in seen)

    look, looks = clock._steadiness._look, iter(range(1000))
    monkeypatch.setattr(clock._steadiness, "_look", lambda: scaled(look(), 0.85 if next(looks) == 1 else 1.0))
    assert clock.measure([lambda: x.add_(1.0)], x.nbytes).retaken is None
    assert clock.measure([chain], x.nbytes).retaken >= 1
    assert clock_for(find_device("cuda"), "sustained")._steadiness is None
