"""Stored runs: find the one to compare with, read it, and refuse what cannot be compared."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fp4bench.evidence.record import FORMAT


class BaselineError(ValueError):
    """A stored run that cannot serve as a baseline. The message is one sentence: which file, what, what to do."""


@dataclass(frozen=True)
class Timing:
    """Seconds of one call of a case, over the samples of one run, and the record they belong to."""

    median: float
    fastest: float
    record: dict[str, Any]


@dataclass(frozen=True)
class Baseline:
    """One stored run: its file, when it was made, and its cases by id."""

    path: Path
    datetime: str
    machine_info: dict[str, Any]
    cases: dict[str, Timing]


def find(folder: Path, wanted: str | None = None) -> Path | None:
    """The stored run to compare with: the newest of a machine's folder, or the newest whose name starts with `wanted`.

    `wanted` may also be the path of a file. None where nothing is stored; BaselineError where `wanted` matches nothing.
    """
    if wanted and Path(wanted).is_file():
        return Path(wanted)
    stored = sorted(folder.glob("[0-9][0-9][0-9][0-9]_*.json"))
    matching = [path for path in stored if path.name.startswith(wanted or "")]
    if wanted and not matching:
        names = ", ".join(path.stem for path in stored) or "nothing"
        raise BaselineError(f"no stored run {wanted!r} in {folder}, which holds {names}")
    return matching[-1] if matching else None


def load(path: Path, machine: str) -> Baseline:
    """Read a stored run of this machine. Raises BaselineError for an unreadable file, another format, or another machine."""
    try:
        stored = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise BaselineError(f"cannot read the baseline {path}: {error.strerror}") from error
    except ValueError as error:
        raise BaselineError(f"the baseline {path} is truncated or not JSON ({error}): restore or remove it") from error
    try:
        version = stored["fp4bench"]["format"]
        recorded_on = stored["machine_info"]["machine"]
        cases = {bench["extra_info"]["case_id"]: _timing(bench) for bench in stored["benchmarks"]}
        made = stored["datetime"]
    except (KeyError, TypeError) as error:
        raise BaselineError(f"the baseline {path} is not a run that fp4bench stored: it has no {error}") from error
    if version != FORMAT:
        raise BaselineError(f"the baseline {path} has format {version}, and this fp4bench reads {FORMAT}: record it anew")
    if recorded_on != machine:
        raise BaselineError(f"the baseline {path} was recorded on {recorded_on}, and this machine is {machine}: not comparable")
    return Baseline(path, made, stored["machine_info"], cases)


def _timing(bench: dict[str, Any]) -> Timing:
    return Timing(bench["stats"]["median"], bench["stats"]["min"], bench["extra_info"])
