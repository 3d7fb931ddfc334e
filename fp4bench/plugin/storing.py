"""What a session writes at its end: the stored run, in the place of pytest-benchmark, and what it says of itself."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fp4bench.plugin.suite import Suite


class Storing:
    """path: of the run, once it is stored. wrote_all: whether nothing failed that was to be written.

    What it knows of pytest-benchmark's session: `benchmarks`, `save`, `autosave`, `save_json` and `storage.save`.
    """

    def __init__(self, suite: Suite) -> None:
        self._suite = suite
        self.path: Path | None = None
        self.wrote_all = True

    def take_over(self, benchmarks: Any) -> None:
        """Have pytest-benchmark's session store by `evidence/storage.py`, and store always."""
        benchmarks.save = benchmarks.save or benchmarks.autosave or "run"
        benchmarks.storage.save = self._store
        benchmarks.save_json = self._writing_json(benchmarks.save_json)

    def derive(self, benchmarks: Any) -> None:
        """Fill what follows from the whole run: ratios to BF16 and to the ceilings."""
        from fp4bench.evidence.record import add_roofline, add_speedups
        from fp4bench.plugin.run import timing

        medians = {case_id: timing(self._suite.run.timed[case_id]).median for case_id in self._suite.tally.timed}
        records = [bench.extra_info for bench in benchmarks.benchmarks if bench.extra_info.get("case_id") in medians]
        add_speedups(records, medians)
        add_roofline(records, medians, self._suite.run.ceilings())

    def _store(self, output: dict[str, Any], name: str) -> None:
        """In the place of pytest-benchmark's storage, which numbers files without regard to others and writes in place."""
        from fp4bench.evidence.storage import store

        try:
            self.path = store(output, self._suite.runs, name, samples=bool(self._suite.config.option.benchmark_save_data))
        except OSError as error:
            self.failed(f"the run was not stored: {error}; nothing is lost, --resume takes it up and stores it")
        else:
            self._suite.run.stored()

    def _writing_json(self, save_json: Callable[[Any], None]) -> Callable[[Any], None]:
        """pytest-benchmark's --benchmark-json, which comes before storing, and must not keep from that."""

        def save(output: Any) -> None:
            try:
                save_json(output)
            except OSError as error:
                self.failed(f"--benchmark-json was not written: {error}")

        return save

    def failed(self, note: str) -> None:
        self.wrote_all = False
        self._suite.notes.append(note)

    def info(self, complete: bool) -> dict[str, Any]:
        """What a stored run says of itself, beside its cases."""
        from datetime import datetime, timezone

        from fp4bench import __version__
        from fp4bench.evidence.record import FORMAT
        from fp4bench.timing.machine import session

        return {
            "format": FORMAT,
            "version": __version__,
            "session": session(self._suite.machine_info, datetime.now(timezone.utc)),
            "complete": complete,
            "failed": self._suite.tally.failed,
            "left_out": len(self._suite.tally.left_out),
            "invalid": self._suite.invalid,
            "options": self._suite.asked,
            "floors": self._suite.own_floors,
            "no_stamps": self._suite.run.conditions[0]["no_stamps"] if self._suite.run.conditions else None,
            "ceilings": self._suite.run.ceilings(),
            "canaries": self._suite.run.canaries(),
            "wall_s": round(self._suite.run.seconds, 1),
            "accepted": None,
        }
