"""Which cases a selection holds."""

import json
from itertools import pairwise

import pytest

from fp4bench.cases import Case, gemm_cases, moe_cases, quantize_cases, select, why_nothing
from fp4bench.devices import Device, find_device
from fp4bench.formats import MXFP4, ScaleRule
from fp4bench.problems import FP8_SUMS, W4A4, GemmProblem, QuantizeProblem
from fp4bench.providers import providers

CPU = find_device("cpu")
H200 = Device("cuda:0", "NVIDIA H200", (9, 0), sm_count=132, l2_bytes=60 << 20)
EVERYTHING = {axis: ["all"] for axis in ("models", "batch_sizes", "had_sizes", "formats", "modes", "providers")}


def ids(cases):
    return [str(case) for case in cases]


def test_the_cpu_set_is_llama_1b_in_both_formats():
    cases = ids(gemm_cases(select({}, CPU)))
    assert "gemm-mxfp4-w4a4-had64-eager-llama3.2-1b.down.tp1-m64" in cases
    assert "gemm-nvfp4-w4a16-eager-llama3.2-1b.qkv.tp1-m1" in cases
    assert "gemm-bf16-torch-llama3.2-1b.o.tp1-m1" in cases
    # 4 layers x 2 batch sizes x (bf16, and per format w4a16, w4a4 with and without rotation)
    assert len(cases) == 4 * 2 * (1 + 2 * 3)


def test_the_gpu_set_is_llama_70b():
    cases = ids(gemm_cases(select({"providers": ["torch", "eager"]}, H200)))
    # 4 layers x 3 batch sizes x (bf16, fp8, and per format w4a16, w4a8, w4a4 with and without rotation)
    assert len(cases) == 4 * 3 * (2 + 2 * 4)
    assert "gemm-fp8-torch-llama3.3-70b.gate_up.tp1-m1024" in cases
    assert not [case for case in cases if "llama3.3-70b" not in case]


def test_a_provider_that_is_not_installed_is_left_out_unless_it_is_named(monkeypatch):
    class Absent:
        name, version, ops, modes, rules = "absent", None, ("gemm",), ("w4a16",), {"mxfp4": (ScaleRule.FLOOR,)}

    known = providers()
    monkeypatch.setattr("fp4bench.cases.providers", lambda: known | {"absent": Absent()})
    chosen = [provider.name for provider in select({}, H200).providers]
    assert chosen == [name for name, provider in known.items() if provider.version]
    assert "absent" in [provider.name for provider in select({"providers": ["all"]}, H200).providers]
    assert [provider.name for provider in select({}, CPU).providers] == ["torch", "eager"]


def test_the_full_grid_has_thousands_of_distinct_ids():
    selection = select(EVERYTHING, H200)
    cases = ids(gemm_cases(selection)) + ids(quantize_cases(selection))
    assert len(cases) > 10_000
    assert len(set(cases)) == len(cases)


def test_rotation_varies_only_where_activations_are_fp4():
    cases = ids(gemm_cases(select({"had_sizes": ["64"], "modes": ["all"]}, CPU)))
    assert [case for case in cases if "-w4a4-had64-" in case]
    assert [case for case in cases if "-w4a4_noquant-had64-" in case]
    assert not [case for case in cases if "had" in case and "w4a4" not in case]


def test_limits_keep_only_their_shapes():
    selection = select({"limit_k": ["2048"], "limit_n": ["2048", "3072"]}, CPU)
    assert {shard.layer.name for shard in selection.shards} == {"o", "qkv"}


def test_a_width_is_quantized_once_and_named_alike_in_every_selection():
    def widths(**options):
        return {case.problem.layer: case.problem.k for case in quantize_cases(select(options, CPU))}

    assert widths() == {"qkv": 2048, "down": 8192}
    assert widths(limit_n=["16384"]) == {"qkv": 2048}  # gate_up alone is selected, and shares qkv's width


def test_values_keep_their_order_and_count_once():
    assert select({"batch_sizes": ["64", "1", "64"]}, CPU).batch_sizes == (64, 1)


def test_cases_of_one_shape_follow_each_other():
    shapes = [(c.problem.layer, c.problem.m) for c in gemm_cases(select({}, CPU))]
    changes = sum(a != b for a, b in pairwise(shapes))
    assert changes == len(set(shapes)) - 1


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        ("models", "gpt-5", r"unknown model 'gpt-5': known are llama3.3-70b, .*config.json"),
        ("formats", "fp3", "unknown format 'fp3': known are mxfp4, nvfp4, or all"),
        ("modes", "w2a2", "unknown mode 'w2a2': known are bf16, fp16, fp8, w4a16"),
        ("providers", "nobody", "unknown provider 'nobody': known are torch, eager"),
        ("had_sizes", "48", "unknown Hadamard size '48': known are none, 16, 32, 64, 128, or all"),
        ("batch_sizes", "0", "batch size '0' is not a positive whole number"),
        ("batch_sizes", "-4", "batch size '-4' is not a positive whole number"),
        ("tp_sizes", "3", "tensor parallel size 3 does not divide the number of attention heads of llama3.2-1b, 32"),
        ("limit_k", "77", "no selected layer has k in 77: there are 2048, 8192"),
        ("limit_n", "x", "n 'x' is not a positive whole number"),
        ("limit_num_groups", "0", "number of groups '0' is not a positive whole number"),
        ("routing", "random", "unknown routing 'random': known are uniform, zipf, one_hot, balanced, or the path"),
        ("routing", "none.json", "cannot read the routing none.json: No such file or directory"),
        ("per_act_token", "1", "--per-act-token '1' is neither no nor yes"),
        ("per_out_ch", "on", "--per-out-ch 'on' is neither no nor yes"),
        ("fp8_blocks", "64", "unknown FP8 blocks '64': known are none and 128"),
    ],
)
def test_what_is_not_known_is_refused_in_one_sentence(option, value, message):
    with pytest.raises(ValueError, match=message) as refusal:
        select({option: [value]}, CPU)
    assert "\n" not in str(refusal.value)


def test_a_provider_may_say_how_it_adds_up():
    class Coarse:
        name, version, ops, modes, rules = "coarse", "1", ("gemm", "quantize"), ("w4a4",), {"mxfp4": (ScaleRule.FLOOR,)}

        def accumulation(self, problem, device):
            return FP8_SUMS if device.is_cuda and problem.m > 1 else None

    def case(m, provider):
        return Case(GemmProblem("tiny", "fc", 1, m, 64, 64, W4A4, MXFP4), provider)

    assert case(8, Coarse()).accumulation(H200) == FP8_SUMS
    assert case(1, Coarse()).accumulation(H200) is case(8, Coarse()).accumulation(CPU) is None
    assert case(8, providers()["eager"]).accumulation(H200) is None
    quantization = QuantizeProblem("tiny", "fc", 1, 8, 64, MXFP4, ScaleRule.FLOOR)
    assert Case(quantization, Coarse()).accumulation(H200) is None


# MoE layers


class Fp8Moe:
    """Declares MoE layers in FP8, and GEMMs in another mode."""

    name, version, ops, modes, moe_modes, rules = "fp8_moe", "1", ("gemm", "moe"), ("bf16",), ("fp8",), {}


@pytest.fixture
def moe_ids(monkeypatch):
    """Ids of the MoE cases of options, with `Fp8Moe` among the providers."""
    known = providers() | {"fp8_moe": Fp8Moe()}
    monkeypatch.setattr("fp4bench.cases.providers", lambda: known)
    return lambda **options: ids(moe_cases(select({"providers": ["torch", "eager", "fp8_moe"], **options}, H200)))


def test_models_without_experts_have_no_moe_cases_and_the_default_sets_none():
    for device in (CPU, H200):
        assert ids(moe_cases(select({}, device))) == []
    selection = select({}, CPU)
    assert why_nothing({"moe"}, selection).endswith("name a model that has some, such as --models gpt-oss-20b")
    assert why_nothing({"moe", "gemm"}, selection) == "no selected provider has a selected mode and format"


def test_the_list_of_the_reference_benchmark(moe_ids):
    sizes = ["4", "8", "16", "32", "64", "128", "256", "512", "1024", "2048"]
    cases = moe_ids(models=["nvidia/DeepSeek-R1-FP4"], modes=["fp8", "w4a4"], formats=["nvfp4"], batch_sizes=sizes)
    expected = [f"deepseek-r1.experts.tp1-m{m}" for m in sizes]
    assert cases == [f"moe-{what}-{at}" for at in expected for what in ("fp8-fp8_moe", "nvfp4-w4a4-eager")]


def test_all_batch_sizes_of_moe_layers_end_at_2048(moe_ids):
    cases = moe_ids(models=["mixtral-8x7b"], modes=["bf16"], batch_sizes=["all"])
    assert [int(case.rpartition("-m")[2]) for case in cases] == [1, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048]


def test_intermediate_sizes_are_split_over_ranks():
    (first, second) = select({"models": ["deepseek-r1"], "tp_sizes": ["1", "8"]}, H200).moe_shards
    assert (first.experts.intermediate, second.experts.intermediate) == (2048, 256)
    with pytest.raises(ValueError, match="does not divide"):
        select({"models": ["qwen3-30b-a3b"], "tp_sizes": ["5"]}, H200)


def test_limits_of_moe_layers_are_hidden_and_intermediate_sizes():
    def models(**options):
        selection = select({"models": ["deepseek-r1", "gpt-oss-20b", "gpt-oss-120b"], **options}, H200)
        return [shard.model.name for shard in selection.moe_shards]

    assert models(limit_k=["7168"], limit_n=["2048"]) == ["deepseek-r1"]
    assert models(limit_k=["2880"]) == ["gpt-oss-20b", "gpt-oss-120b"]
    assert models(limit_num_groups=["128", "256"]) == ["deepseek-r1", "gpt-oss-120b"]
    assert models(limit_n=["5760"]) == []  # gate_up of gpt-oss as a layer of its own


def test_scales_of_fp8_layers_combine_as_in_the_reference_benchmark(moe_ids):
    def scalings(**options):
        cases = moe_ids(models=["mixtral-8x7b"], modes=["fp8"], batch_sizes=["1"], **options)
        return [case.removeprefix("moe-fp8").partition("-fp8_moe")[0] for case in cases]

    assert scalings() == [""]
    assert scalings(per_act_token=["yes"], per_out_ch=["yes"]) == ["-token_channel"]
    assert scalings(per_act_token=["all"], per_out_ch=["all"]) == ["", "-channel", "-token", "-token_channel"]
    assert scalings(fp8_blocks=["128"]) == ["-block128"]
    assert scalings(fp8_blocks=["all"], per_act_token=["yes"]) == ["-token", "-block128"]


def test_routings_by_name_and_from_files(moe_ids, tmp_path):
    path = tmp_path / "seen.json"
    path.write_text(json.dumps({"counts": [1, 2, 3, 4, 5, 6, 7, 8]}))
    cases = moe_ids(models=["mixtral-8x7b"], modes=["bf16"], batch_sizes=["4"], routing=["uniform", "zipf", str(path)])
    start = "moe-bf16-torch-mixtral-8x7b.experts.tp1-m4"
    assert cases[:2] == [start, f"{start}-zipf"]
    assert cases[2].startswith(f"{start}-seen_")
    assert len(moe_ids(models=["mixtral-8x7b"], modes=["bf16"], batch_sizes=["4"], routing=["all"])) == 4


@pytest.mark.usefixtures("moe_ids")
def test_gemms_take_the_modes_of_gemms_and_moe_layers_theirs():
    selection = select({"models": ["mixtral-8x7b"], "modes": ["bf16", "fp8"], "providers": ["fp8_moe"]}, H200)
    assert {case.problem.mode.name for case in gemm_cases(selection)} == {"bf16"}
    assert {case.problem.mode.name for case in moe_cases(selection)} == {"fp8"}


def test_facts_of_a_moe_case_tell_its_load():
    options = {
        "models": ["gpt-oss-20b"],
        "modes": ["w4a16"],
        "formats": ["mxfp4"],
        "providers": ["eager"],
        "routing": ["one_hot"],
    }
    (case,) = moe_cases(select(options | {"batch_sizes": ["16"]}, H200))
    facts = case.facts()
    assert (facts["experts"], facts["topk"], facts["n"], facts["k"]) == (32, 4, 2880, 2880)
    assert (facts["most_tokens"], facts["experts_hit"]) == (16, case.problem.experts_hit)
    assert 4 < facts["experts_hit"] <= 32
    assert (facts["routing"], facts["activation"], facts["fp8_scaling"]) == ("one_hot", "swiglu", None)
    assert (facts["format"], facts["mode"], facts["scale_rule"]) == ("mxfp4", "w4a16", "floor")
    assert facts["bytes"] == case.problem.bytes
