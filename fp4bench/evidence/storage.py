"""Put a run on the disk as a whole or not at all, under a number of its own, in pytest-benchmark's format."""

import json
import math
import os
import re
import textwrap
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, suppress
from itertools import count
from pathlib import Path
from typing import Any

# Four digits, more after 9999; a neighbour that begins with a date is none.
_NUMBERED = re.compile(r"(\d{4}|[1-9]\d{4,5})_.*\.jsonl?", re.DOTALL)


def store(run: dict[str, Any], folder: Path, name: str, samples: bool = False) -> Path:
    """Write a run as `folder/NNNN_<name>.json`, NNNN being one more than the highest number there. The path of the file.

    Nothing is ever replaced: of two processes that store at once, each gets its own number. Raw samples,
    benchmarks[*].stats.data, are left out of the file; with `samples` they are in `samples_path` of it, a line a case. `run`
    itself is not changed.

    Raises ValueError for a name that is none and for a run that JSON does not know (NaN), and OSError with one sentence where
    the files cannot be written; then none is there.
    """
    if not name or set(name) & {"/", "\\", "\0"}:
        raise ValueError(f"{name!r} cannot be a part of a file name: use letters, digits, - and _")
    _refuse_misfits(run, "run")
    stripped, data = _without_samples(run)
    lines = "".join(f"{_json(case)}\n" for case in data) if samples else ""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        return _store(folder, name, _layout(stripped), lines)
    except OSError as error:
        sentence = (
            f"cannot store the run in {folder} ({error.strerror or error}): free space there or mend it, then store it again"
        )
        told = OSError(sentence)
        told.errno = error.errno
        raise told from error


def samples_path(run: Path) -> Path:
    """Where the raw samples of a stored run are, if they were kept.

    Not a .json: pytest-benchmark takes each NNNN_*.json for a run.
    """
    return run.with_name(f"{run.name.removesuffix('.json')}.samples.jsonl")


def stored_runs(folder: Path) -> list[Path]:
    """The runs of a folder, oldest number first."""
    return [path for _, path in sorted(_numbered(folder)) if path.suffix == ".json"]


def _store(folder: Path, name: str, run: str, samples: str) -> Path:
    for number in count(_highest(folder) + 1):
        # The temporary file reserves its number, under whatever name others store.
        temporary, side = folder / f".{number:04}.partial", folder / f".{number:04}.samples.partial"
        path = folder / f"{number:04}_{name}.json"
        try:
            with _created(temporary, run):
                if _highest(folder) < number:  # else one that had reserved it is done meanwhile
                    with _created(side, samples) if samples else nullcontext():
                        _publish_both(temporary, path, side if samples else None)
                    sync_folder(folder)
                    return path
        except FileExistsError:
            continue
    raise AssertionError


def _publish_both(temporary: Path, path: Path, side: Path | None) -> None:
    """The samples first: a run whose samples were asked for is never without them."""
    if side is None:
        _publish(temporary, path)
        return
    _publish(side, samples_path(path))
    try:
        _publish(temporary, path)
    except BaseException:
        samples_path(path).unlink()
        raise


def _publish(temporary: Path, path: Path) -> None:
    """Give a file that is whole its name. Raises FileExistsError where that is taken."""
    try:
        os.link(temporary, path)
    except FileExistsError:
        raise
    except OSError:
        # No hard links on this disk: take the name with an empty file, which is ours to replace.
        os.close(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666))
        try:
            os.replace(temporary, path)
        except BaseException:
            path.unlink()
            raise


@contextmanager
def _created(path: Path, text: str) -> Iterator[None]:
    """A new file with this text, on the disk. It is removed at the end. Raises FileExistsError where there is one."""
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
    try:
        try:
            left = text.encode()
            while left:
                left = left[os.write(descriptor, left) :]
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
        yield
    finally:
        with suppress(FileNotFoundError):
            path.unlink()


def _highest(folder: Path) -> int:
    return max((number for number, _ in _numbered(folder)), default=0)


def _numbered(folder: Path) -> Iterator[tuple[int, Path]]:
    for path in folder.iterdir():
        if found := _NUMBERED.fullmatch(path.name):
            yield int(found[1]), path


def _without_samples(run: dict[str, Any]) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """The run without raw samples, and {name, seconds} of each case that had some."""
    benchmarks, samples = [], []
    for bench in run["benchmarks"]:
        stats = dict(bench["stats"])
        if data := stats.pop("data", None):
            samples.append({"name": bench["name"], "seconds": data})
        benchmarks.append(bench | {"stats": stats})
    return run | {"benchmarks": benchmarks}, samples


def _layout(run: dict[str, Any]) -> str:
    """JSON with a line a benchmark, so that the change of one is a line of a diff; all else is indented."""
    parts = [f"  {_json(key)}: {_benchmarks(value) if key == 'benchmarks' else _indented(value)}" for key, value in run.items()]
    return "{\n" + ",\n".join(parts) + "\n}\n"


def _benchmarks(benchmarks: list[dict[str, Any]]) -> str:
    return "[\n" + ",\n".join(f"    {_json(bench)}" for bench in benchmarks) + "\n  ]"


def _indented(value: Any) -> str:
    return textwrap.indent(_json(value, indent=2), "  ").lstrip()


def _json(value: Any, indent: int | None = None) -> str:
    return json.dumps(value, indent=indent, allow_nan=False)


def _refuse_misfits(value: Any, at: str) -> None:
    """Raises ValueError that names the first value in `value` that JSON does not know."""
    if isinstance(value, dict):
        for key, inner in value.items():
            _refuse_misfits(inner, f"{at}.{key}")
    elif isinstance(value, list | tuple):
        for index, inner in enumerate(value):
            _refuse_misfits(inner, f"{at}[{index}]")
    elif isinstance(value, float) and not math.isfinite(value):
        raise ValueError(f"{at} is {value}, which JSON does not know: store None for what was not measured")
    elif not (value is None or isinstance(value, str | int | float)):
        raise ValueError(f"{at} is a {type(value).__name__}, which JSON does not know: store a number or a text")


def sync_folder(folder: Path) -> None:
    """Put the new name on the disk too; not every filesystem can."""
    with suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
