"""The text of a kernel as instructions."""

import re
from dataclasses import dataclass


@dataclass(frozen=True)
class Instruction:
    """opcode: its parts between dots. operands: words, or tuples of words that stood in braces.

    predicate: the register that decides which threads execute it, where it is `wanted`; None: all.
    """

    opcode: tuple[str, ...]
    operands: tuple[str | tuple[str, ...], ...]
    predicate: str | None
    wanted: bool

    @property
    def type(self):
        return self.opcode[-1]


class Program:
    """The one kernel of a module: its instructions, how many threads a CTA has, names of parameters, where labels are, and
    tables of labels by name."""

    def __init__(self, text):
        text = re.sub(r"//.*", "", text)
        self.threads = int(re.search(r"\.reqntid (\d+)", text)[1])
        header, body = re.search(r"\.entry \w+\((.*?)\)\s*\.reqntid[^{]*\{(.*)", text, re.DOTALL).groups()
        self.parameters = re.findall(r"\w+_param_\d+", header)
        self.instructions, self.labels, self.tables = [], {}, {}
        body = re.sub(r"^\s*\.(loc|file|pragma|reg)\b.*$", "", body.partition("$L__func_end")[0], flags=re.MULTILINE)
        for statement in _statements(body):
            self._add(statement)

    @property
    def overlaps(self):
        """Whether it is written to begin while the kernel before still runs."""
        return any(one.opcode[0] == "griddepcontrol" for one in self.instructions)

    def _add(self, statement):
        name = None
        while label := re.match(r"(\$?\w+):(?!:)\s*", statement):
            name = label[1]
            self.labels[name] = len(self.instructions)
            statement = statement[label.end() :]
        if statement.startswith(".branchtargets"):
            self.tables[name] = re.findall(r"\$\w+", statement)
        if not statement or statement.startswith("."):
            return
        parsed = re.match(r"(?:@(!?[\w%]+)\s+)?([\w.:]+)\s*(.*)", statement, re.DOTALL)
        if parsed is None:
            raise NotImplementedError(statement)
        predicate, opcode, rest = parsed.groups()
        operands = tuple(
            tuple(re.findall(r"[^,{}\s]+", one)) if one.startswith("{") else one.strip()
            for one in re.findall(r"\{[^}]*\}|\[[^\]]*\]|[^,\s]+", rest)
        )
        wanted = not (predicate or "").startswith("!")
        self.instructions.append(
            Instruction(tuple(opcode.replace("::", "_").split(".")), operands, predicate and predicate.lstrip("!"), wanted)
        )


def _statements(body):
    """Without the braces around blocks of inline assembly, whose registers are written before they are read."""
    statement = ""
    for piece in re.split(r"([;{}])", body):
        if piece == ";" or (piece in ("{", "}") and re.fullmatch(r"\s*(\$?\w+:\s*)*", statement)):
            yield statement.strip()
            statement = ""
        else:
            statement += piece
