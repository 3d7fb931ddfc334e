"""What a search has measured, a line a step in a journal on the disk: a search that ends anywhere goes on from there.

A launch that hangs or kills the process leaves a line that it was begun and none of how it ended. It is not tried again.
"""

from collections.abc import Iterable, Mapping
from dataclasses import asdict
from typing import Any

from fp4bench.evidence.journal import Journal
from fp4bench.kernels.configs import Launch, Work, launch_as_json, launch_from_json

# Steps of a launch: begun, then one of the others, and where it ends among the best begun and careful. Of a work: done.
BEGUN, QUICK, CAREFUL, FAILED, STOPPED, DONE = "begun", "quick", "careful", "failed", "stopped", "done"


class Readings:
    """The entries of a journal, by work and launch. Seconds are medians of a call."""

    def __init__(self, entries: Iterable[Mapping[str, Any]], journal: Journal | None = None) -> None:
        self._journal = journal
        self._last: dict[tuple[Work, Launch], str] = {}
        self._seconds: dict[tuple[Work, Launch, str], float] = {}
        self._why: dict[tuple[Work, Launch], str] = {}
        self._done: dict[Work, str | None] = {}
        for entry in entries:
            self._take(entry)

    def begin(self, work: Work, launch: Launch) -> None:
        """To be told before anything of a launch runs."""
        self._add(work, BEGUN, launch)

    def timed(self, work: Work, launch: Launch, step: str, seconds: float, samples: Iterable[float]) -> None:
        """step: QUICK or CAREFUL. samples: what `seconds` is the median of."""
        self._add(work, step, launch, seconds=seconds, samples=list(samples))

    def failed(self, work: Work, launch: Launch, why: str) -> None:
        """It raised, or its output was wrong."""
        self._add(work, FAILED, launch, why=why)

    def stopped(self, work: Work, launch: Launch) -> None:
        """The user stopped the search while it ran: it is no fault of the launch."""
        self._add(work, STOPPED, launch)

    def finish(self, work: Work, why: str | None = None) -> None:
        """Nothing more is to be measured of a work. why: what kept it from being measured at all."""
        self._add(work, DONE, why=why)

    def is_done(self, work: Work) -> bool:
        return work in self._done

    def works_done(self) -> tuple[Work, ...]:
        return tuple(self._done)

    def begun(self, work: Work) -> int:
        """How many launches of a work were begun."""
        return sum(of == work for of, _ in self._last)

    def seconds(self, work: Work, launch: Launch, step: str) -> float | None:
        return self._seconds.get((work, launch, step))

    def why_not(self, work: Work, launch: Launch) -> str | None:
        """Why a launch is not to be tried again, or None."""
        if self._last.get((work, launch)) == BEGUN:
            return "the process ended, or had to be ended, while it ran"
        return self._why.get((work, launch))

    def careful(self, work: Work) -> dict[Launch, float]:
        """The launches of a work that were measured with care."""
        return {launch: value for (of, launch, step), value in self._seconds.items() if (of, step) == (work, CAREFUL)}

    def failures(self) -> dict[tuple[Work, Launch], str]:
        """All launches that are not to be tried again, and why."""
        return {key: why for key in self._last if (why := self.why_not(*key))}

    def given_up(self) -> dict[Work, str]:
        """Works that could not be measured, and why."""
        return {work: why for work, why in self._done.items() if why}

    def _add(self, work: Work, step: str, launch: Launch | None = None, **more: Any) -> None:
        entry = {"work": asdict(work), "launch": launch and launch_as_json(launch), "step": step, **more}
        if self._journal:
            self._journal.append(entry)
        self._take(entry)

    def _take(self, entry: Mapping[str, Any]) -> None:
        work, step = Work(**entry["work"]), entry["step"]
        if step == DONE:
            self._done[work] = entry.get("why")
            return
        launch = launch_from_json(entry["launch"])
        self._last[work, launch] = step
        if step in (QUICK, CAREFUL):
            self._seconds[work, launch, step] = entry["seconds"]
        elif step == FAILED:
            self._why[work, launch] = entry["why"]
