"""The process that measures: replaced when it dies or is silent, and who is told what."""

import pytest

pytest.importorskip("triton")

from deadly_product import H200, WORK, end_at_once, measure

from fp4bench.evidence import journal
from fp4bench.evidence.journal import Journal
from fp4bench.tuning import campaign
from fp4bench.tuning.readings import Readings
from fp4bench.tuning.search import launches


def test_a_launch_that_kills_and_one_that_hangs_cost_a_process_each_and_no_more(tmp_path):
    path, seen = campaign.open_journal(tmp_path, H200), []
    assert campaign.measure_all([WORK], H200, path, until=0, silence=1.5, show=seen.append, measure=measure)
    readings = Readings(journal.read(path)[1])
    assert set(readings.failures()) == {(WORK, launches(WORK, H200)[at]) for at in (2, 4)}
    assert seen[-1].works_done == seen[-1].works == 1
    assert seen[-1].launches_done == seen[-1].launches == len(launches(WORK, H200))


def test_a_process_that_measures_nothing_is_an_error(tmp_path):
    path = campaign.open_journal(tmp_path, H200)
    with pytest.raises(campaign.CannotMeasureError, match="with 7"):
        campaign.measure_all([WORK], H200, path, until=0, silence=9, show=print, measure=end_at_once)


def test_a_journal_is_found_again_until_it_is_put_aside(tmp_path, monkeypatch):
    path = campaign.open_journal(tmp_path, H200)
    with Journal.reopen(path) as file:
        Readings((), file).finish(WORK)
    assert campaign.open_journal(tmp_path, H200) == path
    monkeypatch.setattr(campaign, "_kernels_hash", lambda: "other sources")
    assert campaign.open_journal(tmp_path, H200) != path
    monkeypatch.undo()
    aside = campaign.close_journal(path)
    assert not path.exists()
    assert journal.read(campaign.open_journal(tmp_path, H200))[1] == []
    assert len(journal.read(aside)[1]) == 1
