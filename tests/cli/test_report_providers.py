"""`fp4bench report --throughput`, `--frontier` and `--kernels` as typed, on files of stored runs."""

import json

import pytest
from products import product, run_of
from recorded import write

from fp4bench import cli


@pytest.fixture
def fp4bench(tmp_path, monkeypatch, capsys):
    """Run `fp4bench report` in a folder with two runs of one machine; its exit code, and the lines of stdout and stderr."""
    monkeypatch.chdir(tmp_path)
    first = run_of(*(product("torch", "bf16", m, 40) for m in (1, 64)), product("triton", "w4a16", 1, 10))
    second = run_of(
        product("torch", "bf16", 64, 40), product("triton", "w4a16", 64, 20), product("b", "w4a16", 64, 30), number=2
    )
    write(tmp_path / "0001_one.json", first)
    write(tmp_path / "0002_two.json", second)

    def run(*arguments):
        code = cli.main(["report", *map(str, arguments)])
        told = capsys.readouterr()
        return code, told.out.splitlines(), told.err.splitlines()

    return run


RUNS = ("0001_one.json", "0002_two.json")


def test_throughput_with_csv(fp4bench, tmp_path):
    code, lines, errors = fp4bench("--throughput", *RUNS, "--csv", "all.csv")
    assert (code, errors) == (0, [])
    assert lines[0] == "TFLOP/s, NVIDIA H200, 2026-11-01 to 2026-11-02, 0001_one, 0002_two (paced, cold L2)"
    assert lines[-1] == "Every result: all.csv"
    assert any(line.startswith("| triton w4a16") for line in lines)
    assert len((tmp_path / "all.csv").read_text().splitlines()) == 1 + 5


def test_plots(fp4bench, tmp_path):
    pytest.importorskip("matplotlib", reason="plots are optional: pip install matplotlib")
    code, lines, _ = fp4bench("--throughput", *RUNS, "--plots", "plots")
    assert code == 0
    assert lines[-1] == "Plot: plots/bench_mxfp4_res_n1024_k2048.png"
    assert (tmp_path / "plots" / "bench_mxfp4_res_n1024_k2048.png").is_file()


def test_frontier_with_json(fp4bench, tmp_path):
    code, lines, _ = fp4bench("--frontier", *RUNS, "--json", "frontier.json")
    assert code == 0
    assert lines[-1] == "As a dispatch table: frontier.json"
    told = json.loads((tmp_path / "frontier.json").read_text())
    assert [table["pool"] for table in told["tables"]] == ["mxfp4 w4a16", "mxfp4 any"]
    assert fp4bench("--frontier", *RUNS, "--json", "frontier.json")[2] == [
        "fp4bench: error: frontier.json exists: name a new file for --json"
    ]


def test_kernels_of_a_provider(fp4bench):
    code, lines, _ = fp4bench("--kernels", *RUNS, "--batch-sizes", 64)
    assert code == 0
    (row,) = [line for line in lines if line.startswith("| tiny")]
    assert [cell.strip() for cell in row.strip("|").split("|")][1:] == [
        "64",
        "20.00 us",
        "2.00x",
        "13%",  # 2.68 us at 100 TFLOP/s
        "b",
        "30.00 us",
        "1.50x",
    ]
    assert fp4bench("--kernels", *RUNS, "--provider", "b")[1][0].startswith("b 1.0, NVIDIA H200")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--kernels", *RUNS, "--provider", "c"), "there is nothing by c in what was asked for, only by b, torch, triton"),
        (("--frontier", "absent.json"), "cannot read the baseline absent.json: No such file or directory"),
        (("--frontier", "0001_one.json", "0001_one.json"), "0001_one.json and 0001_one.json are the same run: give it once"),
        (("--throughput", *RUNS, "--modes", "w4a61"), "there is no mode w4a61, there are bf16, w4a16"),
        (("--throughput", *RUNS, "--json", "x"), "--json goes with --side-by-side RUN.json or --frontier RUN.json"),
        (("--cards", "x"), "--cards goes with --spread"),
        (("--spread", "--csv", "x"), "--csv goes with --throughput RUN.json"),
        (("--modes", "w4a16"), "--modes goes with --throughput RUN.json or --frontier RUN.json or --kernels RUN.json"),
        (("--frontier", *RUNS, "--provider", "b"), "--provider goes with --kernels RUN.json"),
    ],
)
def test_refusals_are_one_sentence(fp4bench, arguments, message):
    code, lines, errors = fp4bench(*arguments)
    assert (code, lines) == (2, [])
    assert len(errors) == 1
    assert message in errors[0]


def test_a_file_of_another_format_is_refused(fp4bench, tmp_path):
    old = run_of(product("a", "w4a16", 1, 10), format=2)
    write(tmp_path / "old.json", old)
    code, _, errors = fp4bench("--kernels", "old.json")
    assert code == 2
    assert "old.json has format 2" in errors[0]


def test_compare(fp4bench):
    code, lines, errors = fp4bench("--compare", *RUNS, "--phases")
    assert (code, errors) == (0, [])
    assert lines[0].startswith("us, NVIDIA H200, ")
    assert any(line.startswith("| triton mxfp4 w4a16 | graph | * 10.00 |") for line in lines)
    assert fp4bench("--frontier", *RUNS, "--phases")[2] == ["fp4bench: error: --phases goes with --compare RUN.json"]
