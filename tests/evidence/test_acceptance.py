"""Which runs become a baseline, and what is written."""

import copy
import json
from datetime import date

import pytest
from recorded import CASES, MACHINE, edited, scaled, stored_run, timings, write

from fp4bench.evidence.acceptance import AcceptError, accept, examine
from fp4bench.evidence.baselines import BaselineError, accepted
from fp4bench.evidence.histories import has_own_runs, is_provisional
from fp4bench.evidence.verdict import POLICIES, Outcome, judge

TODAY = date(2026, 11, 21)


def take(tmp_path, *runs, name="night", reason="the first ones", retire=(), **options):
    paths = [write(tmp_path / "runs" / f"{i:04}_x.json", run) for i, run in enumerate(runs, start=1)]
    return accept(examine(paths, tmp_path / "baselines", **options), name, reason, TODAY, retire)


def test_runs_are_taken_in_order_with_name_reason_and_date(tmp_path):
    paths = take(tmp_path, stored_run(1), stored_run(2))
    assert [path.name for path in paths] == ["0001_night.json", "0002_night.json"]
    assert {path.parent for path in paths} == {tmp_path / "baselines" / MACHINE}
    baseline = accepted(tmp_path / "baselines" / MACHINE, MACHINE)
    assert len(baseline.runs) == 2
    assert baseline.runs[0].info["accepted"] == {"name": "night", "reason": "the first ones", "date": "2026-11-21"}
    assert [run.datetime for run in baseline.runs] == [stored_run(n)["datetime"] for n in (1, 2)]


def test_what_is_written_is_the_run_without_samples(tmp_path):
    run = stored_run(1)
    (path,) = take(tmp_path, run)
    written = json.loads(path.read_text(encoding="utf-8"))
    for bench in run["benchmarks"]:
        del bench["stats"]["data"]
    run["fp4bench"]["accepted"] = {"name": "night", "reason": "the first ones", "date": "2026-11-21"}
    assert written == run


def test_a_committed_file_is_small(tmp_path):
    (path,) = take(tmp_path, stored_run(1, cases=tuple(f"{CASES[0]}-{i}" for i in range(480))))
    assert path.stat().st_size < 1_000_000


def test_the_files_of_finished_runs_stay(tmp_path):
    take(tmp_path, stored_run(1))
    assert json.loads((tmp_path / "runs" / "0001_x.json").read_text(encoding="utf-8")) == stored_run(1)


def changed(**top):
    return copy.deepcopy(stored_run(1)) | top


REFUSED = [
    pytest.param(stored_run(1, invalid=["a canary drifted", "busy"]), r"is invalid \(a canary drifted; busy\)", id="invalid"),
    pytest.param(stored_run(1, complete=False), "is incomplete", id="incomplete"),
    pytest.param(stored_run(1, complete=None), "is incomplete", id="completeness-unknown"),
    pytest.param(stored_run(1, failed=["a", "b", "c", "d", "e"]), r"failed cases \(a, b, c, and 2 more\)", id="failed"),
    pytest.param(stored_run(1, cases=()), "timed no case", id="empty"),
    pytest.param(edited(stored_run(1), lambda b: b["extra_info"].update(injected=0.02)), "is a drill's", id="injected"),
    pytest.param(edited(stored_run(1), lambda b: b["extra_info"].update(injected=0.0)), "is a drill's", id="injected-nothing"),
    pytest.param(changed(commit_info={"id": "abc", "dirty": True}), "uncommitted changes", id="dirty"),
    pytest.param(changed(commit_info={"id": "unversioned", "dirty": False}), "of which commit", id="unversioned"),
    pytest.param(changed(commit_info={}), "of which commit", id="no-commit"),
    pytest.param(stored_run(1, format=1), "format 1", id="older-format"),
    pytest.param("{", "truncated or not JSON", id="truncated"),
    pytest.param(changed(machine_info={"machine": "../up"}), "no folder's name", id="machine-is-a-path"),
]


@pytest.mark.parametrize(("run", "message"), REFUSED)
def test_an_unfit_run_is_refused_in_one_sentence_and_nothing_is_written(tmp_path, run, message):
    with pytest.raises((AcceptError, BaselineError), match=message) as refusal:
        take(tmp_path, run)
    assert "\n" not in str(refusal.value)
    assert not (tmp_path / "baselines").exists()


@pytest.mark.parametrize(("run", "message"), REFUSED)
def test_an_unfit_run_refuses_those_beside_it(tmp_path, run, message):
    good = changed(machine_info=run["machine_info"]) if isinstance(run, dict) else stored_run(2)
    with pytest.raises((AcceptError, BaselineError), match=message):
        take(tmp_path, good | {"datetime": "2026-11-30"}, run)
    assert not (tmp_path / "baselines").exists()


@pytest.mark.parametrize("commit", [{"id": "abc", "dirty": True}, {"id": "unversioned", "dirty": False}])
def test_a_dirty_tree_may_be_allowed(tmp_path, commit):
    assert take(tmp_path, changed(commit_info=commit), allow_dirty=True)


def test_runs_of_two_machines_are_refused(tmp_path):
    other = stored_run(2) | {"machine_info": {"machine": "NVIDIA-B200", "uuid": "GPU-9"}}
    with pytest.raises(AcceptError, match=r"is of NVIDIA-B200, and .* of NVIDIA-H200"):
        take(tmp_path, stored_run(1), other)


def test_two_cards_of_one_machine_are_welcome(tmp_path):
    other = stored_run(1) | {"machine_info": {"machine": MACHINE, "uuid": "GPU-9"}}
    assert len(take(tmp_path, stored_run(1), other)) == 2


def test_a_run_is_accepted_once(tmp_path):
    (path,) = take(tmp_path, stored_run(1))
    with pytest.raises(AcceptError, match="is accepted already: it is the run 0001_night"):
        take(tmp_path, stored_run(2), stored_run(1))
    with pytest.raises(AcceptError, match="is accepted already"):
        accept(examine([path], tmp_path / "baselines"), "again", "x", TODAY)
    with pytest.raises(AcceptError, match="is accepted already"):
        take(tmp_path, stored_run(2), stored_run(2))
    assert len(list(path.parent.iterdir())) == 1


def test_a_damaged_baseline_takes_nothing_more(tmp_path):
    write(tmp_path / "baselines" / MACHINE / "0001_old.json", "{")
    with pytest.raises(BaselineError, match="0001_old"):
        take(tmp_path, stored_run(1))


@pytest.mark.parametrize("name", ["", "a/b", "..", "-x", "a b", "a\n", "x" * 65, ".hidden", "é"])
def test_a_bad_name_is_refused(tmp_path, name):
    with pytest.raises(AcceptError, match="cannot be part of a file name"):
        take(tmp_path, stored_run(1), name=name)
    assert not (tmp_path / "baselines").exists()


@pytest.mark.parametrize("reason", ["", " \n "])
def test_a_reason_is_needed(tmp_path, reason):
    with pytest.raises(AcceptError, match="reason is empty"):
        take(tmp_path, stored_run(1), reason=reason)


def test_other_options_are_allowed_and_said(tmp_path):
    take(tmp_path, stored_run(1))
    path = write(tmp_path / "subset.json", stored_run(2, options={"modes": ["bf16"], "batch_sizes": [1, 64]}))
    (note,) = examine([path], tmp_path / "baselines").notes
    assert note == f"{path} ran with options --modes bf16 --batch_sizes 1 64, and 0001_night with of the default set"
    assert examine([write(tmp_path / "same.json", stored_run(2))], tmp_path / "baselines").notes == []


def test_no_run_at_all_is_refused(tmp_path):
    with pytest.raises(AcceptError, match="no run to accept"):
        examine([], tmp_path)


def test_a_disk_that_fails_half_way_says_what_was_accepted(tmp_path, monkeypatch):
    from fp4bench.evidence import storage

    whole = storage.store

    def failing(run, folder, name):
        if run["datetime"] == stored_run(2)["datetime"]:
            raise OSError("cannot store the run: no space")
        return whole(run, folder, name)

    monkeypatch.setattr(storage, "store", failing)
    with pytest.raises(AcceptError, match=r"no space; accepted before that: .*0001_night\.json"):
        take(tmp_path, stored_run(1), stored_run(2))


def changes(path):
    said = json.loads(path.read_text(encoding="utf-8"))["fp4bench"]["accepted"]
    return said.get("restarts"), said.get("retired")


def alone(path):
    return json.loads(path.read_text(encoding="utf-8"))["fp4bench"]["accepted"].get("alone")


def without(run, *case_ids):
    return run | {"benchmarks": [bench for bench in run["benchmarks"] if bench["name"] not in case_ids]}


def outcome_of(tmp_path, run):
    """Of the first case; the others are as they were."""
    baseline = accepted(tmp_path / "baselines" / MACHINE, MACHINE).on("GPU-1", "paced", False)
    verdicts = judge(baseline, timings(run), POLICIES)
    assert {found.outcome for case_id, found in verdicts.items() if case_id != CASES[0]} == {Outcome.SAME}
    return verdicts[CASES[0]].outcome, is_provisional(baseline, CASES[0])


@pytest.mark.parametrize(("factor", "moved", "back"), [(1.05, "REGRESSED", Outcome.FASTER), (0.9, "FASTER", Outcome.REGRESSED)])
def test_a_change_that_two_accepted_runs_show_is_the_baseline(tmp_path, factor, moved, back):
    take(tmp_path, *(stored_run(number) for number in (1, 2, 3, 4)))
    first, second = take(tmp_path, scaled(stored_run(5), factor), scaled(stored_run(6), factor))
    assert (changes(first), alone(first)) == ((None, None), {CASES[0]: moved})
    assert (changes(second), alone(second)) == (([CASES[0]], None), None)
    assert outcome_of(tmp_path, scaled(stored_run(7), factor)) == (Outcome.SAME, True)
    assert outcome_of(tmp_path, stored_run(7)) == (back, True)


@pytest.mark.parametrize("factor", [1.05, 0.9])
def test_a_change_that_one_accepted_run_shows_makes_a_case_blind_until_the_next(tmp_path, factor):
    take(tmp_path, *(stored_run(number) for number in (1, 2)))
    (path,) = take(tmp_path, scaled(stored_run(3), factor))
    assert (changes(path), list(alone(path))) == ((None, None), [CASES[0]])
    for now in (stored_run(4), scaled(stored_run(4), factor)):
        assert outcome_of(tmp_path, now)[0] in (Outcome.SAME, Outcome.INCONCLUSIVE)
    (path,) = take(tmp_path, scaled(stored_run(4), factor))
    assert changes(path) == ([CASES[0]], None)
    known = accepted(tmp_path / "baselines" / MACHINE, MACHINE)
    # From the first of the two on.
    assert [timing.median for _, timing in known.cases[CASES[0]]] == [
        timings(scaled(stored_run(number), factor))[CASES[0]].median for number in (3, 4)
    ]
    assert known.unconfirmed == {}


@pytest.mark.parametrize("together", [True, False])
def test_a_lucky_run_is_one_among_others(tmp_path, together):
    take(tmp_path, *(stored_run(number) for number in (1, 2)))
    after = scaled(stored_run(3), 0.88), stored_run(4)
    if together:
        take(tmp_path, *after)
    else:
        for run in after:
            take(tmp_path, run)
    known = accepted(tmp_path / "baselines" / MACHINE, MACHINE)
    assert len(known.cases[CASES[0]]) == 4
    assert known.unconfirmed == {}
    assert outcome_of(tmp_path, stored_run(5))[0] in (Outcome.SAME, Outcome.INCONCLUSIVE)
    # What is as lucky much later confirms nothing.
    (path,) = take(tmp_path, scaled(stored_run(6), 0.5))
    assert changes(path) == (None, None)


@pytest.mark.parametrize(("floor", "moved"), [(0.1, None), (0.02, {CASES[0]: "REGRESSED"})])
def test_what_stays_within_a_cases_own_floor_did_not_move(tmp_path, floor, moved):
    take(tmp_path, *(stored_run(number) for number in (1, 2, 3, 4)))
    (path,) = take(tmp_path, scaled(stored_run(5, floors={CASES[0]: floor}), 1.05))
    assert alone(path) == moved


def test_moves_to_both_sides_confirm_nothing(tmp_path):
    take(tmp_path, *(stored_run(number) for number in (1, 2, 3, 4)))
    paths = take(tmp_path, scaled(stored_run(5), 0.9), scaled(stored_run(6), 1.1), scaled(stored_run(7), 0.9))
    assert [changes(path)[0] for path in paths] == [None, None, None]
    assert [alone(path)[CASES[0]] for path in paths] == ["FASTER", "REGRESSED", "FASTER"]


def on_card(run, name):
    return run | {"fp4bench": run["fp4bench"] | {"session": f"{name} {run['datetime'][:10]}"}}


def test_a_lucky_first_run_of_a_card_does_not_speak_for_it(tmp_path):
    """It would be all that the card's next runs are compared with."""
    take(tmp_path, *(on_card(stored_run(n), f"GPU-{1 + n % 3}") for n in range(6)))
    (path,) = take(tmp_path, on_card(scaled(stored_run(7), 0.88), "GPU-9"))
    assert alone(path) == {CASES[0]: "FASTER"}
    known = accepted(tmp_path / "baselines" / MACHINE, MACHINE).on("GPU-9", "paced", False)
    assert has_own_runs(known, CASES[1])
    assert not has_own_runs(known, CASES[0])
    assert judge(known, timings(stored_run(8)), POLICIES)[CASES[0]].outcome is not Outcome.REGRESSED


def test_what_did_not_move_keeps_its_history(tmp_path):
    assert {changes(path) for path in take(tmp_path, *(stored_run(number) for number in (1, 2, 3, 4)))} == {(None, None)}
    (path,) = take(tmp_path, stored_run(5))
    assert changes(path) == (None, None)
    assert outcome_of(tmp_path, stored_run(6)) == (Outcome.SAME, False)


def test_a_case_starts_anew_once_for_the_runs_that_are_accepted_together(tmp_path):
    take(tmp_path, *(stored_run(number) for number in (1, 2, 3, 4)))
    # The first does not hold the case, the other two do.
    after = without(stored_run(5), CASES[0]), scaled(stored_run(6), 1.05), scaled(stored_run(7), 1.05)
    assert [changes(path)[0] for path in take(tmp_path, *after)] == [None, None, [CASES[0]]]
    assert len(accepted(tmp_path / "baselines" / MACHINE, MACHINE).cases[CASES[0]]) == 2
    (path,) = take(tmp_path, scaled(stored_run(8), 1.05))
    assert (changes(path), alone(path)) == ((None, None), None)


def test_a_run_moves_beside_runs_of_its_own_card(tmp_path):
    take(
        tmp_path, *(on_card(scaled(stored_run(n), 1.05 if n > 3 else 1.0), "GPU-2" if n > 3 else "GPU-1") for n in range(1, 7))
    )
    (path,) = take(tmp_path, on_card(scaled(stored_run(7), 1.05), "GPU-2"))
    assert (changes(path), alone(path)) == ((None, None), None)
    first, second = take(tmp_path, *(on_card(scaled(stored_run(n), 1.05), "GPU-1") for n in (8, 9)))
    assert (alone(first), changes(second)[0]) == ({CASES[0]: "REGRESSED"}, [CASES[0]])


def test_a_sustained_run_leaves_the_paced_baseline_alone(tmp_path):
    take(tmp_path, *(stored_run(number) for number in (1, 2, 3, 4)))
    sustained = stored_run(5)
    for bench in sustained["benchmarks"]:
        bench["stats"]["median"] *= 1.3
        bench["extra_info"]["pace"] = "sustained"
    (path,) = take(tmp_path, sustained)
    assert changes(path) == (None, None)
    assert outcome_of(tmp_path, stored_run(6)) == (Outcome.SAME, False)
    assert outcome_of(tmp_path, scaled(stored_run(6), 1.05)) == (Outcome.REGRESSED, False)


def test_cases_are_retired_by_name_and_glob(tmp_path):
    take(tmp_path, stored_run(1), stored_run(2))
    (path,) = take(tmp_path, without(stored_run(3), *CASES[:5]), retire=[CASES[0], "*.o.*"])
    gone = [CASES[0], *(case_id for case_id in CASES if ".o." in case_id)]
    assert changes(path) == (None, gone)
    known = accepted(tmp_path / "baselines" / MACHINE, MACHINE).cases
    # The run itself holds some of them: they start anew.
    assert {case_id for case_id in CASES if case_id not in known} == set(gone) - set(CASES[5:])
    assert len(known[CASES[5]]) == 1
    assert len(known[CASES[1]]) == 2


@pytest.mark.parametrize("globs", [["nothing*"], ["*", "nothing"]])
def test_a_glob_that_matches_nothing_is_refused_and_nothing_is_written(tmp_path, globs):
    with pytest.raises(AcceptError, match=r"--retire '\*' matches no case of the baseline"):
        take(tmp_path, stored_run(1), retire=["*"])
    take(tmp_path, stored_run(1))
    with pytest.raises(AcceptError, match=r"--retire 'nothing\*?' matches no case"):
        take(tmp_path, stored_run(2), retire=globs)
    assert len(accepted(tmp_path / "baselines" / MACHINE, MACHINE).runs) == 1


def test_a_paced_run_after_a_sustained_one_moves_beside_paced_ones(tmp_path):
    sustained = stored_run(5)
    for bench in sustained["benchmarks"]:
        bench["extra_info"]["pace"] = "sustained"
    take(tmp_path, *(stored_run(number) for number in (1, 2, 3, 4)), sustained)
    (path,) = take(tmp_path, scaled(stored_run(6), 1.05))
    assert alone(path) == {CASES[0]: "REGRESSED"}
    # Nor does a sustained run come between two paced ones.
    take(tmp_path, sustained | {"datetime": "2026-11-28"})
    (path,) = take(tmp_path, scaled(stored_run(7), 1.05))
    assert changes(path) == ([CASES[0]], None)
