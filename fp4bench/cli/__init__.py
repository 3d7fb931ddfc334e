"""`fp4bench`: what is done beside timing. One file a command."""

import argparse
import sys
from collections.abc import Sequence
from importlib import import_module

_COMMANDS = ("machine", "providers", "accept", "report", "drill", "ab")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command. Returns its exit code: 2 for bad input, which gets one sentence."""
    parser = argparse.ArgumentParser(prog="fp4bench", description="Beside `pytest perf --benchmark-compare`.")
    commands = parser.add_subparsers(metavar="COMMAND", required=True)
    for name in _COMMANDS:
        import_module(f"fp4bench.cli.{name}").add_parser(commands)
    asked = parser.parse_args(arguments)
    try:
        return int(asked.run(asked))
    except ValueError as error:
        sys.stderr.write(f"fp4bench: error: {error}\n")
        return 2
