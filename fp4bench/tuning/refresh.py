"""A table with what was measured: which launches change, and the text that says so."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

from fp4bench.devices import Device
from fp4bench.kernels.configs import Entry, Launch, Table, Work, launch_as_json, tables_of
from fp4bench.tuning.readings import Readings

# A launch is replaced by one that is faster by more than this: medians of one launch differ by some tenths of a percent.
MARGIN = 0.01


@dataclass(frozen=True)
class Change:
    """The best launch of some work, in place of another. was_seconds: of the one before, None where it does not run."""

    entry: Entry
    was: Launch
    was_seconds: float | None

    def __str__(self) -> str:
        was = "does not run" if self.was_seconds is None else f"{1e6 * self.was_seconds:.2f} us"
        now = f"{1e6 * self.entry.seconds:.2f} us by {_text(self.entry.launch)}"
        return f"{describe(self.entry.work)}: {now}; {_text(self.was)}: {was}"


def refreshed(
    device: Device,
    versions: Mapping[str, str],
    works: Iterable[Work],
    readings: Readings,
    current: Callable[[Work], Launch],
    before: Table | None = None,
) -> tuple[Table, list[Change]]:
    """The table of a GPU with the best launch of each work that was measured, and what of it differs from `current`.

    before: what the new one replaces where it is written, whose other entries it keeps; default the table that serves the GPU.
    """
    assert device.capability is not None
    assert device.sm_count is not None
    own = before or next((table for table in tables_of(device) if table.gpu == device.name), None)
    entries = {entry.work: entry for entry in own.entries} if own else {}
    changes = []
    for work in works:
        measured, was = readings.careful(work), current(work)
        if not measured:
            continue
        launch = best(measured, was)
        entries[work] = Entry(work, launch, measured[launch])
        if launch != was:
            changes.append(Change(entries[work], was, measured.get(was)))
    return Table(device.name, device.capability, device.sm_count, versions, tuple(entries.values())), changes


def best(measured: Mapping[Launch, float], current: Launch) -> Launch:
    """The fastest; the current one unless that is faster by more than MARGIN."""
    fastest = min(measured, key=lambda launch: measured[launch])
    kept = current in measured and measured[current] * (1 - MARGIN) <= measured[fastest]
    return current if kept else fastest


def describe(work: Work) -> str:
    """`mxfp4 bf16 m32 n8192 k8192`."""
    return f"{work.format} {work.operand} m{work.m} n{work.n} k{work.k}"


def _text(launch: Launch) -> str:
    raw = launch_as_json(launch)
    return f"{raw.pop('kernel')}({', '.join(f'{name}={value}' for name, value in raw.items())})"
