"""Times of all providers over batch sizes, as `torch.utils.benchmark.Compare` prints them: a table a layer and routing.

The fastest of each column is marked with a `*`. A MoE layer stands there by CUDA graph and, where it was timed so too, as the
host launches it; the difference is what launching costs. Times of its phases follow where they are asked for.
"""

from collections.abc import Iterable, Sequence
from dataclasses import replace

from fp4bench.evidence.results import Answer, Result, Results, Shape
from fp4bench.evidence.tables import markdown_table


def lines(results: Results, phases: bool = False) -> list[str]:
    """The tables, as Markdown; times in microseconds. phases: with those of MoE layers."""
    found = [f"us, {results.caption()}", *(f"- {note}" for note in results.notes())]
    for op, shape, routing in _groups(results):
        here = [r for r in results.by_work.values() if _group(r) == (op, shape, routing)]
        title = f"{op} {results.named(shape)}, {shape}" + (f", {routing} routing" if routing else "")
        found += ["", f"**{title}**", "", *_table(here)]
        if phases and (parts := _phases(here)):
            found += ["", *parts]
    return found


def _groups(results: Results) -> list[tuple[str, Shape, str]]:
    return list(dict.fromkeys(map(_group, results.by_work.values())))


def _group(result: Result) -> tuple[str, Shape, str]:
    answer = result.work.answer
    return answer.op, result.work.shape, answer.routing


def _table(results: Sequence[Result]) -> list[str]:
    sizes = sorted({r.work.m for r in results})
    best = {m: min(r.seconds for r in results if r.work.m == m) for m in sizes}
    rows = []
    if hit := _hit(results, sizes):
        rows.append(["experts hit", "", *hit])
    for name, by_m in _by_name(results):
        marked = [f"{'* ' if by_m[m].seconds == best[m] else ''}{_us(by_m[m].seconds)}" if m in by_m else "" for m in sizes]
        rows.append([name, "graph" if _is_graph(by_m.values()) else "", *marked])
        for key, told in (("eager_seconds", "eager"), ("launch_seconds", "launching")):
            values = [by_m[m].value(key) if m in by_m else None for m in sizes]
            if any(value is not None for value in values):
                rows.append(["", told, *map(_us, values)])
    return markdown_table(["provider, mode", "", *(f"m = {m}" for m in sizes)], rows, left=2)


def _phases(results: Sequence[Result]) -> list[str]:
    """A row a phase of each provider that has some."""
    sizes = sorted({r.work.m for r in results})
    rows = []
    for name, by_m in _by_name(results):
        there = {m: r.record["phases"] for m, r in by_m.items() if r.record.get("phases")}
        for number, phase in enumerate(dict.fromkeys(phase for phases in there.values() for phase in phases)):
            rows.append([name if number == 0 else "", phase, *(_us(there.get(m, {}).get(phase)) for m in sizes)])
    return markdown_table(["provider, mode", "phase", *(f"m = {m}" for m in sizes)], rows, left=2) if rows else []


def _by_name(results: Sequence[Result]) -> list[tuple[str, dict[int, Result]]]:
    found: dict[tuple[str, Answer], dict[int, Result]] = {}
    for result in results:
        found.setdefault((result.work.provider, result.work.answer), {})[result.work.m] = result
    # The table's title names the operation, which a GEMM does not, and the routing.
    return [(f"{provider} {replace(answer, op='gemm', routing='')}", by_m) for (provider, answer), by_m in found.items()]


def _hit(results: Sequence[Result], sizes: Sequence[int]) -> list[str]:
    hit = {r.work.m: r.record.get("experts_hit") for r in results}
    return [str(hit[m]) for m in sizes] if all(hit[m] is not None for m in sizes) else []


def _is_graph(results: Iterable[Result]) -> bool:
    return all(str(r.record.get("clock")).startswith("cuda_graph") for r in results)


def _us(seconds: float | None) -> str:
    return "" if seconds is None else f"{seconds * 1e6:.2f}"
