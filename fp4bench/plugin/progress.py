"""A line that says how far a run is: cases done, time left, the GPU's clock and power."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import Any

import pytest

# Where there is no terminal to rewrite, a line this often.
_LOG_EVERY_SECONDS = 60.0


class Progress:
    """Written over itself on a terminal, once a minute into a log, never under -q or -v."""

    def __init__(self, config: pytest.Config, total: int, now: Callable[[], float] = time.monotonic) -> None:
        self._reporter = config.pluginmanager.getplugin("terminalreporter")
        shown = self._reporter is not None and config.option.verbose == 0
        self.live = bool(shown and self._reporter.isatty)
        self._logs = bool(shown and not self.live)
        self._total, self._now = total, now
        self._started = self._logged = now()
        self._done = 0

    def advance(self, record: Mapping[str, Any] | None) -> None:
        """One more case is done; its record, if it has one."""
        self._done += 1
        self.show(record)

    def show(self, record: Mapping[str, Any] | None = None, doing: str = "") -> None:
        if self.live:
            self._reporter.rewrite(self._line(record, doing), erase=True)
        elif self._logs and self._now() - self._logged > _LOG_EVERY_SECONDS:
            self._logged = self._now()
            self._reporter.ensure_newline()
            self._reporter.write_line(self._line(record, doing))

    def end(self) -> None:
        """Leave the line and begin a new one."""
        if self.live and self._done:
            self._reporter.rewrite("", erase=True)

    def _line(self, record: Mapping[str, Any] | None, doing: str) -> str:
        parts = [f"fp4bench: {self._done} of {self._total} cases"]
        if 0 < self._done < self._total:
            left = (self._now() - self._started) / self._done * (self._total - self._done)
            parts.append(f"{left / 60:.0f} min left" if left > 90 else f"{left:.0f} s left")
        if record and record.get("sm_mhz"):
            parts.append(f"SM {record['sm_mhz']:.0f} MHz")
        if record and record.get("power_w"):
            parts.append(f"{record['power_w']:.0f} W")
        return ", ".join([*parts, *([doing] if doing else [])])
