"""Verdicts and baselines as lines for a terminal, as Markdown, and as the rows of a verdicts file."""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from fp4bench.evidence.baselines import Baseline, StoredRun, Timing, way_of
from fp4bench.evidence.histories import card_of, changed_kernels, is_provisional, mean_seconds
from fp4bench.evidence.verdict import POLICIES, Outcome, Policies, Verdict, policy_of

# A list of cases that nobody scrolls through; all of them are in the verdicts file.
_MOST_ROWS = 10
# GitHub refuses step summaries beyond 1 MiB and comments beyond 64 KiB.
_MOST_BYTES = 60_000

Row = Mapping[str, Any]


def rows(baseline: Baseline | None, now: Mapping[str, Timing], verdicts: Mapping[str, Verdict]) -> dict[str, dict[str, Any]]:
    """The verdicts as plain JSON values by case id, with the seconds of both sides; what is not known is None."""
    return {case_id: _row(baseline, case_id, now.get(case_id), verdict) for case_id, verdict in verdicts.items()}


def _row(baseline: Baseline | None, case_id: str, timing: Timing | None, verdict: Verdict) -> dict[str, Any]:
    low, high = verdict.interval or (None, None)
    return {
        "outcome": verdict.outcome.value,
        "reason": verdict.reason,
        "change": verdict.change,
        "low": low,
        "high": high,
        "mde": verdict.mde,
        "detail": verdict.detail,
        "baseline_seconds": mean_seconds(baseline, case_id) if baseline and case_id in baseline.cases else None,
        "seconds": timing.median if timing else None,
    }


def summary(
    baseline: Baseline,
    now: Mapping[str, Timing],
    verdicts: Mapping[str, Verdict],
    machine_info: Mapping[str, Any],
    policy: Policies = POLICIES,
    stored: str | None = None,
) -> list[str]:
    """What an engineer needs at the end of a run: counts, the worst cases, what changed around them, and what to do.

    stored: the path of this run's file as to be typed, None if it is not stored.
    """
    table = rows(baseline, now, verdicts)
    lines = [f"{counts(verdicts)} against {baseline.label}"]
    for outcome in Outcome:
        found = _worst_first((case_id, row) for case_id, row in table.items() if row["outcome"] == outcome.value)
        if outcome not in (Outcome.SAME, Outcome.INVALID) and found:
            lines += ["", f"{outcome.value}:", *_listed(found, None if outcome is Outcome.REGRESSED else _MOST_ROWS)]
            if outcome is Outcome.MISSING:
                lines.append(f"  if they are gone for good: fp4bench accept {stored or 'RUN.json'} --retire 'ID-OR-GLOB' ...")
    lines.append("")
    if changes := environment_changes(baseline, machine_info):
        lines.append(f"changed since {baseline.runs[-1].name}: {changes}")
    if kernels := _kernel_changes(baseline, now):
        lines.append(kernels)
    lines.append(_trust(baseline, now, verdicts, policy))
    lines += _acceptance(verdicts, stored)
    return lines


def _worst_first(table: Iterable[tuple[str, Row]]) -> list[tuple[str, Row]]:
    """By the size of the change; those without one after them, in their order."""
    return sorted(table, key=lambda item: -abs(item[1]["change"] or 0.0))


def _listed(found: Sequence[tuple[str, Row]], most: int | None) -> list[str]:
    shown = found[:most]
    width = max(len(case_id) for case_id, _ in shown)
    lines = [f"  {case_id:<{width}}  {_numbers(row)}  {row['detail']}".rstrip() for case_id, row in shown]
    return [*lines, f"  and {len(found) - len(shown)} more"] if len(found) > len(shown) else lines


def _numbers(row: Row) -> str:
    """`52.10 us -> 53.40 us   +2.5 % [+2.1 %, +2.9 %]`, with blanks for what is not known."""
    then, here = (duration(row[key]) if row[key] else "-" for key in ("baseline_seconds", "seconds"))
    return f"{then:>9} -> {here:>9}  {_change(row):>24}"


def _change(row: Row) -> str:
    if row["change"] is None:
        return ""
    interval = f" [{row['low']:+.1%}, {row['high']:+.1%}]" if row["low"] is not None else ""
    return f"{row['change']:+.1%}{interval}"


def counts(verdicts: Mapping[str, Verdict]) -> str:
    """How many cases had each outcome, in the order of `Outcome`."""
    return _counted(Counter(verdict.outcome.value for verdict in verdicts.values()))


def _counted(found: Mapping[str, int]) -> str:
    known = [outcome.value for outcome in Outcome]
    return ", ".join(f"{found[name]} {name}" for name in known if found.get(name)) or "no case was timed"


def environment_changes(baseline: Baseline, machine_info: Mapping[str, Any]) -> str:
    """What differs between the machine's facts in the baseline's newest run and now: `torch 2.11.0 -> 2.13.0`, or nothing."""
    before = baseline.runs[-1].machine_info
    keys = [*machine_info, *(key for key in before if key not in machine_info)]
    changed = [key for key in keys if before.get(key) != machine_info.get(key)]
    return ", ".join(f"{key} {before.get(key)} -> {machine_info.get(key)}" for key in changed)


def _kernel_changes(baseline: Baseline, now: Mapping[str, Timing]) -> str:
    known = {c: changed_kernels(baseline.newest(c).record, timing.record) for c, timing in now.items() if c in baseline.cases}
    changed = {case_id: change for case_id, change in known.items() if change}
    if not changed:
        return ""
    case_id, change = next(iter(changed.items()))
    return f"other kernels in {_cases(len(changed))}, such as {case_id}: {change}"


def _trust(baseline: Baseline, now: Mapping[str, Timing], verdicts: Mapping[str, Verdict], policy: Policies) -> str:
    """What the baseline stands on, and how many cases it cannot judge."""
    both = now.keys() & baseline.cases.keys()
    compared = [(c, verdict.mde) for c, verdict in verdicts.items() if c in both and verdict.mde is not None]
    blind = [case_id for case_id, mde in compared if mde > policy_of(policy, now[case_id]).blind]
    cards = [card_of(run.session) for run in baseline.runs if any(map(baseline.holds, run.cases.values()))]
    text = f"the baseline has {_plural(len(cards), 'run')} of {_plural(len(set(cards)), 'card')}"
    known = baseline.card in cards
    text += f", {sum(card == baseline.card for card in cards)} of this one" if known else ", none of this one: cards differ"
    if young := [case_id for case_id, _ in compared if is_provisional(baseline, case_id)]:
        some = "" if len(young) == len(compared) else f" for {_cases(len(young))}"
        text += f"; provisional{some}: {_UNTIL_KNOWN if known else _UNTIL_CARDS_ARE_KNOWN}"
    if blind:
        verb = "is" if len(blind) == 1 else "are"
        text += f"; {len(blind)} of {_cases(len(compared))} {verb} blind to small slowdowns"
        text += " (fp4bench report --spread names them)"
    return text


# As ENOUGH_FREEDOM has it.
_UNTIL_KNOWN = "how runs differ is assumed, not measured, until one card has four accepted runs or three cards have two each"
_UNTIL_CARDS_ARE_KNOWN = "how cards differ is assumed, not measured, until four cards have accepted runs or this one has"


def _acceptance(verdicts: Mapping[str, Verdict], stored: str | None) -> list[str]:
    wanted = [o.value for o in (Outcome.NEW, Outcome.FASTER) if any(v.outcome is o for v in verdicts.values())]
    if not wanted or any(v.outcome is Outcome.INVALID for v in verdicts.values()):
        return []
    path = stored or "RUN.json"
    note = "" if stored else " (store the run with --benchmark-save=NAME first)"
    if Outcome.FASTER.value in wanted:
        note += ", and another run that shows it, for one may be luck"
    return [f'to accept what is {" and ".join(wanted)}: fp4bench accept {path} --name NAME --reason "..."{note}']


def markdown(verdicts: Mapping[str, Any]) -> str:
    """A verdicts file (`--verdicts`) as a summary for CI: counts, and the cases that are not SAME. Under 60 kB.

    Raises ValueError where it is no verdicts file.
    """
    try:
        title, table = str(verdicts["outcome"]), dict(verdicts["cases"])
        lines = [f"### fp4bench: {_TITLES.get(title, title)}", "", _counted(Counter(row["outcome"] for row in table.values()))]
        lines += [f"- {_escaped(reason)}" for reason in verdicts.get("invalid") or ()]
        if failed := [_escaped(case_id) for case_id in verdicts.get("failed") or ()]:
            more = f" and {len(failed) - _MOST_ROWS} more" if len(failed) > _MOST_ROWS else ""
            lines.append(f"- failed, and so not judged: {', '.join(f'`{case_id}`' for case_id in failed[:_MOST_ROWS])}{more}")
        lines += _markdown_rows(table, _MOST_BYTES - sum(len(line.encode()) + 1 for line in lines))
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"this is no verdicts file of fp4bench: it lacks {error}") from error
    return "\n".join(lines) + "\n"


_TITLES = {
    "ok": "no regression",
    "regressed": "regressed",
    "invalid": "the run is invalid, and nothing was judged",
    "no_baseline": "this machine has no baseline, so nothing was compared",
    "not_judged": "the run was stopped, and nothing was judged",
}


def _markdown_rows(table: Mapping[str, Row], room: int) -> list[str]:
    # Of an invalid run every case is INVALID, and says no more than the reasons above do.
    order = [outcome.value for outcome in Outcome if outcome not in (Outcome.SAME, Outcome.INVALID)]
    found = [item for name in order for item in _worst_first((c, row) for c, row in table.items() if row["outcome"] == name)]
    if not found:
        return []
    lines = ["", "| case | outcome | baseline | now | change | detail |", "|---|---|---:|---:|---:|---|"]
    room -= sum(len(line) + 1 for line in lines) + 100  # for the last line
    for shown, (case_id, row) in enumerate(found):
        then, here = (duration(row[key]) if row[key] else "" for key in ("baseline_seconds", "seconds"))
        cells = (f"`{_escaped(case_id)}`", row["outcome"], then, here, _change(row), _escaped(row["detail"]))
        line = f"| {' | '.join(cells)} |"
        room -= len(line.encode()) + 1
        if room < 0:
            return [*lines, "", f"and {len(found) - shown} more; all are in the verdicts file"]
        lines.append(line)
    return lines


def _escaped(text: str, most: int = 500) -> str:
    """One line that Markdown shows as it is: details may quote the error of a provider."""
    line = " ".join(text.split())
    line = line if len(line) <= most else f"{line[:most]}..."
    for character, replacement in (("&", "&amp;"), ("<", "&lt;"), ("|", "\\|"), ("`", "'")):
        line = line.replace(character, replacement)
    return line


def accepted_runs(baseline: Baseline) -> list[str]:
    """The runs of a baseline as a Markdown table: when, on what, how long, and for what reason each was accepted."""
    lines = ["| run | recorded (UTC) | session | cases | wall time | reason |", "|---|---|---|---:|---:|---|"]
    for run in baseline.runs:
        wall, reason = run.info.get("wall_s"), (run.info.get("accepted") or {}).get("reason", "")
        cells = (
            run.name,
            run.datetime[:16],
            run.session,
            str(len(run.cases)),
            f"{wall:.0f} s" if wall else "",
            _escaped(reason),
        )
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def before_after(baseline: Baseline | None, runs: Sequence[StoredRun], most: int = 20) -> list[str]:
    """What accepting runs changes: each case's mean before and in these runs, the largest changes first.

    Runs of one card are compared with those of that card, where there are any; runs timed in one way with those timed so.
    """
    after, cards = Baseline(tuple(runs)), {card_of(run.session) for run in runs}
    if baseline:
        how = way_of(timing for run in runs for timing in run.cases.values())
        baseline = Baseline(baseline.runs, cards.pop() if len(cards) == 1 else None, *how)
    if baseline is None:
        return [f"the first baseline of this machine: {_cases(len(after.cases))} in {_plural(len(runs), 'run')}"]
    both = [case_id for case_id in after.cases if case_id in baseline.cases]
    change = {case_id: mean_seconds(after, case_id) / mean_seconds(baseline, case_id) - 1 for case_id in both}
    order = sorted(both, key=lambda case_id: -abs(change[case_id]))
    lines = [f"{_cases(len(both))} beside {baseline.label}, the largest changes first:"]
    width = max(map(len, order[:most]), default=0)
    for case_id in order[:most]:
        then, here = duration(mean_seconds(baseline, case_id)), duration(mean_seconds(after, case_id))
        lines.append(f"  {case_id:<{width}}  {then:>9} -> {here:>9}  {change[case_id]:+.2%}")
    if rest := order[most:]:
        lines.append(f"  and {len(rest)} more, none beyond {abs(change[rest[0]]):.2%}")
    for what, ids in (
        ("new", [c for c in after.cases if c not in baseline.cases]),
        ("only in the baseline", [c for c in baseline.cases if c not in after.cases]),
    ):
        if ids:
            lines.append(f"{what}: {_cases(len(ids))}: {', '.join(ids[:5])}{', ...' if len(ids) > 5 else ''}")
    return lines


def _cases(number: int) -> str:
    return _plural(number, "case")


def _plural(number: int, noun: str) -> str:
    return f"{number} {noun}{'' if number == 1 else 's'}"


def duration(seconds: float) -> str:
    """Four significant digits in a fitting unit: `12.40 us`."""
    unit, factor = next((u, f) for u, f in (("s", 1.0), ("ms", 1e3), ("us", 1e6)) if seconds * f >= 1 or u == "us")
    return f"{f'{seconds * factor:#.4g}'.rstrip('.')} {unit}"
