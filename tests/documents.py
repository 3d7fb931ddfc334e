"""README and the account of the records: their tables are made of committed files. `python tests/documents.py` makes them anew.

A table stands between a comment that says what it is of and `<!-- end -->`:

    <!-- kernels WORDS -->     what `fp4bench report --kernels WORDS` prints; `compare` likewise
    <!-- runs MACHINE -->      what `fp4bench report --machine MACHINE` prints, without its heading
    <!-- spread MACHINE -->    the first table that it prints with --spread; `MACHINE --cards UUID ...` with that too
    <!-- cards MACHINE -->     and the second, card by card

` | ROW ...` behind the words leaves only the rows that one of these names in its first two cells. Paths in WORDS are from the
repository's root, where all this is to be run.
"""

import os
import re
import shlex
import sys
from pathlib import Path

from fp4bench import cli
from fp4bench.cli import report as cli_report
from fp4bench.evidence import repeats
from fp4bench.evidence.report import accepted_runs

ROOT = Path(__file__).parent.parent
DOCUMENTS = (ROOT / "README.md", ROOT / "baselines" / "README.md")

_COMMENT = re.compile(r"<!-- (?!end )(\w+) (.+?) -->\n")
_BLOCK = re.compile(rf"({_COMMENT.pattern})(.*?)(<!-- end -->)", re.DOTALL)


def made_anew(text):
    """A document with every table as it is made now. Raises ValueError for a comment without its end."""
    if len(_COMMENT.findall(text)) != len(_BLOCK.findall(text)):
        raise ValueError("a table without its <!-- end -->")
    return _BLOCK.sub(lambda block: f"{block[1]}{_made(block[2], block[3])}{block[5]}", text)


def stale(text):
    """The comments whose tables are not what is made now. Raises ValueError as `made_anew`."""
    pairs = zip(_BLOCK.findall(text), _BLOCK.findall(made_anew(text)), strict=True)
    return [f"{kind} {words}" for (_, kind, words, shown, _), (*_, made, _) in pairs if shown != made]


def table(kind, words):
    """The lines of a table, as the comment `kind words` asks for them."""
    asked, _, rows = words.partition(" | ")
    lines = _lines(kind, *shlex.split(asked))
    return _only(set(rows.split()), lines) if rows else lines


def _made(kind, words):
    return "".join(f"{line}\n" for line in table(kind, words))


def _lines(kind, first, *others):
    if kind in ("kernels", "compare"):
        return cli_report.lines(cli.parser().parse_args(["report", f"--{kind}", first, *others]))
    (baseline,) = cli_report.baselines(cli.parser().parse_args(["report", "--spread", "--machine", first, *others]))
    if kind == "runs":
        return accepted_runs(baseline)
    if kind == "cards":
        return repeats.by_card(baseline)
    assert kind == "spread", kind
    return [line for line in repeats.spread(baseline) if line.startswith("|")]


def _only(names, lines):
    """Without the rows that none of these names; a table's head and rule stay. Raises ValueError for a name of no row."""
    kept, row, seen = [], 0, set()
    for line in lines:
        row = row + 1 if line.startswith("|") else 0
        named = names & set(re.findall(r"\w+", " ".join(line.split("|")[1:3])))
        if row < 3 or named:
            kept.append(line)
            seen |= named
    if names - seen:
        raise ValueError(f"no row of the table is named {', '.join(sorted(names - seen))}")
    return kept


if __name__ == "__main__":
    os.chdir(ROOT)
    for path in DOCUMENTS:
        before = path.read_text(encoding="utf-8")
        for each in stale(before):
            sys.stdout.write(f"{path.relative_to(ROOT)}: {each}\n")
        path.write_text(made_anew(before), encoding="utf-8")
