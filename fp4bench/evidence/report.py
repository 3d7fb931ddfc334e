"""Tables of verdicts for a terminal."""

from collections import Counter
from collections.abc import Mapping

from fp4bench.evidence.baselines import Baseline, Timing
from fp4bench.evidence.verdict import Outcome, Verdict


def comparison(baseline: Baseline, now: Mapping[str, Timing], verdicts: Mapping[str, Verdict]) -> list[str]:
    """A line a case: its id, baseline, now, change, and the outcome where it is not SAME."""
    width = max(map(len, now), default=0)
    lines = [f"{'case':<{width}}  {'baseline':>10}  {'now':>10}  {'change':>7}"]
    for case_id, verdict in verdicts.items():
        before = baseline.cases.get(case_id)
        known = verdict.change is not None
        lines.append(
            f"{case_id:<{width}}  {duration(before.median) if before else '':>10}  {duration(now[case_id].median):>10}  "
            f"{f'{verdict.change:+.1%}' if known else '':>7}  "
            f"{'' if verdict.outcome is Outcome.SAME else verdict.outcome.value} {verdict.detail}".rstrip()
        )
    return lines


def counts(verdicts: Mapping[str, Verdict]) -> str:
    """How many cases had each outcome, in the order of `Outcome`."""
    found = Counter(verdict.outcome for verdict in verdicts.values())
    return ", ".join(f"{found[outcome]} {outcome.value}" for outcome in Outcome if found[outcome]) or "no case was timed"


def environment_changes(baseline: Baseline, machine_info: Mapping[str, object]) -> str:
    """What differs between the machine's facts then and now: `torch 2.11.0 -> 2.13.0`, or an empty string."""
    changed = (key for key, value in machine_info.items() if baseline.machine_info.get(key) != value)
    return ", ".join(f"{key} {baseline.machine_info.get(key)} -> {machine_info[key]}" for key in changed)


def duration(seconds: float) -> str:
    """Four significant digits in a fitting unit: `12.40 us`."""
    unit, factor = next((u, f) for u, f in (("s", 1.0), ("ms", 1e3), ("us", 1e6)) if seconds * f >= 1 or u == "us")
    return f"{f'{seconds * factor:#.4g}'.rstrip('.')} {unit}"
