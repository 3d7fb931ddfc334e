"""Pacing: gaps grow until the clock of paced samples is that of a rested device, and sampling stops when enough is known."""

import itertools
import time
from dataclasses import dataclass, replace

import pytest

from fp4bench.timing.pacing import PACED, SUSTAINED, find_gap, known, take


@dataclass(frozen=True)
class Fake:
    seconds: float
    sm_mhz: float | None = 1800.0


class HotDevice:
    """A device whose clock falls by 10 % where a burst does not follow at least `needs` seconds of rest."""

    def __init__(self, needs, seconds=2e-3):
        self.needs, self.seconds, self.rested, self.rests = needs, seconds, 0.0, []

    def sleep(self, seconds):
        self.rested = seconds
        self.rests.append(seconds)

    def read(self):
        mhz = 1800.0 if self.rested >= self.needs else 1620.0
        self.rested = 0.0
        return Fake(self.seconds, mhz)


@pytest.mark.parametrize(("needs", "gap"), [(0.0, 0.01), (0.01, 0.01), (0.015, 0.02), (0.03, 0.04)])
def test_the_gap_doubles_until_the_clock_stays_up(needs, gap):
    device = HotDevice(needs)
    found, samples = find_gap(device.read, PACED, device.sleep)
    assert (found, len(samples)) == (gap, 3)


def test_a_long_sample_needs_fewer():
    def read():
        time.sleep(0.012)
        return Fake(0.012)

    samples, gap = take(read, PACED, lambda seconds: None)
    assert (len(samples), gap) == (5, PACED.gap_seconds)


def test_without_a_clock_the_first_gap_stands():
    assert find_gap(lambda: Fake(2e-3, None), PACED, lambda seconds: None)[0] == 0.01


def test_steady_samples_stop_at_the_fewest():
    samples, gap = take(lambda: Fake(1e-3), PACED, lambda seconds: None)
    assert len(samples) == PACED.fewest
    assert gap == 0.01


def test_unsteady_samples_go_on_to_the_most():
    wave = itertools.count(1.0e-3, 1e-4)
    samples, _ = take(lambda: Fake(next(wave)), replace(PACED, budget_seconds=60), lambda seconds: None)
    assert len(samples) == PACED.most


def test_time_bounds_unsteady_sampling():
    wave = itertools.cycle([1.0e-3, 1.2e-3])
    samples, _ = take(lambda: Fake(next(wave)), replace(PACED, budget_seconds=0.0), lambda seconds: None)
    assert len(samples) == PACED.fewest


def test_no_sample_is_dropped_or_reordered():
    times = itertools.count(1.0, 1e-1)
    samples, _ = take(lambda: Fake(next(times)), replace(PACED, budget_seconds=60), lambda seconds: None)
    # Two readings come before: the first call and the rested one.
    assert [s.seconds for s in samples] == pytest.approx([1.2 + i / 10 for i in range(PACED.most)])


def test_sustained_sampling_works_without_rest():
    slept = []
    samples, gap = take(lambda: Fake(1e-3), replace(SUSTAINED, warm_seconds=0.0), slept.append)
    assert (gap, slept) == (0.0, [])
    assert len(samples) == SUSTAINED.fewest


@pytest.mark.parametrize(
    ("seconds", "precision", "enough"),
    [
        ([1.0] * 9, 1e-3, True),
        # Of nine, the second and the eighth bound the median: one wild sample on each side says nothing.
        ([0.5, *[1.0] * 7, 9.0], 1e-3, True),
        ([0.5, 0.99, *[1.0] * 5, 1.01, 9.0], 1e-3, False),
        ([0.5, 0.99, *[1.0] * 5, 1.01, 9.0], 2e-2, True),
    ],
)
def test_the_bounds_of_the_median_are_order_statistics(seconds, precision, enough):
    assert known(seconds, precision) is enough
