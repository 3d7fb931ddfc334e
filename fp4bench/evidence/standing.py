"""How one provider's kernels stand: beside BF16, the measured roof and the best of the others, as Markdown for a README."""

from fp4bench.evidence.report import duration
from fp4bench.evidence.results import Answer, Result, Results, ResultsError, ratio
from fp4bench.evidence.tables import markdown_table

_HEAD = ("layer", "m", "time", "over {}", "of the roof", "best peer", "its time", "over it")


def lines(results: Results, provider: str) -> list[str]:
    """A table for each answer that a provider gives, with a row for each layer and batch size.

    over BF16: the fastest BF16 of the same run over this; it is FP16 where the answer is in float16. of the roof: the least
    time that the run's measured ceilings allow, over this. best peer: the fastest other provider of the same format, mode and
    rotation, and its time over this one's.
    Raises ResultsError where the runs hold nothing of the provider.
    """
    answers = [answer for answer in results.answers if results.where(answer=answer, provider=provider)]
    if not answers:
        known = ", ".join(results.providers)
        raise ResultsError(f"there is nothing by {provider} in what was asked for, only by {known}: name one with --provider")
    found = [f"{provider} {_version(results, provider)}, {results.caption()}", *(f"- {note}" for note in results.notes())]
    for answer in answers:
        head = [name.format(answer.yardstick.upper()) for name in _HEAD]
        found += ["", f"**{answer}**", "", *markdown_table(head, _rows(results, answer, provider))]
    return found


def _version(results: Results, provider: str) -> str:
    return ", ".join(dict.fromkeys(str(result.record.get("provider_version")) for result in results.where(provider=provider)))


def _rows(results: Results, answer: Answer, provider: str) -> list[list[str]]:
    shapes = list(results.layers)
    ours = results.where(answer=answer, provider=provider)
    ours.sort(key=lambda result: (shapes.index(result.work.shape), result.work.m))
    return [_row(results, one) for one in ours]


def _row(results: Results, ours: Result) -> list[str]:
    work, speedup, roof = ours.work, results.speedup(ours), ours.value("roofline_fraction")
    peers = [r for r in results.where(answer=work.answer, shape=work.shape, m=work.m) if r.work.provider != work.provider]
    peer = min(peers, key=lambda result: ratio(result, ours).value, default=None)
    return [
        results.label(work.shape),
        str(work.m),
        duration(ours.seconds),
        f"{speedup:.2f}x" if speedup else "",
        f"{roof:.0%}" if roof else "",
        peer.work.provider if peer else "nobody",
        duration(peer.seconds) if peer else "",
        str(ratio(peer, ours)) if peer else "",
    ]
