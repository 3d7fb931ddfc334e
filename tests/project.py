"""A project like this one, with its perf tests and the paced provider, and real pytest sessions in it."""

import contextlib
import io
import json
import os
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from preloaded import run_module

import fp4bench
from fp4bench.cli import main
from fp4bench.devices import find_device
from fp4bench.models import get_model
from fp4bench.timing.machine import machine_key

TESTS = Path(__file__).parent
TINY = TESTS / "tiny" / "config.json"
TINY_MOE = TESTS / "tiny-moe" / "config.json"
MACHINE = machine_key(find_device("cpu"))
# Two layers of a tiny model at two batch sizes: four cases. One repetition, without the policy's others and their pauses.
FEW = (
    "--device=cpu",
    "--providers=paced",
    f"--models={TINY}",
    "--limit-n=128",
    "--batch-sizes=1,4",
    "--modes=w4a16",
    "--formats=mxfp4",
    "--confirm=1",
)
COMPARE = (*FEW, "--benchmark-compare")
# A canary is real work, which other work on this machine disturbs; what the limits do is tested in tests/evidence.
CONFTEST = """
from fp4bench.evidence.validity import Limits
from fp4bench.plugin import conditions

conditions.CPU_LIMITS = Limits(drift=50, level=50)
"""
SETTINGS = """
[tool.pytest.ini_options]
addopts = ["--import-mode=importlib"]
filterwarnings = ["error"]
fp4bench_baselines = "baselines"
"""


def case(layer, m):
    return f"gemm-mxfp4-w4a16-paced-{get_model(str(TINY))}.{layer}.tp1-m{m}"


CASES = [case(layer, m) for layer in ("o", "down") for m in (1, 4)]


@dataclass(frozen=True)
class Result:
    """How a session ended. `text`: its stdout and stderr."""

    ret: int
    text: str

    def lines(self, start):
        return [line for line in self.text.splitlines() if line.startswith(start)]


class Project:
    """In a folder of its own, which may be there already."""

    def __init__(self, path):
        self.path = path

    @classmethod
    def create(cls, path):
        project = cls(path)
        site = path / "site"
        metadata = site / "paced_provider-1.dist-info"
        metadata.mkdir(parents=True)
        shutil.copy(TESTS / "paced_provider.py", site)
        (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: paced-provider\nVersion: 1\n")
        (metadata / "entry_points.txt").write_text("[fp4bench.providers]\npaced = paced_provider:PacedProvider\n")
        shutil.copytree(TESTS.parent / "perf", path / "perf", ignore=shutil.ignore_patterns("__pycache__"))
        (path / "pyproject.toml").write_text(SETTINGS)
        (path / "conftest.py").write_text(CONFTEST)
        return project

    def copy(self, path):
        return Project(shutil.copytree(self.path, path))

    def words(self, *args):
        return ["-p", "fp4bench.plugin", *args]

    def command(self, *args):
        return [sys.executable, "-m", "pytest", *self.words(*args)]

    def environment(self, faults=None, log=None):
        """faults: of the paced provider, by case id. log: the file of what it prepared."""
        # fp4bench too, for a machine where it is checked out and not installed.
        path = os.pathsep.join((str(self.path / "site"), str(Path(fp4bench.__file__).parent.parent)))
        own = {"PYTHONPATH": path, "PACED": json.dumps(faults or {}), "PACED_LOG": str(log or ""), "COLUMNS": "160"}
        return {key: value for key, value in os.environ.items() if not key.startswith(("PYTEST_", "PACED"))} | own

    def start(self, *args, **environment):
        """One session in a process of its own, as a user starts it; not waited for."""
        return subprocess.Popen(
            self.command("perf", *args),
            cwd=self.path,
            env=self.environment(**environment),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    def run(self, *args, **environment):
        """How one session ends, in a process of its own that had torch before."""
        return Result(*run_module("pytest", self.words("perf", *args), self.path, self.environment(**environment), timeout=120))

    def accept(self, *runs, name="first"):
        """The exit code of `fp4bench accept`, and what it says."""
        output = io.StringIO()
        arguments = [*map(str, runs), "--name", name, "--reason", "a test", "--allow-dirty", "--folder"]
        with contextlib.redirect_stderr(output), contextlib.redirect_stdout(output):
            code = main(["accept", *arguments, str(self.path / "baselines")])
        return Result(code, output.getvalue())

    @property
    def runs(self):
        """Folder of what sessions stored."""
        return self.path / ".benchmarks" / MACHINE

    def stored(self, name):
        return json.loads((self.runs / f"{name}.json").read_text())

    @property
    def journals(self):
        return list((self.runs / "unfinished").glob("*"))

    def edit_baseline(self, change):
        """`change` the one accepted run in place."""
        (path,) = (self.path / "baselines" / MACHINE).glob("*.json")
        run = json.loads(path.read_text())
        change(run)
        path.write_text(json.dumps(run))


def ended(process):
    output, _ = process.communicate(timeout=120)
    return Result(process.returncode, output)


def case_ids(run):
    return [bench["extra_info"]["case_id"] for bench in run["benchmarks"]]


def scale(run, case_id, factor):
    """Multiply the times that a stored run has of a case."""
    (bench,) = (bench for bench in run["benchmarks"] if bench["extra_info"]["case_id"] == case_id)
    for key in ("median", "min", "max", "mean"):
        bench["stats"][key] *= factor


def prepared(log):
    """The ids of the cases that the provider prepared, in their order."""
    return [line.split()[0] for line in log.read_text().splitlines()]


def processes(log):
    """The ids of the processes in which it did."""
    return [int(line.split()[1]) for line in log.read_text().splitlines()]
