"""What a record holds, and what follows from samples."""

import pytest

from fp4bench.evidence.record import KEYS, add_speedups, make_record

FACTS = {"case_id": "gemm-x", "op": "gemm", "mode": "w4a4", "flops": 2_000_000_000, "bytes": 1_000_000}


def test_every_key_is_there_and_what_was_not_measured_is_none():
    record = make_record(FACTS, [0.001])
    assert tuple(record) == KEYS
    assert record["cycles"] is None
    assert record["roofline_fraction"] is None


def test_rates_follow_from_the_median():
    record = make_record(FACTS, [0.001, 0.002, 0.004])
    assert record["tflops"] == pytest.approx(2e9 / 0.002 / 1e12)
    assert record["gbps"] == pytest.approx(1e6 / 0.002 / 1e9)
    assert record["samples"] == 3


def test_a_rate_percentile_is_that_of_the_rates():
    # Ten samples of 1..10 ms: the slowest fifth of the calls lies beyond 8.2 ms, and 20 % of the rates below that one's.
    record = make_record(FACTS, [i * 1e-3 for i in range(1, 11)])
    assert record["tflops_p20"] == pytest.approx(2e9 / 8.2e-3 / 1e12)
    assert record["tflops_p80"] == pytest.approx(2e9 / 2.8e-3 / 1e12)
    assert record["tflops_p20"] < record["tflops"] < record["tflops_p80"]
    assert record["seconds_q10"] < record["seconds_q25"] < record["seconds_q75"] < record["seconds_q90"]


def test_work_without_flops_has_no_tflops():
    assert make_record({**FACTS, "flops": 0}, [0.001])["tflops"] is None


@pytest.mark.parametrize("samples", [[], [0.0], [-1.0], [float("nan")], [float("inf")], [1e-3, float("nan")]], ids=str)
def test_bad_samples_are_refused(samples):
    with pytest.raises(ValueError, match="positive and finite"):
        make_record(FACTS, samples)


def test_unknown_facts_are_refused():
    with pytest.raises(ValueError, match="has no colour"):
        make_record({**FACTS, "colour": "red"}, [0.001])


def test_numbers_are_plain_floats():
    # numpy scalars become the string "UNSERIALIZABLE[...]" in pytest-benchmark's JSON.
    record = make_record(FACTS, [0.001, 0.002])
    assert {type(record[key]) for key in ("tflops", "tflops_p20", "gbps", "seconds_q10")} == {float}


def _record(case_id, mode, m):
    return {
        "case_id": case_id,
        "op": "gemm",
        "model": "a",
        "layer": "o",
        "tp": 1,
        "m": m,
        "mode": mode,
        "speedup_vs_bf16": None,
    }


def test_speedup_is_over_bf16_of_the_same_layer_and_batch():
    records = [_record("base", "bf16", 1), _record("fp4", "w4a4", 1), _record("other", "w4a4", 2)]
    add_speedups(records, {"base": 3.0, "fp4": 2.0, "other": 1.0})
    assert [r["speedup_vs_bf16"] for r in records] == [1.0, 1.5, None]
