"""A run that was cut off and never resumed, as reports read it: its journal holds every case that had finished.

It is no baseline, and cannot be accepted: nobody looked at the canaries after its last case.
"""

from collections.abc import Iterable, Mapping
from datetime import datetime, timezone
from pathlib import Path
from statistics import median
from typing import Any

from fp4bench.evidence import journal
from fp4bench.evidence.record import add_roofline, add_speedups


def as_run(path: Path) -> dict[str, Any]:
    """What a stored run of the same cases would hold, as far as reports read it.

    Raises JournalError for a file that is no journal, and ValueError for one without a finished case.
    """
    header, entries = journal.read(path)
    key, made = header["key"], _started(path)
    finished = {entry["record"]["case_id"]: entry for entry in entries if entry.get("record") and entry.get("seconds")}
    if not finished:
        raise ValueError(f"no case of the journal {path} had finished: there is nothing to report")
    records = [dict(entry["record"]) for entry in finished.values()]
    medians = {case_id: median(entry["seconds"]) for case_id, entry in finished.items()}
    ceilings = _ceilings(entry["conditions"] for entry in entries if entry.get("conditions"))
    add_speedups(records, medians)
    add_roofline(records, medians, ceilings)
    benches = [
        {"extra_info": record, "stats": {"median": medians[case_id], "min": min(finished[case_id]["seconds"])}}
        for case_id, record in zip(finished, records, strict=True)
    ]
    card = key["machine_info"].get("uuid") or key["machine_info"]["machine"]
    info = {"format": key["format"], "session": f"{card} {made:%Y-%m-%d}", "complete": False, "ceilings": ceilings}
    return {
        "machine_info": key["machine_info"],
        "datetime": made.isoformat(),
        "benchmarks": benches,
        "fp4bench": info | {"accepted": None},
    }


def _started(path: Path) -> datetime:
    """When the run began: journals are named by that; a renamed one counts from when it was last written."""
    try:
        return datetime.strptime(path.name.split("-")[0], "%Y%m%dT%H%M%S").replace(tzinfo=timezone.utc)
    except ValueError:
        return datetime.fromtimestamp(path.stat().st_mtime, timezone.utc)


def _ceilings(conditions: Iterable[Mapping[str, Any]]) -> dict[str, float | None]:
    """The medians of what was measured, by name."""
    found: dict[str, list[float]] = {}
    for told in conditions:
        for name, value in told["ceilings"].items():
            found.setdefault(name, []).extend([] if value is None else [value])
    return {name: median(values) if values else None for name, values in found.items()}
