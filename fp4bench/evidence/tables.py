"""Markdown that is also read as it is, in a terminal."""

from collections.abc import Iterable, Sequence


def markdown_table(head: Sequence[str], rows: Iterable[Sequence[str]], left: int = 1) -> list[str]:
    """A Markdown table whose columns also stand in line where Markdown is read as it is. The first `left` are flush left."""
    everything = [tuple(head), *map(tuple, rows)]
    widths = [max(3, *(len(row[i]) for row in everything)) for i in range(len(head))]

    def line(cells: Sequence[str]) -> str:
        padded = [cell.ljust(w) if i < left else cell.rjust(w) for i, (cell, w) in enumerate(zip(cells, widths, strict=True))]
        return f"| {' | '.join(padded)} |"

    rule = [f"{'-' * width}" if i < left else f"{'-' * (width - 1)}:" for i, width in enumerate(widths)]
    return [line(everything[0]), f"| {' | '.join(rule)} |", *map(line, everything[1:])]
