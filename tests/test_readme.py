"""What README names exists: paths, commands, options, models, and the example provider to the letter."""

import configparser
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from products import product, run_of
from recorded import write

from fp4bench import cli
from fp4bench.cli import report as cli_report
from fp4bench.evidence import baselines, repeats
from fp4bench.models import get_model
from fp4bench.plugin.options import floors_table
from fp4bench.problems import MODES

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
FENCES = re.findall(r"^```(\w*)\n(.*?)^```$", README, flags=re.MULTILINE | re.DOTALL)
BLOCKS = [body for _, body in FENCES]
INLINE = re.findall(r"`([^`\n]+)`", re.sub(r"^```.*?^```$", "", README, flags=re.MULTILINE | re.DOTALL))
COMMANDS = [
    line.split("#")[0].strip() for body in BLOCKS for line in body.splitlines() if re.match(r"(python|tox|pytest) ", line)
]
COMMANDS += [text for text in INLINE if re.match(r"(tox|pytest|fp4bench) ", text)]
OF_FP4BENCH = re.compile(r"(tox -e fp4bench -- |fp4bench )(?=\w)")


def is_path(text):
    return re.fullmatch(r"[\w.]+(/[\w.]+)*(/|\.py|\.md|\.toml|\.ini)", text) and not text.startswith("path/")


def paths():
    mapped = [word for body in BLOCKS for word in body.split() if word.startswith(("fp4bench/", "perf/", "tests/"))]
    return sorted({text for text in (*INLINE, *mapped) if is_path(text)})


def test_readme_names_paths_and_commands():
    assert len(paths()) > 15
    assert len(COMMANDS) > 6


@pytest.mark.parametrize("path", paths())
def test_every_path_exists(path):
    found = ROOT / path
    assert found.is_dir() if path.endswith("/") else found.is_file()


def test_the_map_shows_every_module():
    modules = {
        f"fp4bench/{p.name}{'/' if p.is_dir() else ''}" for p in (ROOT / "fp4bench").iterdir() if not p.name.startswith("__")
    }
    assert modules - {"fp4bench/py.typed"} <= set(paths())


@pytest.fixture(scope="module")
def pytest_help():
    return subprocess.run(
        [sys.executable, "-m", "pytest", "--help"], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout


@pytest.mark.parametrize("command", sorted(text for text in set(COMMANDS) if OF_FP4BENCH.match(text)))
def test_every_command_of_fp4bench_parses(command):
    name, *words = shlex.split(OF_FP4BENCH.sub("", command))
    assert name in cli.COMMANDS
    assert not words or callable(cli.parser().parse_args([name, *words]).run)


@pytest.mark.parametrize("command", sorted(text for text in set(COMMANDS) if not OF_FP4BENCH.match(text)))
def test_every_command_exists(command, pytest_help):
    environments = configparser.ConfigParser()
    environments.read(ROOT / "tox.ini")
    words = shlex.split(command)
    if "tox" in words and "-e" in words:
        assert f"testenv:{words[words.index('-e') + 1]}" in environments
    if words[0] != "pytest-benchmark":
        for option in (word.partition("=")[0] for word in words if re.match(r"--\w", word)):
            assert option in pytest_help


def test_every_option_named_exists(pytest_help):
    commands = next(action.choices for action in cli.parser()._actions if action.choices)
    known = pytest_help + "".join(command.format_help() for command in commands.values())
    named = {text.partition("=")[0] for text in INLINE if re.fullmatch(r"--[\w=-]+", text)}
    assert {"--models", "--had-sizes", "--device", "--lf", "--benchmark-compare", "--retire"} <= named
    assert [option for option in sorted(named) if option not in known] == []


def test_models_and_modes_named_are_known():
    assert get_model("llama3.3-70b")
    assert get_model("deepseek-r1")
    assert f"`{' '.join(MODES)}`" in README


def test_the_example_provider_is_the_one_that_is_tested():
    (shown,) = [body for language, body in FENCES if language == "python"]
    assert shown == (ROOT / "tests" / "example_provider" / "example_provider.py").read_text(encoding="utf-8")
    (entry,) = [body for language, body in FENCES if language == "toml" and "entry-points" in body]
    assert entry in (ROOT / "tests" / "example_provider" / "pyproject.toml").read_text(encoding="utf-8")


def test_the_floors_table_shown_is_read(tmp_path):
    (shown,) = [body for language, body in FENCES if language == "toml" and "floors" in body]
    (tmp_path / "pyproject.toml").write_text(shown)
    assert floors_table(tmp_path) == {"gemm-*-eager-*": 0.03}


@pytest.mark.parametrize("machine", re.findall(r"<!-- spread (\S+) -->", README))
def test_tables_of_spread_are_those_of_the_accepted_runs(machine):
    (shown,) = re.findall(rf"<!-- spread {machine} -->\n(.*?)<!-- end -->", README, flags=re.DOTALL)
    lines = repeats.spread(baselines.accepted(ROOT / "baselines" / machine, machine))
    assert shown.strip().splitlines() == [line for line in lines if line.startswith("|")]


def stale_kernel_tables(text):
    """What follows `fp4bench report --kernels` in each `<!-- kernels ... -->` of a text that does not show what that prints.

    Likewise `--compare` in each `<!-- compare ... -->`.
    """
    marked = re.findall(r"<!-- (kernels|compare) (.+?) -->\n(.*?)<!-- end -->", text, flags=re.DOTALL)
    assert len(marked) == len(re.findall("<!-- (?:kernels|compare) ", text)), "a marker without its <!-- end -->"
    return [words for report, words, shown in marked if shown.strip().splitlines() != kernel_table(words, report)]


def kernel_table(words, report="kernels"):
    asked = cli.parser().parse_args(["report", f"--{report}", *shlex.split(words)])
    return cli_report.lines(asked)


def test_tables_of_kernels_are_those_of_the_records(monkeypatch):
    monkeypatch.chdir(ROOT)
    assert stale_kernel_tables(README) == []


def test_a_stale_table_of_kernels_is_found(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "0001_a.json", run_of(product("torch", "bf16", 1, 40), product("triton", "w4a16", 1, 10)))
    table = "\n".join(kernel_table("0001_a.json --modes w4a16"))
    text = f"before\n<!-- kernels 0001_a.json --modes w4a16 -->\n{table}\n<!-- end -->\n"
    assert "4.00x" in text
    assert stale_kernel_tables(text) == []
    assert stale_kernel_tables(text.replace("4.00x", "4.10x")) == ["0001_a.json --modes w4a16"]
    with pytest.raises(AssertionError, match="without its"):
        stale_kernel_tables(text.replace("<!-- end -->", ""))
    compared = "\n".join(kernel_table("0001_a.json", "compare"))
    text += f"<!-- compare 0001_a.json -->\n{compared}\n<!-- end -->\n"
    assert stale_kernel_tables(text) == []
    assert stale_kernel_tables(text.replace("* 10.00", "* 10.10")) == ["0001_a.json"]


def test_the_two_set_up_commands_come_first():
    first, second = BLOCKS[0].splitlines()
    assert first.startswith("python -m pip install tox && tox -e perf ")
    assert second.startswith("python -m pip install tox && tox -e tests ")


def test_ci_runs_the_test_command_of_readme():
    assert BLOCKS[0].splitlines()[1].split("#")[0].strip() in (ROOT / ".ci" / "run").read_text(encoding="utf-8")
