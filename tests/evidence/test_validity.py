"""When a run is not to be believed: readings of canaries by shape, each fault of a GPU alone, and the level of a machine."""

import json
from dataclasses import dataclass
from pathlib import Path

import pytest

from fp4bench.evidence.validity import (
    CPU_LIMITS,
    GPU_LIMITS,
    SLOWDOWNS,
    CanaryReading,
    Conditions,
    against_baseline,
    invalid_reasons,
    smoothed,
)

MIB = 1 << 20
H100 = Path(__file__).parents[2] / "baselines" / "NVIDIA-H100-80GB-HBM3"


@dataclass(frozen=True)
class Look:
    throttle: tuple | None = ()
    processes: tuple | None = ()
    temperature_c: float | None = None
    memory_used_bytes: int | None = None
    utilization_percent: float | None = None


def readings(seconds, name="bf16", cycles=None, sm_mhz=None):
    cycles = cycles or [None] * len(seconds)
    return tuple(CanaryReading(name, 10.0 * i, s, sm_mhz, c) for i, (s, c) in enumerate(zip(seconds, cycles, strict=True)))


STEADY = [1.0, 1.001, 0.999, 1.002, 1.0, 0.998, 1.0, 1.001]
SHAPES = [
    pytest.param([], False, id="none"),
    pytest.param([1.0], False, id="one"),
    pytest.param([1.0, 1.02], False, id="two-alike"),
    pytest.param([1.0, 1.05], True, id="two-apart"),
    pytest.param([1.0, 1.05, 1.0], False, id="three-with-a-blip-inside"),
    pytest.param([1.0, 1.02, 1.04], True, id="three-on-a-ramp"),
    pytest.param(STEADY, False, id="steady"),
    pytest.param([*STEADY[:4], 1.5, *STEADY[4:]], False, id="a-slow-blip"),
    pytest.param([*STEADY[:4], 0.5, *STEADY[4:]], False, id="a-fast-blip"),
    pytest.param([1.0, 1.2, 1.0, 1.0, 0.8, 1.0, 1.0, 1.2, 1.0], False, id="blips-apart"),
    pytest.param([1.5, *STEADY], False, id="a-blip-first"),
    pytest.param([*STEADY, 1.5], False, id="a-blip-last"),
    pytest.param([*STEADY, 1.05, 1.05], True, id="a-step-at-the-end"),
    pytest.param([1.05, 1.05, *STEADY], True, id="a-step-at-the-start"),
    pytest.param([*STEADY, *(1.05 * s for s in STEADY)], True, id="a-step-half-way"),
    pytest.param([*STEADY, *(0.95 * s for s in STEADY)], True, id="faster-half-way"),
    pytest.param([1.0, 1.01, 1.02, 1.03, 1.04], True, id="a-ramp-of-4%"),
    pytest.param([1.04, 1.03, 1.02, 1.01, 1.0], True, id="a-ramp-down"),
    pytest.param([1.0, 1.005, 1.01, 1.015, 1.02], False, id="a-ramp-of-2%"),
    pytest.param([1.0, 1.0, 1.05, 1.05, 1.0, 1.0], True, id="a-phase-of-two-readings"),
]


@pytest.mark.parametrize(("seconds", "invalid"), SHAPES)
def test_a_canary_drifts_in_time_beyond_3_percent(seconds, invalid):
    found = invalid_reasons(Conditions(readings(seconds)), GPU_LIMITS)
    assert len(found) == invalid
    assert all("canary bf16 drifted by" in sentence and "in time" in sentence for sentence in found)


@pytest.mark.parametrize(("cycles", "invalid"), SHAPES)
def test_and_so_it_does_in_cycles(cycles, invalid):
    found = invalid_reasons(Conditions(readings([1.0] * len(cycles), cycles=cycles)), GPU_LIMITS)
    assert len(found) == invalid
    assert all("in cycles" in sentence for sentence in found)


def test_of_two_products_both_must_drift_and_in_the_same_quantity():
    steady, ramp = [1.0] * 5, [1.0, 1.0, 1.05, 1.05, 1.05]

    def found(bf16, fp8, cycles_bf16=steady, cycles_fp8=steady):
        pair = (*readings(bf16, "bf16", cycles_bf16), *readings(fp8, "fp8", cycles_fp8))
        return [sentence.split(" during")[0] for sentence in invalid_reasons(Conditions(pair), GPU_LIMITS)]

    assert found(steady, ramp) == found(ramp, steady) == found(steady, ramp, steady, ramp) == []
    assert found(ramp, steady, steady, ramp) == []
    assert found(ramp, ramp) == ["the canary bf16 drifted by 5.0% in time", "the canary fp8 drifted by 5.0% in time"]
    assert len(found(ramp, ramp, ramp, ramp)) == 4
    assert len(invalid_reasons(Conditions((*readings(steady, "bf16"), *readings(ramp, "copy"))), GPU_LIMITS)) == 1


@pytest.mark.parametrize("name", ["kernels/2026-11-27_llama3.3-70b", "moe/2026-11-27_deepseek-r1"])
def test_the_fp8_product_of_an_h100_moves_alone_by_more_than_its_limit(name):
    path = H100 / f"{name}-fp8-canary-drifted.json"
    stored = [
        CanaryReading(c["name"], c["at_s"], c["seconds"], c["sm_mhz"], c["cycles"])
        for c in json.loads(path.read_text())["fp4bench"]["canaries"]
    ]
    assert len(invalid_reasons(Conditions(tuple(c for c in stored if c.name == "fp8")), GPU_LIMITS)) == 1
    assert invalid_reasons(Conditions(tuple(stored)), GPU_LIMITS) == []


@pytest.mark.parametrize(
    ("shape", "invalid"),
    [
        pytest.param([2.1, 3.1, 3.1, 3.1, 2.1, 2.1], False, id="a-phase-of-1.5x"),
        pytest.param([2.1, 2.1, 5.6, 5.6, 5.6], True, id="hopeless"),
    ],
)
def test_a_cpu_may_wander_by_half(shape, invalid):
    assert len(invalid_reasons(Conditions(readings(shape)), CPU_LIMITS)) == invalid
    assert len(invalid_reasons(Conditions(readings(shape)), GPU_LIMITS)) == 1


def test_each_canary_is_held_to_itself_in_the_order_of_time():
    good, bad = readings([1.0] * 6, "copy"), readings([9.0, 9.0, 9.0, 9.5, 9.5, 9.5], "bf16", sm_mhz=1500)
    (sentence,) = invalid_reasons(Conditions((*bad[::-1], *good)), GPU_LIMITS)
    assert sentence == (
        "the canary bf16 drifted by 5.6% in time during the run, beyond 3% (SM clock 1500 to 1500 MHz): "
        "the machine was not steady"
    )
    late = readings([9.0, 9.0, 9.0, 9.0, 9.0, 9.5, 9.5])
    like_blips = tuple(late[i] for i in (0, 1, 5, 2, 3, 6, 4))
    assert len(invalid_reasons(Conditions(like_blips), GPU_LIMITS)) == 1


def test_readings_without_cycles_among_those_with_are_left_out():
    mixed = readings([1.0] * 4, cycles=[100, None, 100, 110])
    assert invalid_reasons(Conditions(mixed), GPU_LIMITS) == [
        "the canary bf16 drifted by 10.0% in cycles during the run, beyond 3%: the machine was not steady"
    ]


@pytest.mark.parametrize("value", [0.0, -1.0, float("nan"), float("inf")])
def test_a_reading_that_is_no_time_is_refused(value):
    with pytest.raises(ValueError, match="canary copy has a reading of"):
        CanaryReading("copy", 0.0, value)
    with pytest.raises(ValueError, match="canary copy has a reading of"):
        CanaryReading("copy", 0.0, 1.0, cycles=value)


@pytest.mark.parametrize(
    ("values", "smooth"),
    [
        ([], []),
        ([1], [1]),
        ([1, 9], [1, 9]),
        ([1, 9, 2], [1, 2, 2]),
        ([1, 2, 3, 4, 5], [1, 2, 3, 4, 5]),
        ([1, 1, 9, 1, 1], [1, 1, 1, 1, 1]),
        ([9, 1, 1, 1, 9], [1, 1, 1, 1, 1]),
        ([1, 1, 1, 9, 9], [1, 1, 1, 9, 9]),
    ],
)
def test_smoothing_takes_blips_and_leaves_ramps_and_steps(values, smooth):
    assert smoothed(values) == smooth
    assert smoothed(values[::-1]) == smooth[::-1]


@pytest.mark.parametrize("reason", SLOWDOWNS)
def test_a_slowdown_by_heat_or_hardware_is_a_reason(reason):
    looks = [Look(temperature_c=60), *[Look((reason,), temperature_c=91)] * 3]
    assert invalid_reasons(Conditions.seen((), looks), GPU_LIMITS) == [
        f"{reason} slowed the GPU in 3 of 4 looks (hottest reading 91 C): see to its cooling and power"
    ]


@pytest.mark.parametrize("reason", ["sw_power_cap", "sync_boost", "0x800"])
def test_a_power_cap_is_none(reason):
    assert invalid_reasons(Conditions.seen((), [Look((reason,))] * 9), GPU_LIMITS) == []


@pytest.mark.parametrize(("hits", "invalid"), [(0, False), (1, False), (2, False), (3, True), (100, True)])
def test_a_slowdown_in_a_few_looks_of_a_hundred_is_a_blip(hits, invalid):
    looks = [Look(("hw_slowdown",))] * hits + [Look()] * (100 - hits)
    assert len(invalid_reasons(Conditions.seen((), looks), GPU_LIMITS)) == invalid


@pytest.mark.parametrize(
    ("idle", "who"),
    [
        pytest.param([Look(processes=((7, 300 * MIB),), utilization_percent=80)], "the process 7", id="another"),
        pytest.param([Look(processes=((7, None),), utilization_percent=80)], "the process 7", id="of-unknown-memory"),
        pytest.param(
            [Look(processes=((9, MIB), (7, 300 * MIB), (8, 400 * MIB)), utilization_percent=80)],
            "the processes 7, 8",
            id="two-and-a-small-one",
        ),
        pytest.param(
            [Look(processes=None, memory_used_bytes=900 * MIB, utilization_percent=80)],
            "someone out of sight who holds 900 MiB",
            id="out-of-sight",
        ),
        pytest.param([Look(processes=((7, 300 * MIB),), utilization_percent=0)], None, id="holds-memory-and-idles"),
        pytest.param([Look(processes=((7, 3 * MIB),), utilization_percent=80)], None, id="too-small-for-a-context"),
        pytest.param([Look(memory_used_bytes=3 * MIB, utilization_percent=99)], None, id="use-that-a-driver-makes-up"),
        pytest.param([Look(processes=((7, 300 * MIB),), utilization_percent=None)], None, id="use-unknown"),
        pytest.param([Look(None, None, None, None, None)], None, id="nothing-known"),
        pytest.param([], None, id="no-look"),
        pytest.param([Look(processes=((7, 300 * MIB),), utilization_percent=p) for p in (0, 80, 0)], None, id="a-blip-of-use"),
    ],
)
def test_a_busy_gpu_is_used_by_someone_who_holds_memory_while_the_run_idles(idle, who):
    found = invalid_reasons(Conditions.seen((), [], idle), GPU_LIMITS)
    assert found == ([f"the GPU was 80 % in use while this run idled, by {who}: wait for it, or stop it"] if who else [])


def test_our_own_memory_is_not_someone_out_of_sight():
    idle = [Look(memory_used_bytes=MIB, utilization_percent=80), Look(memory_used_bytes=9000 * MIB, utilization_percent=80)]
    assert invalid_reasons(Conditions.seen((), [], idle), GPU_LIMITS) == []


def test_conditions_gather_the_looks():
    idle = [Look(("sw_thermal",), ((7, None),), 40, 5, 3), Look(None, ((7, 30), (8, None)), None, 900, None)]
    looks = [Look(("sw_thermal", "sw_power_cap"), ((7, 20),), 70), Look(None, None, None), Look((), ((7, None), (8, 1)), 60)]
    assert Conditions.seen((), looks, idle) == Conditions(
        throttle={"sw_thermal": 2, "sw_power_cap": 1},
        looks=3,
        foreign={7: 30, 8: 1},
        idle_percent=(3,),
        idle_bytes=5,
        temperature_max=70,
    )


def test_nothing_seen_speaks_against_nothing():
    assert invalid_reasons(Conditions(), GPU_LIMITS) == []
    assert invalid_reasons(Conditions.seen((), [Look(None, None)] * 3, [Look(None, None)]), GPU_LIMITS) == []


def test_every_reason_is_given():
    conditions = Conditions(
        (*readings([1, 1.1], "copy", cycles=[10, 12]), *readings([1, 1.2], "bf16")),
        {"hw_thermal": 5, "hw_slowdown": 5},
        looks=5,
        foreign={7: None},
        idle_percent=(50,),
    )
    assert len(invalid_reasons(conditions, GPU_LIMITS)) == 6


@pytest.mark.parametrize(
    ("factor", "invalid"), [(0.90, True), (0.96, False), (1.0, False), (1.04, False), (1.06, True), (2.0, True)]
)
def test_the_level_of_a_canary_is_that_of_the_accepted_runs(factor, invalid):
    accepted = [readings([1.0, 1.001]), readings([0.995, 0.996]), readings([1.004, 1.006])]
    now = readings([factor * s for s in STEADY])
    assert len(against_baseline(now, accepted, GPU_LIMITS)) == invalid
    assert against_baseline(now, [], GPU_LIMITS) == against_baseline(now, [(), ()], GPU_LIMITS) == []


def test_levels_are_compared_either_way_alike():
    a, b = readings([1.0]), readings([1.055])
    assert len(against_baseline(a, [b], GPU_LIMITS)) == len(against_baseline(b, [a], GPU_LIMITS)) == 1


def test_a_level_says_both_times_and_the_canary():
    assert against_baseline(readings([0.0011] * 3, "copy"), [readings([0.001], "copy")], GPU_LIMITS) == [
        "the canary copy takes 1.1 ms and took 1 ms in the accepted runs (+10.0%, beyond 5%): "
        "the machine or its libraries changed as a whole"
    ]


def test_blips_and_one_odd_accepted_run_do_not_move_a_level():
    accepted = [readings([1.0, 1.0, 3.0]), readings([1.0]), readings([1.5])]
    assert against_baseline(readings([1.0, 1.0, 1.0, 1.8]), accepted, GPU_LIMITS) == []


def test_a_canary_is_compared_with_its_name_only():
    accepted = [readings([1.0], "copy"), (*readings([1.0], "copy"), *readings([5.0], "fp8"))]
    now = (*readings([1.0], "copy"), *readings([5.5], "fp8"), *readings([7.0], "bf16"))
    (sentence,) = against_baseline(now, accepted, GPU_LIMITS)
    assert "canary fp8" in sentence
    assert against_baseline((), accepted, GPU_LIMITS) == []


def test_a_cpu_of_another_phase_is_the_same_cpu():
    assert against_baseline(readings([3.1] * 4), [readings([2.1] * 4)], CPU_LIMITS) == []
    assert len(against_baseline(readings([5.6] * 4), [readings([2.1] * 4)], CPU_LIMITS)) == 1
