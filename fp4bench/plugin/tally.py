"""What became of the cases of one session."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from fp4bench.cases import Case


@dataclass
class Tally:
    """Cases by id. Every generated case is selected or left out; every selected one ends skipped, failed or timed.

    skipped: with the reason; from the beginning where a provider cannot run it, later where its test says so.
    """

    generated: set[str] = field(default_factory=set)
    selected: set[str] = field(default_factory=set)
    skipped: dict[str, str] = field(default_factory=dict)
    failed: list[str] = field(default_factory=list)
    timed: dict[str, tuple[pytest.Item, Case]] = field(default_factory=dict)

    @property
    def left_out(self) -> set[str]:
        """Cases that were deselected: by -k, --lf, or tests named one by one."""
        return self.generated - self.selected

    @property
    def due(self) -> set[str]:
        """Cases that are to be timed."""
        return self.selected - self.skipped.keys()

    @property
    def complete(self) -> bool:
        """Whether every selected case was timed, or skipped for a reason."""
        return not self.failed and self.due <= self.timed.keys()

    def fail(self, case_id: str) -> None:
        """A case's test failed, before or after it was timed: it has no number."""
        self.timed.pop(case_id, None)
        if case_id not in self.failed:
            self.failed.append(case_id)


def case_of(item: pytest.Item) -> Case | None:
    """The case that a test is run for, if it is for one. pytest skips a test that got no case by running it for a token."""
    if item.get_closest_marker("cases") is None or not hasattr(item, "callspec"):
        return None
    from fp4bench.cases import Case

    case = item.callspec.params.get("case")
    return case if isinstance(case, Case) else None
