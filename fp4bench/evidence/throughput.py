"""TFLOP/s of every provider over batch sizes: tables, and rows for a CSV file. The plots of the same are in plots.py.

A table is what the GEMM benchmarks of vLLM print (benchmarks/kernels/bench_mxfp4_qutlass.py, bench_nvfp4_qutlass.py): one a
format, shape and Hadamard size, providers by row, batch sizes by column, medians with the 20th and the 80th percentile.
"""

import csv
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fp4bench.evidence.record import least_seconds
from fp4bench.evidence.results import Answer, Result, Results, Shape
from fp4bench.evidence.tables import markdown_table

# Of a rate's percentile, `tflops_p20` is reached or beaten by 80 % of the samples, as in `make_record`.
PERCENTILES = (("50 %", "tflops"), ("20 %", "tflops_p20"), ("80 %", "tflops_p80"))

COLUMNS = (
    *("machine", "gpu", "format", "n", "k", "layers", "hadamard", "provider", "provider_version", "mode", "scale_rule", "m"),
    *("tflops", "tflops_p20", "tflops_p80", "roof_tflops", "seconds", "gbps", "roofline_fraction", "speedup_vs_bf16"),
    *("error", "exact", "clock", "l2", "pace", "readings"),
)


@dataclass(frozen=True)
class Group:
    """What stands in one table: a format (None: nothing is FP4), a shape and a Hadamard size, and what is timed without FP4."""

    format: str | None
    shape: Shape
    hadamard: int | None

    def __str__(self) -> str:
        rotation = f"Hadamard {self.hadamard}" if self.hadamard else "no rotation"
        return f"{self.format}, {self.shape}, {rotation}" if self.format else str(self.shape)

    def holds(self, answer: Answer) -> bool:
        return answer.plain or (answer.format == self.format and answer.hadamard == self.hadamard)


def groups(results: Results) -> list[Group]:
    """The tables of these results, by format, shape and Hadamard size; none only of yardsticks where a shape has FP4."""
    shapes = dict.fromkeys(work.shape for work in results.by_work)
    found = []
    for shape in shapes:
        fp4 = {work.answer for work in results.by_work if work.shape == shape and not work.answer.plain}
        keys = sorted({(answer.format, answer.hadamard or 0) for answer in fp4})
        found += [Group(fmt, shape, hadamard or None) for fmt, hadamard in keys] or [Group(None, shape, None)]
    return sorted(found, key=lambda group: group.format or "")


def lines(results: Results) -> list[str]:
    """The tables, as Markdown. Raises ResultsError where the runs timed no GEMM."""
    results = results.of("gemm")
    found = [f"TFLOP/s, {results.caption()}", *(f"- {note}" for note in results.notes())]
    for group in groups(results):
        found += ["", f"### {group} ({results.named(group.shape)})", "", *_table(results, group)]
    return found


def _table(results: Results, group: Group) -> list[str]:
    series = curves(results, group)
    sizes = sorted({m for curve in series for m in curve.by_m})
    rows = []
    for curve in series:
        for percentile, key in PERCENTILES:
            name = f"{curve.provider} {curve.answer.mode}" if key == "tflops" else ""
            rows.append([name, percentile, *(_rate(curve.by_m.get(m), key) for m in sizes)])
    return markdown_table(["provider, mode", "percentile", *map(str, sizes)], rows, left=2)


@dataclass(frozen=True, eq=False)
class Curve:
    """Results of a provider and an answer by batch size, ascending."""

    provider: str
    answer: Answer
    by_m: dict[int, Result]


def curves(results: Results, group: Group) -> list[Curve]:
    """What a group holds, yardsticks first."""
    found = []
    for answer in filter(group.holds, results.answers):
        for provider in results.providers:
            there = results.where(answer=answer, provider=provider, shape=group.shape)
            if there:
                found.append(Curve(provider, answer, {r.work.m: r for r in sorted(there, key=lambda r: r.work.m)}))
    return found


def roof_tflops(results: Results, result: Result) -> float | None:
    """The rate that this machine's measured ceilings allow: of its tensor cores, or of a copy of the bytes that must move."""
    least = least_seconds(result.record, results.ceilings)
    return result.record["flops"] * 1e-12 / least if least else None


def _rate(result: Result | None, key: str) -> str:
    value = result.value(key) if result else None
    return "" if value is None else f"{value:.4g}" if value < 100 else f"{value:.1f}"


def write_csv(results: Results, path: Path) -> None:
    """A new file with a row of `COLUMNS` for every GEMM: seconds, other units in the names, empty where unknown.

    Raises ResultsError where the runs timed no GEMM, ValueError where the file exists or cannot be written.
    """
    try:
        with path.open("x", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, COLUMNS)
            writer.writeheader()
            writer.writerows(rows(results.of("gemm")))
    except FileExistsError as error:
        raise ValueError(f"{path} exists: name a new file for --csv") from error
    except OSError as error:
        raise ValueError(f"cannot write {path}: {error.strerror}") from error


def rows(results: Results) -> Iterator[dict[str, Any]]:
    """The rows of the CSV file."""
    for work, result in results.by_work.items():
        told = {key: result.record.get(key) for key in ("provider_version", "scale_rule", "exact", "clock", "l2", "pace")}
        measured: Sequence[str] = (
            "tflops",
            "tflops_p20",
            "tflops_p80",
            "gbps",
            "roofline_fraction",
            "speedup_vs_bf16",
            "error",
        )
        yield {
            "machine": results.machine["machine"],
            "gpu": results.gpu,
            "format": work.answer.format,
            "n": work.shape.n,
            "k": work.shape.k,
            "layers": results.named(work.shape),
            "hadamard": work.answer.hadamard,
            "provider": work.provider,
            "mode": work.answer.mode,
            "m": work.m,
            "roof_tflops": roof_tflops(results, result),
            "seconds": result.seconds,
            "readings": len(result.readings),
            **told,
            **{key: result.value(key) for key in measured},
        }
