"""Which cases there are: the grid of problems and providers that a user's options select."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from fp4bench.devices import Device
from fp4bench.formats import FORMATS, BlockFormat, ScaleRule
from fp4bench.models import Layer, Model, get_model, layers, model_names
from fp4bench.problems import BATCH_SIZES, MODES, Accumulation, GemmProblem, Mode, Problem, QuantizeProblem
from fp4bench.providers import Provider, providers, why_not

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
        """The scale rule of its FP4 operands: a quantization's own, or that of the provider's GEMMs; None without FP4."""
        if isinstance(self.problem, QuantizeProblem):
            return self.problem.rule
        return self.provider.rules[self.problem.format.name][0] if self.problem.format else None

    def facts(self) -> dict[str, Any]:
        """What the case is, by the keys of a record (`fp4bench.evidence.record.KEYS`)."""
        problem, rule = self.problem, self.rule
        gemm = problem if isinstance(problem, GemmProblem) else None
        return {
            "case_id": str(self),
            "op": problem.op,
            "format": str(problem.format or (gemm and gemm.mode)),
            "mode": str(gemm.mode if gemm else rule),
            "provider": self.provider.name,
            "provider_version": self.provider.version,
            "model": problem.model,
            "layer": problem.layer,
            "tp": problem.tp,
            "m": problem.m,
            "n": gemm.n if gemm else None,
            "k": problem.k,
            "hadamard": problem.hadamard,
            "scale_rule": str(rule) if rule else None,
            "flops": problem.flops,
            "bytes": problem.bytes,
        }

    def accumulation(self, device: Device) -> Accumulation | None:
        """How its products are added up on `device`, where the provider says so; None: as the mode says."""
        of_provider = getattr(self.provider, "accumulation", None)
        return of_provider(self.problem, device) if of_provider and isinstance(self.problem, GemmProblem) else None

    def why_not(self, device: Device) -> str | None:
        """What keeps the case from running on `device`, or None."""
        return why_not(self.provider, self.problem, device)


@dataclass(frozen=True)
class Shard:
    """A layer as one of `tp` ranks of a model computes it."""

    model: Model
    tp: int
    layer: Layer


@dataclass(frozen=True)
class Selection:
    """The axes of the grid. `had_sizes` holds None for no rotation."""

    shards: tuple[Shard, ...]
    batch_sizes: tuple[int, ...]
    had_sizes: tuple[int | None, ...]
    formats: tuple[BlockFormat, ...]
    modes: tuple[Mode, ...]
    providers: tuple[Provider, ...]


# What runs when an option is not given. On a CPU: what two cores do in 90 seconds, by the providers that need no GPU. On a GPU:
# the reference benchmarks' model, from decode to prefill, by every installed provider; activations that come quantized
# (w4a4_noquant) would make a third more cases, and say what w4a4 and the quantizations say together.
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
    return Selection(
        shards=_shards(asked),
        batch_sizes=_pick(asked, "batch_sizes", BATCH_SIZES, _positive("batch size")),
        had_sizes=_pick(asked, "had_sizes", (None, *HADAMARD_SIZES), _hadamard_size),
        formats=_pick(asked, "formats", FORMATS.values(), _by_name("format", FORMATS)),
        modes=_pick(asked, "modes", MODES.values(), _by_name("mode", MODES)),
        providers=_pick(asked, "providers", known.values(), _by_name("provider", known)),
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


CASES: dict[str, Callable[[Selection], Iterator[Case]]] = {"gemm": gemm_cases, "quantize": quantize_cases}


def _shards(asked: Mapping[str, Sequence[str]]) -> tuple[Shard, ...]:
    models = _pick(asked, "models", map(get_model, model_names()), get_model)
    sizes = _pick(asked, "tp_sizes", None, _positive("tensor parallel size"))
    found = [Shard(model, tp, layer) for model in models for tp in sizes for layer in layers(model, tp)]
    for axis in ("k", "n"):
        limits = _pick(asked, f"limit_{axis}", None, _positive(axis))
        there = sorted({getattr(shard.layer, axis) for shard in found})
        found = [shard for shard in found if not limits or getattr(shard.layer, axis) in limits]
        if not found:
            raise ValueError(f"no selected layer has {axis} in {_listed(limits)}: there are {_listed(there)}")
    return tuple(found)


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
