"""Which launches are measured, how a search is cut off and goes on, and which launch a table gets: by a made-up product."""

from contextlib import contextmanager

import pytest

from fp4bench.devices import Device
from fp4bench.evidence import journal
from fp4bench.evidence.journal import Journal
from fp4bench.kernels import configs
from fp4bench.kernels.configs import Work
from fp4bench.kernels.decode import DecodeConfig
from fp4bench.tuning import refresh
from fp4bench.tuning.readings import CAREFUL, QUICK, Readings
from fp4bench.tuning.search import MOST, DeviceLostError, WrongOutputError, finalists, launches, search

H200 = Device("cuda:0", "NVIDIA H200", (9, 0), 132, 60 << 20)
WORK = Work("bf16", "mxfp4", 8, 8192, 8192)


class MadeUp:
    """Seconds by launch, 10 us for others; what some do instead of computing; and what was asked for."""

    def __init__(self, seconds=None, instead=None):
        self.seconds, self.instead, self.asked = seconds or {}, instead or {}, []

    @contextmanager
    def open(self, work):
        self.work = work
        yield self

    def check(self, launch):
        self.asked.append(("check", launch))
        if launch in self.instead:
            raise self.instead[launch]

    def time(self, launch, careful):
        self.asked.append((CAREFUL if careful else QUICK, launch))
        seconds = self.seconds.get(launch, 1e-5)
        return (seconds, 9.0, 0.5 * seconds)

    def of(self, kind):
        return [launch for asked, launch in self.asked if asked == kind]


@pytest.fixture
def no_tables(monkeypatch):
    monkeypatch.setattr(configs, "tables_of", lambda device: [])
    monkeypatch.setattr(refresh, "tables_of", lambda device: [])


def best_of(readings, work=WORK):
    table, changes = refresh.refreshed(H200, {}, readings.works_done(), readings, lambda of: configs.choose(of, H200))
    (launch,) = [entry.launch for entry in table.entries if entry.work == work]
    return launch, changes


def test_all_launches_are_checked_and_timed_and_the_fastest_is_found(no_tables):
    all_of_them = launches(WORK, H200)
    product, readings = MadeUp({all_of_them[7]: 0.9e-5, all_of_them[9]: 0.95e-5}), Readings(())
    assert search([WORK], H200, product.open, readings)
    assert product.of("check") == product.of(QUICK) == all_of_them
    assert product.of(CAREFUL) == [all_of_them[7], all_of_them[9], all_of_them[0]]
    launch, (change,) = best_of(readings)
    assert launch == all_of_them[7]
    assert "9.00 us" in str(change)
    assert "10.00 us" in str(change)


def test_a_launch_is_replaced_only_by_one_that_is_faster_by_more_than_a_percent(no_tables):
    current, other = launches(WORK, H200)[:2]
    for seconds, kept in ((0.991e-5, current), (0.989e-5, other)):
        readings = Readings(())
        search([WORK], H200, MadeUp({other: seconds}).open, readings)
        launch, changes = best_of(readings)
        assert launch == kept
        assert bool(changes) == (kept == other)


def test_a_launch_that_is_wrong_or_raises_is_no_candidate_and_is_named(no_tables):
    current, wrong, refused = launches(WORK, H200)[:3]
    product = MadeUp({wrong: 1e-6, refused: 1e-6}, {wrong: WrongOutputError("3 elements"), refused: TypeError("no\nmore")})
    readings = Readings(())
    assert search([WORK], H200, product.open, readings)
    assert best_of(readings)[0] == current
    assert readings.failures() == {(WORK, wrong): "WrongOutputError: 3 elements", (WORK, refused): "TypeError: no"}
    assert wrong not in product.of(QUICK)


def test_when_the_current_launch_does_not_run_another_takes_its_place(no_tables):
    current, other = launches(WORK, H200)[:2]
    readings = Readings(())
    search([WORK], H200, MadeUp({other: 0.9999e-5}, {current: RuntimeError("x")}).open, readings)
    launch, (change,) = best_of(readings)
    assert launch == other
    assert "does not run" in str(change)


def test_the_current_launch_is_measured_with_care_however_slow_and_few_others():
    quick = {DecodeConfig(tiles): 1e-5 for tiles in range(1, 8)} | {DecodeConfig(8): 5e-5}
    assert len(finalists(quick, DecodeConfig(8))) == MOST + 1
    assert finalists(quick, DecodeConfig(8))[-1] == DecodeConfig(8)
    assert finalists({DecodeConfig(1): 1e-5, DecodeConfig(2): 1.07e-5}, DecodeConfig(1)) == [DecodeConfig(1)]


def test_a_search_that_is_stopped_goes_on_where_it_was(tmp_path, no_tables):
    all_of_them, product = launches(WORK, H200), MadeUp()
    with Journal.create(tmp_path, {"key": {}}) as file:
        left = iter([False] * 5 + [True] * 9)
        assert not search([WORK], H200, product.open, Readings((), file), enough=lambda: next(left))
    assert product.of(QUICK) == all_of_them[:5]
    with Journal.reopen(file.path) as again:
        readings = Readings(journal.read(file.path)[1], again)
        assert search([WORK], H200, product.open, readings)
        assert search([WORK], H200, product.open, readings)
    assert product.of(QUICK) == all_of_them
    assert best_of(Readings(journal.read(file.path)[1]))[0] == all_of_them[0]


def test_a_launch_that_ended_the_process_is_not_tried_again_and_one_that_the_user_stopped_is(tmp_path, no_tables):
    current, killer, slow = launches(WORK, H200)[:3]

    def search_with(product):
        with Journal.reopen(file.path) as open_file:
            return search([WORK], H200, product.open, Readings(journal.read(file.path)[1], open_file))

    with Journal.create(tmp_path, {"key": {}}) as file:
        pass
    with pytest.raises(SystemExit):
        search_with(MadeUp(instead={killer: SystemExit(9)}))
    with pytest.raises(KeyboardInterrupt):
        search_with(MadeUp(instead={slow: KeyboardInterrupt()}))
    product = MadeUp()
    assert search_with(product)
    assert killer not in product.of(QUICK)
    assert current not in product.of(QUICK)
    assert slow in product.of(QUICK)


def test_a_lost_gpu_ends_the_process_and_what_does_not_fit_ends_the_work_alone(no_tables):
    launch = launches(WORK, H200)[0]
    lost = MadeUp(instead={launch: RuntimeError("CUDA error: an illegal memory access was encountered")})
    readings = Readings(())
    with pytest.raises(DeviceLostError):
        search([WORK], H200, lost.open, readings)
    assert not readings.is_done(WORK)
    assert readings.why_not(WORK, launch)

    @contextmanager
    def full(work):
        raise RuntimeError("CUDA out of memory")
        yield

    assert search([WORK], H200, full, readings)
    assert readings.given_up() == {WORK: "RuntimeError: CUDA out of memory"}


def test_a_table_keeps_what_was_not_measured(monkeypatch):
    other = configs.Entry(Work("bf16", "mxfp4", 1, 512, 512), DecodeConfig(3), 1e-6)
    table = configs.Table(H200.name, (9, 0), 132, {"triton": "0"}, (other,))
    monkeypatch.setattr(refresh, "tables_of", lambda device: [table])
    readings = Readings(())
    search([WORK], H200, MadeUp().open, readings)
    made, _ = refresh.refreshed(H200, {"triton": "1"}, [WORK], readings, lambda work: DecodeConfig(1))
    assert made.entries[0] == other
    assert [entry.work for entry in made.entries] == [other.work, WORK]
    assert made.versions == {"triton": "1"}
