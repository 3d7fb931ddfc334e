"""A search from beginning to end, in a process that is replaced when a launch takes it down.

The processes speak through the journal alone: the one that measures writes it, this one reads it for the progress, and ends
the other when it has been silent for too long. So a search goes on in the same way after a launch that hangs, after Ctrl-C and
after a reboot.
"""

import multiprocessing
import os
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from hashlib import sha256
from importlib.metadata import version
from pathlib import Path
from typing import Any

import fp4bench.kernels
from fp4bench.devices import Device
from fp4bench.evidence import journal
from fp4bench.evidence.journal import Journal
from fp4bench.kernels.configs import Work
from fp4bench.tuning.readings import Readings
from fp4bench.tuning.search import DeviceLostError, launches, search

_ALL_DONE, _OUT_OF_TIME, _LOST = 0, 3, 4  # exit codes of the process that measures
_LOOK_SECONDS = 0.5
_START_SECONDS = 120.0  # until a process has its libraries and its GPU, and touches the journal
_MOST_IN_VAIN = 2  # processes in a row that end before they measured anything

# Who measures: (works, device, journal, the time.time() to stop at) -> exit code. In a process of its own.
Measure = Callable[[Sequence[Work], Device, Path, float], int]


class CannotMeasureError(ValueError):
    """The process that measures ends before it has measured anything. One sentence."""


@dataclass(frozen=True)
class Progress:
    """works_done of `works`, launches_done of `launches`; what: compiling or measuring."""

    what: str
    works_done: int
    works: int
    launches_done: int
    launches: int


def versions() -> dict[str, str]:
    """Of what launches are tuned with."""
    return {name: version(name) for name in ("torch", "triton")}


def open_journal(folder: Path, device: Device) -> Path:
    """The journal of a search of this GPU by these kernels that was cut off, or a new one. Raises JournalError."""
    header = {"key": {"gpu": device.name, "versions": versions(), "kernels": _kernels_hash()}}
    found = journal.resumable(folder, header)
    if found:
        return found
    with Journal.create(folder, header) as new:
        return new.path


def close_journal(path: Path) -> Path:
    """Put a finished journal aside, where no later search goes on with it. -> its new place."""
    return path.replace(path.with_suffix(".readings"))


def measure_all(
    works: Sequence[Work],
    device: Device,
    path: Path,
    *,
    until: float,
    silence: float,
    show: Callable[[Progress], None],
    measure: Measure | None = None,
) -> bool:
    """Measure until all works are done, or time.time() is `until`. Returns whether all are done.

    silence: seconds after the last line of the journal at which the process that measures is ended.
    Raises CannotMeasureError where it ends again and again with nothing new in the journal.
    """
    spawn, in_vain = multiprocessing.get_context("spawn"), 0
    tried = {work: len(launches(work, device)) for work in works}
    while in_vain < _MOST_IN_VAIN:
        size = path.stat().st_size
        process = spawn.Process(target=_in_a_process, args=(measure or measure_here, works, device, path, until))
        process.start()
        try:
            _wait(process, path, silence, lambda: show(progress(path, tried)))
        finally:
            _end(process)
        if process.exitcode in (_ALL_DONE, _OUT_OF_TIME):
            return process.exitcode == _ALL_DONE
        in_vain = 0 if path.stat().st_size > size else in_vain + 1
    raise CannotMeasureError(f"the process that measures ends with {process.exitcode} before it has measured anything")


def measure_here(works: Sequence[Work], device: Device, path: Path, until: float) -> int:
    """Measure in this process. -> exit code."""
    import torch

    from fp4bench.tuning.product import Products

    torch.cuda.set_device(device.torch_name)
    entries = journal.read(path)[1]
    with Journal.reopen(path) as open_journal:
        readings = Readings(entries, open_journal)
        try:
            done = search(works, device, Products(device).open, readings, enough=lambda: time.time() > until)
        except DeviceLostError:
            return _LOST
    return _ALL_DONE if done else _OUT_OF_TIME


def progress(path: Path, tried: dict[Work, int]) -> Progress:
    """How far a journal is. tried: launches to be tried, by work."""
    readings = Readings(journal.read(path)[1])
    done = [work for work in tried if readings.is_done(work)]
    begun = sum(readings.begun(work) for work in tried if not readings.is_done(work))
    launches_done = sum(tried[work] for work in done) + begun
    return Progress("measuring", len(done), len(tried), min(launches_done, sum(tried.values())), sum(tried.values()))


def _in_a_process(measure: Measure, works: Sequence[Work], device: Device, path: Path, until: float) -> None:
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # Triton prints the whole of what ptxas refuses
    os.utime(path)
    try:
        code = measure(works, device, path, until)
    except KeyboardInterrupt:
        code = 130
    os._exit(code)  # a lost GPU would keep the interpreter from ending


def _wait(process: Any, path: Path, silence: float, look: Callable[[], None]) -> None:
    """Until the process ends, or was silent for too long."""
    started = time.time()
    while process.exitcode is None:
        process.join(_LOOK_SECONDS)
        look()
        last = path.stat().st_mtime
        if time.time() - max(started, last) > (silence if last > started else max(silence, _START_SECONDS)):
            return


def _end(process: Any) -> None:
    """After Ctrl-C it has a moment to write down that it was stopped."""
    process.join(0 if process.exitcode is None and sys.exc_info()[0] is None else 5)
    if process.exitcode is None:
        process.kill()
    process.join()


def _kernels_hash() -> str:
    """Of the sources: a launch that was measured with others is to be measured again."""
    folder = Path(fp4bench.kernels.__file__).parent
    names = "configs decode fragments overlap prefill prefill_kernel prefill_launch slots streams unpack weights"
    return sha256(b"".join((folder / f"{name}.py").read_bytes() for name in names.split())).hexdigest()[:16]
