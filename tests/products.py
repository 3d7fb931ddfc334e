"""Runs of matrix products by several providers, made up and small: what tests of tables, plots and the frontier stand on."""

from recorded import ALIKE, stored_run

from fp4bench.evidence.baselines import parse
from fp4bench.evidence.record import add_roofline, add_speedups, make_record
from fp4bench.evidence.results import join

CEILINGS = {"copy_gbps": 1000.0, "bf16_tflops": 100.0, "fp8_tflops": 200.0}
# Bits of a weight, and of an activation, in memory.
_BITS = {
    "bf16": (16, 16),
    "fp16": (16, 16),
    "fp8": (8, 8),
    "w4a16": (4.25, 16),
    "w4a16_fp16": (4.25, 16),
    "w4a8": (4.25, 16),
    "w4a4": (4.25, 16),
    "w4a4_noquant": (4.25, 4.25),
}


def product(provider, mode, m, us, *, fmt="mxfp4", hadamard=None, layer="qkv", n=1024, k=2048, **changes):
    """One product that took `us` microseconds in the median, 1 % less in its fastest fifth and 2 % more in its slowest."""
    fmt = mode if mode in ("bf16", "fp16", "fp8") else fmt
    weights, activations = _BITS[mode]
    what = [mode] if fmt == mode else [fmt, mode]
    facts = {
        "case_id": "-".join(["gemm", *what, *([f"had{hadamard}"] if hadamard else []), provider, f"tiny.{layer}.tp1-m{m}"]),
        **{"op": "gemm", "format": fmt, "mode": mode, "hadamard": hadamard, "provider": provider, "provider_version": "1.0"},
        **{"model": "tiny", "layer": layer, "tp": 1, "m": m, "n": n, "k": k, "error": 0.0017, "exact": False},
        **ALIKE,
        "scale_rule": None if fmt == mode else "floor",
        "flops": 2 * m * n * k,
        "bytes": int(n * k * weights / 8 + m * k * activations / 8 + 2 * m * n),
    }
    return _bench(facts | changes, [us * 0.99e-6] * 3 + [us * 1e-6] * 3 + [us * 1.02e-6] * 3)


def quantization(provider, m, us, *, rule="floor", hadamard=None, k=2048):
    """One quantization to MXFP4."""
    facts = {
        "case_id": f"quantize-mxfp4-{rule}-{provider}-tiny.qkv.tp1-m{m}",
        **{"op": "quantize", "format": "mxfp4", "mode": rule, "hadamard": hadamard, "provider": provider},
        **{"model": "tiny", "layer": "qkv", "tp": 1, "m": m, "k": k, **ALIKE, "flops": 0, "bytes": m * k * 2.53125},
    }
    return _bench(facts, [us * 1e-6] * 9)


def moe(provider, mode, m, us, *, experts=8, topk=2, routing="uniform", fp8_scaling=None, **changes):
    """The experts of a layer, hidden size 256 and intermediate size 128, that took `us` microseconds."""
    fmt = mode if mode in ("bf16", "fp8") else "mxfp4"
    scaling = fp8_scaling or ("tensor" if mode == "fp8" else None)
    what = [mode] if fmt == mode else [fmt, mode]
    facts = {
        "case_id": "-".join(
            ["moe", *what, *([scaling] if fp8_scaling else []), provider, f"e{experts}.experts.tp1-m{m}", routing]
        ),
        **{"op": "moe", "format": fmt, "mode": mode, "hadamard": None, "provider": provider, "provider_version": "1.0"},
        **{"model": "tiny", "layer": "experts", "tp": 1, "m": m, "n": 128, "k": 256, "error": 0.0017, "exact": False},
        **{"experts": experts, "topk": topk, "routing": routing, "fp8_scaling": scaling, "activation": "silu"},
        **ALIKE,
        **{"flops": 6 * m * topk * 128 * 256, "bytes": 3 * 128 * 256 * min(m * topk, experts)},
    }
    return _bench(facts | changes, [us * 1e-6] * 9)


def _bench(facts, seconds):
    record = make_record(facts, seconds)
    return {"name": facts["case_id"], "stats": {"median": sorted(seconds)[4], "min": min(seconds)}, "extra_info": record}


def run_of(*benches, number=1, card="GPU-1", ceilings=CEILINGS, **info):
    """A stored run of these cases, of an H200 and day `number`, as JSON."""
    info = {"session": f"{card} 2026-11-{number:02}", "ceilings": ceilings} | info
    run = stored_run(number, cases=(), **info) | {"benchmarks": list(benches)}
    run["machine_info"] |= {"gpu": "NVIDIA H200", "uuid": card}
    medians = {bench["name"]: bench["stats"]["median"] for bench in benches}
    add_speedups([bench["extra_info"] for bench in benches], medians)
    add_roofline([bench["extra_info"] for bench in benches], medians, ceilings or {})
    return run


def results_of(tmp_path, *runs, **options):
    """Runs, joined as if read from numbered files."""
    return join([parse(run, tmp_path / f"{i:04}_run.json") for i, run in enumerate(runs, start=1)], **options)
