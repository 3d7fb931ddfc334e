"""`fp4bench providers`: who there is, what each computes, and what keeps it from doing so on this device."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fp4bench.devices import Device
    from fp4bench.problems import Problem
    from fp4bench.providers import Provider

# A layer and batch size that are multiples of every block, so that what is refused is the device or the mode, not the shape.
_MODEL, _LAYER, _TP, _M, _N, _K = "sample", "qkv", 1, 64, 4096, 4096
_HADAMARD = 64
# Experts likewise: those of Mixtral-8x7B at TP 2.
_MOE_MODEL, _MOE_TP = "mixtral-8x7b", 2


def add_parser(commands: Any) -> None:
    parser = commands.add_parser(
        "providers",
        help="each provider: its version, what it computes, and why not here",
        description=f"Asks each provider about every mode, format and scale rule it has, for n = {_N}, k = {_K} and m = {_M}, "
        f"and the experts of {_MOE_MODEL} at TP {_MOE_TP}: a table of all, then each with its reasons. Other shapes may have "
        "reasons of their own; a run shows them as skipped cases.",
    )
    parser.add_argument("--device", default="auto", help="auto (a GPU where there is one), cpu, cuda or cuda:<index>")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Write the list to stdout. Raises ValueError for a device that is not there, and for a broken provider."""
    # torch takes seconds to import, and the other commands do without.
    from fp4bench.devices import find_device
    from fp4bench.providers import providers

    device = find_device(args.device)
    known = list(providers().values())
    blocks = ["\n".join(part) for part in (table(known, device), *(describe(provider, device) for provider in known))]
    sys.stdout.write(f"on {device}\n\n" + "\n\n".join(blocks) + "\n")
    return 0


def table(known: Iterable[Provider], device: Device) -> list[str]:
    """A line a provider: its formats, modes and version (without what its libraries were built for), and what runs here."""
    rows = [("provider", "formats", "modes", "version", "here")]
    for provider in known:
        version = (provider.version or "-").partition(" (")[0]
        rows.append(
            (
                provider.name,
                ", ".join(provider.rules) or "-",
                ", ".join(provider.modes) or "-",
                version,
                _here(provider, device),
            )
        )
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]) - 1)]
    return ["  ".join(f"{cell:<{width}}" for cell, width in zip(row, [*widths, 0], strict=True)).rstrip() for row in rows]


def _here(provider: Provider, device: Device) -> str:
    """ "yes", "partly", or the reason that keeps most of the work from running."""
    kept, asked = _kept(provider, device)
    if not kept:
        return "yes" if asked else "it declares no work"
    return "partly" if sum(map(len, kept.values())) < asked else max(kept, key=lambda reason: len(kept[reason]))


def _kept(provider: Provider, device: Device) -> tuple[dict[str, list[str]], int]:
    """Each reason on this device with the kinds of work that it prevents, and how many kinds there are."""
    from fp4bench.providers import why_not

    kept: dict[str, list[str]] = {}
    asked = list(_samples(provider))
    for what, problem in asked:
        if reason := why_not(provider, problem, device):
            kept.setdefault(reason, []).append(what)
    return kept, len(asked)


def describe(provider: Provider, device: Device) -> list[str]:
    """A provider as text: name and version, what it declares, and each reason on this device with the work it prevents."""
    from fp4bench.providers import modes_of

    rules = [f"{name}: {', '.join(map(str, rules))}" for name, rules in provider.rules.items()]
    lines = [
        f"{provider.name} {provider.version or '(not installed)'}",
        f"  operations   {', '.join(provider.ops)}",
        f"  modes        {', '.join(provider.modes) or '-'}",
        *([f"  moe modes    {', '.join(modes_of(provider, 'moe'))}"] if "moe" in provider.ops else []),
        *(f"  {'scale rules' if i == 0 else '':<11}  {rule}" for i, rule in enumerate(rules or ["-"])),
    ]
    kept, asked = _kept(provider, device)
    if not kept:
        return [*lines, "  here         all of it" if asked else "  here         nothing: it declares no work"]
    able = asked - sum(map(len, kept.values()))
    lines.append(f"  here         {able} of {asked} kinds of work; not")
    return [*lines, *(f"    {', '.join(whats)}: {reason}" for reason, whats in kept.items())]


def _samples(provider: Provider) -> Iterator[tuple[str, Problem]]:
    """A problem of each kind that the provider declares, with the kind's name."""
    if "gemm" in provider.ops:
        yield from _gemms(provider)
    if "quantize" in provider.ops:
        yield from _quantizations(provider)
    if "moe" in provider.ops:
        yield from _moes(provider)


def _gemms(provider: Provider) -> Iterator[tuple[str, Problem]]:
    from fp4bench.formats import FORMATS
    from fp4bench.problems import MODES, GemmProblem

    for mode in (MODES[name] for name in MODES if name in provider.modes):
        formats: Iterable[Any] = _known_formats(provider, FORMATS) if mode.weights == "fp4" else (None,)
        for fmt in formats:
            for hadamard in (None, _HADAMARD) if mode.activations == "fp4" else (None,):
                name = " ".join(map(str, [mode, *([fmt] if fmt else []), *([f"had{hadamard}"] if hadamard else [])]))
                yield name, GemmProblem(_MODEL, _LAYER, _TP, _M, _N, _K, mode, fmt, hadamard)


def _quantizations(provider: Provider) -> Iterator[tuple[str, Problem]]:
    from fp4bench.formats import FORMATS
    from fp4bench.problems import QuantizeProblem

    for fmt in _known_formats(provider, FORMATS):
        for rule in provider.rules[fmt.name]:
            for hadamard in (None, _HADAMARD):
                name = f"quantize {fmt} {rule}" + (f" had{hadamard}" if hadamard else "")
                yield name, QuantizeProblem(_MODEL, _LAYER, _TP, _M, _K, fmt, rule, hadamard)


def _moes(provider: Provider) -> Iterator[tuple[str, Problem]]:
    from fp4bench.formats import FORMATS
    from fp4bench.models import get_model, rank_experts
    from fp4bench.problems import FP8_SCALINGS, MODES, MoeProblem
    from fp4bench.providers import modes_of

    model = get_model(_MOE_MODEL)
    experts = rank_experts(model, _MOE_TP)
    assert experts is not None
    sizes = (_MOE_TP, _M, model.hidden, experts.intermediate, experts.count, experts.topk)
    for mode in (MODES[name] for name in MODES if name in modes_of(provider, "moe")):
        formats: Iterable[Any] = _known_formats(provider, FORMATS) if mode.weights == "fp4" else (None,)
        scalings: Iterable[Any] = FP8_SCALINGS.values() if mode.weights == "fp8" else (None,)
        for fmt in formats:
            for scaling in scalings:
                name = " ".join(str(part) for part in ("moe", mode, fmt, scaling) if part)
                yield name, MoeProblem(_MOE_MODEL, "experts", *sizes, mode, fmt, fp8=scaling)


def _known_formats(provider: Provider, formats: dict[str, Any]) -> list[Any]:
    return [formats[name] for name in provider.rules if name in formats]
