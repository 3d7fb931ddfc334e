"""What one run stores of one case: a flat record, pytest-benchmark's `extra_info`.

Seconds, bytes and flops; other units are in the names. What was not measured is None, never left out.
"""

from collections.abc import Iterable, Mapping, Sequence
from statistics import median
from typing import Any

import numpy as np

# Format history, stored as `fp4bench.format` in each file:
# 1 - first version
# 2 - paced timing by clock stamps: pace, cycles_q25, cycles_q75, event_seconds, gap_s, injected; the run says its session,
#     whether it is complete and valid, its options, ceilings and canaries, and for what reason it was accepted
# 3 - copies of the operands, of which large ones have several too; later runs also say how often samples were `retaken` (0 in
#     some of them where nobody looked; None since), and those since the 36th of H200s the `placement` of operands: "arena", or
#     None where the driver found room
FORMAT = 3

# What was computed, who computed it, what came out, and the state it was timed in.
KEYS = (
    *("case_id", "op", "format", "mode", "provider", "provider_version", "provider_variant"),
    *("model", "layer", "tp", "m", "n", "k"),
    *("hadamard", "experts", "topk", "experts_hit", "most_tokens", "routing", "fp8_scaling", "activation"),
    *("scale_rule", "flops", "bytes"),
    *("tflops", "tflops_p20", "tflops_p80", "gbps", "roofline_fraction", "speedup_vs_bf16", "error", "exact"),
    *("clock", "l2", "copies", "placement", "pace", "gap_s"),
    *("seconds_q10", "seconds_q25", "seconds_q75", "seconds_q90", "event_seconds"),
    *("eager_seconds", "launch_seconds", "phases"),
    *("cycles", "cycles_q25", "cycles_q75", "sm_mhz", "sm_mhz_min"),
    *("throttle_reasons", "power_w", "temperature_c", "samples", "calls_per_sample", "retaken"),
    *("kernels", "skipped", "injected"),
)

# Two measurements of a case are comparable only where these agree: the work, the way that the provider was asked to do it, and
# how it was timed. Not the provider's version: what an upgrade slows down is to be seen.
# In an arena chains of small kernels on m = 1 read 1 to 3 % more than without on H200s, and products from -4 to +4 %.
COMPARABLE = ("flops", "bytes", "scale_rule", "provider_variant", "clock", "l2", "copies", "placement", "pace")

# Modes whose activations have 8 bits or 4, held to the rate of 8-bit matrix units: Hopper has no smaller ones, and where there
# are 4-bit ones, which have no ceiling yet, a fraction may exceed 1. The others are held to 16 bits.
_FP8_MODES = ("fp8", "w4a8", "w4a4", "w4a4_noquant")


def make_record(
    facts: Mapping[str, Any],
    seconds: Sequence[float],
    cycles: Sequence[float] | None = None,
    sm_mhz: Sequence[float] | None = None,
    event_seconds: Sequence[float] | None = None,
) -> dict[str, Any]:
    """The record of a case: `facts` by key, and what follows from the samples.

    seconds, and where the clock gives them SM cycles, SM clock and seconds by CUDA events: of one call, one value a sample, in
    time order. A percentile of a rate is that of the samples' rates: `tflops_p20` is reached or beaten by 80 % of them.
    Raises ValueError for unknown keys, bad samples, and sequences of different lengths.
    """
    if unknown := facts.keys() - set(KEYS):
        raise ValueError(f"a record has no {', '.join(sorted(unknown))}")
    _check_samples("seconds", seconds, len(seconds))
    for name, values in (("cycles", cycles), ("sm_mhz", sm_mhz), ("event_seconds", event_seconds)):
        if values is not None:
            _check_samples(name, values, len(seconds))
    q10, q20, q25, q75, q80, q90 = (float(q) for q in np.quantile(seconds, (0.1, 0.2, 0.25, 0.75, 0.8, 0.9)))
    middle = float(median(seconds))
    tera = facts["flops"] * 1e-12
    derived = {
        "tflops": tera / middle if tera else None,
        "tflops_p20": tera / q80 if tera else None,
        "tflops_p80": tera / q20 if tera else None,
        "gbps": facts["bytes"] * 1e-9 / middle,
        "seconds_q10": q10,
        "seconds_q25": q25,
        "seconds_q75": q75,
        "seconds_q90": q90,
        "samples": len(seconds),
    }
    if cycles is not None:
        q25, q50, q75 = (float(q) for q in np.quantile(cycles, (0.25, 0.5, 0.75)))
        derived |= {"cycles": q50, "cycles_q25": q25, "cycles_q75": q75}
    if sm_mhz is not None:
        derived |= {"sm_mhz": float(median(sm_mhz)), "sm_mhz_min": float(min(sm_mhz))}
    if event_seconds is not None:
        derived["event_seconds"] = float(median(event_seconds))
    return dict.fromkeys(KEYS) | dict(facts) | derived


def _check_samples(name: str, values: Sequence[float], expected: int) -> None:
    if not values or not all(0 < value < float("inf") for value in values):
        what = "seconds" if name == "seconds" else f"{name}, where given"
        raise ValueError(f"a record needs samples, each a positive and finite number: {what}")
    if len(values) != expected:
        raise ValueError(f"a record needs one value a sample: {len(values)} of {name} for {expected} samples")


def add_speedups(records: Iterable[dict[str, Any]], medians: Mapping[str, float]) -> None:
    """Fill `speedup_vs_bf16` of each product whose layer, batch size and routing this run timed in BF16 too, over the fastest.

    medians: seconds by case id.
    """
    records = list(records)
    shape = ("op", "model", "layer", "tp", "m", "routing")
    bf16: dict[tuple[Any, ...], float] = {}
    for record in records:
        if record["mode"] == "bf16":
            at = tuple(record.get(key) for key in shape)
            bf16[at] = min(medians[record["case_id"]], bf16.get(at, float("inf")))
    for record in records:
        base = bf16.get(tuple(record.get(key) for key in shape))
        if base is not None:
            record["speedup_vs_bf16"] = base / medians[record["case_id"]]


def add_roofline(records: Iterable[dict[str, Any]], medians: Mapping[str, float], ceilings: Mapping[str, float | None]) -> None:
    """Fill `roofline_fraction`: the least time that this machine's measured ceilings allow, over the median.

    medians: seconds by case id. ceilings: copy_gbps, bf16_tflops and fp8_tflops; a fraction whose ceiling is None stays None.
    """
    for record in records:
        least = least_seconds(record, ceilings)
        if least is not None:
            record["roofline_fraction"] = least / medians[record["case_id"]]


def least_seconds(record: Mapping[str, Any], ceilings: Mapping[str, float | None]) -> float | None:
    """The least time that measured ceilings allow for the mode, flops and bytes of a record; None where one is not known."""
    copy, rate = ceilings.get("copy_gbps"), ceilings.get("fp8_tflops" if record["mode"] in _FP8_MODES else "bf16_tflops")
    if copy is None or (record["flops"] and rate is None):
        return None
    computing = record["flops"] / (rate * 1e12) if record["flops"] and rate else 0.0
    return max(record["bytes"] / (copy * 1e9), computing)
