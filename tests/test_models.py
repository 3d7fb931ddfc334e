"""Layer shapes, typed by hand from the config.json that each model publishes: n x k of the weights that one rank holds."""

import json
import re
from pathlib import Path

import pytest

from fp4bench.models import SILU, Activation, Experts, get_model, layers, model_names, rank_experts

# (model, tensor parallel size, {layer: (n, k)}). qkv is (heads + 2 * kv heads) * head size, gate_up 2 * intermediate.
SHAPES = [
    ("llama3.3-70b", 1, {"qkv": (10240, 8192), "o": (8192, 8192), "gate_up": (57344, 8192), "down": (8192, 28672)}),
    ("llama3.3-70b", 2, {"qkv": (5120, 8192), "o": (8192, 4096), "gate_up": (28672, 8192), "down": (8192, 14336)}),
    ("llama3.3-70b", 4, {"qkv": (2560, 8192), "o": (8192, 2048), "gate_up": (14336, 8192), "down": (8192, 7168)}),
    ("llama3.3-70b", 8, {"qkv": (1280, 8192), "o": (8192, 1024), "gate_up": (7168, 8192), "down": (8192, 3584)}),
    ("llama3.1-8b", 1, {"qkv": (6144, 4096), "o": (4096, 4096), "gate_up": (28672, 4096), "down": (4096, 14336)}),
    ("llama3.1-8b", 2, {"qkv": (3072, 4096), "o": (4096, 2048), "gate_up": (14336, 4096), "down": (4096, 7168)}),
    ("llama3.2-1b", 1, {"qkv": (3072, 2048), "o": (2048, 2048), "gate_up": (16384, 2048), "down": (2048, 8192)}),
    ("llama2-7b", 1, {"qkv": (12288, 4096), "o": (4096, 4096), "gate_up": (22016, 4096), "down": (4096, 11008)}),
    ("llama2-7b", 8, {"qkv": (1536, 4096), "o": (4096, 512), "gate_up": (2752, 4096), "down": (4096, 1376)}),
    ("qwen3-32b", 1, {"qkv": (10240, 5120), "o": (5120, 8192), "gate_up": (51200, 5120), "down": (5120, 25600)}),
    ("qwen3-32b", 4, {"qkv": (2560, 5120), "o": (5120, 2048), "gate_up": (12800, 5120), "down": (5120, 6400)}),
    (
        "qwen3-30b-a3b",
        1,
        {"qkv": (5120, 2048), "o": (2048, 4096), "expert_gate_up": (1536, 2048), "expert_down": (2048, 768)},
    ),
    (
        "deepseek-r1",
        1,
        {
            "qkv_a": (2112, 7168),  # q rank 1536, kv rank 512, rope 64
            "q_b": (24576, 1536),  # 128 heads of 128 + 64
            "kv_b": (32768, 512),  # 128 heads of 128 + 128
            "o": (7168, 16384),
            "gate_up": (36864, 7168),
            "down": (7168, 18432),
            "shared_gate_up": (4096, 7168),
            "shared_down": (7168, 2048),
            "expert_gate_up": (4096, 7168),  # vLLM's MoE benchmark swaps these two's n and k
            "expert_down": (7168, 2048),
        },
    ),
    (
        "deepseek-r1",
        8,
        {
            "qkv_a": (2112, 7168),  # every rank holds all of it
            "q_b": (3072, 1536),
            "kv_b": (4096, 512),
            "o": (7168, 2048),
            "gate_up": (4608, 7168),
            "down": (7168, 2304),
            "shared_gate_up": (512, 7168),
            "shared_down": (7168, 256),
            "expert_gate_up": (512, 7168),
            "expert_down": (7168, 256),
        },
    ),
    ("gpt-oss-20b", 1, {"qkv": (5120, 2880), "o": (2880, 4096), "expert_gate_up": (5760, 2880), "expert_down": (2880, 2880)}),
    ("gpt-oss-20b", 4, {"qkv": (1280, 2880), "o": (2880, 1024), "expert_gate_up": (1440, 2880), "expert_down": (2880, 720)}),
    ("gpt-oss-120b", 1, {"qkv": (5120, 2880), "o": (2880, 4096), "expert_gate_up": (5760, 2880), "expert_down": (2880, 2880)}),
    (
        "mixtral-8x7b",
        1,
        {"qkv": (6144, 4096), "o": (4096, 4096), "expert_gate_up": (28672, 4096), "expert_down": (4096, 14336)},
    ),
]

GPT_OSS = Activation("swiglu", alpha=1.702, limit=7.0)

EXPERTS = {
    "qwen3-30b-a3b": Experts(128, 8, 768),
    "deepseek-r1": Experts(256, 8, 2048),
    "gpt-oss-20b": Experts(32, 4, 2880, GPT_OSS, bias=True),
    "gpt-oss-120b": Experts(128, 4, 2880, GPT_OSS, bias=True),
    "mixtral-8x7b": Experts(8, 2, 14336),
}

# As the files are on Hugging Face: with fields that say nothing of shapes, and without those that are left to their defaults.
CONFIGS = {
    "llama3.3-70b": {
        "architectures": ["LlamaForCausalLM"],
        "head_dim": 128,
        "hidden_size": 8192,
        "intermediate_size": 28672,
        "num_attention_heads": 64,
        "num_hidden_layers": 80,
        "num_key_value_heads": 8,
        "rope_scaling": {"factor": 8.0, "rope_type": "llama3"},
        "vocab_size": 128256,
    },
    "llama3.1-8b": {
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_attention_heads": 32,
        "num_hidden_layers": 32,
        "num_key_value_heads": 8,
    },
    "llama3.2-1b": {
        "head_dim": 64,
        "hidden_size": 2048,
        "intermediate_size": 8192,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "tie_word_embeddings": True,
    },
    "llama2-7b": {
        "hidden_size": 4096,
        "intermediate_size": 11008,
        "num_attention_heads": 32,
        "num_key_value_heads": 32,
        "rope_scaling": None,
    },
    "qwen3-32b": {
        "head_dim": 128,  # not hidden size / heads, which is 80
        "hidden_size": 5120,
        "intermediate_size": 25600,
        "num_attention_heads": 64,
        "num_key_value_heads": 8,
        "sliding_window": None,
    },
    "qwen3-30b-a3b": {
        "decoder_sparse_step": 1,
        "head_dim": 128,
        "hidden_size": 2048,
        "intermediate_size": 6144,  # of dense layers, which it does not have
        "mlp_only_layers": [],
        "moe_intermediate_size": 768,
        "norm_topk_prob": True,
        "num_attention_heads": 32,
        "num_experts": 128,
        "num_experts_per_tok": 8,
        "num_key_value_heads": 4,
    },
    "deepseek-r1": {
        "first_k_dense_replace": 3,
        "hidden_size": 7168,
        "intermediate_size": 18432,
        "kv_lora_rank": 512,
        "moe_intermediate_size": 2048,
        "moe_layer_freq": 1,
        "n_routed_experts": 256,
        "n_shared_experts": 1,
        "num_attention_heads": 128,
        "num_experts_per_tok": 8,
        "num_key_value_heads": 128,
        "q_lora_rank": 1536,
        "qk_nope_head_dim": 128,
        "qk_rope_head_dim": 64,
        "v_head_dim": 128,
    },
    "gpt-oss-20b": {
        "experts_per_token": 4,
        "head_dim": 64,
        "hidden_size": 2880,
        "intermediate_size": 2880,
        "model_type": "gpt_oss",
        "num_attention_heads": 64,
        "num_experts_per_tok": 4,
        "num_key_value_heads": 8,
        "num_local_experts": 32,
    },
    "gpt-oss-120b": {
        "experts_per_token": 4,
        "head_dim": 64,
        "hidden_size": 2880,
        "intermediate_size": 2880,
        "model_type": "gpt_oss",
        "num_attention_heads": 64,
        "num_experts_per_tok": 4,
        "num_key_value_heads": 8,
        "num_local_experts": 128,
        "swiglu_limit": 7.0,
    },
    "mixtral-8x7b": {
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "model_type": "mixtral",
        "num_attention_heads": 32,
        "num_experts_per_tok": 2,
        "num_key_value_heads": 8,
        "num_local_experts": 8,
        "sliding_window": None,
    },
}


def shapes(model, tp=1):
    return {layer.name: (layer.n, layer.k) for layer in layers(model, tp)}


@pytest.fixture
def write(tmp_path):
    """Writes a config.json into a folder and returns its path as a string."""

    def write(config, folder="my-model"):
        path = tmp_path / folder / "config.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(config if isinstance(config, str) else json.dumps(config), encoding="utf-8")
        return str(path)

    return write


@pytest.mark.parametrize(("name", "tp", "expected"), SHAPES, ids=[f"{name}-tp{tp}" for name, tp, _ in SHAPES])
def test_layers_are_those_of_the_published_config(name, tp, expected):
    assert shapes(get_model(name), tp) == expected


def test_every_built_in_model_has_shapes_and_a_config_here():
    assert set(model_names()) == {name for name, tp, _ in SHAPES if tp == 1} == set(CONFIGS)


def test_experts_are_counted():
    assert {name: get_model(name).experts for name in model_names() if get_model(name).experts} == EXPERTS


def test_a_kv_head_is_copied_where_ranks_outnumber_kv_heads():
    assert shapes(get_model("llama3.3-70b"), 16)["qkv"] == ((4 + 2 * 1) * 128, 8192)
    assert shapes(get_model("qwen3-30b-a3b"), 8)["qkv"] == ((4 + 2 * 1) * 128, 2048)


@pytest.mark.parametrize(
    ("name", "change", "tp", "what"),
    [
        ("llama3.3-70b", {}, 3, "number of attention heads of MODEL, 64"),
        ("llama3.3-70b", {}, 128, "number of attention heads of MODEL, 64"),
        ("llama3.3-70b", {}, 0, "number of attention heads of MODEL, 64"),
        ("llama3.3-70b", {}, -2, "number of attention heads of MODEL, 64"),
        ("llama3.3-70b", {"num_attention_heads": 72}, 3, "number of kv heads of MODEL, 8"),
        ("llama3.3-70b", {"intermediate_size": 28676}, 8, "intermediate size of MODEL, 28676"),
        ("gpt-oss-20b", {"intermediate_size": 2882}, 4, "expert intermediate size of MODEL, 2882"),
        ("deepseek-r1", {}, 3, "number of attention heads of MODEL, 128"),
        ("deepseek-r1", {"moe_intermediate_size": 2052}, 8, "shared intermediate size of MODEL, 2052"),
    ],
)
def test_a_tensor_parallel_size_that_does_not_divide_is_refused(name, change, tp, what, write):
    model = get_model(write(CONFIGS[name] | change))
    message = f"tensor parallel size {tp} does not divide the {what.replace('MODEL', model.name)}"
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        layers(model, tp)


@pytest.mark.parametrize(
    ("name", "short"),
    [
        ("llama3.3-70b", "llama3.3-70b"),
        ("LLAMA3.3-70B", "llama3.3-70b"),
        ("meta-llama/Llama-3.3-70B-Instruct", "llama3.3-70b"),
        ("META-LLAMA/llama-3.3-70b-instruct", "llama3.3-70b"),
        ("Llama-3.3-70B-Instruct", "llama3.3-70b"),
        ("Llama-3.1-8B-Instruct", "llama3.1-8b"),
        ("meta-llama/Llama-3.2-1B-Instruct", "llama3.2-1b"),
        ("llama-2-7b-HF", "llama2-7b"),
        ("Qwen/Qwen3-32B", "qwen3-32b"),
        ("qwen/QWEN3-30B-A3B", "qwen3-30b-a3b"),
        ("deepseek-ai/DeepSeek-R1", "deepseek-r1"),
        ("openai/gpt-oss-20b", "gpt-oss-20b"),
        ("GPT-OSS-120B", "gpt-oss-120b"),
    ],
)
def test_a_model_goes_by_short_name_and_hub_id_in_any_case(name, short):
    assert str(get_model(name)) == short


@pytest.mark.parametrize("name", ["llama", "", "meta-llama/", "other/Llama-3.3-70B-Instruct"])
def test_an_unknown_model_is_refused_with_the_known_names(name):
    with pytest.raises(ValueError, match=rf"unknown model '{name}'.*llama3\.3-70b, .*gpt-oss-120b.*config\.json"):
        get_model(name)


@pytest.mark.parametrize("name", CONFIGS)
def test_a_published_config_gives_the_layers_of_the_built_in_model(name, write):
    model = get_model(write(CONFIGS[name]))
    assert [layers(model, tp) for tp in (1, 2, 4)] == [layers(get_model(name), tp) for tp in (1, 2, 4)]
    assert model.experts == EXPERTS.get(name)


def test_a_nested_text_config_is_read(write):
    path = write({"model_type": "gemma3", "hidden_size": 1, "text_config": CONFIGS["llama3.1-8b"]})
    assert shapes(get_model(path)) == shapes(get_model("llama3.1-8b"))


def test_missing_kv_heads_are_as_many_as_heads(write):
    config = {key: value for key, value in CONFIGS["llama2-7b"].items() if key != "num_key_value_heads"}
    assert shapes(get_model(write(config)))["qkv"] == (12288, 4096)


def test_latent_attention_without_a_query_rank_has_a_full_q(write):  # as DeepSeek-V2-Lite
    config = CONFIGS["deepseek-r1"] | {"q_lora_rank": None, "hidden_size": 2048, "num_attention_heads": 16}
    found = shapes(get_model(write(config)))
    assert list(found)[:4] == ["q", "kv_a", "kv_b", "o"]
    assert [found[name] for name in ("q", "kv_a", "kv_b", "o")] == [(3072, 2048), (576, 2048), (4096, 512), (2048, 2048)]


def test_several_shared_experts_are_one_mlp(write):
    found = shapes(get_model(write(CONFIGS["deepseek-r1"] | {"n_shared_experts": 2})))
    assert (found["shared_gate_up"], found["shared_down"]) == ((8192, 7168), (7168, 4096))


def test_a_shared_expert_may_have_a_size_of_its_own(write):  # as Qwen1.5-MoE and Qwen2-57B-A14B
    found = shapes(get_model(write(CONFIGS["qwen3-30b-a3b"] | {"shared_expert_intermediate_size": 5632})))
    assert (found["shared_gate_up"], found["shared_down"]) == ((11264, 2048), (2048, 5632))
    assert (found["expert_gate_up"], found["expert_down"]) == ((1536, 2048), (2048, 768))
    assert layers(get_model(write(CONFIGS["qwen3-30b-a3b"] | {"shared_expert_intermediate_size": 0}))) == layers(
        get_model("qwen3-30b-a3b")
    )


@pytest.mark.parametrize(
    "dense", [{"mlp_only_layers": [0]}, {"decoder_sparse_step": 2}], ids=["mlp_only_layers", "decoder_sparse_step"]
)
def test_a_moe_model_with_some_dense_layers_has_both(dense, write):
    found = shapes(get_model(write(CONFIGS["qwen3-30b-a3b"] | dense)))
    assert (found["gate_up"], found["expert_gate_up"]) == ((12288, 2048), (1536, 2048))


@pytest.mark.parametrize(
    ("name", "missing", "message"),
    [
        ("llama3.3-70b", "hidden_size", "has no hidden_size"),
        ("llama3.3-70b", "num_attention_heads", "has no num_attention_heads"),
        ("llama3.3-70b", "intermediate_size", "has no intermediate_size"),
        ("qwen3-30b-a3b", "num_experts_per_tok", "has no num_experts_per_tok"),
        ("gpt-oss-20b", "intermediate_size", "has no moe_intermediate_size or intermediate_size"),
        ("deepseek-r1", "intermediate_size", "has no intermediate_size"),
        ("deepseek-r1", "v_head_dim", "has no v_head_dim"),
    ],
)
@pytest.mark.parametrize("value", ["absent", 0, None], ids=["absent", "zero", "null"])
def test_a_config_without_a_field_is_refused_by_file_and_field(name, missing, message, value, write):
    config = CONFIGS[name] | {missing: value}
    path = write({key: value for key, value in config.items() if value != "absent"})
    with pytest.raises(ValueError, match=f"^the model config {re.escape(path)} {message}: layer shapes cannot be told"):
        get_model(path)


NUMBERS = [
    *[
        ("llama3.3-70b", f)
        for f in ("hidden_size", "num_attention_heads", "intermediate_size", "num_key_value_heads", "head_dim")
    ],
    *[("qwen3-30b-a3b", f) for f in ("num_experts", "num_experts_per_tok", "moe_intermediate_size", "decoder_sparse_step")],
    *[("qwen3-30b-a3b", f) for f in ("shared_expert_intermediate_size",)],
    *[("gpt-oss-20b", f) for f in ("num_local_experts", "intermediate_size")],
    *[("deepseek-r1", f) for f in ("n_routed_experts", "n_shared_experts", "first_k_dense_replace", "q_lora_rank")],
    *[("deepseek-r1", f) for f in ("kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim")],
]


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        (-128, "-128"),
        (128.0, "128.0"),
        (0.5, "0.5"),
        (True, "True"),
        ("128", "'128'"),
        ([128], "[128]"),
        ({"a": 1}, "{'a': 1}"),
    ],
    ids=["negative", "float", "fraction", "true", "text", "list", "object"],
)
@pytest.mark.parametrize(("name", "field"), NUMBERS, ids=[f"{name}-{field}" for name, field in NUMBERS])
def test_a_field_that_is_no_positive_whole_number_is_refused_by_file_and_name(name, field, value, shown, write):
    path = write(CONFIGS[name] | {field: value})
    message = f"the model config {path} has {field} = {shown}, which is not a positive whole number"
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        get_model(path)


@pytest.mark.parametrize("absent", [None, {}], ids=["null", "empty"])
def test_a_text_config_that_is_not_there_is_ignored(absent, write):
    path = write(CONFIGS["llama3.1-8b"] | {"text_config": absent})
    assert shapes(get_model(path)) == shapes(get_model("llama3.1-8b"))


@pytest.mark.parametrize("value", [[CONFIGS["llama3.1-8b"]], "llama", 7], ids=["list", "text", "number"])
def test_a_text_config_that_is_no_object_is_refused_by_file(value, write):
    path = write(CONFIGS["llama3.1-8b"] | {"text_config": value})
    message = f"the text_config of the model config {path} is not a JSON object"
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        get_model(path)


@pytest.mark.parametrize(
    ("text", "problem"),
    [("{", "is not JSON: "), ("", "is not JSON: "), ("[1, 2]", "is not a JSON object"), ("null", "is not a JSON object")],
)
def test_a_file_that_is_no_config_is_refused_by_name(text, problem, write):
    path = write(text)
    with pytest.raises(ValueError, match=f"^the model config {re.escape(path)} {problem}"):
        get_model(path)


def test_a_file_that_cannot_be_read_is_refused_by_name(tmp_path):
    absent, folder = tmp_path / "config.json", tmp_path / "folder.json"
    folder.mkdir()
    with pytest.raises(ValueError, match=f"^cannot read the model config {re.escape(str(absent))}: No such file"):
        get_model(str(absent))
    with pytest.raises(ValueError, match=f"^cannot read the model config {re.escape(str(folder))}: "):
        get_model(str(folder))


def test_a_config_names_its_model_by_folder_and_shapes(write):
    config = CONFIGS["llama3.1-8b"]
    name = get_model(write(config, "My Model_v1.5")).name
    assert re.fullmatch(r"my-model_v1\.5-[0-9a-f]{6}", name)
    assert get_model(write(config | {"vocab_size": 7, "torch_dtype": "float16"}, "My Model_v1.5")).name == name
    assert get_model(write(config, "elsewhere/My Model_v1.5")).name == name
    assert get_model(write(config, "another")).name == name.replace("my-model_v1.5", "another")
    changed = get_model(write(config | {"intermediate_size": 14338}, "My Model_v1.5")).name
    assert changed != name
    assert changed.startswith("my-model_v1.5-")


def test_a_linked_config_is_named_by_the_folder_it_is_asked_for_in(write, tmp_path):
    # As in the Hugging Face cache: snapshots/<revision>/config.json is a link to blobs/<hash>.
    blob = Path(write(CONFIGS["llama3.1-8b"], "blobs"))
    link = tmp_path / "snapshots" / "0e9e39f2" / "config.json"
    link.parent.mkdir(parents=True)
    link.symlink_to(blob)
    assert re.fullmatch(r"0e9e39f2-[0-9a-f]{6}", get_model(str(link)).name)
    (tmp_path / "llama").symlink_to(link.parent, target_is_directory=True)
    assert get_model(str(tmp_path / "llama" / "config.json")).name.startswith("llama-")


def test_a_relative_config_is_named_by_its_folder_too(write, monkeypatch):
    path = Path(write(CONFIGS["llama3.1-8b"], "here"))
    monkeypatch.chdir(path.parent)
    assert get_model("config.json") == get_model(str(path))


@pytest.mark.parametrize("name", ["nvidia/DeepSeek-R1-FP4", "deepseek-r1-fp4"])
def test_a_quantized_copy_of_a_model_has_its_shapes(name):
    assert get_model(name) == get_model("deepseek-r1")


@pytest.mark.parametrize(("tp", "intermediate"), [(1, 2048), (8, 256)])
def test_ranks_split_experts_along_their_intermediate(tp, intermediate):
    assert rank_experts(get_model("deepseek-r1"), tp) == Experts(256, 8, intermediate)
    assert rank_experts(get_model("llama3.1-8b"), tp) is None


def test_experts_that_cannot_be_split_are_refused():
    with pytest.raises(ValueError, match=r"^tensor parallel size 5 does not divide the expert intermediate size of"):
        rank_experts(get_model("qwen3-30b-a3b"), 5)


def test_bias_and_activation_are_no_part_of_a_configs_name(write):
    plain = {key: value for key, value in CONFIGS["gpt-oss-20b"].items() if key != "model_type"}
    with_type, without = get_model(write(CONFIGS["gpt-oss-20b"])), get_model(write(plain))
    assert with_type.name == without.name
    assert (with_type.experts.bias, without.experts.bias) == (True, False)
    assert (with_type.experts.activation, without.experts.activation) == (GPT_OSS, SILU)
