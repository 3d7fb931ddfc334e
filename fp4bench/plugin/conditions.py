"""Whether a run is to be believed: what it saw of its machine, put before the rules of evidence/validity.py."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

from fp4bench.evidence import validity
from fp4bench.evidence.baselines import card_of
from fp4bench.evidence.validity import CPU_LIMITS, GPU_LIMITS, CanaryReading, Conditions, Limits

if TYPE_CHECKING:
    from fp4bench.evidence.baselines import Baseline
    from fp4bench.plugin.run import Run


def invalid_reasons(run: Run, on_gpu: bool) -> list[str]:
    """Why this run says nothing of the kernels, a sentence each."""
    idle = [SimpleNamespace(**entry["idle"]) for entry in run.conditions[:1]]
    looks = [SimpleNamespace(**entry["snapshot"]) for entry in run.conditions]
    seen = Conditions.seen(_canaries(run.canaries()), [*looks, *(_look(timed.record) for timed in run.timed.values())], idle)
    return [*run.canary_errors, *validity.invalid_reasons(seen, _limits(on_gpu))]


def incomparable_reasons(run: Run, baseline: Baseline, on_gpu: bool) -> list[str]:
    """Why this run, valid in itself, says nothing beside these accepted runs: its canaries are elsewhere as a whole.

    Such a run may be accepted, as after a new driver or cuBLAS. Accepted runs of this card are compared where there are any;
    else all are, with twice the limit, for cards differ.
    """
    own = [stored for stored in baseline.runs if card_of(stored.session) == baseline.card]
    accepted = [_canaries(stored.info.get("canaries") or ()) for stored in own or baseline.runs]
    limits = _limits(on_gpu)
    limits = limits if own else replace(limits, level=2 * limits.level)
    return validity.against_baseline(_canaries(run.canaries()), accepted, limits)


def _limits(on_gpu: bool) -> Limits:
    return GPU_LIMITS if on_gpu else CPU_LIMITS


def _canaries(readings: Iterable[Mapping[str, Any]]) -> Iterable[CanaryReading]:
    keys = ("name", "at_s", "seconds", "sm_mhz", "cycles")
    return [CanaryReading(**{key: reading[key] for key in keys}) for reading in readings]


def _look(record: Mapping[str, Any]) -> Any:
    """What a case's record tells of the machine."""
    return SimpleNamespace(
        throttle=record["throttle_reasons"],
        temperature_c=record["temperature_c"],
        processes=None,
        memory_used_bytes=None,
        utilization_percent=None,
    )
