"""Reading and refusing stored runs, and gathering them into a baseline."""

import copy
import json
import time

import pytest
from recorded import CASES, MACHINE, cpu_timing, edited, stored_run, timing, write

from fp4bench.evidence.baselines import BaselineError, accepted, card_of, find, load, way_of
from fp4bench.evidence.record import FORMAT


def test_a_run_is_read(tmp_path):
    run = load(write(tmp_path / "0001_a.json", stored_run()), MACHINE)
    assert run.name == "0001_a"
    assert tuple(run.cases) == CASES
    assert run.cases[CASES[0]].fastest < run.cases[CASES[0]].median
    assert run.machine_info["torch"] == "2.11.0"
    assert run.session == "GPU-1 2026-11-01"
    assert run.info["wall_s"] == 61.0


def without(run, *keys):
    """The run without what these keys lead to."""
    changed = json.loads(json.dumps(run))
    inner = changed
    for key in keys[:-1]:
        inner = inner[key]
    del inner[keys[-1]]
    return changed


def with_stat(name, value):
    return edited(stored_run(), lambda bench: bench["stats"].update({name: value}))


DAMAGED = [
    pytest.param(
        stored_run() | {"machine_info": {"machine": "NVIDIA-B200"}}, "recorded on NVIDIA-B200.*is NVIDIA-H200", id="gpu"
    ),
    pytest.param(stored_run(format=99), f"format 99, and this fp4bench reads {FORMAT}", id="newer-format"),
    pytest.param(stored_run(format=1), "format 1, .*record it anew", id="older-format"),
    pytest.param({"benchmarks": []}, "not a run that fp4bench stored: it has no 'fp4bench'", id="foreign"),
    pytest.param(without(stored_run(), "fp4bench", "session"), "has no 'session'", id="no-session"),
    pytest.param(without(stored_run(), "datetime"), "has no 'datetime'", id="no-datetime"),
    pytest.param(without(stored_run(), "benchmarks", 3, "extra_info"), "has no 'extra_info'", id="no-record"),
    pytest.param(without(stored_run(), "benchmarks", 3, "stats", "median"), "has no 'median'", id="no-median"),
    pytest.param(with_stat("median", float("nan")), "no positive median of", id="nan"),
    pytest.param(with_stat("median", -1.0), "no positive median of", id="negative"),
    pytest.param(with_stat("min", None), "no positive min of", id="null"),
    pytest.param(edited(stored_run(), lambda b: b["extra_info"].update(cycles=0)), "no positive cycles of", id="no-cycles"),
    pytest.param(
        edited(stored_run(), lambda b: b["extra_info"].update(case_id=CASES[1])), f"holds {CASES[1]} twice", id="twice"
    ),
    pytest.param(stored_run() | {"benchmarks": 3}, "not a run that fp4bench stored", id="a-number-for-cases"),
    pytest.param(json.dumps(stored_run())[:-20], "truncated or not JSON", id="truncated"),
    pytest.param("", "truncated or not JSON", id="empty"),
    pytest.param("[" * 100_000, "truncated or not JSON", id="too-deep"),
    pytest.param("[1, 2]", "not a run that fp4bench stored", id="a-list"),
    pytest.param("7", "not a run that fp4bench stored", id="a-number"),
]


@pytest.mark.parametrize(("run", "message"), DAMAGED)
def test_what_cannot_be_compared_is_refused_in_one_line(tmp_path, run, message):
    path = write(tmp_path / "0001_a.json", run)
    with pytest.raises(BaselineError, match=message) as refusal:
        load(path, MACHINE)
    assert str(path) in str(refusal.value)
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize(("run", "message"), DAMAGED)
def test_one_damaged_run_refuses_the_baseline(tmp_path, run, message):
    write(tmp_path / "0001_a.json", stored_run(1))
    path = write(tmp_path / "0002_b.json", run)
    write(tmp_path / "0003_c.json", stored_run(3))
    with pytest.raises(BaselineError, match=message) as refusal:
        accepted(tmp_path, MACHINE)
    assert str(path) in str(refusal.value)


def test_a_file_that_cannot_be_read_is_refused(tmp_path):
    with pytest.raises(BaselineError, match="cannot read the baseline"):
        load(tmp_path, MACHINE)  # a folder


def test_a_file_that_is_not_text_is_refused(tmp_path):
    path = tmp_path / "0001_a.json"
    path.write_bytes(b"\xff\xfe\x00garbage")
    with pytest.raises(BaselineError, match="truncated or not JSON"):
        load(path, MACHINE)


def test_nothing_stored_is_no_baseline(tmp_path):
    assert accepted(tmp_path / "absent", MACHINE) is None
    write(tmp_path / "notes.json", "{}")
    assert accepted(tmp_path, MACHINE) is None


def test_all_accepted_runs_are_the_baseline_in_order_of_their_numbers(tmp_path):
    for number in (2, 10, 1):
        write(tmp_path / f"{number:04}_z.json", stored_run(number, day=min(number, 2)))
    for ignored in ("0001_z.samples.json", "12_short.json", "notes.json"):
        write(tmp_path / ignored, "not a run")
    baseline = accepted(tmp_path, MACHINE)
    assert [run.name for run in baseline.runs] == ["0001_z", "0002_z", "0010_z"]
    assert [session for session, _ in baseline.cases[CASES[0]]] == ["GPU-1 2026-11-01", "GPU-1 2026-11-02", "GPU-1 2026-11-02"]
    assert baseline.newest(CASES[0]) is baseline.runs[-1].cases[CASES[0]]
    assert baseline.cards == ("GPU-1",)
    assert baseline.label == "0001_z..0010_z (3 runs, 1 card)"


def test_runs_of_several_cards_are_one_baseline_for_a_run_of_any(tmp_path):
    for number, card in ((1, "GPU-2"), (2, "GPU-1"), (3, "GPU-2")):
        write(tmp_path / f"{number:04}_z.json", stored_run(number, session=f"{card} 2026-11-01"))
    baseline = accepted(tmp_path, MACHINE)
    assert baseline.cards == ("GPU-2", "GPU-1")
    assert baseline.label == "0001_z..0003_z (3 runs, 2 cards)"
    assert baseline.card is None
    here = baseline.on("GPU-1")
    assert (here.card, here.runs, here.cases) == ("GPU-1", baseline.runs, baseline.cases)


@pytest.mark.parametrize(
    ("session", "card"), [("GPU-1 2026-11-01", "GPU-1"), ("an odd cpu 2026-11-01", "an odd cpu"), ("s", "")]
)
def test_the_card_of_a_session(session, card):
    assert card_of(session) == card


def test_a_case_that_some_runs_hold_is_in_the_baseline(tmp_path):
    write(tmp_path / "0001_a.json", stored_run(1))
    write(tmp_path / "0002_b.json", stored_run(2, cases=CASES[:3]))
    baseline = accepted(tmp_path, MACHINE)
    assert [len(baseline.cases[case_id]) for case_id in CASES[2:4]] == [2, 1]


@pytest.mark.parametrize(("key", "value"), [("clock", "cuda_events"), ("pace", "sustained"), ("l2", "warm"), ("bytes", 7)])
def test_a_case_whose_work_or_clock_changed_starts_anew(tmp_path, key, value):
    def edit(bench):
        bench["extra_info"][key] = value

    for number, other in ((1, False), (2, True), (3, False), (4, False)):
        run = stored_run(number)
        write(tmp_path / f"{number:04}_a.json", edited(run, edit) if other else run)
    baseline = accepted(tmp_path, MACHINE)
    assert [session[-2:] for session, _ in baseline.cases[CASES[0]]] == ["03", "04"]
    assert [session[-2:] for session, _ in baseline.cases[CASES[1]]] == ["01", "02", "03", "04"]


def way_edited(run, **record):
    run = copy.deepcopy(run)
    for bench in run["benchmarks"]:
        bench["extra_info"].update(record)
    return run


def days(baseline, case_id=CASES[0]):
    return [session[-2:] for session, _ in baseline.cases.get(case_id, ())]


def test_each_way_of_timing_has_a_baseline(tmp_path):
    ways = {1: {}, 2: {}, 3: {"pace": "sustained"}, 4: {"l2": "warm"}, 5: {"l2": "cold_flush", "copies": 1}}
    for number, record in ways.items():
        write(tmp_path / f"{number:04}_a.json", way_edited(stored_run(number), **record))
    baseline = accepted(tmp_path, MACHINE)
    assert days(baseline) == ["05"]
    assert days(baseline.on("GPU-1", "sustained", False)) == ["03"]
    assert days(baseline.on("GPU-1", "paced", True)) == ["04"]
    assert days(baseline.on("GPU-1", "sustained", True)) == []
    (tmp_path / "0005_a.json").unlink()
    assert days(accepted(tmp_path, MACHINE).on("GPU-1", "paced", False)) == ["01", "02"]


@pytest.mark.parametrize("warm", [True, False])
def test_the_wall_clock_knows_no_warm_and_cold(tmp_path, warm):
    write(tmp_path / "0001_a.json", way_edited(stored_run(1), clock="perf_counter", l2="warm"))
    assert days(accepted(tmp_path, MACHINE).on("GPU-1", "paced", warm)) == ["01"]


def test_the_way_of_several_timings():
    cold, warm, wall = timing(1.0), timing(1.0, l2="warm"), cpu_timing(1.0)
    assert way_of([cold, wall]) == ("paced", False)
    assert way_of([warm, warm]) == ("paced", True)
    assert way_of([wall]) == ("paced", None)
    assert way_of([cold, warm, timing(1.0, pace="sustained")]) == (None, None)


def test_what_moved_starts_anew_on_all_cards_and_only_as_it_was_timed(tmp_path):
    write(tmp_path / "0001_a.json", stored_run(1, session="GPU-2 2026-11-01"))
    write(tmp_path / "0002_a.json", way_edited(stored_run(2), pace="sustained"))
    write(tmp_path / "0003_a.json", stored_run(3, accepted={"restarts": [CASES[0]]}))
    write(tmp_path / "0004_a.json", stored_run(4))
    baseline = accepted(tmp_path, MACHINE)
    paced, sustained = baseline.on("GPU-1", "paced", False), baseline.on("GPU-1", "sustained", False)
    assert (days(paced), days(paced, CASES[1])) == (["03", "04"], ["01", "03", "04"])
    assert days(sustained) == ["02"]


def test_what_was_retired_is_gone_until_a_run_holds_it_again(tmp_path):
    write(tmp_path / "0001_a.json", stored_run(1))
    write(tmp_path / "0002_a.json", stored_run(2, cases=CASES[1:], accepted={"retired": [CASES[0], "never was"]}))
    assert CASES[0] not in accepted(tmp_path, MACHINE).cases
    assert days(accepted(tmp_path, MACHINE), CASES[1]) == ["01", "02"]
    write(tmp_path / "0003_a.json", stored_run(3))
    assert days(accepted(tmp_path, MACHINE)) == ["03"]


def test_one_run_is_found_by_its_number_or_path(tmp_path):
    for number in (1, 2, 10):
        write(tmp_path / f"{number:04}_a.json", stored_run(number))
    elsewhere = write(tmp_path / "other" / "run.json", stored_run(5))
    assert [run.name for run in find([tmp_path], "0002", MACHINE).runs] == ["0002_a"]
    assert find([tmp_path], "00", MACHINE).label == "0010_a"  # the newest of those that match
    assert find([tmp_path], str(elsewhere), MACHINE).runs[0].datetime.startswith("2026-11-05")


def test_a_run_that_is_not_there_is_named_with_those_that_are(tmp_path):
    write(tmp_path / "0001_first.json", stored_run())
    with pytest.raises(BaselineError, match=r"no stored run '0007' in .*, which holds 0001_first"):
        find([tmp_path], "0007", MACHINE)
    with pytest.raises(BaselineError, match=r"no stored run '0007' in .*, which holds nothing"):
        find([tmp_path / "absent"], "0007", MACHINE)


def test_a_number_that_two_folders_give_is_nobodys(tmp_path):
    taken, stored = tmp_path / "baselines", tmp_path / ".benchmarks"
    for path in (taken / "0001_first.json", stored / "0001_run.json", stored / "0002_run.json"):
        write(path, stored_run(1))
    assert find([taken, stored], "0002", MACHINE).label == "0002_run"
    assert find([taken, stored], "0001_f", MACHINE).label == "0001_first"
    with pytest.raises(BaselineError, match=r"'0001' is .*0001_first\.json and .*0001_run\.json: give the path of the one"):
        find([taken, stored], "0001", MACHINE)
    assert find([taken, stored], str(stored / "0001_run.json"), MACHINE).label == "0001_run"


def test_a_large_baseline_loads_quickly(tmp_path):
    cases = tuple(f"case-{i}" for i in range(500))
    for number in range(1, 21):
        write(tmp_path / f"{number:04}_a.json", stored_run(number, cases=cases))
    start = time.process_time()
    assert len(accepted(tmp_path, MACHINE).cases) == 500
    assert time.process_time() - start < 2
