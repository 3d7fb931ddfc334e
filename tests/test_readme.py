"""What README and the account of the records name exists: paths, commands, options, models, the example provider to the letter.

Their tables are what the records say, and every record is named.
"""

import configparser
import json
import re
import shlex
import subprocess
import sys

import documents
import pytest
from documents import DOCUMENTS, ROOT
from products import product, run_of
from recorded import write

from fp4bench import cli
from fp4bench.cli import report as cli_report
from fp4bench.evidence import repeats
from fp4bench.evidence.histories import card_of
from fp4bench.models import get_model
from fp4bench.plugin.options import floors_table
from fp4bench.problems import MODES

FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", flags=re.MULTILINE | re.DOTALL)
TEXTS = {path: path.read_text(encoding="utf-8") for path in DOCUMENTS}
README, RECORDS = TEXTS.values()
FENCES = FENCE.findall(README)
BLOCKS = [body for _, body in FENCES]
INLINE = [(path, text) for path in DOCUMENTS for text in re.findall(r"`([^`\n]+)`", FENCE.sub("", TEXTS[path]))]
COMMANDS = [
    line.split("#")[0].strip() for body in BLOCKS for line in body.splitlines() if re.match(r"(python|tox|pytest) ", line)
]
COMMANDS += [text for _, text in INLINE if re.match(r"(tox|pytest|fp4bench) ", text)]
OF_FP4BENCH = re.compile(r"(tox -e fp4bench -- |fp4bench )(?=\w)")


def is_path(text):
    """Also a pattern of paths, as `NVIDIA-H200/[0-9]*.json`; without a folder only what ends as this repository's texts do."""
    word = r"[\w.*\[\]-]+"
    folders = re.fullmatch(rf"{word}(/{word})*/|{word}(/{word})+", text)
    return bool(folders or re.fullmatch(r"[\w.]+\.(py|md|toml|ini)", text)) and not text.startswith("path/")


def paths():
    """Each with the folder of the document that names it."""
    mapped = [word for body in BLOCKS for word in body.split() if word.startswith(("fp4bench/", "perf/", "tests/"))]
    named = [*((path.parent, text) for path, text in INLINE), *((ROOT, text) for text in mapped)]
    return sorted({(str(folder.relative_to(ROOT)), text) for folder, text in named if is_path(text)})


def records():
    """The files in the folders of a machine; its accepted runs beside these tell themselves what they are."""
    return {path for path in (ROOT / "baselines").glob("*/*/**/*") if path.is_file()}


def test_readme_names_paths_and_commands():
    assert len(paths()) > 15
    assert len(COMMANDS) > 6


@pytest.mark.parametrize(("folder", "path"), paths())
def test_every_path_exists(folder, path):
    found = [*(ROOT / folder).glob(path), *ROOT.glob(path)]
    assert found
    assert all(one.is_dir() if path.endswith("/") else one.is_file() for one in found)


def test_every_record_is_named():
    named = {one for folder, path in paths() if folder == "baselines" for one in (ROOT / folder).glob(path)}
    assert len(named) > 80
    assert sorted(records() - named) == []


def test_the_map_shows_every_module():
    modules = {
        f"fp4bench/{p.name}{'/' if p.is_dir() else ''}" for p in (ROOT / "fp4bench").iterdir() if not p.name.startswith("__")
    }
    assert modules - {"fp4bench/py.typed"} <= {path for _, path in paths()}


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
    named = {text.partition("=")[0] for _, text in INLINE if re.fullmatch(r"--[\w=-]+", text)}
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


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_tables_are_those_of_the_records(path, monkeypatch):
    monkeypatch.chdir(ROOT)
    assert {kind for kind in ("kernels", "compare", "spread") if f"<!-- {kind} " not in TEXTS[path]} == set()
    assert documents.stale(TEXTS[path]) == []


def test_what_the_gate_found_is_what_the_drills_say():
    """Since `placement` exists: the drills of the eighth machine and later."""
    drills = {path.name: json.loads(path.read_text()) for path in ROOT.glob("baselines/NVIDIA-H200/drills/*-card-[0-9].json")}
    sessions = [session for drill in drills.values() for session in drill["sessions"]]
    slowed = [session for session in sessions if session["plan"]]
    assert not any(session["alarms"] for session in sessions if not session["plan"])
    flagged = [len(session["alarms"]) for session in slowed if session["alarms"]]
    found = {
        (slowdown, placed): [
            injection["detected"]
            for name, drill in drills.items()
            for injection in drill["injections"]
            if injection["slowdown"] == slowdown and not injection["blind"]
            if not placed or int(name.split("-")[4]) >= 8
        ]
        for slowdown in (0.02, 0.05)
        for placed in (False, True)
    }
    told = {key: f"{sum(those)} of {len(those)}" for key, those in found.items()}
    text = " ".join(README.split())
    assert f"{len(sessions) - len(slowed)} sessions of unchanged code in drills had no false alarm" in text
    assert f"{told[0.02, False]} slowdowns of 2 % and {told[0.05, False]} of 5 %; since" in text
    assert f"since `placement` exists, {told[0.02, True]} and {told[0.05, True]}" in text
    assert f"In {len(flagged)} of the {len(slowed)} sessions with slowdowns it flagged one case more" in text
    assert set(flagged) == {1}


def test_where_peers_are_ahead_is_what_the_run_says():
    run = json.loads((ROOT / "baselines/NVIDIA-H200/kernels/2026-11-28_all-providers.json").read_text(encoding="utf-8"))
    seconds: dict[tuple, dict[str, float]] = {}
    for bench in run["benchmarks"]:
        record = bench["extra_info"]
        cell = tuple(record[name] for name in ("format", "mode", "model", "layer", "m"))
        seconds.setdefault(cell, {})[record["provider"]] = bench["stats"]["median"]
    cells = {cell: min(by, key=by.get) for cell, by in seconds.items() if "triton" in by}
    behind = {cell: fastest for cell, fastest in cells.items() if fastest != "triton"}
    formats = [format for format, *_ in cells]
    assert {format for format, *_ in behind} == {"mxfp4"}
    assert set(behind.values()) == {"humming"}
    assert {by for cell in cells if cell[0] == "nvfp4" for by in seconds[cell]} == {"triton", "vllm_marlin"}
    assert all(m > 16 and model != "llama3.3-70b" for _, _, model, _, m in behind)
    text = " ".join(README.split())
    told = f"in {len(behind)} of {formats.count('mxfp4')} MXFP4 cells, and Marlin in none of {formats.count('nvfp4')} of NVFP4"
    assert told in text


def test_how_many_cases_of_five_runs_repeat_is_what_they_say(monkeypatch):
    monkeypatch.chdir(ROOT)
    (cards,) = re.findall(r"<!-- spread NVIDIA-H200 --cards (.+?) \|", README)
    asked = ["report", "--spread", "--machine", "NVIDIA-H200", "--cards", *cards.split()]
    (baseline,) = cli_report.baselines(cli.parser().parse_args(asked))
    baseline = baseline.on(card_of(baseline.runs[-1].session))
    of_six, of_all = repeats.half_ranges_of_six(baseline), repeats.half_ranges(baseline)
    others = [half for case_id, half in of_all.items() if case_id not in of_six]
    within = sum(half <= 0.01 for half in others)
    text = " ".join(README.split())
    assert (
        f"{len(of_six)} cases that have so many; of the other {len(others)}, which five runs have, {within} are within 1 %"
        in text
    )


def test_a_stale_table_is_found_and_made_anew(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "0001_a.json", run_of(product("torch", "bf16", 1, 40), product("triton", "w4a16", 1, 10)))
    comments = "kernels 0001_a.json --modes w4a16", "compare 0001_a.json", "compare 0001_a.json | triton"
    text = documents.made_anew("".join(f"before\n<!-- {comment} -->\nstale\n<!-- end -->\n" for comment in comments))
    assert (text.count("before\n"), text.count("stale\n")) == (3, 0)
    assert "4.00x" in text
    assert (text.count("| torch bf16"), text.count("| triton mxfp4 w4a16")) == (1, 2)
    assert documents.stale(text) == []
    assert documents.stale(text.replace("4.00x", "4.10x")) == [comments[0]]
    assert documents.stale(text.replace("* 10.00", "* 10.10")) == [*comments[1:]]
    assert documents.made_anew(text.replace("4.00x", "4.10x")) == text
    for cut in (text.removesuffix("<!-- end -->\n"), text.replace("<!-- end -->", "", 1)):
        with pytest.raises(ValueError, match="without its"):
            documents.stale(cut)
    with pytest.raises(ValueError, match="named nobody"):
        documents.stale(text.replace("| triton -->", "| triton nobody -->"))


def test_the_two_set_up_commands_come_first():
    first, second = BLOCKS[0].splitlines()
    assert first.startswith("python -m pip install tox && tox -e perf ")
    assert second.startswith("python -m pip install tox && tox -e tests ")


def test_ci_runs_the_test_command_of_readme():
    assert BLOCKS[0].splitlines()[1].split("#")[0].strip() in (ROOT / ".ci" / "run").read_text(encoding="utf-8")
