"""One case from its inputs to its record, in this process: what is checked, timed, told and freed. On the CPU."""

import json
import weakref
from types import SimpleNamespace

import arena_places
import pytest
import torch

from fp4bench.cases import Case
from fp4bench.checking import WrongResultError
from fp4bench.evidence.record import KEYS
from fp4bench.formats import MXFP4, ScaleRule
from fp4bench.problems import W4A16, Accumulation, GemmProblem, MoeProblem
from fp4bench.providers import Phased
from fp4bench.providers.eager import EagerProvider
from fp4bench.quantize import decode, quantize
from fp4bench.timing.clock import CpuClock
from fp4bench.workers import measure
from fp4bench.workers.measure import CheckCase, Measurer, ReadCanaries, TimeCase


class Provider:
    """Right results, but from the copies whose numbers are in `wrong`."""

    name, version, ops, modes = "fake", "7", ("gemm",), ("w4a16",)
    rules = {"mxfp4": (ScaleRule.FLOOR,)}

    def __init__(self, wrong=()):
        self.wrong, self.inputs, self.calls = wrong, [], 0

    def prepare(self, problem, inputs):
        number = len(self.inputs)
        self.inputs.append(weakref.ref(inputs.x))
        y = (inputs.x.float() @ decode(quantize(inputs.w, MXFP4)).T).to(torch.bfloat16)
        if number in self.wrong:
            y[0, 1] = torch.nan

        def run():
            self.calls += 1
            return y

        return run


class Rotating(CpuClock):
    """Wants three copies of the operands, as the clocks of GPUs do, and times the first alone."""

    budget_seconds = 0.001

    def copies(self, bytes_touched):
        return 3

    def measure(self, calls, bytes_touched=0, slowdown=0.0):
        self.calls = list(calls)
        return super().measure(calls[:1], bytes_touched, slowdown)


def case(provider, m=4, k=64):
    return Case(GemmProblem("none", "o", 1, m, 32, k, W4A16, MXFP4, None), provider)


@pytest.fixture
def measurer(monkeypatch):
    clock = Rotating()
    monkeypatch.setattr(measure, "clock_for", lambda device, pace, warm, memory: clock)
    made = Measurer("cpu")
    made.clock = clock
    return made


def test_a_timed_case_has_a_record_and_the_samples_it_stands_on(measurer):
    timed = measurer(TimeCase(case(Provider())))
    assert tuple(timed.record) == KEYS
    assert timed.record["case_id"] == str(case(Provider()))
    assert (timed.record["clock"], timed.record["l2"], timed.record["pace"]) == ("perf_counter", "warm", "paced")
    assert timed.record["samples"] == len(timed.seconds)
    assert timed.record["calls_per_sample"] == timed.calls_per_sample > 0
    assert 0 < timed.record["error"] < 0.01
    assert timed.record["throttle_reasons"] is None  # a CPU has no NVML
    json.dumps(timed.record, allow_nan=False)


def test_each_copy_is_prepared_checked_and_given_to_the_clock(measurer):
    provider = Provider()
    measurer(TimeCase(case(provider)))
    assert len(provider.inputs) == len(measurer.clock.calls) == 3


@pytest.mark.parametrize("wrong", [0, 1, 2])
def test_a_wrong_copy_raises_and_is_not_timed(measurer, wrong):
    measurer.clock.calls = None
    with pytest.raises(WrongResultError, match=r"output is not finite in 1 of 128 elements, first at \[0, 1\]: nan"):
        measurer(TimeCase(case(Provider(wrong={wrong}))))
    assert measurer.clock.calls is None
    assert measurer(TimeCase(case(Provider()))).record["samples"]  # the next case is none the worse


def test_an_output_is_checked_for_the_sums_that_its_provider_states(measurer):
    provider = Provider()
    right = provider.prepare
    # Off by 2**-9 of the largest output: more than float32 sums can be, less than those of 14 bits.
    provider.prepare = lambda problem, inputs: lambda: (y := right(problem, inputs)()) + y.abs().max() * 2.0**-9
    with pytest.raises(WrongResultError, match="output is wrong"):
        measurer(CheckCase(case(provider)))
    provider.accumulation = lambda problem, device: Accumulation(bits=12, terms=1)
    assert measurer(CheckCase(case(provider))).error > 0


def test_a_copy_has_the_same_values_elsewhere(measurer):
    seen = []
    provider = Provider()
    prepare = provider.prepare
    provider.prepare = lambda problem, inputs: (seen.append(inputs), prepare(problem, inputs))[1]
    measurer(TimeCase(case(provider)))
    assert len({inputs.w.data_ptr() for inputs in seen}) == 3
    assert all(torch.equal(inputs.w, seen[0].w) and torch.equal(inputs.x, seen[0].x) for inputs in seen)


def test_a_check_takes_one_copy_and_times_nothing(measurer):
    provider = Provider()
    agreement = measurer(CheckCase(case(provider)))
    assert agreement.error < 0.01
    assert (len(provider.inputs), provider.calls) == (1, 1)


def test_an_injected_slowdown_is_in_the_time_and_in_the_record(measurer):
    request = case(Provider())
    plain, slow = (measurer(TimeCase(request, slowdown)) for slowdown in (0.0, 3.0))
    assert (plain.record["injected"], slow.record["injected"]) == (None, 3.0)
    assert min(slow.seconds) > 2 * min(plain.seconds)


def test_cases_of_one_shape_share_their_inputs_and_another_shape_frees_them(measurer):
    first, second, other = Provider(), Provider(), Provider()
    measurer(TimeCase(case(first)))
    measurer(TimeCase(case(second)))
    assert [a() is b() for a, b in zip(first.inputs, second.inputs, strict=True)] == [True] * 3
    measurer(TimeCase(case(other, k=96)))
    measurer.clock.calls = None
    assert [each() for each in first.inputs] == [None] * 3
    assert None not in [each() for each in other.inputs]


def test_conditions_are_canaries_ceilings_and_what_the_machine_is_like(measurer):
    seen = measurer(ReadCanaries())
    assert [reading["name"] for reading in seen.canaries] == ["bf16", "copy"]
    for reading in seen.canaries:
        assert reading.keys() == {"name", "seconds", "cycles", "sm_mhz", "in_s"}
        assert reading["seconds"] > 0
    assert [reading["in_s"] for reading in seen.canaries] == sorted(reading["in_s"] for reading in seen.canaries)
    assert seen.ceilings.keys() == {"copy_gbps", "bf16_tflops", "fp8_tflops"}
    assert seen.ceilings["copy_gbps"] > 0
    assert seen.ceilings["fp8_tflops"] is None
    assert seen.idle.keys() == seen.snapshot.keys()
    json.dumps(vars(seen), allow_nan=False)


def test_a_device_that_does_not_answer_is_not_usable(measurer, monkeypatch):
    def lost():
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    assert measurer.usable()
    measurer._device = SimpleNamespace(is_cuda=True)
    monkeypatch.setattr(torch.cuda, "synchronize", lost)
    assert not measurer.usable()


# MoE layers, whose copies have choices of their own


def moe_case(provider, m=5):
    return Case(MoeProblem("none", "experts", 1, m, 64, 32, 8, 2, W4A16, MXFP4), provider)


class MoeProvider(EagerProvider):
    """The eager provider, which keeps the inputs it got, and has phases."""

    def __init__(self, wrong=None):
        self.seen, self.wrong = [], wrong

    def prepare(self, problem, inputs):
        first = self.seen[0] if self.seen else inputs
        number = len(self.seen)
        self.seen.append(inputs)
        run = super().prepare(problem, first if number == self.wrong else inputs)
        return Phased({"routing": lambda: None, "products": run})


def test_each_copy_of_a_moe_layer_has_other_experts_and_is_held_to_its_own_reference(measurer):
    provider = MoeProvider()
    timed = measurer(TimeCase(moe_case(provider)))
    assert len(provider.seen) == 3
    assert timed.record["copies"] == 1  # of a clock for CPUs
    assert timed.record["error"] > 0
    problem = moe_case(provider).problem
    for number, inputs in enumerate(provider.seen[1:], start=1):
        again = problem.copy(provider.seen[0], number)
        assert torch.equal(inputs.topk_ids, again.topk_ids)
        assert inputs.weights is again.weights


@pytest.mark.parametrize("wrong", [1, 2])
def test_a_copy_that_computes_the_choices_of_the_first_is_wrong(measurer, wrong):
    with pytest.raises(WrongResultError, match="output is wrong"):
        measurer(TimeCase(moe_case(MoeProvider(wrong))))


def test_phases_of_a_moe_layer_are_in_its_record_and_launches_where_a_clock_has_them(measurer):
    plain = measurer(TimeCase(moe_case(MoeProvider()))).record
    assert list(plain["phases"]) == ["routing", "products"]
    assert 0 < plain["phases"]["routing"] < plain["phases"]["products"]
    assert plain["eager_seconds"] is plain["launch_seconds"] is None
    # An hour, so that a busy machine, on which a layer once took 0.17 s, changes nothing.
    measurer.clock.eager_seconds = lambda calls, bytes_touched, gap_seconds: 3600.0
    launched = measurer(TimeCase(moe_case(MoeProvider()))).record
    assert launched["eager_seconds"] == 3600.0
    assert 3500.0 < launched["launch_seconds"] < 3600.0


def test_other_cases_have_no_launches_and_phases(measurer):
    record = measurer(TimeCase(case(Provider()))).record
    assert record["eager_seconds"] is record["launch_seconds"] is record["phases"] is None


def test_ranges_are_marked_where_they_are_asked_for(measurer, monkeypatch):
    marked = []
    monkeypatch.setattr(torch.cuda.nvtx, "range_push", marked.append)
    monkeypatch.setattr(torch.cuda.nvtx, "range_pop", lambda: marked.append(None))
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    measurer(TimeCase(moe_case(MoeProvider())))
    assert marked == []
    measurer._nvtx = True
    asked = moe_case(MoeProvider())
    measurer(TimeCase(asked))
    assert marked == [
        str(asked),
        *("prepare", None, "check", None, "time", None),
        *("routing", None, "products", None),
        None,
    ]


def test_a_case_that_does_not_fit_beside_the_arena_is_timed_without_one():
    measurer, asked = Measurer("cpu"), []
    measurer._kept = ["arena"]

    def serve(request):
        asked.append((request, list(measurer._kept)))
        if measurer._kept or request == "too large":
            raise torch.cuda.OutOfMemoryError("of this try")
        return "timed"

    measurer._serve = serve
    assert measurer("large") == "timed"
    assert asked == [("large", ["arena"]), ("large", [])]
    with pytest.raises(torch.cuda.OutOfMemoryError):
        measurer("too large")
    assert len(asked) == 3


@pytest.mark.gpu
def test_operands_lie_in_one_arena_whatever_was_captured_before():
    places = arena_places.asked(120)
    assert places[0][1] > torch.cuda.get_device_properties("cuda").total_memory // 4
    assert places[1] != places[0] == places[2] == places[3]


def test_a_record_says_where_operands_lay():
    measurer, eager = Measurer("cpu"), case(EagerProvider())
    measurer._clock = Rotating()
    assert measurer(TimeCase(eager)).record["placement"] is None
    measurer._kept = ["arena"]
    assert measurer(TimeCase(eager)).record["placement"] == "arena"
