"""Who was fastest on a machine, a line for each format and mode: what a run measured, and how far that is from BF16."""

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass

from fp4bench.evidence.frontier import best, pools
from fp4bench.evidence.results import Results


@dataclass(frozen=True)
class Fastest:
    """Of an answer, such as "mxfp4 w4a16", in one or several runs.

    provider, version: who was fastest most often, in `cells` of `of` layers and batch sizes, at m from `m_least` to `m_most`.
    least, most: how many times as fast as BF16 it was in these, over BF16 of the same run.
    """

    answer: str
    provider: str
    version: str | None
    cells: int
    of: int
    m_least: int
    m_most: int
    least: float
    most: float

    def __str__(self) -> str:
        return (
            f"{self.provider} {self.version or ''}".rstrip()
            + f", {self.least:.2f}x to {self.most:.2f}x BF16 in {self.cells} of {self.of} layers and batch sizes "
            f"(m = {self.m_least} to {self.m_most})"
        )


def fastest(results: Results) -> Iterator[Fastest]:
    """Of every answer with FP4 that was timed beside BF16."""
    for pool in pools(results):
        if pool.answer is None or pool.answer.plain:
            continue
        found = [entry.result for entry in best(results, pool) if entry.result.value("speedup_vs_bf16") is not None]
        if not found:
            continue
        provider, cells = Counter(result.work.provider for result in found).most_common(1)[0]
        own = [result for result in found if result.work.provider == provider]
        speedups = sorted(result.value("speedup_vs_bf16") or 0.0 for result in own)
        sizes = sorted(result.work.m for result in own)
        version = own[-1].record.get("provider_version")
        yield Fastest(str(pool.answer), provider, version, cells, len(found), sizes[0], sizes[-1], speedups[0], speedups[-1])
