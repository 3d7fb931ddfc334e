"""What --benchmark-compare does: find the baseline, judge the run, fail tests, tell."""

from __future__ import annotations

import json
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from fp4bench.evidence import baselines, report, verdict
from fp4bench.evidence.baselines import Baseline, Timing
from fp4bench.evidence.gate import judge_run
from fp4bench.evidence.histories import mean_seconds
from fp4bench.evidence.verdict import POLICIES, Outcome, Policy, Verdict
from fp4bench.plugin.conditions import incomparable_reasons
from fp4bench.plugin.coverage import covers
from fp4bench.timing.machine import card

if TYPE_CHECKING:
    from fp4bench.plugin.suite import Suite

_FAILING = {
    "off": frozenset[Outcome](),
    "on": frozenset({Outcome.REGRESSED, Outcome.MISSING}),
    "strict": frozenset({Outcome.REGRESSED, Outcome.MISSING, Outcome.NEW, Outcome.INCONCLUSIVE}),
}


class Gate:
    """The decision of one session against the accepted runs of this machine, or against one stored run that was asked for."""

    def __init__(self, suite: Suite, wanted: str | None) -> None:
        """Raises ValueError for a baseline that cannot serve."""
        self._suite = suite
        self._level = suite.config.option.gate
        self.verdicts: dict[str, Verdict] = {}
        self.invalid: list[str] = []  # why nothing can be decided
        self._judged = False
        self._changed: list[str] = []  # of `invalid`: the machine as a whole is not what it was
        found = self._find(wanted)
        # Compared with the runs of this very card, where there are any, and only with what was timed in the same way.
        option = suite.config.option
        pace = "sustained" if option.sustained and suite.device.is_cuda else "paced"  # a CPU has one pace
        self.baseline = found and found.on(card(suite.machine_info), pace, option.warm)

    def _find(self, wanted: str | None) -> Baseline | None:
        suite = self._suite
        machine = suite.machine_info["machine"]
        if wanted is None:
            return baselines.accepted(suite.baselines / machine, machine)
        return baselines.find((suite.baselines / machine, suite.runs), wanted, machine)

    def header(self) -> str | None:
        """What the run will be compared with."""
        if self.baseline is None:
            return f"fp4bench: no accepted run of {self._suite.machine_info['machine']}, so nothing will be compared"
        folder = self._suite.short(self.baseline.runs[-1].path.parent)
        return f"fp4bench: comparing with {self.baseline.label} of {folder}, {len(self.baseline.cases)} cases"

    # Judging

    def judge(self) -> None:
        """Judge every case; suspects are measured again. A run in bad conditions is INVALID as a whole."""
        self.invalid = list(self._suite.invalid)
        if self.baseline is None:
            self._demand_a_baseline()
            self._judged = True
            return
        now, floors, expected = self._timings, self._suite.own_floors, self._expected()
        self._changed = incomparable_reasons(self._suite.run, self.baseline, self._suite.device.is_cuda)
        self.invalid += self._changed
        if self.invalid:
            seen = verdict.judge(self.baseline, now, self._policy, floors, expected)
            self.verdicts = verdict.invalid(seen, self.invalid)
        else:
            self.verdicts = judge_run(self.baseline, now, self._policy, floors, expected, self._measure_again)
        self._judged = True
        if reporter := self._suite.config.pluginmanager.getplugin("terminalreporter"):
            reporter.ensure_newline()  # an F behind the dots of the last file would be taken for one of its tests
        for case_id, found in self.verdicts.items():
            if found.outcome in _FAILING[self._level]:
                self._fail(case_id, found)

    def _demand_a_baseline(self) -> None:
        if self._level == "strict":
            machine = self._suite.machine_info["machine"]
            text = f"--gate=strict: no run of {machine} is accepted in {self._suite.short(self._suite.baselines)}"
            self._report("baseline", text)

    @cached_property
    def _timings(self) -> dict[str, Timing]:
        from fp4bench.plugin.run import timing

        return {case_id: timing(self._suite.run.timed[case_id]) for case_id in self._suite.tally.timed}

    @property
    def _policy(self) -> dict[str, Policy]:
        again = self._suite.config.option.confirm
        if again is None:
            return POLICIES
        return {clock: replace(policy, repetitions=again) for clock, policy in POLICIES.items()}

    def _expected(self) -> dict[str, str]:
        """Cases of the baseline that this run was to time and did not, with the reason; failed cases are told elsewhere."""
        assert self.baseline
        tally = self._suite.tally
        absent = {}
        for case_id in self.baseline.cases:
            if case_id in tally.selected and case_id in tally.skipped:
                absent[case_id] = f"skipped: {tally.skipped[case_id]}"
            # Where tests were deselected, nobody knows whether it would have been among them.
            elif case_id not in tally.generated and not tally.left_out:
                absent |= self._vanished(case_id, self.baseline.newest(case_id).record)
        return absent

    def _vanished(self, case_id: str, record: dict[str, Any]) -> dict[str, str]:
        """The case with the reason, if the options ask for what nobody offers any more."""
        suite = self._suite
        if record["op"] not in suite.ops or not covers(suite.selection, record):
            return {}
        provider = record["provider"]
        if provider in {known.name for known in suite.selection.providers}:
            return {case_id: f"the provider {provider} no longer offers it"}
        everyone = suite.asked.get("providers", ["all"]) == ["all"]
        return {case_id: f"the provider {provider} is not installed"} if everyone else {}

    def _measure_again(self, case_ids: list[str]) -> dict[str, Timing | str]:
        self._suite.progress.show(doing=f"measuring {len(case_ids)} again in a fresh process")
        return self._suite.run.time_again({case_id: self._suite.tally.timed[case_id][1] for case_id in case_ids})

    # Telling

    def _fail(self, case_id: str, found: Verdict) -> None:
        """Report a case as a failed test: exit code 1, FAILURES, JUnit, and `--lf` measures it again."""
        text = f"{case_id} is {found.outcome.value}: {self._told(case_id, found)}"
        if item := self._suite.item_of.get(case_id):
            self._report(item.nodeid, text, item.location)
        else:
            self._report(f"missing[{case_id}]", text)

    def _told(self, case_id: str, found: Verdict) -> str:
        """`+2.1% (+1.7% to +2.5%) beside its baseline, 12.40 us then and 12.66 us now; <detail>`."""
        assert self.baseline
        parts = [found.detail] if found.detail else []
        if found.change is not None and found.interval is not None:
            low, high = found.interval
            then = report.duration(mean_seconds(self.baseline, case_id))
            now = report.duration(self._timings[case_id].median)
            change = f"{found.change:+.1%} ({low:+.1%} to {high:+.1%}) beside its baseline, {then} then and {now} now"
            parts.insert(0, change)
        return "; ".join(parts or [found.reason])

    def _report(self, nodeid: str, text: str, location: tuple[str, int | None, str] | None = None) -> None:
        where = location or ("baselines", None, nodeid)
        failed = pytest.TestReport(nodeid, where, {}, "failed", text, "call", sections=[], duration=0)
        self._suite.config.hook.pytest_runtest_logreport(report=failed)

    def summary(self, reporter: pytest.TerminalReporter) -> None:
        """The outcome in a few lines that one can act on."""
        suite = self._suite
        if self.invalid:
            reporter.section("fp4bench: INVALID run", red=True)
            for line in self._about_invalid():
                reporter.write_line(line)
        elif not self._judged or not (self.verdicts or suite.tally.timed):
            reporter.write_line("fp4bench: nothing was compared: the run was stopped, or no case was timed")
        elif self.baseline is None:
            reporter.write_line(f"fp4bench: nothing was compared: {self._how_to_accept()}")
        else:
            reporter.section("fp4bench: baseline and now")
            lines = report.summary(
                self.baseline, self._timings, self.verdicts, suite.machine_info, self._policy, self._stored()
            )
            reporter.write("\n".join((*lines, "")) + "\n")

    def _about_invalid(self) -> list[str]:
        lines = [f"INVALID: {reason}" for reason in self.invalid]
        if self.baseline and (changes := report.environment_changes(self.baseline, self._suite.machine_info)):
            lines.append(f"changed since {self.baseline.runs[-1].name}: {changes}")
        if self.invalid != self._changed or not self._stored():
            return [*lines, "This says nothing about the kernels. Repeat the run when the machine is free and cool."]
        accept = f'fp4bench accept {self._stored()} --name NAME --reason "..."'
        return [*lines, f"This says nothing about the kernels. Repeat the run; if the change is here to stay: {accept}"]

    def _stored(self) -> str | None:
        path = self._suite.storing.path
        return self._suite.short(path) if path else None

    def _how_to_accept(self) -> str:
        machine = self._suite.machine_info["machine"]
        run = self._stored()
        fit = run and self._suite.tally.complete
        how = f'; accept this run with: fp4bench accept {run} --name first --reason "..."' if fit else ""
        return f"no run of {machine} is accepted yet{how}"

    def write(self, path: Path | None) -> None:
        """The verdicts as JSON, for other programs. Raises OSError, one sentence."""
        if path is None:
            return
        text = json.dumps(self._content(), indent=1, allow_nan=False) + "\n"
        try:
            path.write_text(text, encoding="utf-8")
        except OSError as error:
            raise OSError(f"cannot write the verdicts {path}: {error.strerror}") from error

    def _content(self) -> dict[str, Any]:
        outcomes = [verdict.outcome for verdict in self.verdicts.values()]
        if not self._judged:
            outcome = "not_judged"  # stopped, or --benchmark-disable
        elif self.invalid:
            outcome = "invalid"
        elif self.baseline is None:
            outcome = "no_baseline"
        else:
            outcome = "regressed" if {Outcome.REGRESSED, Outcome.MISSING} & set(outcomes) else "ok"
        return {
            "outcome": outcome,
            "run": self._stored(),
            "machine": self._suite.machine_info["machine"],
            "promised": verdict.promised(self._policy, self._timings.values()) if self._judged else None,
            "counts": {o.value: outcomes.count(o) for o in Outcome if o in outcomes},
            "invalid": self.invalid,
            "failed": self._suite.tally.failed,
            "cases": report.rows(self.baseline, self._timings, self.verdicts),
        }
