"""Pytest sessions as child processes of a command, and what such commands share."""

import argparse
import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

COMMAND = (sys.executable, "-m", "pytest", "perf")
RETRIES = 2  # of a session that was INVALID
# pytest's exit codes: passed, tests failed (a case's error, or a regression), and fp4bench's own for a run in bad conditions.
EXPECTED = (0, 1, 6)
_QUOTED_LINES = 15


def run_session(
    command: Sequence[str], folder: Path | None = None, environment: Mapping[str, str] | None = None
) -> tuple[int, str]:
    """Run to its end: the exit code, and what was written to stdout and stderr. The process ends with us, however we end."""
    with tempfile.TemporaryFile() as output:
        child = subprocess.Popen(
            command, cwd=folder, env=environment, stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT
        )
        try:
            code = child.wait()
        except BaseException as error:
            # Ctrl-C in a terminal reached pytest too, which then stores what it has; everything else reached us alone.
            if not isinstance(error, KeyboardInterrupt):
                child.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                child.wait(timeout=10)
            child.kill()
            child.wait()
            raise
        output.seek(0)
        return code, output.read().decode(errors="replace")


def stopped(code: int, output: str, what: str = "") -> str:
    """The message for a session that ended as none should: its exit code, and its last lines."""
    ended = f"was ended by signal {-code}" if code < 0 else f"ended with exit code {code}"
    lines = "\n".join(f"    {line}" for line in output.splitlines()[-_QUOTED_LINES:])
    return f"the pytest session {ended}{f' and {what}' if what else ''}; its last lines:\n{lines or '    (none)'}"


@contextlib.contextmanager
def ended_by_sigterm() -> Iterator[None]:
    """SIGTERM, as a cancelled CI job sends it, unwinds the stack, so that what was started is ended and removed."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


class Report:
    """A JSON file that always holds everything found so far. Never an existing one: FileExistsError becomes ValueError."""

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            path.open("x").close()
        except FileExistsError as error:
            raise ValueError(f"{path} exists: name a new file for --json") from error
        except OSError as error:
            raise ValueError(f"cannot write {path}: {error.strerror}") from error

    def write(self, content: Mapping[str, Any]) -> None:
        partial = self.path.with_name(f".{self.path.name}.{os.getpid()}")
        try:
            partial.write_text(json.dumps(content, indent=1, allow_nan=False) + "\n", encoding="utf-8")
            partial.replace(self.path)
        except OSError as error:
            partial.unlink(missing_ok=True)
            raise ValueError(f"cannot write {self.path}: {error.strerror}") from error


def takes_pytest_args(parser: argparse.ArgumentParser) -> None:
    """Let `pytest_args` be what follows the first `--`.

    argparse itself refuses them where an option stands between positional arguments and the `--`.
    """
    parse = parser.parse_known_args

    def split(args: Any = None, namespace: Any = None) -> Any:
        words = list(args)
        at = words.index("--") if "--" in words else len(words)
        known, unknown = parse(words[:at], namespace)
        known.pytest_args = words[at + 1 :]
        return known, unknown

    parser.parse_known_args = split  # type: ignore[method-assign]


def say(*lines: str) -> None:
    """Lines for the terminal, or a CI log, at once."""
    sys.stdout.write("".join(f"{line}\n" for line in lines))
    sys.stdout.flush()


def count(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text} is not a count of 1 or more")
    return value
