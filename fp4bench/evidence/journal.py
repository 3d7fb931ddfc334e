"""Finished cases on the disk as they finish, so that a run that is cut off can go on where it was."""

import fcntl
import json
import os
from contextlib import suppress
from datetime import datetime, timezone
from itertools import count
from pathlib import Path
from types import TracebackType
from typing import Any

from fp4bench.evidence.storage import sync_folder

KEPT_DAYS = 30.0  # of a run that was cut off and never resumed


class JournalError(OSError, ValueError):
    """A journal that cannot be written or read. One sentence: which file, what, what to do."""


class Journal:
    """A file that grows by a line a finished case. While it is open, no other process can take it over.

    The first line is the header. header["key"], a JSON object, says what must agree for a run to go on with this journal.
    """

    def __init__(self, path: Path, descriptor: int) -> None:
        self.path = path
        self._descriptor: int | None = descriptor
        self._size = os.fstat(descriptor).st_size  # of whole lines

    @classmethod
    def create(cls, folder: Path, header: dict[str, Any]) -> "Journal":
        """A new journal. Raises JournalError where it cannot be written, and ValueError for a header that has no key."""
        _key(header)
        line = _line(header)
        started = datetime.now(timezone.utc).strftime("%Y%m%dT%H%M%S")
        try:
            folder.mkdir(parents=True, exist_ok=True)
            path, descriptor = _open_new(folder, f"{started}-{os.getpid()}")
        except OSError as error:
            raise JournalError(_cannot_write(folder, error)) from error
        _lock(path, descriptor)
        journal = cls(path, descriptor)
        try:
            journal._write(line)
        except JournalError:
            journal.discard()
            raise
        sync_folder(folder)
        return journal

    @classmethod
    def reopen(cls, path: Path) -> "Journal":
        """Go on with a journal that was cut off. Raises JournalError where another run holds it or it cannot be written."""
        try:
            descriptor = os.open(path, os.O_RDWR | os.O_APPEND)
        except OSError as error:
            raise JournalError(_cannot_write(path, error)) from error
        _lock(path, descriptor)
        journal = cls(path, descriptor)
        try:
            journal._size = path.read_bytes().rfind(b"\n") + 1
            journal._drop_half_line()
        except OSError as error:
            journal.close()
            raise JournalError(_cannot_write(path, error)) from error
        return journal

    def append(self, entry: dict[str, Any]) -> None:
        """Add a line; it is on the disk when this returns. Raises JournalError, and then the journal is as it was before.

        Raises ValueError for an entry that JSON does not know, such as NaN.
        """
        self._write(_line(entry))

    def discard(self) -> None:
        """Remove the file: the run is stored elsewhere."""
        with suppress(FileNotFoundError):
            self.path.unlink()
        self.close()

    def close(self) -> None:
        """Let others take the journal over. May be repeated."""
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None

    def __enter__(self) -> "Journal":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def _write(self, line: bytes) -> None:
        if self._descriptor is None:
            raise JournalError(f"the journal {self.path} is closed")
        try:
            self._drop_half_line()
            left = line
            while left:
                left = left[os.write(self._descriptor, left) :]
            os.fsync(self._descriptor)
        except OSError as error:
            with suppress(OSError):  # then the next append tries again
                self._drop_half_line()
            raise JournalError(_cannot_write(self.path, error)) from error
        self._size += len(line)

    def _drop_half_line(self) -> None:
        """Cut what follows the last whole line: the next one would become a part of it."""
        assert self._descriptor is not None
        if os.fstat(self._descriptor).st_size > self._size:
            os.ftruncate(self._descriptor, self._size)


def read(path: Path) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """The header and the entries. A last line that was cut off is left out: its case had not finished.

    Raises JournalError for an unreadable file, one without a header, and a line in it that is damaged.
    """
    try:
        lines = path.read_bytes().split(b"\n")[:-1]
    except OSError as error:
        raise JournalError(f"cannot read the journal {path}: {error.strerror}") from error
    if not lines:
        raise JournalError(f"the journal {path} has no header: remove it")
    header, *entries = (_parsed(path, number, line) for number, line in enumerate(lines, 1))
    return header, entries


def resumable(folder: Path, header: dict[str, Any]) -> Path | None:
    """The newest journal of this key with a finished case that no living process holds, or None.

    Raises JournalError for a damaged journal of this key.
    """
    wanted = json.loads(_line(_key(header)))
    for path in sorted(folder.glob("*.jsonl"), reverse=True):
        if _key_of_file(path) == wanted and not _held(path) and read(path)[1]:
            return path
    return None


def forget_old(folder: Path, now: float, days: float = KEPT_DAYS) -> list[Path]:
    """Remove journals that were last written so many days before `now` (Unix time), unless a living process holds them.

    What they hold could be resumed on their commit alone, which is not where the work goes on by then.
    """
    old = [path for path in folder.glob("*.jsonl") if now - _written(path) > days * 86400 and not _held(path)]
    for path in old:
        with suppress(OSError):  # another run may have been first
            path.unlink()
    return old


def _written(path: Path) -> float:
    try:
        return path.stat().st_mtime
    except FileNotFoundError:
        return float("inf")


def _key(header: dict[str, Any]) -> dict[str, Any]:
    key = header.get("key")
    if not isinstance(key, dict):
        raise ValueError("the header of a journal needs a `key`, an object that says which runs may go on with it")
    return key


def _key_of_file(path: Path) -> Any:
    """None where the file has no whole header, or went away."""
    try:
        with path.open("rb") as file:
            header = json.loads(file.readline())
    except (OSError, ValueError):
        return None
    return header.get("key") if isinstance(header, dict) else None


def _line(entry: dict[str, Any]) -> bytes:
    try:
        return json.dumps(entry, allow_nan=False, separators=(",", ":")).encode() + b"\n"
    except (TypeError, ValueError) as error:
        raise ValueError(f"a journal holds JSON without NaN and infinity, and this entry is not: {error}") from error


def _parsed(path: Path, number: int, line: bytes) -> dict[str, Any]:
    try:
        entry = json.loads(line)
    except ValueError as error:
        raise JournalError(f"line {number} of the journal {path} is damaged ({error}): remove that line or the file") from error
    if not isinstance(entry, dict):
        raise JournalError(f"line {number} of the journal {path} is damaged (not an object): remove that line or the file")
    return entry


def _open_new(folder: Path, stem: str) -> tuple[Path, int]:
    """A new file, never one that is there: this process may have begun another journal in this second."""
    for number in count(1):
        path = folder / (f"{stem}.jsonl" if number == 1 else f"{stem}-{number}.jsonl")
        with suppress(FileExistsError):
            return path, os.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_EXCL, 0o666)
    raise AssertionError


def _lock(path: Path, descriptor: int) -> None:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        os.close(descriptor)
        raise JournalError(f"the journal {path} belongs to a run that has not ended: wait for it or stop it") from error
    except OSError as error:
        os.close(descriptor)
        raise JournalError(f"cannot lock the journal {path} ({error.strerror}): use a folder on a disk that can") from error


def _held(path: Path) -> bool:
    """Whether a living process has it open. A file that went away was stored: it is not to be resumed either."""
    try:
        with path.open("rb") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return True
    return False


def _cannot_write(path: Path, error: OSError) -> str:
    return f"cannot write the journal {path} ({error.strerror}): free space there or mend it, then go on with --resume"
