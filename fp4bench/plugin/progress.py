"""A line that says how far a run is: cases done, time left, the GPU's clock and power."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import pytest

# Where there is no terminal to rewrite, a line this often.
_LOG_EVERY_SECONDS = 60.0


class Progress:
    """Written over itself on a terminal, once a minute into a log, never under -q or -v."""

    def __init__(self, config: pytest.Config, total: int, resumed: int = 0, now: Callable[[], float] = time.monotonic) -> None:
        """total: of cases to be timed, `resumed` ones included, whose time says nothing of what is left."""
        self._reporter = config.pluginmanager.getplugin("terminalreporter")
        self._capture = config.pluginmanager.getplugin("capturemanager")
        shown = self._reporter is not None and config.option.verbose == 0
        self.live = bool(shown and self._reporter.isatty)
        self._logs = bool(shown and not self.live)
        self._total, self._resumed, self._now = total, resumed, now
        self._started = self._logged = now()
        self._done = 0
        self._machine: list[str] = []
        self._doing = ""

    def advance(self, record: Mapping[str, Any] | None) -> None:
        """One more case is done; its record, if it has one."""
        self._done += 1
        if record:
            shown = (("sm_mhz", "SM {:.0f} MHz"), ("power_w", "{:.0f} W"))
            self._machine = [text.format(record[key]) for key, text in shown if record.get(key)]
        self.show()

    def show(self, doing: str | None = None) -> None:
        """Show the line, where it is due. `doing` is shown from now on."""
        if doing is not None:
            self._doing = doing
        if self.live:
            with self._uncaptured():
                self._reporter.rewrite(self._line(), erase=True)
        elif self._logs and self._now() - self._logged >= _LOG_EVERY_SECONDS:
            self._logged = self._now()
            with self._uncaptured():
                self._reporter.ensure_newline()
                self._reporter.write_line(self._line())

    def end(self) -> None:
        """Remove the line."""
        if self.live:
            self._reporter.rewrite("", erase=True)

    @contextmanager
    def _uncaptured(self) -> Iterator[None]:
        """While a test runs, what is written goes to its captured output."""
        if self._capture is None:
            yield
            return
        with self._capture.global_and_fixture_disabled():
            yield

    def _line(self) -> str:
        parts = [f"fp4bench: {self._done} of {self._total} cases"]
        timed = self._done - self._resumed
        if timed > 0 and self._done < self._total:
            left = (self._now() - self._started) / timed * (self._total - self._done)
            parts.append(f"{left / 60:.0f} min left" if left > 90 else f"{left:.0f} s left")
        return ", ".join([*parts, *self._machine, *([self._doing] if self._doing else [])])
