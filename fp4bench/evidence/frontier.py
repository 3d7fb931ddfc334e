"""Who is fastest: for each layer and batch size the fastest provider that was right, as tables and as a dispatch table.

Records hold only right outputs, each within the bound of its own mode. What may compete with what:

- Within an answer (format, mode, Hadamard size): the operands are the same but for a provider's scale rule, so providers may
  stand in for each other.
- In the pool `any` of a format: all of its modes and rotations, and BF16 and FP8. They differ in accuracy, so the error stands
  beside them. It is that of the arithmetic against float64 on the operands as the mode quantizes them; what that quantization
  costs a model is not in it, and is the user's to judge. Left out are w4a4_noquant, as its time lacks the quantization of the
  activations, and fp16 and w4a16_fp16, which answer in float16 where all others answer in bfloat16.

MoE layers have pools of their own, a routing apart from another.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cmp_to_key
from math import isqrt
from typing import Any

from fp4bench.evidence.baselines import card_of
from fp4bench.evidence.report import duration
from fp4bench.evidence.results import Answer, Ratio, Result, Results, Shape, ratio
from fp4bench.evidence.tables import markdown_table

# The format of the JSON file. 1 - first version
SCHEMA = 1

_OPS = ("gemm", "moe")
_APART = ("w4a4_noquant", "w4a16_fp16", "fp16")


@dataclass(frozen=True)
class Pool:
    """Who competes: providers of one answer, or (`answer` None) of everything that a format's layer can be computed by.

    op, routing: of all of its answers; a GEMM has no routing.
    """

    format: str
    answer: Answer | None = None
    op: str = "gemm"
    routing: str = ""

    def __str__(self) -> str:
        if self.answer:
            return str(self.answer)
        parts = [] if self.op == "gemm" else [self.op]
        return " ".join([*parts, self.format, "any", *([self.routing] if self.routing else [])])

    def holds(self, answer: Answer) -> bool:
        if self.answer:
            return answer == self.answer
        of_format = answer.plain or answer.format == self.format
        return of_format and answer.mode not in _APART and (answer.op, answer.routing) == (self.op, self.routing)


@dataclass(frozen=True, eq=False)
class Best:
    """The fastest of a pool at one shape and batch size, the next of another provider or answer, and how far that is behind."""

    result: Result
    second: Result | None = None

    @property
    def lead(self) -> Ratio | None:
        return ratio(self.second, self.result) if self.second else None


def pools(results: Results) -> list[Pool]:
    """Those of single answers, then those of whole formats. BF16 and FP8 have one of their own where several compute them."""
    single = [a for a in results.answers if not a.plain or len({r.work.provider for r in results.where(answer=a)}) > 1]
    fp4 = dict.fromkeys((answer.format, answer.op, answer.routing) for answer in results.answers if not answer.plain)
    whole = [Pool(fmt, None, op, routing) for fmt, op, routing in fp4]
    return [*(Pool(answer.format, answer, answer.op, answer.routing) for answer in single), *whole]


def best(results: Results, pool: Pool) -> list[Best]:
    """By shape, then batch size."""
    places: dict[tuple[Shape, int], list[Result]] = {}
    for work, result in results.by_work.items():
        if pool.holds(work.answer):
            places.setdefault((work.shape, work.m), []).append(result)
    shapes = list(results.layers)
    return [_best(places[at]) for at in sorted(places, key=lambda at: (shapes.index(at[0]), at[1]))]


def _best(there: Sequence[Result]) -> Best:
    # By pairs, not by seconds: in runs of two cards the faster card's provider is not the faster one.
    first, *others = sorted(there, key=cmp_to_key(_slower))
    return Best(first, others[0] if others else None)


def _slower(a: Result, b: Result) -> int:
    return 1 if ratio(a, b).value > 1 else -1


def lines(results: Results) -> list[str]:
    """Markdown: a table for each pool. Raises ResultsError where the runs timed neither a GEMM nor a MoE layer."""
    results = results.of(*_OPS)
    found = [f"The fastest right providers, {results.caption()}", *(f"- {note}" for note in results.notes())]
    for pool in pools(results):
        found += ["", f"### {pool}", "", *_table(results, pool)]
    return found


def _table(results: Results, pool: Pool) -> list[str]:
    head = [
        "layer",
        "fastest",
        "m",
        "time",
        f"over {pool.answer.yardstick.upper() if pool.answer else 'BF16'}",
        "the next",
        "is behind by",
        "error",
    ]
    return markdown_table(head, [_row(results, pool, found) for found in best(results, pool)], left=2)


def _row(results: Results, pool: Pool, found: Best) -> list[str]:
    work, speedup, error = found.result.work, results.speedup(found.result), found.result.value("error")
    return [
        results.label(work.shape),
        _named(found.result, pool),
        str(work.m),
        duration(found.result.seconds),
        f"{speedup:.2f}x" if speedup else "",
        _named(found.second, pool) if found.second else "nobody",
        str(found.lead) if found.lead else "",
        "" if error is None else f"{error:.1e}",
    ]


def _named(result: Result, pool: Pool) -> str:
    return result.work.provider if pool.answer else f"{result.work.provider} {result.work.answer}"


def as_json(results: Results) -> dict[str, Any]:
    """The frontier as a table that a serving engine can dispatch by.

    schema: 1; another number means that this description does not hold.
    machine: machine, gpu, compute_capability, driver, cuda, torch, triton, as the newest run says, None where it does not.
    timing: pace and l2 ("cold" or "warm"). runs: name, datetime and card of each run.
    providers: version by name, of those that are fastest anywhere.
    tables: one a pool. `pool` is its name; `format` (None: of BF16 or FP8 alone), `mode` and `hadamard` are what it holds,
    `mode` being None for all modes of the format together, with BF16 and FP8. `layers` is one a shape: n, k, names and
    `ranges`. A range holds for m_min <= m <= m_max, and names provider, mode, hadamard and scale_rule of the fastest, with
    `measured`: m, seconds, speedup_vs_bf16 (within one run, or None), error, and `second`: None, or who is next, as above, with
    `ratio`, its seconds over those of the fastest, and `same_run`.
    Tables of MoE layers also have `op`, "moe", and `routing`, and their layers `experts`: how many there are and how many a
    token has; n is then the intermediate size and k the hidden one.
    Ranges of one layer touch: between two batch sizes that were timed they meet at the geometric mean. Nothing was measured
    below the first and above the last.
    Raises ResultsError where the runs timed neither a GEMM nor a MoE layer.
    """
    results = results.of(*_OPS)
    tables = [_json_of_pool(results, pool) for pool in pools(results)]
    fastest = {at["provider"] for table in tables for layer in table["layers"] for at in layer["ranges"]}
    facts = ("machine", "gpu", "compute_capability", "driver", "cuda", "torch", "triton")
    return {
        "schema": SCHEMA,
        "machine": {key: results.machine.get(key) for key in facts},
        "timing": results.timing,
        "runs": [{"name": run.name, "datetime": run.datetime, "card": card_of(run.session)} for run in results.runs],
        "providers": {
            work.provider: result.record.get("provider_version")
            for work, result in results.by_work.items()
            if work.provider in fastest
        },
        "tables": tables,
    }


def _json_of_pool(results: Results, pool: Pool) -> dict[str, Any]:
    by_shape: dict[Shape, list[Best]] = {}
    for found in best(results, pool):
        by_shape.setdefault(found.result.work.shape, []).append(found)
    return {
        "pool": str(pool),
        "format": None if pool.answer and pool.answer.plain else pool.format,
        "mode": pool.answer.mode if pool.answer else None,
        "hadamard": pool.answer.hadamard if pool.answer else None,
        **({"op": pool.op, "routing": pool.routing or "uniform"} if pool.op == "moe" else {}),
        "layers": [
            {
                "n": shape.n,
                "k": shape.k,
                **_experts(shape),
                "names": list(results.layers[shape]),
                "ranges": list(_ranges(found)),
            }
            for shape, found in by_shape.items()
        ],
    }


def _experts(shape: Shape) -> dict[str, list[int]]:
    return {"experts": list(shape.experts)} if shape.experts else {}


def _ranges(found: Sequence[Best]) -> Iterator[dict[str, Any]]:
    """Neighbouring batch sizes of one winner as one range."""
    stretches: list[list[Best]] = []
    for one in found:
        if stretches and _same(stretches[-1][-1], one):
            stretches[-1].append(one)
        else:
            stretches.append([one])
    start = found[0].result.work.m
    for i, stretch in enumerate(stretches):
        last = stretch[-1].result.work.m
        end = isqrt(last * stretches[i + 1][0].result.work.m) if i + 1 < len(stretches) else last
        yield {"m_min": start, "m_max": end, **_who(stretch[0].result), "measured": [_measured(one) for one in stretch]}
        start = end + 1


def _same(a: Best, b: Best) -> bool:
    return (a.result.work.provider, a.result.work.answer) == (b.result.work.provider, b.result.work.answer)


def _who(result: Result) -> dict[str, Any]:
    work = result.work
    told = {"provider": work.provider, "mode": work.answer.mode, "hadamard": work.answer.hadamard}
    return told | {"scale_rule": result.record.get("scale_rule")}


def _measured(found: Best) -> dict[str, Any]:
    result, second, lead = found.result, found.second, found.lead
    return {
        "m": result.work.m,
        "seconds": result.seconds,
        "speedup_vs_bf16": result.value("speedup_vs_bf16"),
        "error": result.value("error"),
        "second": _who(second) | {"ratio": lead.value, "same_run": lead.same_run} if second and lead else None,
    }
