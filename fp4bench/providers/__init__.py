"""Who can compute a problem here, and if not, why not: the protocol and the registry.

Built-in providers are one file each in this folder. Others come from installed packages through the entry point group
`fp4bench.providers`; README shows one. A provider that cannot run says so; nothing is ever replaced by another.
"""

import re
from collections.abc import Callable, Iterable, Mapping
from importlib import import_module
from importlib.metadata import PackageNotFoundError, entry_points
from importlib.metadata import version as _version
from types import ModuleType
from typing import Any, Protocol

from fp4bench.devices import Device
from fp4bench.formats import ScaleRule
from fp4bench.problems import MoeProblem, Problem, QuantizeProblem

Runner = Callable[[], Any]
"""Computes the problem once on fixed buffers, without arguments; safe to capture in a CUDA graph."""


class Phased:
    """A runner of several parts, by name in their order: a call is all of them, and returns what the last one does.

    Each part may also be called alone, any number of times, after a call of the whole: it finds what the parts before it left
    in buffers.
    """

    def __init__(self, phases: Mapping[str, Runner]) -> None:
        self.phases = phases

    def __call__(self) -> Any:
        result = None
        for phase in self.phases.values():
            result = phase()
        return result


GROUP = "fp4bench.providers"

_PARTS = ("name", "version", "ops", "modes", "rules", "why_not", "prepare")

_BUILT_IN = (
    "torch_native:TorchProvider",
    "eager:EagerProvider",
    "triton_native:TritonProvider",
    "vllm_marlin:VllmMarlinProvider",
    "vllm_triton:VllmTritonProvider",
    "humming:HummingProvider",
    "torch_native:TorchFastFp8Provider",
    "torch_scaled_mm:TorchScaledMmProvider",
    "gemlite:GemliteProvider",
    "triton_kernels:TritonKernelsProvider",
    "vllm_qutlass:VllmQutlassProvider",
    "vllm_qutlass:VllmQutlassQuestProvider",
    "vllm_cutlass:VllmCutlassProvider",
    "flashinfer:FlashInferCutlassProvider",
    "flashinfer:FlashInferCudnnProvider",
    "flashinfer:FlashInferCuteDslProvider",
    "flashinfer:FlashInferTrtllmProvider",
    "flashinfer:FlashInferB12xProvider",
)


class Provider(Protocol):
    """Computes problems. All attributes are constants of the class or set when it is made; making one asks nothing of a GPU.

    name: its part of a case id, in lower-case letters, digits and underscores.
    version: of the library behind it, or None where that is not installed.
    ops: the problems it computes: "gemm", "quantize", "moe".
    modes: names of the GEMM modes it has (`fp4bench.problems.MODES`).
    rules: by format name, the scale rules it implements; the first one is that of its GEMMs and MoE layers.

    It may also have
    variant: how a user has it do the same work, where there is a choice: measurements of different variants are not compared.
    moe_modes: names of the modes of its MoE layers, where they are not `modes`.
    accumulation(problem, device) -> Accumulation | None: how it adds up products where that is less exact than the mode allows,
    which is what its outputs are checked for.
    The runner of a MoE layer may have `phases`, as `Phased` has: they are timed one by one too.
    """

    name: str
    version: str | None
    ops: Iterable[str]
    modes: Iterable[str]
    rules: Mapping[str, tuple[ScaleRule, ...]]

    def why_not(self, problem: Any, device: Device) -> str | None:
        """What keeps this provider from computing a problem of its operations, modes and rules on `device`, or None."""

    def prepare(self, problem: Any, inputs: Any) -> Runner:
        """Quantize and lay out what is not part of the timed work. Only called where `why_not` has no reason."""
        ...


def providers() -> dict[str, Provider]:
    """Every provider, built in and installed, by name. Raises ValueError for one that is none, or takes a name twice."""
    found: dict[str, Provider] = {}
    for source, make in (*_built_in(), *_installed()):
        provider = make()
        missing = [name for name in _PARTS if not hasattr(provider, name)]
        if missing:
            raise ValueError(f"the provider of {source} has no {', '.join(missing)}: see fp4bench.providers.Provider")
        if not re.fullmatch(r"[a-z0-9_]+", provider.name):
            raise ValueError(
                f"the provider of {source} is named {provider.name!r}: use lower-case letters, digits and underscores"
            )
        if provider.name in found:
            raise ValueError(f"two providers are named {provider.name!r}, the second from {source}: rename it")
        found[provider.name] = provider
    return found


def why_not(provider: Provider, problem: Problem, device: Device) -> str | None:
    """What keeps a provider from computing `problem` on `device`, in one sentence, or None.

    What it declares (operation, mode, format, rule) is looked at first; the rest is the provider's own word.
    """
    if problem.op not in provider.ops:
        return f"{provider.name} has no {problem.op}"
    if problem.format is not None and problem.format.name not in provider.rules:
        return f"{provider.name} has no format {problem.format}"
    if not isinstance(problem, QuantizeProblem) and problem.mode.name not in modes_of(provider, problem.op):
        return f"{provider.name} has no mode {problem.mode}" + (" of MoE layers" if isinstance(problem, MoeProblem) else "")
    if isinstance(problem, QuantizeProblem) and problem.rule not in provider.rules[problem.format.name]:
        return f"{provider.name} has no scale rule {problem.rule}"
    return provider.why_not(problem, device)


def modes_of(provider: Provider, op: str) -> Iterable[str]:
    """Names of the modes that a provider has of an operation, "gemm" or "moe"."""
    return getattr(provider, "moe_modes", provider.modes) if op == "moe" else provider.modes


def import_optional(module: str) -> ModuleType | None:
    """`module`, or None where it is not installed. One that is installed but broken raises its own error."""
    try:
        return import_module(module)
    except ModuleNotFoundError as error:
        if error.name != module.partition(".")[0]:
            raise
        return None


def installed_version(distribution: str) -> str | None:
    """The version of an installed distribution (its name on PyPI), without importing it; None where it is not installed."""
    try:
        return _version(distribution)
    except PackageNotFoundError:
        return None


def _built_in() -> Iterable[tuple[str, Callable[[], Any]]]:
    for entry in _BUILT_IN:
        module, _, attribute = entry.partition(":")
        yield f"{__name__}.{module}", getattr(import_module(f"{__name__}.{module}"), attribute)


def _installed() -> Iterable[tuple[str, Callable[[], Any]]]:
    for entry in sorted(entry_points(group=GROUP), key=lambda entry: entry.name):
        yield f"entry point {entry.name} = {entry.value}", entry.load()
