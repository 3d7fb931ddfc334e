"""Layer shapes of real models, by tensor-parallel size.

A model is read from the fields of its Hugging Face `config.json`, the built-in ones too, so adding one is a row in `_CONFIGS`.
Shapes are those of one rank under vLLM's parallel layers: qkv and gate_up fused and split along n, o and down split along k.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from hashlib import sha256
from pathlib import Path
from typing import Any, NoReturn


@dataclass(frozen=True)
class Layer:
    """One linear layer of one rank: Y[m, n] = X[m, k] @ W[n, k]^T."""

    name: str
    n: int
    k: int


@dataclass(frozen=True)
class Activation:
    """What experts do to the gate g and what it gates, u.

    "silu": silu(g) * u. "swiglu", of gpt-oss: g clamped to at most `limit` and u to +-`limit`, then
    g * sigmoid(alpha * g) * (u + 1). (openai/gpt-oss, gpt_oss/torch/model.py)
    """

    name: str
    alpha: float = 1.0
    limit: float | None = None

    def __str__(self) -> str:
        return self.name


SILU = Activation("silu")


@dataclass(frozen=True)
class Experts:
    """The experts of one MoE layer: each is gate_up (2 * intermediate, hidden) and down (hidden, intermediate).

    bias: whether both have one. It and the activation are no shapes, and no part of a config's hash.
    """

    count: int
    topk: int
    intermediate: int
    activation: Activation = field(default=SILU, repr=False)
    bias: bool = field(default=False, repr=False)


@dataclass(frozen=True)
class LatentAttention:
    """DeepSeek's multi-head latent attention (arXiv 2405.04434, section 2.1): low-rank q and kv, `q_rank` None for a full q."""

    q_rank: int | None
    kv_rank: int
    nope_dim: int
    rope_dim: int
    v_dim: int


@dataclass(frozen=True)
class Model:
    """What the layer shapes follow from. `intermediate` is None where every MLP is a MoE."""

    name: str
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    intermediate: int | None
    experts: Experts | None = None
    shared_intermediate: int | None = None
    latent: LatentAttention | None = None

    def __str__(self) -> str:
        return self.name


def layers(model: Model, tp: int = 1) -> tuple[Layer, ...]:
    """The linear layers of one of `tp` ranks; expert_gate_up and expert_down are those of a single expert.

    Raises ValueError where `tp` does not divide one.
    """
    return (*_attention(model, tp), *_mlp(model, tp))


def rank_experts(model: Model, tp: int = 1) -> Experts | None:
    """The experts as one of `tp` ranks has them, each cut along its intermediate; None where the model has none.

    Raises ValueError where `tp` does not divide the intermediate size.
    """
    if model.experts is None:
        return None
    return replace(model.experts, intermediate=_split(model, "expert intermediate size", model.experts.intermediate, tp))


def get_model(name: str) -> Model:
    """A model by its short name, Hugging Face id, or `config.json` path. Raises ValueError with the known names."""
    if name.endswith(".json"):
        return read_config(Path(name))
    for short, (hub_id, config) in _CONFIGS.items():
        known = (hub_id, *_ALSO.get(short, ()))
        if name.casefold() in (short, *(one.casefold() for hub in known for one in (hub, hub.partition("/")[2]))):
            return _model(config, short, source=short)
    raise ValueError(f"unknown model {name!r}: known are {', '.join(_CONFIGS)}, or the path of a Hugging Face config.json")


def model_names() -> tuple[str, ...]:
    """Short names of the built-in models."""
    return tuple(_CONFIGS)


def read_config(path: Path) -> Model:
    """The model of a Hugging Face `config.json`. Raises ValueError naming the file and what is wrong with it.

    Its name is that of the file's folder and six digits of a hash of its shapes: a changed config is another model, and never
    meets the baseline of the old one.
    """
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ValueError(f"cannot read the model config {path}: {error.strerror}") from error
    except ValueError as error:
        raise ValueError(f"the model config {path} is not JSON: {error}") from error
    if not isinstance(config, dict):
        raise ValueError(f"the model config {path} is not a JSON object")
    shapes = _model(config, "", source=str(path))
    stem = "".join(c if c.isalnum() or c in "._" else "-" for c in path.absolute().parent.name.lower())
    return _model(config, f"{stem}-{sha256(repr(shapes).encode()).hexdigest()[:6]}", source=str(path))


def _attention(model: Model, tp: int) -> tuple[Layer, ...]:
    heads = _split(model, "number of attention heads", model.heads, tp)
    if model.latent:
        return _latent_attention(model, model.latent, heads)
    # With more ranks than kv heads each rank keeps a copy of one head (vLLM's QKVParallelLinear).
    kv_heads = 1 if tp % model.kv_heads == 0 else _split(model, "number of kv heads", model.kv_heads, tp)
    return (
        Layer("qkv", (heads + 2 * kv_heads) * model.head_dim, model.hidden),
        Layer("o", model.hidden, heads * model.head_dim),
    )


def _latent_attention(model: Model, latent: LatentAttention, heads: int) -> tuple[Layer, ...]:
    qk_dim = latent.nope_dim + latent.rope_dim
    kv_a = latent.kv_rank + latent.rope_dim
    if latent.q_rank is None:
        queries = (Layer("q", heads * qk_dim, model.hidden), Layer("kv_a", kv_a, model.hidden))
    else:
        # The down-projections of q and kv are one layer, and every rank holds all of it.
        queries = (Layer("qkv_a", latent.q_rank + kv_a, model.hidden), Layer("q_b", heads * qk_dim, latent.q_rank))
    return (
        *queries,
        Layer("kv_b", heads * (latent.nope_dim + latent.v_dim), latent.kv_rank),
        Layer("o", model.hidden, heads * latent.v_dim),
    )


def _mlp(model: Model, tp: int) -> tuple[Layer, ...]:
    sizes = {
        "": model.intermediate,
        "shared_": model.shared_intermediate,
        "expert_": model.experts.intermediate if model.experts else None,
    }
    found = []
    for prefix, size in sizes.items():
        if size is not None:
            intermediate = _split(model, f"{prefix.replace('_', ' ')}intermediate size", size, tp)
            found.append(Layer(f"{prefix}gate_up", 2 * intermediate, model.hidden))
            found.append(Layer(f"{prefix}down", model.hidden, intermediate))
    return tuple(found)


def _split(model: Model, what: str, size: int, tp: int) -> int:
    if tp < 1 or size % tp:
        raise ValueError(f"tensor parallel size {tp} does not divide the {what} of {model}, {size}")
    return size // tp


class _Fields:
    """The fields of a config that give shapes, each a positive whole number where it is there at all."""

    def __init__(self, config: Any, source: str) -> None:
        # Multimodal models nest their decoder.
        nested = config.get("text_config")
        self.config = config if nested in (None, {}) else nested
        self.source = source
        if not isinstance(self.config, dict):
            raise ValueError(f"the text_config of the model config {source} is not a JSON object")

    def optional(self, *names: str) -> int | None:
        """The first of these that is there; null and 0 count as absent."""
        for name in names:
            value = self.config.get(name)
            if type(value) is not int and value is not None:
                self._refuse(name, value)
            if value:
                if value < 0:
                    self._refuse(name, value)
                return value
        return None

    def required(self, *names: str) -> int:
        value = self.optional(*names)
        if value is None:
            raise ValueError(f"the model config {self.source} has no {' or '.join(names)}: layer shapes cannot be told from it")
        return value

    def _refuse(self, name: str, value: object) -> NoReturn:
        raise ValueError(f"the model config {self.source} has {name} = {value!r}, which is not a positive whole number")


def _model(config: Mapping[str, Any], name: str, source: str) -> Model:
    fields = _Fields(config, source)
    hidden, heads = fields.required("hidden_size"), fields.required("num_attention_heads")
    routed = _experts(fields)
    return Model(
        name,
        hidden,
        heads,
        kv_heads=fields.optional("num_key_value_heads") or heads,
        head_dim=fields.optional("head_dim") or hidden // heads,
        intermediate=fields.required("intermediate_size") if routed is None or _has_dense_layers(fields) else None,
        experts=routed,
        shared_intermediate=_shared_intermediate(fields, routed),
        latent=_latent(fields),
    )


def _experts(fields: _Fields) -> Experts | None:
    count = fields.optional("num_experts", "num_local_experts", "n_routed_experts")
    if count is None:
        return None
    intermediate = fields.required("moe_intermediate_size", "intermediate_size")
    topk = fields.required("num_experts_per_tok")
    if fields.config.get("model_type") == "gpt_oss":
        # Its constants; a config's swiglu_limit is 7.0 in both models.
        return Experts(count, topk, intermediate, Activation("swiglu", alpha=1.702, limit=7.0), bias=True)
    return Experts(count, topk, intermediate)


def _shared_intermediate(fields: _Fields, routed: Experts | None) -> int | None:
    """Qwen gives the shared expert's size, DeepSeek the number of shared experts, each as large as a routed one."""
    shared = fields.optional("n_shared_experts")
    if routed and shared:
        return shared * routed.intermediate
    return fields.optional("shared_expert_intermediate_size")


def _has_dense_layers(fields: _Fields) -> bool:
    """Whether a MoE model has dense MLPs too: DeepSeek's first layers, Qwen's sparse step and exceptions."""
    sparse_step = fields.optional("decoder_sparse_step") or 1
    return bool(fields.optional("first_k_dense_replace") or fields.config.get("mlp_only_layers") or sparse_step > 1)


def _latent(fields: _Fields) -> LatentAttention | None:
    kv_rank = fields.optional("kv_lora_rank")
    if kv_rank is None:
        return None
    dims = (fields.required(name) for name in ("qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim"))
    return LatentAttention(fields.optional("q_lora_rank"), kv_rank, *dims)


def _llama(hidden: int, intermediate: int, heads: int, kv_heads: int, head_dim: int) -> dict[str, Any]:
    return {
        "hidden_size": hidden,
        "intermediate_size": intermediate,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": head_dim,
    }


def _moe(count: int, topk: int, intermediate: int) -> dict[str, Any]:
    return {"num_experts": count, "num_experts_per_tok": topk, "moe_intermediate_size": intermediate}


# Other Hugging Face ids of the same shapes: that of vLLM's MoE benchmark.
_ALSO = {"deepseek-r1": ("nvidia/DeepSeek-R1-FP4",)}

_GPT_OSS = {"model_type": "gpt_oss"}

# Short name -> (Hugging Face id, the fields of its config.json that give shapes).
_CONFIGS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama3.3-70b": ("meta-llama/Llama-3.3-70B-Instruct", _llama(8192, 28672, 64, 8, 128)),
    "llama3.1-8b": ("meta-llama/Llama-3.1-8B-Instruct", _llama(4096, 14336, 32, 8, 128)),
    "llama3.2-1b": ("meta-llama/Llama-3.2-1B-Instruct", _llama(2048, 8192, 32, 8, 64)),
    "llama2-7b": ("meta-llama/Llama-2-7b-hf", _llama(4096, 11008, 32, 32, 128)),
    "qwen3-32b": ("Qwen/Qwen3-32B", _llama(5120, 25600, 64, 8, 128)),
    "qwen3-30b-a3b": ("Qwen/Qwen3-30B-A3B", _llama(2048, 6144, 32, 4, 128) | _moe(128, 8, 768)),
    "deepseek-r1": (
        "deepseek-ai/DeepSeek-R1",
        _llama(7168, 18432, 128, 128, 192)
        | _moe(256, 8, 2048)
        | {
            "first_k_dense_replace": 3,
            "n_shared_experts": 1,
            "q_lora_rank": 1536,
            "kv_lora_rank": 512,
            "qk_nope_head_dim": 128,
            "qk_rope_head_dim": 64,
            "v_head_dim": 128,
        },
    ),
    "gpt-oss-20b": ("openai/gpt-oss-20b", _llama(2880, 2880, 64, 8, 64) | _moe(32, 4, 2880) | _GPT_OSS),
    "gpt-oss-120b": ("openai/gpt-oss-120b", _llama(2880, 2880, 64, 8, 64) | _moe(128, 4, 2880) | _GPT_OSS),
    "mixtral-8x7b": ("mistralai/Mixtral-8x7B-Instruct-v0.1", _llama(4096, 14336, 32, 8, 128) | _moe(8, 2, 14336)),
}
