"""What a record holds, and what follows from samples."""

import pytest

from fp4bench.evidence.record import COMPARABLE, FORMAT, KEYS, add_roofline, add_speedups, make_record

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


def test_cycles_clock_and_events_are_summed_up():
    record = make_record(FACTS, [1e-3, 2e-3, 3e-3], [100, 200, 400], [1800, 1500, 1700], [1.1e-3, 2.1e-3, 3.1e-3])
    assert (record["cycles"], record["cycles_q25"], record["cycles_q75"]) == (200, 150, 300)
    assert (record["sm_mhz"], record["sm_mhz_min"]) == (1700, 1500)
    assert record["event_seconds"] == 2.1e-3
    assert {type(record[key]) for key in ("cycles", "cycles_q25", "sm_mhz", "sm_mhz_min", "event_seconds")} == {float}


@pytest.mark.parametrize(
    ("samples", "message"),
    [
        ({"cycles": [1.0]}, "one value a sample: 1 of cycles for 2"),
        ({"sm_mhz": [1.0, 0.0]}, "positive and finite number: sm_mhz"),
        ({"event_seconds": [1.0, float("nan")]}, "positive and finite number: event_seconds"),
        ({"cycles": []}, "needs samples"),
    ],
)
def test_bad_second_witnesses_are_refused(samples, message):
    with pytest.raises(ValueError, match=message):
        make_record(FACTS, [1e-3, 2e-3], **samples)


def test_what_makes_timings_comparable_is_recorded():
    assert FORMAT == 3
    assert set(COMPARABLE) <= set(KEYS)
    assert {"pace", "cycles_q25", "cycles_q75", "event_seconds", "gap_s", "injected"} <= set(KEYS)


CEILINGS = {"copy_gbps": 4000.0, "bf16_tflops": 800.0, "fp8_tflops": 1600.0}


@pytest.mark.parametrize(
    ("mode", "flops", "moved", "ceilings", "fraction"),
    [
        pytest.param("w4a16", 8e9, 4e6, CEILINGS, 0.5, id="compute-bound"),
        pytest.param("w4a4", 8e9, 4e6, CEILINGS, 0.25, id="fp4-through-fp8-units"),
        pytest.param("fp8", 8e9, 4e6, CEILINGS, 0.25, id="fp8-at-the-fp8-rate"),
        pytest.param("w4a8", 8e9, 4e6, CEILINGS, 0.25, id="fp8-activations"),
        pytest.param("w4a16", 8e6, 64e6, CEILINGS, 0.8, id="memory-bound"),
        pytest.param(None, 0, 64e6, CEILINGS, 0.8, id="no-products"),
        pytest.param("fp8", 8e9, 4e6, CEILINGS | {"fp8_tflops": None}, None, id="unknown-rate"),
        pytest.param("fp8", 8e9, 4e6, CEILINGS | {"bf16_tflops": None}, 0.25, id="another-rate-unknown"),
        pytest.param("w4a16", 8e9, 4e6, CEILINGS | {"copy_gbps": None}, None, id="unknown-bandwidth"),
        pytest.param(None, 0, 64e6, CEILINGS | {"bf16_tflops": None}, 0.8, id="a-rate-that-is-not-needed"),
        pytest.param("w4a16", 8e9, 4e6, {}, None, id="nothing-measured"),
    ],
)
def test_the_roofline_is_that_of_measured_ceilings(mode, flops, moved, ceilings, fraction):
    record = {"case_id": "a", "mode": mode, "flops": flops, "bytes": moved, "roofline_fraction": None}
    add_roofline([record], {"a": 20e-6}, ceilings)
    assert record["roofline_fraction"] == (None if fraction is None else pytest.approx(fraction))
