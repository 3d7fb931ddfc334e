"""The measuring of one session: cases go to a worker process, and what comes back is journaled before anything else."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

from fp4bench.cases import Case
from fp4bench.evidence.baselines import Timing
from fp4bench.evidence.journal import Journal, forget_old
from fp4bench.workers.measure import CheckCase, Moment, ReadCanaries, TimeCase, TimedCase
from fp4bench.workers.process import StartFailed, Worker, WorkerError

# How often the canaries are read along a run: a reading takes some 0.4 s (H200).
CANARY_EVERY_SECONDS = 20.0


@dataclass(frozen=True)
class HowToTime:
    """What a worker needs to know beside the case."""

    device: str
    pace: str
    warm: bool
    timeout_seconds: float
    slowdowns: Mapping[str, float]
    nvtx: bool = False


@dataclass
class Run:
    """Timed cases by id, and what the machine was like meanwhile."""

    how: HowToTime
    journal_folder: Path
    journal_header: dict[str, Any]
    on_wait: Callable[[], None]
    started: float  # by time.monotonic()
    timed: dict[str, TimedCase] = field(default_factory=dict)
    conditions: list[dict[str, Any]] = field(default_factory=list)
    canary_errors: list[str] = field(default_factory=list)
    resumed: frozenset[str] = frozenset()  # cases that a run that was cut off had timed
    _worker: Worker | None = None
    _journal: Journal | None = None
    _canaries_due: float = 0.0

    def resume(self) -> None:
        """Take over what the newest run that was cut off had finished. Raises ValueError where there is none."""
        from fp4bench.evidence import journal

        path = journal.resumable(self.journal_folder, self.journal_header)
        if path is None:
            raise ValueError(f"--resume found no run to go on with in {self.journal_folder}: start without it")
        self._journal = Journal.reopen(path)  # which locks it, before it is read
        entries = journal.read(path)[1]
        for entry in entries:
            self._take_over(entry)
        self.resumed = frozenset(self.timed)
        # The run's time goes on where it was: canaries are judged in its order.
        self.started -= max(entry["at_s"] for entry in entries)

    def start(self) -> None:
        """Start the worker process, without waiting for it."""
        how = self.how
        self._worker = Worker("fp4bench.workers.measure:Measurer", how.device, how.pace, how.warm, how.nvtx)

    def check(self, case: Case) -> None:
        """Compare a case's output with its reference. Raises WorkerError."""
        self._ask(CheckCase(case))

    def time(self, case: Case) -> TimedCase:
        """Check and time a case, unless a resumed run had. Raises WorkerError; OSError where the journal cannot be written."""
        case_id = str(case)
        if case_id not in self.timed:
            if time.monotonic() >= self._canaries_due:
                self.read_canaries()
            found: TimedCase = self._ask(TimeCase(case, self.how.slowdowns.get(case_id, 0.0)))
            assert self._worker
            self._note(record=found.record, seconds=found.seconds, calls_per_sample=found.calls_per_sample)
            self.timed[case_id] = found
            if found.record["clock"] == "cuda_events":
                # A capture that failed leaves torch's allocator believing that one is under way.
                self._worker.restart()
        return self.timed[case_id]

    def time_again(self, cases: Mapping[str, Case]) -> dict[str, Timing | str]:
        """Time cases in a fresh process, by id; the error of one that failed. The run keeps its first times."""
        assert self._worker
        self._worker.restart()
        found: dict[str, Timing | str] = {}
        for case_id, case in cases.items():
            try:
                again: TimedCase = self._ask(TimeCase(case, self.how.slowdowns.get(case_id, 0.0)))
            except WorkerError as error:
                found[case_id] = str(error)
            else:
                found[case_id] = timing(again)
        return found

    def read_canaries(self) -> None:
        """Time the canaries and note what the machine is like. Where they cannot be timed, no case is at fault: the run is."""
        at = self.seconds
        self._canaries_due = time.monotonic() + CANARY_EVERY_SECONDS
        try:
            conditions: Moment = self._ask(ReadCanaries())
        except StartFailed:
            raise
        except WorkerError as error:
            self.note_canary_error(error)
            return
        entry = {
            "canaries": [{"at_s": at, **reading} for reading in conditions.canaries],
            "ceilings": conditions.ceilings,
            "snapshot": conditions.snapshot,
            "idle": conditions.idle,
            "no_stamps": conditions.no_stamps,
        }
        self._note(conditions=entry)
        self.conditions.append(entry)

    def note_canary_error(self, error: WorkerError) -> None:
        """The run cannot be believed. Raises OSError where the journal cannot be written."""
        sentence = f"the canaries could not be timed: {error}"
        self.canary_errors.append(sentence)
        self._note(canary_error=sentence)

    @property
    def seconds(self) -> float:
        """How long this run has been going on, without the time between its parts if it was resumed."""
        return time.monotonic() - self.started

    def canaries(self) -> list[dict[str, Any]]:
        """All readings of the canaries, in time order."""
        return [reading for entry in self.conditions for reading in entry["canaries"]]

    def ceilings(self) -> dict[str, float | None]:
        """The medians of this run's ceilings; None where the device has no such unit."""
        names = self.conditions[0]["ceilings"] if self.conditions else {}
        found: dict[str, float | None] = {}
        for name in names:
            values = [entry["ceilings"][name] for entry in self.conditions if entry["ceilings"][name] is not None]
            found[name] = median(values) if values else None
        return found

    def close(self) -> None:
        """End the worker process; the journal stays."""
        if self._worker:
            self._worker.close()

    def stored(self) -> None:
        """The run is on the disk as a whole: its journal may go."""
        if self._journal:
            self._journal.discard()
            self._journal = None

    def _ask(self, request: Any) -> Any:
        if self._worker is None:
            self.start()
        assert self._worker
        return self._worker.ask(request, self.how.timeout_seconds, self.on_wait)

    def _note(self, **entry: Any) -> None:
        if self._journal is None:
            self._journal = Journal.create(self.journal_folder, self.journal_header)
            forget_old(self.journal_folder, time.time())
        self._journal.append({"at_s": self.seconds, **entry})

    def _take_over(self, entry: dict[str, Any]) -> None:
        """A line of the journal, as `_note` wrote it."""
        if "record" in entry:
            found = TimedCase(entry["record"], tuple(entry["seconds"]), entry["calls_per_sample"])
            self.timed[found.record["case_id"]] = found
        elif "conditions" in entry:
            self.conditions.append(entry["conditions"])
        else:
            self.canary_errors.append(entry["canary_error"])


def timing(found: TimedCase) -> Timing:
    """What a verdict sees of a timed case."""
    return Timing(median(found.seconds), min(found.seconds), found.record)
