"""Which cases there are: the grid of problems and providers that a user's options select.

A module of its own, for choosing cases is not the plugin's glue. Their order is the same in each run, and not shuffled: what a
case does to the next is the same too.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any, TypeVar

from fp4bench.devices import Device
from fp4bench.formats import FORMATS, BlockFormat, ScaleRule
from fp4bench.models import Experts, Layer, Model, get_model, layers, model_names, rank_experts
from fp4bench.problems import (
    BATCH_SIZES,
    MODES,
    MOE_BATCH_SIZES,
    PER_BLOCK,
    PER_CHANNEL,
    PER_TENSOR,
    PER_TOKEN,
    PER_TOKEN_CHANNEL,
    ROUTINGS,
    Accumulation,
    Fp8Scaling,
    GemmProblem,
    Mode,
    MoeProblem,
    Problem,
    QuantizeProblem,
    Routing,
    read_routing,
)
from fp4bench.providers import Provider, modes_of, providers, why_not

HADAMARD_SIZES = (16, 32, 64, 128)

Value = TypeVar("Value")


@dataclass(frozen=True)
class Case:
    """One problem by one provider. Its `str` is the case id, the key of a baseline."""

    problem: Problem
    provider: Provider

    def __str__(self) -> str:
        return self.problem.case_id(self.provider.name)

    @property
    def rule(self) -> ScaleRule | None:
        """The scale rule of its FP4 operands: a quantization's own, or that of the provider's products; None without FP4."""
        if isinstance(self.problem, QuantizeProblem):
            return self.problem.rule
        return self.provider.rules[self.problem.format.name][0] if self.problem.format else None

    def facts(self) -> dict[str, Any]:
        """What the case is, by the keys of a record (`fp4bench.evidence.record.KEYS`)."""
        problem, rule = self.problem, self.rule
        matmul = None if isinstance(problem, QuantizeProblem) else problem
        return {
            "case_id": str(self),
            "op": problem.op,
            "format": str(problem.format or (matmul and matmul.mode)),
            "mode": str(matmul.mode if matmul else rule),
            "provider": self.provider.name,
            "provider_version": self.provider.version,
            "provider_variant": getattr(self.provider, "variant", None),
            "model": problem.model,
            "layer": problem.layer,
            "tp": problem.tp,
            "m": problem.m,
            "n": matmul.n if matmul else None,
            "k": problem.k,
            "hadamard": problem.hadamard,
            "scale_rule": str(rule) if rule else None,
            "flops": problem.flops,
            "bytes": problem.bytes,
        } | (_facts_of_moe(problem) if isinstance(problem, MoeProblem) else {})

    def accumulation(self, device: Device) -> Accumulation | None:
        """How its products are added up on `device`, where the provider says so; None: as the mode says."""
        of_provider = getattr(self.provider, "accumulation", None)
        return of_provider(self.problem, device) if of_provider and not isinstance(self.problem, QuantizeProblem) else None

    def why_not(self, device: Device) -> str | None:
        """What keeps the case from running on `device`, or None."""
        return why_not(self.provider, self.problem, device)


def _facts_of_moe(problem: MoeProblem) -> dict[str, Any]:
    return {
        "experts": problem.experts,
        "topk": problem.topk,
        "experts_hit": problem.experts_hit,
        "most_tokens": problem.choices.most,
        "routing": str(problem.routing),
        "fp8_scaling": str(problem.fp8) if problem.fp8 else None,
        "activation": str(problem.activation),
    }


@dataclass(frozen=True)
class Shard:
    """A layer as one of `tp` ranks of a model computes it."""

    model: Model
    tp: int
    layer: Layer


@dataclass(frozen=True)
class MoeShard:
    """The experts of a model as one of `tp` ranks computes them."""

    model: Model
    tp: int
    experts: Experts


@dataclass(frozen=True)
class Selection:
    """The axes of the grid. `had_sizes` holds None for no rotation; the last four are of MoE layers alone."""

    shards: tuple[Shard, ...]
    batch_sizes: tuple[int, ...]
    had_sizes: tuple[int | None, ...]
    formats: tuple[BlockFormat, ...]
    modes: tuple[Mode, ...]
    providers: tuple[Provider, ...]
    moe_shards: tuple[MoeShard, ...]
    moe_batch_sizes: tuple[int, ...]
    routings: tuple[Routing, ...]
    fp8_scalings: tuple[Fp8Scaling, ...]


# What runs when an option is not given. On a CPU: what two cores do in 90 seconds, by the providers that need no GPU. On a GPU:
# the reference benchmarks' model, from decode to prefill, by every installed provider; activations that come quantized
# (w4a4_noquant) would make a third more cases, and say what w4a4 and the quantizations say together. Eager FP4 at m = 4096 took
# most of the time of a run.
_CPU_DEFAULTS: dict[str, Sequence[str]] = {
    "models": ["llama3.2-1b"],
    "tp_sizes": ["1"],
    "batch_sizes": ["1", "64"],
    "had_sizes": ["none", "64"],
    "formats": ["all"],
    "modes": ["bf16", "w4a16", "w4a4"],
    "providers": ["torch", "eager"],
    "limit_k": [],
    "limit_n": [],
    "limit_num_groups": [],
    "routing": ["uniform"],
    "per_act_token": ["no"],
    "per_out_ch": ["no"],
    "fp8_blocks": ["none"],
}
_GPU_DEFAULTS = _CPU_DEFAULTS | {
    "models": ["llama3.3-70b"],
    "batch_sizes": ["1", "64", "1024"],
    "modes": ["bf16", "fp8", "w4a16", "w4a8", "w4a4"],
}


def select(options: Mapping[str, Sequence[str]], device: Device) -> Selection:
    """The selection of command line options, by name without dashes; what is absent takes the device's default.

    Lists of what is known take "all". Raises ValueError, one sentence, for what is unknown and for limits that leave no layer.
    """
    known = providers()
    asked = {**(_GPU_DEFAULTS | _installed(known) if device.is_cuda else _CPU_DEFAULTS), **options}
    shards, moe_shards = _limited(asked, _shards(asked), _moe_shards(asked))
    return Selection(
        shards=shards,
        batch_sizes=_pick(asked, "batch_sizes", BATCH_SIZES, _positive("batch size")),
        had_sizes=_pick(asked, "had_sizes", (None, *HADAMARD_SIZES), _hadamard_size),
        formats=_pick(asked, "formats", FORMATS.values(), _by_name("format", FORMATS)),
        modes=_pick(asked, "modes", MODES.values(), _by_name("mode", MODES)),
        providers=_pick(asked, "providers", known.values(), _by_name("provider", known)),
        moe_shards=moe_shards,
        moe_batch_sizes=_pick(asked, "batch_sizes", MOE_BATCH_SIZES, _positive("batch size")),
        routings=_pick(asked, "routing", map(Routing, ROUTINGS), _routing),
        fp8_scalings=_fp8_scalings(asked),
    )


def _installed(known: Mapping[str, Provider]) -> dict[str, Sequence[str]]:
    return {"providers": [name for name, provider in known.items() if provider.version is not None]}


def gemm_cases(selection: Selection) -> Iterator[Case]:
    """Every layer and batch size in every mode, format and rotation that a provider has. Same inputs stay together."""
    variants = [
        (mode, fmt, hadamard, provider)
        for mode in selection.modes
        for fmt in (selection.formats if mode.weights == "fp4" else (None,))
        for hadamard in (selection.had_sizes if mode.activations == "fp4" else (None,))
        for provider in selection.providers
        if "gemm" in provider.ops and mode.name in provider.modes and (fmt is None or fmt.name in provider.rules)
    ]
    for shard in selection.shards:
        name, n, k = shard.layer.name, shard.layer.n, shard.layer.k
        for m in selection.batch_sizes:
            for mode, fmt, hadamard, provider in variants:
                yield Case(GemmProblem(shard.model.name, name, shard.tp, m, n, k, mode, fmt, hadamard), provider)


def quantize_cases(selection: Selection) -> Iterator[Case]:
    """Every distinct width of activations and batch size, by every rule and rotation that a provider has.

    A width is named by the model's first layer that has it, selected or not: the id does not depend on the selection.
    """
    variants = [
        (fmt, rule, hadamard, provider)
        for provider in selection.providers
        if "quantize" in provider.ops
        for fmt in selection.formats
        for rule in provider.rules.get(fmt.name, ())
        for hadamard in selection.had_sizes
    ]
    for model, tp, k in dict.fromkeys((shard.model, shard.tp, shard.layer.k) for shard in selection.shards):
        layer = next(layer.name for layer in layers(model, tp) if layer.k == k)
        for m in selection.batch_sizes:
            for fmt, rule, hadamard, provider in variants:
                yield Case(QuantizeProblem(model.name, layer, tp, m, k, fmt, rule, hadamard), provider)


def moe_cases(selection: Selection) -> Iterator[Case]:
    """The experts of every selected model that has some, in every batch size, routing, mode, format and FP8 scaling."""
    variants = [
        (mode, fmt, scaling, provider)
        for mode in selection.modes
        for fmt in (selection.formats if mode.weights == "fp4" else (None,))
        for scaling in (selection.fp8_scalings if mode.weights == "fp8" else (None,))
        for provider in selection.providers
        if "moe" in provider.ops and mode.name in modes_of(provider, "moe") and (fmt is None or fmt.name in provider.rules)
    ]
    for shard, m, routing in product(selection.moe_shards, selection.moe_batch_sizes, selection.routings):
        for mode, fmt, scaling, provider in variants:
            yield Case(_moe_problem(shard, m, routing, mode, fmt, scaling), provider)


def _moe_problem(
    shard: MoeShard, m: int, routing: Routing, mode: Mode, fmt: BlockFormat | None, scaling: Fp8Scaling | None
) -> MoeProblem:
    experts = shard.experts
    return MoeProblem(
        shard.model.name,
        "experts",
        shard.tp,
        m,
        shard.model.hidden,
        experts.intermediate,
        experts.count,
        experts.topk,
        mode,
        fmt,
        experts.activation,
        experts.bias,
        routing,
        scaling,
    )


CASES: dict[str, Callable[[Selection], Iterator[Case]]] = {"gemm": gemm_cases, "quantize": quantize_cases, "moe": moe_cases}


def why_nothing(ops: Iterable[str], selection: Selection) -> str:
    """Why a selection has no case of these operations."""
    if set(ops) == {"moe"} and not selection.moe_shards:
        return "no selected model and limit leaves experts: name a model that has some, such as --models gpt-oss-20b"
    return "no selected provider has a selected mode and format"


def _shards(asked: Mapping[str, Sequence[str]]) -> list[Shard]:
    return [Shard(model, tp, layer) for model, tp in _ranks(asked) for layer in layers(model, tp)]


def _moe_shards(asked: Mapping[str, Sequence[str]]) -> list[MoeShard]:
    return [MoeShard(model, tp, experts) for model, tp in _ranks(asked) if (experts := rank_experts(model, tp))]


def _ranks(asked: Mapping[str, Sequence[str]]) -> Iterator[tuple[Model, int]]:
    models = _pick(asked, "models", map(get_model, model_names()), get_model)
    return product(models, _pick(asked, "tp_sizes", None, _positive("tensor parallel size")))


def _limited(
    asked: Mapping[str, Sequence[str]], shards: list[Shard], moe_shards: list[MoeShard]
) -> tuple[tuple[Shard, ...], tuple[MoeShard, ...]]:
    """Without what has other sizes than the limits name. The k of a MoE layer is its hidden size, its n the intermediate."""
    for axis in ("k", "n"):
        limits = _pick(asked, f"limit_{axis}", None, _positive(axis))
        there = sorted({getattr(shard.layer, axis) for shard in shards})
        shards = [shard for shard in shards if not limits or getattr(shard.layer, axis) in limits]
        moe_shards = [shard for shard in moe_shards if not limits or _moe_size(shard, axis) in limits]
        if not shards and not moe_shards:
            raise ValueError(f"no selected layer has {axis} in {_listed(limits)}: there are {_listed(there)}")
    groups = _pick(asked, "limit_num_groups", None, _positive("number of groups"))
    return tuple(shards), tuple(shard for shard in moe_shards if not groups or shard.experts.count in groups)


def _moe_size(shard: MoeShard, axis: str) -> int:
    return shard.model.hidden if axis == "k" else shard.experts.intermediate


def _routing(text: str) -> Routing:
    return read_routing(Path(text)) if text.endswith(".json") else Routing(text)


def _fp8_scalings(asked: Mapping[str, Sequence[str]]) -> tuple[Fp8Scaling, ...]:
    """Scales by tensors, tokens and channels as two options of vLLM's benchmark combine, and by blocks."""
    tokens, channels = (
        _pick(asked, option, (False, True), _yes_or_no(option.replace("_", "-"))) for option in ("per_act_token", "per_out_ch")
    )
    blocks = _pick(asked, "fp8_blocks", (None, 128), _block_shape)
    named = {
        (False, False): PER_TENSOR,
        (True, False): PER_TOKEN,
        (False, True): PER_CHANNEL,
        (True, True): PER_TOKEN_CHANNEL,
    }
    plain = [named[pair] for pair in product(tokens, channels)] if None in blocks else []
    return (*plain, *([PER_BLOCK] if 128 in blocks else []))


def _yes_or_no(option: str) -> Callable[[str], bool]:
    def parse(text: str) -> bool:
        if text not in ("no", "yes"):
            raise ValueError(f"--{option} {text!r} is neither no nor yes")
        return text == "yes"

    return parse


def _block_shape(text: str) -> int | None:
    if text not in ("none", "128"):
        raise ValueError(f"unknown FP8 blocks {text!r}: known are none and 128")
    return None if text == "none" else int(text)


def _pick(
    asked: Mapping[str, Sequence[str]], option: str, everything: Iterable[Value] | None, parse: Callable[[str], Value]
) -> tuple[Value, ...]:
    """The values of one option, in the order given, each once. `everything` is what "all" stands for, if for anything."""
    if everything is not None and list(asked[option]) == ["all"]:
        return tuple(everything)
    return tuple(dict.fromkeys(parse(text) for text in asked[option]))


def _by_name(what: str, known: Mapping[str, Value]) -> Callable[[str], Value]:
    def parse(text: str) -> Value:
        if text not in known:
            raise ValueError(f"unknown {what} {text!r}: known are {_listed(known)}, or all")
        return known[text]

    return parse


def _positive(what: str) -> Callable[[str], int]:
    def parse(text: str) -> int:
        if not text.isdecimal() or int(text) == 0:
            raise ValueError(f"{what} {text!r} is not a positive whole number")
        return int(text)

    return parse


def _hadamard_size(text: str) -> int | None:
    if text == "none":
        return None
    if text not in map(str, HADAMARD_SIZES):
        raise ValueError(f"unknown Hadamard size {text!r}: known are none, {_listed(HADAMARD_SIZES)}, or all")
    return int(text)


def _listed(values: Iterable[object]) -> str:
    return ", ".join(map(str, values))
