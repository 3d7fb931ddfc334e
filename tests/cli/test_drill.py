"""The drill against gates whose sight is known: counts, exit codes, repeats and refusals. Its pytest is a small script."""

import argparse
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

import fp4bench
from fp4bench.cli import drill

# A gate session: writes the verdicts that a scenario asks for, and logs what it was asked. Of its 32 cases number 0 is NEW,
# number 1 is MISSING, and number 2 is blind to less than 10 %.
FAKE = """
import json, os, sys, time
from pathlib import Path

scenario, log, *args = sys.argv[1:]
told = dict(arg[2:].split("=", 1) for arg in args if arg.startswith("--") and "=" in arg)
plan = json.loads(Path(told["inject"]).read_text()) if "inject" in told else {}
log = Path(log)
number = len(log.read_text().splitlines()) if log.exists() else 0
with log.open("a") as file:
    file.write(json.dumps({"plan": plan, "args": args, "pid": os.getpid()}) + "\\n")

if scenario == "hang":
    time.sleep(60)
if scenario == "crash" and number == 2:
    print("INTERNALERROR> the last words")
    sys.exit(3)
if scenario == "silent" and number == 1:
    sys.exit(0)

def verdict(i):
    case = f"case-{i:02d}"
    found = {"outcome": "SAME", "reason": "within_floor", "change": 0.001, "mde": 0.1 if i == 2 else 0.01}
    if i < 2:
        found = {"outcome": ("NEW", "MISSING")[i], "reason": "x", "change": None, "mde": None}
    if case in plan and scenario != "blind" and plan[case] >= found["mde"]:
        found |= {"outcome": "REGRESSED", "reason": "slower", "change": plan[case]}
    if scenario == "alarms" and i == 5:
        found |= {"outcome": "REGRESSED", "reason": "slower", "change": 0.03}
    if scenario == "flaky" and case in plan and i == 7:
        found |= {"outcome": "INCONCLUSIVE", "reason": "noisy", "change": 0.02}
    return case, found

cases = dict(map(verdict, range(32)))
if scenario == "dropped":
    cases = {case: found for case, found in cases.items() if not (plan and case == "case-09")}
outcome, code = ("regressed", 1) if any(v["outcome"] in ("REGRESSED", "MISSING") for v in cases.values()) else ("ok", 0)
invalid = []
if scenario in ("no_baseline", "not_judged"):
    outcome, code, cases = scenario, 0, {}
if scenario == "invalid" or (scenario == "invalid-once" and number == 1):
    outcome, code, invalid = "invalid", 6, ["another process keeps the GPU busy"]
    cases = {case: found | {"outcome": "INVALID"} for case, found in cases.items()}
verdicts = {"outcome": outcome, "run": f".benchmarks/run-{number}.json", "counts": {}, "invalid": invalid, "cases": cases}
verdicts["promised"] = 0.01
Path(told["verdicts"]).write_text(json.dumps(verdicts))
sys.exit(4 if scenario == "late-crash" and number == 1 else code)
"""


@pytest.fixture
def gate(tmp_path, monkeypatch, capsys):
    """Run the drill against a scenario: the exit code, the output, the sessions' log and the report."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "fake.py").write_text(FAKE)

    class Gate:
        log = tmp_path / "log.jsonl"
        report = tmp_path / "report.json"
        command = (sys.executable, str(tmp_path / "fake.py"))

        def __call__(self, scenario, *words):
            args = parse("drill", "--json", str(self.report), "--seed", "1", *words)
            return drill.run(args, (*self.command, scenario, str(self.log)))

        @property
        def sessions(self):
            return [json.loads(line) for line in self.log.read_text().splitlines()]

        @property
        def found(self):
            return json.loads(self.report.read_text())

        @property
        def text(self):
            return capsys.readouterr().out

    return Gate()


def parse(*words):
    parser = argparse.ArgumentParser()
    drill.add_parser(parser.add_subparsers())
    return parser.parse_args(words)


def test_a_gate_that_sees(gate):
    assert gate("perfect", "--slowdown", "2", "--slowdown", "20", "--cases", "31") == 0
    small, large = gate.found["tallies"]
    # 30 of 32 cases can be drawn, so that 31 injections hold each once and one of them twice; case 2 is blind to 2 %.
    assert (small["detected"], small["trials"]) in [(30, 30), (29, 29)]
    assert small["blind"] == 31 - small["trials"]
    assert (large["detected"], large["trials"], large["blind"]) == (31, 31, 0)
    text = gate.text
    assert "31 of 31" in text
    assert "blind at 2 %: case-02 (smallest visible slowdown 10 %)" in text
    assert "MISSING in session 0: case-01" in text
    assert "The gate sees." in text
    assert gate.found["complete"]


def test_the_plan_keeps_to_the_share_and_to_comparable_cases(gate):
    gate("perfect", "--slowdown", "5", "--cases", "20", "--share", "0.1")
    plans = [session["plan"] for session in gate.sessions]
    assert plans[0] == {}
    assert [len(plan) for plan in plans[1:]] == [3] * 6 + [2]
    assert not {"case-00", "case-01"} & {case for plan in plans for case in plan}
    assert {slowdown for plan in plans for slowdown in plan.values()} == {0.05}


def test_a_seed_repeats_a_drill(gate):
    def plans(seed):
        gate.log.unlink(missing_ok=True)
        gate.report.unlink(missing_ok=True)
        gate("perfect", "--cases", "12", "--seed", seed)
        return [session["plan"] for session in gate.sessions]

    assert plans("3") == plans("3") != plans("4")


def test_a_session_is_a_gate_run_that_leaves_the_users_cache_alone(gate):
    gate("perfect", "--cases", "4", "--", "--models", "llama3.1-8b")
    for session in gate.sessions:
        assert session["args"][:2] == ["--models", "llama3.1-8b"]
        assert {"--gate=on", "--benchmark-compare"} <= set(session["args"])
        assert "-p no:cacheprovider" in " ".join(session["args"])


def test_the_users_choice_of_baseline_stays(gate):
    gate("perfect", "--alarms", "1", "--", "--benchmark-compare=0003")
    assert "--benchmark-compare" not in gate.sessions[0]["args"]


def test_a_blind_gate(gate):
    assert gate("blind", "--slowdown", "5", "--cases", "12") == 1
    assert gate.found["tallies"][0]["detected"] == 0
    text = gate.text
    assert "The gate cannot be trusted: at 5 % it detected 0 of" in text
    assert "missed at 5 %: case-" in text


def test_a_miss_is_listed_with_its_reason(gate):
    assert gate("flaky", "--slowdown", "20", "--cases", "30") == 0
    assert gate.found["tallies"][0]["missed_by_reason"] == {"noisy": 1}
    assert "missed at 20 %: case-07 (noisy, change +2.00%)" in gate.text


def test_a_case_that_got_no_verdict_was_not_seen(gate):
    gate("dropped", "--slowdown", "20", "--cases", "30")
    assert gate.found["tallies"][0]["missed_by_reason"] == {"no_verdict": 1}


def test_false_alarms_beyond_chance(gate):
    assert gate("alarms", "--slowdown", "20", "--cases", "12") == 1
    # Case 5 is REGRESSED on unchanged code: never drawn, and an alarm in each of the three sessions.
    assert [session["alarms"].keys() for session in gate.found["sessions"]] == [{"case-05": 0}.keys()] * 4
    assert all("case-05" not in session["plan"] for session in gate.sessions)
    text = gate.text
    assert "false alarm in session 0: case-05 (slower, change +3.00%)" in text
    assert "4 of 4 sessions had a false alarm, and 1 % is what it promises" in text


def test_unchanged_code_alone(gate):
    assert gate("perfect", "--alarms", "4") == 0
    assert [session["plan"] for session in gate.sessions] == [{}] * 4
    text = gate.text
    # 1 - 0.05^(1/4)
    assert "0 of 4 sessions had a false alarm, which proves a rate below 52.7 %" in text
    assert "0 of 120 verdicts" in text  # neither the new case nor the missing one


def test_unchanged_code_and_injections(gate):
    assert gate("perfect", "--alarms", "3", "--slowdown", "20", "--cases", "6") == 0
    # 0.05^(1/6)
    assert "at 20 %: 6 of 6 detected where the gate is not blind, which proves a rate above 60.7 %" in gate.text
    assert [len(session["plan"]) for session in gate.sessions] == [0, 0, 0, 6]


def test_an_invalid_session_is_repeated_and_not_counted(gate):
    assert gate("invalid-once", "--slowdown", "20", "--cases", "12") == 0
    plans = [session["plan"] for session in gate.sessions]
    assert plans[1] == plans[2] != {}  # the same plan again
    assert len(plans) == 4
    assert (len(gate.found["sessions"]), len(gate.found["injections"])) == (3, 12)
    assert gate.found["invalid"][0]["reasons"] == ["another process keeps the GPU busy"]
    assert "INVALID after session 1, not counted: another process keeps the GPU busy" in gate.text


def test_a_machine_that_stays_invalid_stops_the_drill(gate):
    with pytest.raises(
        ValueError, match="3 sessions in a row were INVALID, the last because another process keeps the GPU busy"
    ):
        gate("invalid")
    assert len(gate.sessions) == 3


def test_a_crash_stops_the_drill_and_keeps_what_was_found(gate):
    with pytest.raises(ValueError, match=r"ended with exit code 3 and wrote no verdicts.*\n.*INTERNALERROR> the last words"):
        gate("crash", "--slowdown", "20", "--cases", "30")
    assert len(gate.found["injections"]) == 6
    assert not gate.found["complete"]
    assert "6 of 6" in gate.text


def test_verdicts_of_a_session_that_crashed_afterwards_do_not_count(gate):
    with pytest.raises(ValueError, match="the pytest session ended with exit code 4; its last lines"):
        gate("late-crash", "--alarms", "3")
    assert len(gate.found["sessions"]) == 1


def test_a_session_without_verdicts_is_never_a_pass(gate):
    with pytest.raises(ValueError, match="exit code 0 and wrote no verdicts"):
        gate("silent", "--alarms", "3")


def test_without_a_baseline_there_is_nothing_to_drill(gate):
    with pytest.raises(ValueError, match=r"no accepted baseline.*fp4bench accept"):
        gate("no_baseline")


def test_a_session_that_judged_nothing_is_never_a_pass(gate):
    with pytest.raises(ValueError, match="exit code 0 and judged nothing"):
        gate("not_judged", "--alarms", "3")


def test_too_few_cases_for_the_share(gate):
    with pytest.raises(ValueError, match="3 % of 30 comparable cases is none"):
        gate("perfect", "--share", "0.03")


def test_a_report_is_never_replaced(gate):
    gate.report.write_text("dear")
    with pytest.raises(ValueError, match=r"report.json exists"):
        gate("perfect")
    assert gate.report.read_text() == "dear"
    assert not gate.log.exists()


def test_a_report_that_cannot_be_written_is_known_at_once(gate, tmp_path):
    gate.report = tmp_path / "no" / "folder.json"
    with pytest.raises(ValueError, match=r"cannot write .*folder.json: No such file"):
        gate("perfect")
    assert not gate.log.exists()


@pytest.mark.parametrize(
    "words",
    [("--slowdown", "0"), ("--slowdown", "nan"), ("--slowdown", "x"), ("--cases", "0"), ("--share", "1.5"), ("--alarms", "-1")],
)
def test_misuse(words):
    with pytest.raises(SystemExit) as stopped:
        parse("drill", *words)
    assert stopped.value.code == 2


def test_slowdowns_are_in_percent():
    args = parse("drill", "--slowdown", "2", "--slowdown", "0.5", "--", "--slowdown", "9")
    assert args.slowdown == [0.02, 0.005]
    assert args.pytest_args == ["--slowdown", "9"]


def test_sigterm_ends_the_session_too(gate):
    code = f"""
import argparse
from fp4bench.cli import drill
parser = argparse.ArgumentParser()
drill.add_parser(parser.add_subparsers())
drill.run(parser.parse_args(["drill"]), [{gate.command[0]!r}, {gate.command[1]!r}, "hang", {str(gate.log)!r}])
"""
    environment = os.environ | {"PYTHONPATH": str(Path(fp4bench.__file__).parent.parent)}
    process = subprocess.Popen([sys.executable, "-c", code], env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    wait_until(lambda: gate.log.exists() and gate.log.read_text())
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=8)  # the session is told to end, not waited for
    assert process.returncode == 128 + signal.SIGTERM
    with pytest.raises(ProcessLookupError):
        os.kill(gate.sessions[0]["pid"], 0)


def wait_until(happened, seconds=15):
    deadline = time.monotonic() + seconds
    while not happened():
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.02)
