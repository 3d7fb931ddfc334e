"""`fp4bench`: what is done beside timing. One file a command."""

import argparse
import sys
from collections.abc import Sequence
from importlib import import_module

COMMANDS = ("machine", "providers", "accept", "report", "drill", "do-bench", "ab", "tune")


def parser() -> argparse.ArgumentParser:
    """The parser of all commands."""
    made = argparse.ArgumentParser(prog="fp4bench", description="Beside `pytest perf --benchmark-compare`.")
    commands = made.add_subparsers(metavar="COMMAND", required=True)
    for name in COMMANDS:
        import_module(f"fp4bench.cli.{name.replace('-', '_')}").add_parser(commands)
    return made


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command. Returns its exit code: 2 for bad input, which gets one sentence."""
    asked = parser().parse_args(arguments)
    try:
        return int(asked.run(asked))
    except ValueError as error:
        sys.stderr.write(f"fp4bench: error: {error}\n")
        return 2
    except KeyboardInterrupt:
        return 130  # as shells call it; commands told what they had
