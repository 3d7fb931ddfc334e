"""TFLOP/s over batch sizes as PNG files: one a format and shape, with a panel for each mode and Hadamard size.

Both axes are logarithmic: at m = 1 a product reaches a hundredth of what it does at m = 4096, and both ends matter. That brings
providers close together, so below it stands, on a linear axis, how many times faster each is than BF16 in the same run.
Needs matplotlib, which is imported when a plot is drawn.
"""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from fp4bench.evidence.record import least_seconds
from fp4bench.evidence.results import Results, Shape
from fp4bench.evidence.throughput import Curve, curves, groups

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Twelve that stay apart on white, also for the colour-blind (Okabe and Ito's, then Tol's); eleven markers, so that a thirteenth
# provider still looks like no other.
_COLOURS = (
    *("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9"),
    *("#882255", "#117733", "#332288", "#999933", "#AA4499", "#661100"),
)
_MARKERS = "osD^vPX<>hp"
_YARDSTICKS = {"bf16": "#000000", "fp16": "#444444", "fp8": "#777777"}
# What a mode shares a panel with: the same operands, quantized before the timed region.
_SHARED = {"w4a4_noquant": "w4a4"}
_ROOF: dict[str, Any] = {"color": "#444444", "linestyle": ":", "linewidth": 1.4}
_COLUMNS = (3, 4)  # of a page that holds more panels than the first: the one that leaves the fewest places empty
_UPRIGHT = 8  # batch sizes that have room for their labels side by side
_LETTERS_AN_INCH = 11  # of a title of 11 points


@dataclass(frozen=True)
class Panel:
    """What is drawn in one pair of axes: curves of one mode (and of the one that shares its panel), and yardsticks."""

    title: str
    curves: tuple[Curve, ...]


def plot(results: Results, folder: Path) -> list[Path]:
    """Draw `bench_<format>_res_n<N>_k<K>.png` in a folder, for each format and shape; files of these names are replaced.

    Raises ResultsError where the runs timed no GEMM, ValueError without matplotlib and for what cannot be written.
    """
    results = results.of("gemm")
    pages = list(dict.fromkeys((group.format, group.shape) for group in groups(results)))
    figures = {_name(fmt, shape): draw(results, fmt, shape) for fmt, shape in pages}
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for name, figure in figures.items():
            figure.savefig(folder / name, dpi=130)
    except OSError as error:
        raise ValueError(f"cannot write plots to {folder}: {error.strerror}") from error
    return [folder / name for name in figures]


def _name(fmt: str | None, shape: Shape) -> str:
    return f"bench_{fmt or 'plain'}_res_n{shape.n}_k{shape.k}.png"


def panels(results: Results, fmt: str | None, shape: Shape) -> list[Panel]:
    """The panels of a format and a shape: those without rotation by mode, then the rotated ones by Hadamard size."""
    found = []
    for group in groups(results):
        if (group.format, group.shape) != (fmt, shape):
            continue
        there = curves(results, group)
        yardsticks = [curve for curve in there if curve.answer.plain]
        by_mode: dict[str, list[Curve]] = {}
        for curve in there:
            if not curve.answer.plain:
                by_mode.setdefault(_SHARED.get(curve.answer.mode, curve.answer.mode), []).append(curve)
        for mode, members in by_mode.items():
            rotation = f", Hadamard {group.hadamard}" if group.hadamard else ", no rotation" if mode in _SHARED.values() else ""
            found.append(Panel(f"{mode}{rotation}", (*yardsticks, *members)))
        if not by_mode:
            found.append(Panel("without FP4", tuple(yardsticks)))
    return found


def draw(results: Results, fmt: str | None, shape: Shape) -> Figure:
    """The plot of a format and a shape: of each panel TFLOP/s and, where BF16 was timed, how many times faster that is.

    Raises ValueError without matplotlib.
    """
    figure_class = _figure_class()
    shown = panels(results, fmt, shape)
    columns = _columns(len(shown))
    rows = -(-len(shown) // columns)
    draws = (_draw_rates, _draw_speedups) if _speedups(shown) else (_draw_rates,)
    figure: Figure = figure_class(figsize=(5.2 * columns + 2.4, (0.5 + 2.9 * len(draws)) * rows + 0.9), layout="constrained")
    figure.suptitle(_title(results, fmt, shape, int(_LETTERS_AN_INCH * figure.get_figwidth())), fontsize=11)
    grid = figure.subplots(len(draws) * rows, columns, squeeze=False, sharex=True)
    looks = _looks(results)
    for row, column in np.ndindex(rows, columns):
        i = row * columns + column
        for below, draw_axes in enumerate(draws):
            axes = grid[len(draws) * row + below, column]
            if i >= len(shown):
                axes.remove()
                continue
            axes.sharey(grid[below, 0])
            draw_axes(axes, shown[i], results, looks)
            last = below == len(draws) - 1 and i + columns >= len(shown)
            _label(axes, shown[i], first=column == 0, last=last)
        if i < len(shown):
            grid[len(draws) * row, column].set_title(shown[i].title, fontsize=10)
    _legend(figure, shown, results, looks)
    figure.align_ylabels(grid[:, 0])
    return figure


def _columns(panels: int) -> int:
    return panels if panels <= _COLUMNS[0] else min(_COLUMNS, key=lambda columns: -panels % columns)


def _figure_class() -> Any:
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ValueError("plots need matplotlib, which is not installed here: pip install matplotlib") from error
    return Figure


def _title(results: Results, fmt: str | None, shape: Shape, width: int) -> str:
    told = f"{fmt or 'without FP4'}, {shape} ({results.named(shape)})", f"{results.caption()}; band: 20th to 80th percentile"
    return "\n".join(line for text in told for line in textwrap.wrap(text, width))


def _looks(results: Results) -> dict[str, dict[str, Any]]:
    """Colour and marker of each provider, the same in all plots of these results."""
    return {
        provider: {"color": _COLOURS[i % len(_COLOURS)], "marker": _MARKERS[i % len(_MARKERS)], "markersize": 5}
        for i, provider in enumerate(results.providers)
    }


def _style(curve: Curve, looks: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """How a curve is drawn: yardsticks without a colour, activations that were quantized before with dashes."""
    style = looks[curve.provider] | {"linewidth": 1.6}
    if curve.answer.plain:
        return style | {"color": _YARDSTICKS.get(curve.answer.mode, "#777777"), "linewidth": 1.2}
    return style | ({"linestyle": "--", "markerfacecolor": "white"} if curve.answer.mode in _SHARED else {})


def _draw_rates(axes: Axes, panel: Panel, results: Results, looks: dict[str, dict[str, Any]]) -> None:
    for curve in panel.curves:
        middle, low, high = (
            [result.value(key) or np.nan for result in curve.by_m.values()] for key in ("tflops", "tflops_p20", "tflops_p80")
        )
        style = _style(curve, looks)
        axes.plot(list(curve.by_m), middle, **style)
        axes.fill_between(list(curve.by_m), low, high, color=style["color"], alpha=0.25, linewidth=0)
    for sizes, rates in _roofs(panel, results):
        axes.plot(sizes, rates, **_ROOF)
    axes.set_yscale("log")
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
    axes.set_ylabel("TFLOP/s")


def _draw_speedups(axes: Axes, panel: Panel, results: Results, looks: dict[str, dict[str, Any]]) -> None:
    for curve in panel.curves:
        axes.plot(list(curve.by_m), [r.value("speedup_vs_bf16") or np.nan for r in curve.by_m.values()], **_style(curve, looks))
    for sizes, rates in _roofs(panel, results):
        at = {m: rate / bf16 for m, rate in zip(sizes, rates, strict=True) if (bf16 := _bf16(panel).get(m))}
        axes.plot(list(at), list(at.values()), **_ROOF)
    axes.set_ylim(bottom=0)
    axes.set_ylabel("times faster than BF16")


def _bf16(panel: Panel) -> dict[int, float]:
    """TFLOP/s of the fastest BF16 by batch size."""
    found: dict[int, float] = {}
    for curve in panel.curves:
        if curve.answer.mode == "bf16":
            for m, result in curve.by_m.items():
                found[m] = max(found.get(m, 0.0), result.value("tflops") or 0.0)
    return found


def _speedups(shown: Sequence[Panel]) -> bool:
    everything = (result for panel in shown for curve in panel.curves for result in curve.by_m.values())
    return any(result.value("speedup_vs_bf16") is not None for result in everything)


def _label(axes: Axes, panel: Panel, first: bool, last: bool) -> None:
    """Batch sizes below the last axes of a column, words beside the first column, and a grid."""
    sizes = _apart(sorted({m for curve in panel.curves for m in curve.by_m}))
    axes.set_xscale("log", base=2)
    turned: dict[str, Any] = {"rotation": 45, "ha": "right", "rotation_mode": "anchor"} if len(sizes) > _UPRIGHT else {}
    axes.set_xticks(sizes, [str(m) for m in sizes], fontsize=8, **turned)
    axes.minorticks_off()
    axes.tick_params(labelbottom=last, labelleft=first)
    axes.grid(True, color="#dddddd", linewidth=0.6)
    if last:
        axes.set_xlabel("batch size m")
    if not first:
        axes.set_ylabel("")


def _apart(sizes: Sequence[int]) -> list[int]:
    """Batch sizes that can be labelled side by side: 24576 stands too close to 16384 and 32768."""
    powers = [m for m in sizes if m & (m - 1) == 0]
    return powers if len(powers) > 1 else list(sizes)


def _roofs(panel: Panel, results: Results) -> list[tuple[Any, list[float]]]:
    """Batch sizes and rates of the measured roof of each FP4 mode of a panel; of the yardsticks' where there is no FP4.

    Flops and bytes of a product are linear in m, so what they are between the batch sizes that were timed is known too, and a
    roof has its corner where it belongs.
    """
    fp4 = [curve for curve in panel.curves if not curve.answer.plain] or list(panel.curves)
    by_mode: dict[str, dict[int, Any]] = {}
    for curve in fp4:
        by_mode.setdefault(curve.answer.mode, {}).update({m: result.record for m, result in curve.by_m.items()})
    return [roof for mode, records in by_mode.items() if (roof := _roof(mode, records, results))]


def _roof(mode: str, records: dict[int, Any], results: Results) -> tuple[Any, list[float]] | None:
    sizes = sorted(records)
    dense = np.unique(np.concatenate([sizes, np.geomspace(sizes[0], sizes[-1], 200)]))
    flops, moved = (np.interp(dense, sizes, [records[m][key] for m in sizes]) for key in ("flops", "bytes"))
    at: list[dict[str, Any]] = [{"mode": mode, "flops": float(f), "bytes": float(b)} for f, b in zip(flops, moved, strict=True)]
    least = [least_seconds(record, results.ceilings) for record in at]
    if not all(least):
        return None
    return dense, [record["flops"] * 1e-12 / seconds for record, seconds in zip(at, least, strict=True) if seconds]


def _legend(figure: Figure, shown: Sequence[Panel], results: Results, looks: dict[str, dict[str, Any]]) -> None:
    """One for all panels, beside them, so that it covers nothing."""
    from matplotlib.lines import Line2D

    drawn = [curve for panel in shown for curve in panel.curves]
    plain = dict.fromkeys((curve.provider, curve.answer.mode) for curve in drawn if curve.answer.plain)
    providers = dict.fromkeys(curve.provider for curve in drawn if not curve.answer.plain)
    handles = [
        Line2D([], [], label=f"{provider} {mode}", **looks[provider] | {"color": _YARDSTICKS.get(mode, "#777777")})
        for provider, mode in plain
    ]
    handles += [Line2D([], [], label=provider, **looks[provider]) for provider in sorted(providers)]
    if any(curve.answer.mode in _SHARED for curve in drawn):
        handles.append(Line2D([], [], label="dashed: quantized before", color="#444444", linestyle="--"))
    if any(_roofs(panel, results) for panel in shown):
        handles.append(Line2D([], [], label="measured roof", **_ROOF))
    figure.legend(handles=handles, loc="outside right center", fontsize=9, frameon=False)
