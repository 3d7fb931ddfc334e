"""What one run stores of one case: a flat record, pytest-benchmark's `extra_info`.

Seconds, bytes and flops; other units are in the names. What was not measured is None, never left out.
"""

from collections.abc import Iterable, Mapping, Sequence
from statistics import median
from typing import Any

import numpy as np

# Format history, stored as `fp4bench.format` in each file:
# 1 - first version
FORMAT = 1

# What was computed, who computed it, what came out, and the state it was timed in.
KEYS = (
    *("case_id", "op", "format", "mode", "provider", "provider_version", "model", "layer", "tp", "m", "n", "k"),
    *("hadamard", "experts", "topk", "scale_rule", "flops", "bytes"),
    *("tflops", "tflops_p20", "tflops_p80", "gbps", "roofline_fraction", "speedup_vs_bf16", "error", "exact"),
    *("clock", "l2", "seconds_q10", "seconds_q25", "seconds_q75", "seconds_q90", "cycles", "sm_mhz", "sm_mhz_min"),
    *("throttle_reasons", "power_w", "temperature_c", "samples", "calls_per_sample", "kernels", "skipped"),
)

# Two measurements of a case are comparable only where these agree: the work, and how it was timed.
COMPARABLE = ("flops", "bytes", "scale_rule", "clock", "l2")


def make_record(facts: Mapping[str, Any], seconds: Sequence[float]) -> dict[str, Any]:
    """The record of a case: `facts` by key, and what follows from the samples.

    A percentile of a rate is that of the samples' rates: `tflops_p20` is reached or beaten by 80 % of them.
    Raises ValueError for unknown keys and bad samples.
    """
    if unknown := facts.keys() - set(KEYS):
        raise ValueError(f"a record has no {', '.join(sorted(unknown))}")
    if not seconds or not all(0 < s < float("inf") for s in seconds):
        raise ValueError("a record needs samples, each a positive and finite number of seconds")
    q10, q20, q25, q75, q80, q90 = (float(q) for q in np.quantile(seconds, (0.1, 0.2, 0.25, 0.75, 0.8, 0.9)))
    middle = median(seconds)
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
    return dict.fromkeys(KEYS) | dict(facts) | derived


def add_speedups(records: Iterable[dict[str, Any]], medians: Mapping[str, float]) -> None:
    """Fill `speedup_vs_bf16` of each GEMM whose layer and batch size this run timed in BF16 too, over the fastest BF16.

    medians: seconds by case id.
    """
    records = list(records)
    shape = ("op", "model", "layer", "tp", "m")
    bf16: dict[tuple[Any, ...], float] = {}
    for record in records:
        if record["mode"] == "bf16":
            at = tuple(record[key] for key in shape)
            bf16[at] = min(medians[record["case_id"]], bf16.get(at, float("inf")))
    for record in records:
        base = bf16.get(tuple(record[key] for key in shape))
        if base is not None:
            record["speedup_vs_bf16"] = base / medians[record["case_id"]]
