"""When a run is not to be believed: its canaries wandered, the GPU was slowed by heat or hardware, or someone else used it.

Pure: readings in, sentences out. An invalid run says nothing of any kernel, so none of its cases is REGRESSED.
"""

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from math import isfinite
from statistics import median
from typing import Protocol

# Clocks cut by heat or by the board's protection. `sw_power_cap` is not among them: it is the normal state of a loaded GPU.
SLOWDOWNS = ("hw_slowdown", "sw_thermal", "hw_thermal", "hw_power_brake")

# Canaries that a machine slows down together, so that one alone is not the machine's doing: on two H100s the FP8 product, whose
# two operands of 64 MB do not fit the L2 of 50 MB, moved by 3.3 and 3.5 % in runs in which the BF16 one kept within 0.6 %
# (`baselines/NVIDIA-H100-80GB-HBM3/*/*-fp8-canary-drifted.json`). On H200s both keep within 0.8 %.
PRODUCTS = ("bf16", "fp8")


@dataclass(frozen=True)
class CanaryReading:
    """One reading of a canary: `at_s` seconds into the run, `seconds` and SM `cycles` of one call, at `sm_mhz`.

    Raises ValueError for a time that is not positive and finite: as a reading it would compare as no drift.
    """

    name: str
    at_s: float
    seconds: float
    sm_mhz: float | None = None
    cycles: float | None = None

    def __post_init__(self) -> None:
        for value in (self.seconds, self.cycles):
            if value is not None and not (isfinite(value) and value > 0):
                raise ValueError(f"the canary {self.name} has a reading of {value}, which is not a positive, finite number")


class Look(Protocol):
    """What is read of a look at the GPU; `fp4bench.timing.telemetry.Snapshot` is one. None: not known."""

    @property
    def throttle(self) -> tuple[str, ...] | None: ...
    @property
    def processes(self) -> Sequence[tuple[int, int | None]] | None: ...
    @property
    def temperature_c(self) -> float | None: ...
    @property
    def memory_used_bytes(self) -> int | None: ...
    @property
    def utilization_percent(self) -> float | None: ...


@dataclass(frozen=True)
class Conditions:
    """What was seen of the machine during a run.

    throttle: in how many looks each reason was seen; looks: how many could tell.
    foreign: the largest memory in bytes of each process of others, by pid, None where unknown.
    idle_percent: utilization while nothing of this run worked, for a second or more before each reading.
    idle_bytes: memory in use before this run had a CUDA context. temperature_max: degrees Celsius.
    """

    canaries: tuple[CanaryReading, ...] = ()
    throttle: Mapping[str, int] = field(default_factory=dict)
    looks: int = 0
    foreign: Mapping[int, int | None] = field(default_factory=dict)
    idle_percent: tuple[float, ...] = ()
    idle_bytes: int | None = None
    temperature_max: float | None = None

    @classmethod
    def seen(cls, canaries: Iterable[CanaryReading], looks: Iterable[Look], idle: Iterable[Look] = ()) -> "Conditions":
        """From the looks during the run and those while it idled, the first of these before its first CUDA context."""
        idle, looks = list(idle), list(looks)
        every = [*idle, *looks]
        told = [look.throttle for look in every if look.throttle is not None]
        temperatures = [look.temperature_c for look in every if look.temperature_c is not None]
        return cls(
            canaries=tuple(canaries),
            throttle=Counter(reason for reasons in told for reason in reasons),
            looks=len(told),
            foreign=_largest(every),
            idle_percent=tuple(look.utilization_percent for look in idle if look.utilization_percent is not None),
            idle_bytes=idle[0].memory_used_bytes if idle else None,
            temperature_max=max(temperatures, default=None),
        )


@dataclass(frozen=True)
class Limits:
    """Beyond these a run is invalid; all but `foreign_bytes` are shares.

    drift: of a canary's time and of its cycles within a run, highest over lowest, less one; of all products, if of one.
    level: of a canary's median time from that of the accepted runs, either way, as a ratio less one.
    slowdown: of the looks that show a slowdown by heat or hardware.
    idle_use: of the GPU in use while this run idles, by someone who holds `foreign_bytes` (less is no CUDA context).
    """

    drift: float = 0.03
    level: float = 0.05
    slowdown: float = 0.02
    idle_use: float = 0.05
    foreign_bytes: int = 256 << 20


# Paced medians of an H200 repeat within 0.2 % between processes and 0.6 % between cards. A shared CPU has phases of half a
# minute in which the same work takes 1.5 times as long; the gate copes with those, so only a hopeless machine is refused.
GPU_LIMITS = Limits()
CPU_LIMITS = Limits(drift=1.5, level=1.5)


def invalid_reasons(conditions: Conditions, limits: Limits) -> list[str]:
    """Why a run is not to be believed, a sentence each; empty: nothing speaks against it, also where nothing was seen."""
    by_name = _by_name(conditions.canaries)
    return [*_drifts(by_name, limits.drift), *_slowdowns(conditions, limits), *_busy(conditions, limits)]


def against_baseline(now: Iterable[CanaryReading], accepted: Iterable[Iterable[CanaryReading]], limits: Limits) -> list[str]:
    """Why this run's machine is not the one that the accepted runs were made on, a sentence each.

    A canary's level is its median time over a run, which an odd reading does not move; the accepted level is the median over
    the accepted runs that have this canary. A canary that no accepted run has is not compared.
    """
    levels: dict[str, list[float]] = {}
    for run in accepted:
        for name, readings in _by_name(run).items():
            levels.setdefault(name, []).append(_level(readings))
    sentences = []
    for name, readings in _by_name(now).items():
        if name not in levels:
            continue
        before, after = median(levels[name]), _level(readings)
        if max(after / before, before / after) > 1 + limits.level:
            sentences.append(
                f"the canary {name} takes {after * 1e3:.4g} ms and took {before * 1e3:.4g} ms in the accepted runs "
                f"({after / before - 1:+.1%}, beyond {limits.level:.0%}): the machine or its libraries changed as a whole"
            )
    return sentences


def smoothed(values: Sequence[float]) -> list[float]:
    """Running medians of three, the ends by Tukey's rule (Exploratory Data Analysis, 1977, section 7C).

    An odd reading between like ones vanishes, wherever it is; a ramp stays as it is, and so does a step that lasts for two
    readings. Of three readings the ends, and of two both, stay as they are: too few to call one odd.
    """
    inner = [median(values[i : i + 3]) for i in range(len(values) - 2)]
    if len(inner) < 2:
        return [values[0], *inner, values[-1]] if inner else list(values)
    first = median((values[0], inner[0], 3 * inner[0] - 2 * inner[1]))
    last = median((values[-1], inner[-1], 3 * inner[-1] - 2 * inner[-2]))
    return [first, *inner, last]


def _drifts(by_name: Mapping[str, Sequence[CanaryReading]], limit: float) -> Iterable[str]:
    """Of each canary; of `PRODUCTS` where all of them drift in the same quantity."""
    found = {name: dict(_drifts_of(readings, limit)) for name, readings in by_name.items()}
    products = [found[name] for name in PRODUCTS if name in found]
    for name, sentences in found.items():
        for quantity, sentence in sentences.items():
            if name not in PRODUCTS or all(quantity in product for product in products):
                yield sentence


def _drifts_of(readings: Sequence[CanaryReading], limit: float) -> Iterable[tuple[str, str]]:
    """-> quantity and sentence. A run is held to its canaries' time and to their cycles: a clock that falls shows in the first
    alone, and another user of the memory or of the SMs in both. Highest over lowest of the smoothed readings, so one blip is no
    drift."""
    views: tuple[tuple[str, Callable[[CanaryReading], float | None]], ...] = (
        ("time", lambda reading: reading.seconds),
        ("cycles", lambda reading: reading.cycles),
    )
    for quantity, view in views:
        values = smoothed([value for reading in readings if (value := view(reading)) is not None])
        drift = max(values) / min(values) - 1 if values else 0
        if drift > limit:
            yield (
                quantity,
                f"the canary {readings[0].name} drifted by {drift:.1%} in {quantity} during the run, beyond {limit:.0%}"
                f"{_clocks(readings)}: the machine was not steady",
            )


def _slowdowns(conditions: Conditions, limits: Limits) -> Iterable[str]:
    hottest = f" (hottest reading {conditions.temperature_max:g} C)" if conditions.temperature_max is not None else ""
    for reason in SLOWDOWNS:
        count = conditions.throttle.get(reason, 0)
        if count > limits.slowdown * conditions.looks:
            yield f"{reason} slowed the GPU in {count} of {conditions.looks} looks{hottest}: see to its cooling and power"


def _busy(conditions: Conditions, limits: Limits) -> Iterable[str]:
    """Memory and use together: a context that idles takes no time, and some drivers report use where nobody is."""
    if not conditions.idle_percent or (use := median(conditions.idle_percent)) <= 100 * limits.idle_use:
        return
    holders = [pid for pid, size in conditions.foreign.items() if size is None or size >= limits.foreign_bytes]
    if holders:
        who = "the process" + ("es " if len(holders) > 1 else " ") + ", ".join(map(str, sorted(holders)))
    elif (conditions.idle_bytes or 0) >= limits.foreign_bytes:
        who = f"someone out of sight who holds {(conditions.idle_bytes or 0) / 2**20:.0f} MiB"
    else:
        return
    yield f"the GPU was {use:.0f} % in use while this run idled, by {who}: wait for it, or stop it"


def _clocks(readings: Sequence[CanaryReading]) -> str:
    clocks = [reading.sm_mhz for reading in readings if reading.sm_mhz is not None]
    return f" (SM clock {min(clocks):.0f} to {max(clocks):.0f} MHz)" if clocks else ""


def _level(readings: Sequence[CanaryReading]) -> float:
    return median(reading.seconds for reading in readings)


def _by_name(canaries: Iterable[CanaryReading]) -> dict[str, list[CanaryReading]]:
    """Readings by canary, each list in the order of time."""
    found: dict[str, list[CanaryReading]] = {}
    for canary in sorted(canaries, key=lambda reading: reading.at_s):
        found.setdefault(canary.name, []).append(canary)
    return found


def _largest(looks: Iterable[Look]) -> dict[int, int | None]:
    """The largest memory that each process of others was seen with."""
    found: dict[int, int | None] = {}
    for look in looks:
        for pid, size in look.processes or ():
            known = found.get(pid)
            found[pid] = size if known is None else max(known, size or 0)
    return found
