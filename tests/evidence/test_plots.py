"""What is drawn: panels, lines, the roof's corner, and that nothing covers anything."""

import sys
from itertools import combinations

import numpy as np
import pytest
from products import product, quantization, results_of, run_of

from fp4bench.evidence import plots
from fp4bench.evidence.results import ResultsError, Shape

pytest.importorskip("matplotlib", reason="plots are optional: pip install matplotlib")

SHAPE = Shape(1024, 2048)
SIZES = (1, 16, 256, 4096)


def swept(provider, mode, us, **options):
    """A provider whose time grows with m from 64 on."""
    return [product(provider, mode, m, us * max(1, m / 64), **options) for m in SIZES]


@pytest.fixture
def results(tmp_path):
    run = run_of(
        *swept("torch", "bf16", 9),
        *swept("torch", "fp8", 6),
        *swept("a", "w4a16", 3),
        *swept("b", "w4a16", 4),
        *swept("a", "w4a4", 4),
        *swept("a", "w4a4_noquant", 3),
        *swept("b", "w4a4", 5, hadamard=64),
        *swept("b", "w4a16", 5, fmt="nvfp4", layer="o", n=512),
    )
    return results_of(tmp_path, run)


def lines_of(axes):
    """Sizes and values of the lines, by colour, marker and style."""
    return {(line.get_color(), line.get_marker(), line.get_linestyle()): line.get_xydata().T for line in axes.lines}


@pytest.mark.parametrize(("panels", "columns"), [(1, 1), (3, 3), (4, 4), (5, 3), (6, 3), (7, 4), (8, 4), (9, 3), (10, 3)])
def test_a_page_leaves_few_places_empty(panels, columns):
    assert plots._columns(panels) == columns


@pytest.mark.parametrize(("sizes", "turned"), [((1, 16, 256, 4096), 0), (tuple(2**i for i in range(12)), 45)])
def test_many_batch_sizes_are_turned(sizes, turned, tmp_path):
    run = run_of(*(product("a", "w4a16", m, 1.0) for m in sizes), *(product("torch", "bf16", m, 2.0) for m in sizes))
    figure = plots.draw(results_of(tmp_path, run), "mxfp4", SHAPE)
    assert {label.get_rotation() for label in figure.axes[-1].get_xticklabels()} == {turned}


def test_one_file_a_format_and_shape(results, tmp_path):
    folder = tmp_path / "new" / "plots"
    made = plots.plot(results, folder)
    assert [path.name for path in made] == ["bench_mxfp4_res_n1024_k2048.png", "bench_nvfp4_res_n512_k2048.png"]
    assert sorted(folder.iterdir()) == sorted(made)
    for path in made:
        assert path.read_bytes().startswith(b"\x89PNG\r\n")
        assert path.stat().st_size > 20_000
    assert plots.plot(results, folder) == made  # drawn anew


def test_a_panel_for_each_mode_and_hadamard_size(results):
    figure = plots.draw(results, "mxfp4", SHAPE)
    titles = [axes.get_title() for axes in figure.axes]
    assert [title for title in titles if title] == ["w4a16", "w4a4, no rotation", "w4a4, Hadamard 64"]
    assert [axes.get_ylabel() for axes in figure.axes if axes.get_ylabel()] == ["TFLOP/s", "times faster than BF16"]
    assert [axes.get_xlabel() for axes in figure.axes if axes.get_xlabel()] == ["batch size m"] * 3
    first, second = figure.get_suptitle().splitlines()
    assert first == "mxfp4, n = 1024, k = 2048 (tiny.qkv.tp1)"
    assert second == "NVIDIA H200, 2026-11-01, 0001_run (paced, cold L2); band: 20th to 80th percentile"


def test_lines_and_bands_are_the_records_numbers(results):
    rates, *_ = plots.draw(results, "mxfp4", SHAPE).axes
    (a,) = results.where(provider="a", shape=SHAPE, m=16, answer=results.answers[2])
    drawn = lines_of(rates)
    assert len(drawn) == 5  # two yardsticks, two providers, the roof
    assert [16, a.value("tflops")] in [pair.tolist() for sizes_rates in drawn.values() for pair in sizes_rates.T]
    bands = [band.get_paths()[0].vertices for band in rates.collections]
    assert any(np.isclose(band, [16, a.value("tflops_p20")]).all(axis=1).any() for band in bands)
    assert any(np.isclose(band, [16, a.value("tflops_p80")]).all(axis=1).any() for band in bands)
    assert (rates.get_xscale(), rates.get_yscale()) == ("log", "log")


def test_the_roof_bends_where_compute_takes_over(results):
    rates, *_ = plots.draw(results, "mxfp4", SHAPE).axes
    (roof,) = [xy for (_, _, style), xy in lines_of(rates).items() if style == ":"]
    sizes, values = roof
    assert values.max() == pytest.approx(100.0)  # TFLOP/s of BF16: w4a16
    # Bytes are 2 n k 4.25 / 16 + 2 m k + 2 m n; at 1000 GB/s they take as long as 2 m n k at 100 TFLOP/s at about m = 31.
    corner = (1024 * 2048 * 4.25 / 8 / 1e12) / (2 * 1024 * 2048 / 100e12 - 2 * (1024 + 2048) / 1e12)
    assert sizes[np.argmax(values > 99.999)] == pytest.approx(corner, rel=0.05)


def test_the_speed_ups_are_those_of_the_run(results):
    _, _, _, speedups, *_ = plots.draw(results, "mxfp4", SHAPE).axes
    values = sorted({round(float(v), 6) for (_, _, style), xy in lines_of(speedups).items() if style == "-" for v in xy[1]})
    assert values == [1.0, 1.5, 2.25, 3.0]


def test_without_bf16_there_are_no_speed_ups(tmp_path):
    figure = plots.draw(results_of(tmp_path, run_of(*swept("a", "w4a16", 3))), "mxfp4", SHAPE)
    assert [axes.get_ylabel() for axes in figure.axes] == ["TFLOP/s"]


def test_without_ceilings_there_is_no_roof(tmp_path):
    figure = plots.draw(results_of(tmp_path, run_of(*swept("a", "w4a16", 3), ceilings=None)), "mxfp4", SHAPE)
    assert [line.get_linestyle() for axes in figure.axes for line in axes.lines] == ["-"]
    assert "measured roof" not in [text.get_text() for text in figure.legends[0].get_texts()]


def test_the_legend_names_what_is_drawn(results):
    figure = plots.draw(results, "mxfp4", SHAPE)
    (legend,) = figure.legends
    names = [text.get_text() for text in legend.get_texts()]
    assert names == ["torch bf16", "torch fp8", "a", "b", "dashed: quantized before", "measured roof"]


def test_thirteen_providers_all_look_different(tmp_path):
    names = [f"provider_{i:02}" for i in range(13)]
    results = results_of(tmp_path, run_of(*(case for name in names for case in swept(name, "w4a16", 3))))
    looks = {(line.get_color(), line.get_marker()) for line in plots.draw(results, "mxfp4", SHAPE).axes[0].lines}
    assert len(looks) == 14


@pytest.mark.parametrize("providers", [1, 12])
@pytest.mark.parametrize("modes", [("w4a16",), ("w4a16", "w4a8", "w4a4", "w4a4_noquant")])
def test_nothing_covers_anything(tmp_path, providers, modes):
    cases = [case for i in range(providers) for mode in modes for case in swept(f"a_long_name_{i}", mode, 3)]
    figure = plots.draw(results_of(tmp_path, run_of(*swept("torch", "bf16", 9), *cases)), "mxfp4", SHAPE)
    figure.draw_without_rendering()
    parts = [*(axes.get_tightbbox() for axes in figure.axes), figure.legends[0].get_window_extent()]
    parts.append(figure._suptitle.get_window_extent())
    assert [pair for pair in combinations(parts, 2) if pair[0].overlaps(pair[1])] == []
    width, height = figure.canvas.get_width_height()
    assert all(box.x0 >= 0 and box.y0 >= 0 and box.x1 <= width and box.y1 <= height for box in parts)


def test_labels_of_batch_sizes_stand_apart():
    assert plots._apart([8192, 16384, 24576, 32768]) == [8192, 16384, 32768]
    assert plots._apart([3, 5]) == [3, 5]


def test_a_run_without_products_has_no_plot(tmp_path):
    with pytest.raises(ResultsError, match="there is no gemm"):
        plots.plot(results_of(tmp_path, run_of(quantization("a", 1, 10))), tmp_path / "plots")
    assert not (tmp_path / "plots").exists()


def test_without_matplotlib_one_sentence_says_so(results, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ValueError, match="plots need matplotlib, which is not installed here: pip install matplotlib"):
        plots.plot(results, tmp_path / "plots")


def test_a_folder_that_cannot_be_made(results, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match=r"cannot write plots to .*/file/plots: Not a directory"):
        plots.plot(results, tmp_path / "file" / "plots")
