"""fp4bench imports in one direction, and importing it is cheap."""

import ast
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import fp4bench

PACKAGE = Path(fp4bench.__file__).parent

# A module imports only from those before it, and from its own folder.
ORDER = (
    *("formats", "hadamard", "quantize", "models", "problems", "reference", "checking", "devices", "kernels", "providers"),
    *("cases", "nn", "timing", "evidence", "tuning", "workers", "serving", "plugin", "cli", "__main__"),
)

FP4 = (*ORDER[: ORDER.index("devices")], "kernels", "providers", "cases", "nn")
FORBIDDEN = {
    "timing": {f"fp4bench.{part}" for part in FP4},
    # devices and timing stand on torch
    "evidence": {f"fp4bench.{part}" for part in (*FP4, "devices", "timing")} | {"torch", "pytest", "pytest_benchmark"},
}


def violations(root):
    """Every import of the package in `root` that its place in the order forbids, as "file imports module"."""
    found = []
    for path in sorted(root.rglob("*.py")):
        part = path.relative_to(root).with_suffix("").parts[0]
        if part not in (*ORDER, "__init__"):
            found.append(f"{part} has no place in the order")
            continue
        before = () if part == "__init__" else ORDER[: ORDER.index(part)]
        for module in imported(path, root):
            top, _, inner = module.partition(".")
            own = inner.partition(".")[0]
            if module == "fp4bench.__version__":
                continue
            if (top == "fp4bench" and own not in (*before, part)) or {top, f"fp4bench.{own}"} & FORBIDDEN.get(part, set()):
                found.append(f"{path.relative_to(root).as_posix()} imports {module}")
    return found


def imported(path, root):
    """The dotted names that a file imports, anywhere in it. A name imported from fp4bench itself counts as fp4bench.<name>."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            folder = ["fp4bench", *path.relative_to(root).parts[:-1]]
            start = folder[: len(folder) - node.level + 1] if node.level else []
            module = ".".join([*start, *([node.module] if node.module else [])])
            yield from (f"{module}.{alias.name}" for alias in node.names) if module == "fp4bench" else [module]


def test_imports_go_one_way():
    assert violations(PACKAGE) == []


@pytest.mark.parametrize(
    ("file", "source", "violation"),
    [
        ("formats/e2m1.py", "from fp4bench.quantize import decode", "formats/e2m1.py imports fp4bench.quantize"),
        ("reference.py", "import fp4bench.kernels.gemm", "reference.py imports fp4bench.kernels.gemm"),
        ("reference.py", "def f():\n    from fp4bench.providers import providers", "reference.py imports fp4bench.providers"),
        ("problems.py", "from .checking import check", "problems.py imports fp4bench.checking"),
        ("formats/e2m1.py", "from ..quantize import decode", "formats/e2m1.py imports fp4bench.quantize"),
        ("hadamard.py", "from fp4bench import MXFP4", "hadamard.py imports fp4bench.MXFP4"),
        ("models.py", "from fp4bench import checking", "models.py imports fp4bench.checking"),
        ("models.py", "from . import checking", "models.py imports fp4bench.checking"),
        ("models.py", "import fp4bench", "models.py imports fp4bench"),
        ("__init__.py", "from fp4bench.problems import W4A4", "__init__.py imports fp4bench.problems"),
        ("__init__.py", "from fp4bench.formats import MXFP4", "__init__.py imports fp4bench.formats"),
        ("__init__.py", "from fp4bench.quantize import quantize", "__init__.py imports fp4bench.quantize"),
        ("timing/clock.py", "from fp4bench.formats import MXFP4", "timing/clock.py imports fp4bench.formats"),
        ("timing/clock.py", "from fp4bench.providers import Provider", "timing/clock.py imports fp4bench.providers"),
        ("timing/clock.py", "from fp4bench.evidence import record", "timing/clock.py imports fp4bench.evidence"),
        ("evidence/record.py", "from fp4bench.problems import W4A4", "evidence/record.py imports fp4bench.problems"),
        ("evidence/record.py", "from fp4bench.timing.clock import Clock", "evidence/record.py imports fp4bench.timing.clock"),
        ("evidence/record.py", "import torch.nn.functional as F", "evidence/record.py imports torch.nn.functional"),
        ("evidence/report.py", "import pytest", "evidence/report.py imports pytest"),
        ("evidence/report.py", "from pytest import Item", "evidence/report.py imports pytest"),
        ("extras.py", "", "extras has no place in the order"),
    ],
)
def test_a_planted_violation_is_found(file, source, violation, tmp_path):
    path = tmp_path / file
    path.parent.mkdir(exist_ok=True)
    path.write_text(source, encoding="utf-8")
    assert violations(tmp_path) == [violation]


def test_allowed_imports_are_not_violations(tmp_path):
    sources = {
        "__init__.py": "__version__ = '1'",
        "formats.py": "import torch\nfrom os import path",
        "reference.py": "from fp4bench.quantize import decode\nfrom fp4bench import __version__",
        "timing.py": "from fp4bench.devices import Device\nimport torch",
        "evidence.py": "import json\nimport numpy",
        "plugin.py": "import pytest\nfrom fp4bench.evidence import record\nfrom fp4bench.cases import Case",
    }
    for name, source in sources.items():
        (tmp_path / name).write_text(source, encoding="utf-8")
    (tmp_path / "providers").mkdir()
    (tmp_path / "providers" / "eager.py").write_text(
        "from fp4bench.providers import Runner\nfrom . import Runner", encoding="utf-8"
    )
    assert violations(tmp_path) == []


def in_a_new_python(code):
    """What `code` prints in a fresh interpreter that sees no GPU."""
    environment = os.environ | {"CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    return done.stdout.split()


def test_the_map_of_kernels_names_every_file():
    text = (PACKAGE / "kernels" / "__init__.py").read_text(encoding="utf-8")
    named = set(re.findall(r"`(\w+)`", text.partition("| --- | --- |")[2].rpartition("|")[0]))
    assert named == {path.stem for path in (PACKAGE / "kernels").glob("*.py")} - {"__init__", "configs"}


def test_importing_fp4bench_does_no_work():
    # Beyond what torch itself brings in.
    code = """
import sys, torch, numpy
before = set(sys.modules)
import fp4bench
assert not torch.cuda.is_initialized()
print(*sorted({module.partition(".")[0] for module in set(sys.modules) - before} - sys.stdlib_module_names))
"""
    assert in_a_new_python(code) == ["fp4bench"]


def test_importing_fp4bench_imports_nothing_else():
    code = """
import sys
before = set(sys.modules)
import fp4bench
print(*sorted(set(sys.modules) - before))
"""
    assert in_a_new_python(code) == ["fp4bench"]


def test_a_module_is_never_hidden_by_a_function_of_its_name():
    code = """
import fp4bench.quantize, fp4bench.plugin, fp4bench.cases, fp4bench.checking
print(type(fp4bench.quantize).__name__, fp4bench.quantize.quantize.__name__)
"""
    assert in_a_new_python(code) == ["module", "quantize"]


def test_importing_the_plugin_does_not_import_torch():
    # pytest loads it in every project where fp4bench is installed.
    assert in_a_new_python("import sys, fp4bench.plugin\nprint('torch' in sys.modules)") == ["False"]
