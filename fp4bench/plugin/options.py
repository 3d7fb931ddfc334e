"""The command line options, and what they ask for."""

from __future__ import annotations

import json
from collections.abc import Mapping
from fnmatch import fnmatchcase
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest

# Options that choose cases; those of the reference benchmarks keep their names.
SELECTION = {
    "models": "short names, Hugging Face ids, or paths of config.json files",
    "tp-sizes": "tensor parallel sizes",
    "batch-sizes": "batch sizes, the m of a GEMM",
    "had-sizes": "Hadamard sizes of the rotation before quantization: none, 16, 32, 64, 128",
    "limit-k": "only layers with these k; the hidden size of MoE layers",
    "limit-n": "only layers with these n; the intermediate size of MoE layers",
    "limit-num-groups": "only MoE layers with so many experts",
    "routing": "how tokens choose experts: uniform, zipf, one_hot, balanced, or paths of recorded ones (.json)",
    "per-act-token": "whether a row of activations has an FP8 scale, in mode fp8 of MoE layers: no, yes",
    "per-out-ch": "whether a row of weights has one: no, yes",
    "fp8-blocks": "FP8 scales by blocks instead: none, 128",
    "formats": "FP4 formats: mxfp4, nvfp4",
    "modes": "modes: bf16, fp16, fp8, w4a16, w4a16_fp16, w4a8, w4a4, w4a4_noquant",
    "providers": "providers",
}


def add_options(parser: pytest.Parser) -> None:
    group = parser.getgroup("fp4bench", "fp4bench: which cases to time")
    for name, what in SELECTION.items():
        group.addoption(f"--{name}", nargs="+", metavar="X", help=f"{what}; several, or all. Put the test path before it.")
    group.addoption("--device", default="auto", help="auto (a GPU where there is one), cpu, cuda or cuda:<index>")
    group = parser.getgroup("fp4bench-timing", "fp4bench: how to time them")
    group.addoption("--sustained", action="store_true", help="time at the power limit, as a busy server runs, not in bursts")
    group.addoption("--warm", action="store_true", help="let the L2 keep operands between calls")
    group.addoption(
        "--case-timeout", type=float, default=120.0, metavar="SECONDS", help="give a case up that takes longer (default 120)"
    )
    group.addoption("--nvtx", action="store_true", help="mark each case and its parts by NVTX ranges, for a profiler")
    group.addoption("--resume", action="store_true", help="go on with the newest run that was cut off: finished cases stay")
    group = parser.getgroup("fp4bench-gate", "fp4bench: what --benchmark-compare decides")
    group.addoption(
        "--gate",
        choices=("off", "on", "strict"),
        default="on",
        help="off: judge and show, fail nothing; on (default): REGRESSED and MISSING fail; strict: NEW and INCONCLUSIVE too",
    )
    group.addoption("--confirm", type=int, metavar="N", help="measure a suspect N times again, each in a fresh process")
    group.addoption("--verdicts", type=Path, metavar="FILE", help="write outcome and verdicts as JSON")
    group.addoption(
        "--inject", type=Path, metavar="FILE", help="a drill's slowdowns, JSON {case id: share}; see fp4bench drill"
    )
    parser.addini("fp4bench_baselines", "Folder of accepted runs, one folder a machine; the plugin acts only where it is set.")


def asked(config: pytest.Config) -> dict[str, list[str]]:
    """The selection options that were given, by name. Values may be separated by spaces or commas."""
    given = {}
    for option in SELECTION:
        name = option.replace("-", "_")
        if values := [part for value in config.getoption(name) or () for part in value.split(",")]:
            given[name] = values
    return given


def swallowed_path(given: dict[str, list[str]]) -> str | None:
    """A sentence about the first option that took a test path for its value."""
    for name, values in given.items():
        if path := next(filter(is_test_path, values), None):
            return f"--{name.replace('_', '-')} took the path {path!r} for a value: put the path first"
    return None


def is_test_path(value: str) -> bool:
    """Whether an option's value is rather the path of tests, which the option swallowed."""
    return Path(value).is_dir() or value.endswith(".py") or "::" in value


def slowdowns(path: Path | None) -> dict[str, float]:
    """What a drill injects, by case id. Raises ValueError."""
    if path is None:
        return {}
    try:
        plan = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"cannot read --inject {path}: {error}") from error
    if not isinstance(plan, dict) or not all(isinstance(v, int | float) and 0 <= v < 10 for v in plan.values()):
        raise ValueError(f"--inject {path} is not a JSON object of case ids and slowdowns such as 0.02")
    return plan


def check_floor(item: pytest.Item) -> None:
    """Raises ValueError for a test whose `floor` marker is none."""
    marker = item.get_closest_marker("floor")
    if marker and not (len(marker.args) == 1 and not marker.kwargs and _is_floor(marker.args[0])):
        raise ValueError(f"the floor marker of {item.nodeid} needs one share such as 0.03: it has {marker.args or 'none'}")


def check_numbers(case_timeout: float, confirm: int | None) -> None:
    """Raises ValueError."""
    if not case_timeout > 0:
        raise ValueError(f"--case-timeout {case_timeout:g} is not a time in seconds")
    if confirm is not None and confirm < 0:
        raise ValueError(f"--confirm {confirm} is not a number of repetitions")


def floors_table(rootpath: Path) -> dict[str, float]:
    """`floors` of `[tool.fp4bench]` in pyproject.toml: the smallest slowdown that fails, by glob of case ids.

    Raises ValueError for what is no such table.
    """
    path = rootpath / "pyproject.toml"
    if not path.is_file():
        return {}
    settings = _toml().loads(path.read_text(encoding="utf-8")).get("tool", {}).get("fp4bench", {})
    if unknown := settings.keys() - {"floors"}:
        raise ValueError(f"[tool.fp4bench] of {path.name} has no {', '.join(sorted(unknown))}: known is floors")
    floors = settings.get("floors", {})
    if not isinstance(floors, dict):
        raise ValueError(f"[tool.fp4bench] floors of {path.name} is no table of globs and shares")
    for glob, floor in floors.items():
        if not _is_floor(floor):
            raise ValueError(f"[tool.fp4bench] floors {glob!r} of {path.name} is {floor!r}, not a share such as 0.03")
    return floors


def own_floors(table: Mapping[str, float], items: Mapping[str, pytest.Item]) -> dict[str, float]:
    """The floors of those cases that have one of their own: the first matching glob of the table, else its test's marker."""
    floors = {}
    for case_id, item in items.items():
        matching = (floor for glob, floor in table.items() if fnmatchcase(case_id, glob))
        marker = item.get_closest_marker("floor")
        floor = next(matching, marker.args[0] if marker else None)
        if floor is not None:
            floors[case_id] = floor
    return floors


def _is_floor(value: Any) -> bool:
    return isinstance(value, float) and 0 < value < 1


def _toml() -> Any:
    try:
        return import_module("tomllib")
    except ModuleNotFoundError:  # Python 3.10, where pytest brings tomli
        return import_module("tomli")
