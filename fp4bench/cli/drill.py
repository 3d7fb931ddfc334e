"""`fp4bench drill`: is the gate of this machine able to see? Slows cases down on purpose and counts what it flags.

Every session is a pytest process of its own with `--gate=on`. Which cases are slowed is in a file that only the measuring
process reads (`--inject`), and the verdicts come back in another (`--verdicts`).
"""

import argparse
import json
import secrets
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from fp4bench.cli.sessions import (
    COMMAND,
    EXPECTED,
    RETRIES,
    Report,
    count,
    ended_by_sigterm,
    run_session,
    say,
    stopped,
    takes_pytest_args,
)
from fp4bench.evidence.power import (
    Detections,
    Injection,
    by_slowdown,
    draw,
    drawable,
    interval,
    lower_bound,
    objections,
    percent,
    upper_bound,
)


def add_parser(commands: Any) -> None:
    parser = commands.add_parser(
        "drill",
        help="prove the gate on this machine: slow cases down on purpose, and count what it flags",
        description="Slows randomly chosen cases down, hidden from the decision, and counts detections, misses and false "
        "alarms. Needs an accepted baseline. Exits with 1 where the gate is blind, or raises false alarms beyond chance.",
        usage="fp4bench drill [options] [-- PYTEST OPTIONS]",
    )
    parser.add_argument(
        "--slowdown", type=slowdown, action="append", metavar="PERCENT", help="may be given several times; 2 without --alarms"
    )
    parser.add_argument("--cases", type=count, default=60, metavar="N", help="injections a slowdown (60)")
    parser.add_argument("--alarms", type=count, metavar="N", help="N sessions on unchanged code, to bound the false alarms")
    parser.add_argument("--share", type=share, default=0.2, help="of the cases, slowed down in one session at most (0.2)")
    parser.add_argument("--seed", type=int, help="of the choice of cases; drawn and shown where it is not given")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write every injection with its verdict to a new file")
    parser.set_defaults(run=run)
    takes_pytest_args(parser)


def run(args: argparse.Namespace, command: Sequence[str] = COMMAND) -> int:
    """0 where the gate sees, 1 where it does not (`power.objections`). Raises ValueError where the drill cannot go on."""
    drill = Drill(
        command=(*command, *args.pytest_args),
        slowdowns=tuple(args.slowdown or ([] if args.alarms else [0.02])),
        cases=args.cases,
        alarms=args.alarms or 0,
        share=args.share,
        seed=secrets.randbelow(2**32) if args.seed is None else args.seed,
        report=Report(args.json) if args.json else None,
    )
    say(f"seed {drill.seed}; each session: {' '.join(drill.command)}")
    with ended_by_sigterm():
        try:
            drill.go()
        finally:
            say(*drill.summary())
    drill.complete = True
    drill.write()
    found = drill.objections
    say(*[f"The gate cannot be trusted: {objection}." for objection in found] or ["The gate sees."])
    return 1 if found else 0


@dataclass(frozen=True)
class Session:
    """One valid gate session.

    plan: the slowdown by case id, empty on unchanged code. alarms: REGRESSED without an injection. run: where it is stored.
    promised: the share of such sessions on unchanged code that have an alarm, at most, as the gate says.
    """

    plan: Mapping[str, float]
    verdicts: Mapping[str, Mapping[str, Any]]
    run: str | None
    seconds: float
    promised: float

    @property
    def alarms(self) -> dict[str, Mapping[str, Any]]:
        regressed = {case_id: verdict for case_id, verdict in self.verdicts.items() if verdict["outcome"] == "REGRESSED"}
        return {case_id: verdict for case_id, verdict in regressed.items() if case_id not in self.plan}

    @property
    def judged(self) -> int:
        """How many cases could have been a false alarm: compared, and not slowed down."""
        compared = {case_id for case_id, verdict in self.verdicts.items() if verdict["outcome"] not in ("NEW", "MISSING")}
        return len(compared - self.plan.keys())

    @property
    def missing(self) -> list[str]:
        return [case_id for case_id, verdict in self.verdicts.items() if verdict["outcome"] == "MISSING"]


@dataclass
class Drill:
    """The sessions so far and what they proved. All that is asked for comes first, what was found last."""

    command: tuple[str, ...]
    slowdowns: tuple[float, ...]
    cases: int
    alarms: int
    share: float
    seed: int
    report: "Report | None" = None
    sessions: list[Session] = field(default_factory=list)
    invalid: list[dict[str, Any]] = field(default_factory=list)
    injections: list[Injection] = field(default_factory=list)
    complete: bool = False

    @property
    def alarmed(self) -> list[Session]:
        return [session for session in self.sessions if session.alarms]

    @property
    def promised(self) -> float:
        """What the gate says of itself: the share of sessions on unchanged code that have any false alarm, at most."""
        return min((session.promised for session in self.sessions), default=1.0)

    @property
    def objections(self) -> list[str]:
        return objections(self.injections, len(self.alarmed), len(self.sessions), self.promised)

    @property
    def unchanged(self) -> list[Session]:
        return [session for session in self.sessions if not session.plan]

    def go(self) -> None:
        """Sessions on unchanged code, of which the first says what can be drawn, then those of each slowdown."""
        self.write()
        for _ in range(max(self.alarms, 1)):
            self._judge({})
        before = self.sessions[0].verdicts
        if not self.slowdowns:
            return
        plans = [
            dict.fromkeys(chosen, slowdown)
            for number, slowdown in enumerate(self.slowdowns)
            for chosen in draw(drawable(before), self.cases, self.share, self.seed + number)
        ]
        say(f"{len(plans)} sessions with injections follow; {len(drawable(before))} of {len(before)} cases can be drawn")
        for plan in plans:
            self._judge(plan)

    def _judge(self, plan: Mapping[str, float]) -> None:
        """One valid session, INVALID ones repeated. Raises ValueError where they stay INVALID."""
        for _ in range(1 + RETRIES):
            start = time.monotonic()
            told = judge_once(self.command, plan)
            seconds = time.monotonic() - start
            if told["outcome"] != "invalid":
                self._count(Session(plan, told["cases"], told.get("run"), seconds, told["promised"]))
                return
            reasons = told.get("invalid") or ["no reason given"]
            self.invalid.append({"after_sessions": len(self.sessions), "reasons": reasons, "run": told.get("run")})
            self.write()
            say(f"INVALID, not counted: {'; '.join(reasons)}")
        raise ValueError(
            f"{1 + RETRIES} sessions in a row were INVALID, the last because {'; '.join(reasons)}: drill on a quiet GPU"
        )

    def _count(self, session: Session) -> None:
        number = len(self.sessions)
        self.sessions.append(session)
        # What is blind was declared on unchanged code: an injection must not choose the side it is counted on.
        declared = self.sessions[0].verdicts
        found = [
            _injection(case_id, slowdown, number, declared[case_id].get("mde"), session.verdicts.get(case_id))
            for case_id, slowdown in session.plan.items()
        ]
        self.injections += found
        self.write()
        say(_progress(number, session, found))

    def summary(self) -> list[str]:
        """What was found so far, as lines."""
        lines = ["", *(_table(by_slowdown(self.injections)) if self.injections else [])]
        for one in by_slowdown(self.injections):
            at = f"at {percent(one.slowdown)}"
            lines.append(
                f"{at}: {one.detected} of {one.trials} detected where the gate is not blind, which proves a rate above "
                f"{percent(lower_bound(one.detected, one.trials))} (one-sided, 95 %)"
            )
            lines += [f"missed {at}: {i.case_id} ({i.reason}, change {_signed(i.change)}){_looks(i)}" for i in one.misses]
            lines += [
                f"blind {at}: {case_id} (smallest visible slowdown {percent(mde)})"
                for case_id, mde in _blind_cases(one).items()
            ]
        for number, session in enumerate(self.sessions):
            lines += [
                f"false alarm in session {number}: {case_id} ({verdict.get('reason')}, change {_signed(verdict.get('change'))})"
                for case_id, verdict in session.alarms.items()
            ]
            lines += [f"MISSING in session {number}: {', '.join(session.missing)}"] if session.missing else []
        lines += [f"INVALID after session {i['after_sessions']}, not counted: {'; '.join(i['reasons'])}" for i in self.invalid]
        return [*lines, *self._alarm_lines()]

    def _alarm_lines(self) -> list[str]:
        judged = sum(session.judged for session in self.sessions)
        alarms = sum(len(session.alarms) for session in self.sessions)
        sessions, alarmed = len(self.sessions), len(self.alarmed)
        unchanged = [bool(session.alarms) for session in self.unchanged]
        return [
            f"false alarms: {alarms} of {judged} verdicts where nothing was injected ({_range(alarms, judged)}), "
            f"in {alarmed} of {sessions} sessions ({_range(alarmed, sessions)}; the gate promises {percent(self.promised)})",
            f"unchanged code: {sum(unchanged)} of {len(unchanged)} sessions had a false alarm, which proves a rate below "
            f"{percent(upper_bound(sum(unchanged), len(unchanged)))} (one-sided, 95 %)",
        ]

    def write(self) -> None:
        """Everything so far to the report's file, where one was asked for."""
        if not self.report:
            return
        asked = {key: getattr(self, key) for key in ("command", "slowdowns", "cases", "alarms", "share", "seed", "complete")}
        sessions = [
            {
                "plan": s.plan,
                "alarms": s.alarms,
                "missing": s.missing,
                "verdicts": len(s.verdicts),
                "run": s.run,
                "wall_s": s.seconds,
            }
            for s in self.sessions
        ]
        injections = [asdict(i) | {"detected": i.detected, "blind": i.blind} for i in self.injections]
        counted = [_detections_json(one) for one in by_slowdown(self.injections)]
        found = self.objections if self.complete else None
        results = {
            "sessions": sessions,
            "invalid": self.invalid,
            "injections": injections,
            "tallies": counted,
            "promised": self.promised,
            "objections": found,
        }
        # No path of this machine.
        asked["command"] = ["python" if word == sys.executable else word for word in self.command]
        self.report.write(asked | results)


def judge_once(command: Sequence[str], plan: Mapping[str, float]) -> dict[str, Any]:
    """The verdicts of one gate session (`--verdicts`). Raises ValueError where it crashed, or found no baseline."""
    with tempfile.TemporaryDirectory(prefix="fp4bench-drill-") as folder:
        verdicts = Path(folder, "verdicts.json")
        # A drill's failures are not those that the user wants to see again with --lf.
        # The samples stay beside each run, for the rules in `fp4bench report --side-by-side` that judge by them.
        options = ["-p", "no:cacheprovider", "--gate=on", f"--verdicts={verdicts}", "--benchmark-save-data"]
        if not any(arg.startswith("--benchmark-compare") for arg in command):
            options.append("--benchmark-compare")
        if plan:
            hidden = Path(folder, "plan.json")
            hidden.write_text(json.dumps(plan), encoding="utf-8")
            options.append(f"--inject={hidden}")
        code, output = run_session([*command, *options])
        try:
            told = json.loads(verdicts.read_text(encoding="utf-8"))
            outcome, _, _ = told["outcome"], told["cases"], told["promised"]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ValueError(stopped(code, output, "wrote no verdicts")) from error
    if code not in EXPECTED:
        raise ValueError(stopped(code, output))
    if outcome == "not_judged":
        raise ValueError(stopped(code, output, "judged nothing"))
    if outcome == "no_baseline":
        raise ValueError(
            "this machine has no accepted baseline for a drill: record runs and accept them with `fp4bench accept`"
        )
    return told


def slowdown(text: str) -> float:
    value = float(text) / 100
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"{text} is not a slowdown in percent, above 0")
    return value


def share(text: str) -> float:
    value = float(text)
    if not 0 < value <= 1:
        raise argparse.ArgumentTypeError(f"{text} is not a share above 0 and at most 1")
    return value


def _injection(case_id: str, slowdown: float, session: int, mde: float | None, verdict: Mapping[str, Any] | None) -> Injection:
    if verdict is None:  # the case failed or was left out: the gate did not see it
        return Injection(case_id, slowdown, session, mde, None, "no_verdict", None)
    outcome, reason, detail = verdict["outcome"], str(verdict.get("reason")), verdict.get("detail") or ""
    return Injection(case_id, slowdown, session, mde, outcome, reason, verdict.get("change"), detail)


def _looks(injection: Injection) -> str:
    return f": {injection.detail}" if injection.detail else ""


def _progress(number: int, session: Session, found: Sequence[Injection]) -> str:
    what = "unchanged code"
    if found:
        seen = sum(injection.detected for injection in found)
        what = f"{len(found)} cases slowed by {percent(found[0].slowdown)}, {seen} detected"
    return (
        f"session {number}: {what}, {len(session.alarms)} false alarms, {len(session.verdicts)} cases, {session.seconds:.0f} s"
    )


def _table(counted: Sequence[Detections]) -> list[str]:
    lines = [f"{'slowdown':>8}  {'detected':>10}  {'rate':>6}  {'95 % interval':>16}  {'blind':>5}  {'misses by reason'}"]
    for one in counted:
        rate = percent(one.detected / one.trials) if one.trials else ""
        misses = ", ".join(f"{reason} {count}" for reason, count in one.missed_by_reason.items())
        lines.append(
            f"{percent(one.slowdown):>8}  {f'{one.detected} of {one.trials}':>10}  {rate:>6}  "
            f"{_range(one.detected, one.trials):>16}  {len(one.blind):>5}  {misses}".rstrip()
        )
    return lines


def _blind_cases(one: Detections) -> dict[str, float]:
    return {injection.case_id: injection.mde for injection in one.blind if injection.mde is not None}


def _detections_json(one: Detections) -> dict[str, Any]:
    low, high = interval(one.detected, one.trials)
    counts = {"slowdown": one.slowdown, "detected": one.detected, "trials": one.trials, "low": low, "high": high}
    return counts | {"blind": len(one.blind), "missed_by_reason": one.missed_by_reason}


def _range(hits: int, trials: int) -> str:
    low, high = interval(hits, trials)
    return f"{percent(low)} to {percent(high)}"


def _signed(change: float | None) -> str:
    return "unknown" if change is None else f"{change:+.2%}"
