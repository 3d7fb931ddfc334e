"""Which launch a product gets."""

import json
from dataclasses import replace

import pytest

from fp4bench.devices import Device
from fp4bench.kernels import configs
from fp4bench.kernels.configs import Entry, Table, Work
from fp4bench.kernels.decode import DecodeConfig
from fp4bench.kernels.prefill_launch import PrefillConfig

H200 = Device("cuda:0", "NVIDIA H200", (9, 0), 132, 60 << 20)
WORK = Work("bf16", "mxfp4", 8, 8192, 8192)


def entry(m, n=8192, k=8192, format="mxfp4", tiles=1):
    return Entry(Work("bf16", format, m, n, k), DecodeConfig(tiles=tiles), 1e-5)


def test_the_nearest_m_from_its_own_on_goes_first_and_then_the_nearest_shape():
    entries = [entry(16, tiles=1), entry(8, n=16384, tiles=2), entry(8, n=10240, tiles=3), entry(1, tiles=4)]
    assert configs.nearest(WORK, entries).launch.tiles == 3
    assert configs.nearest(replace(WORK, m=2), entries).launch.tiles == 3
    assert configs.nearest(replace(WORK, m=1), entries).launch.tiles == 4
    assert configs.nearest(replace(WORK, m=12), entries).launch.tiles == 1


def test_an_m_that_is_at_least_its_own_goes_before_a_nearer_one_below():
    below, above = (Entry(Work("bf16", "mxfp4", m, 8192, 8192), PrefillConfig(columns=m), 1e-5) for m in (128, 256))
    assert configs.nearest(replace(WORK, m=140), [below, above]) == above
    assert configs.nearest(replace(WORK, m=300), [below, above]) == above
    assert configs.nearest(replace(WORK, m=300), [below]) == below


def test_a_tile_too_narrow_for_all_rows_serves_only_those_it_holds():
    narrow = Entry(Work("bf16", "mxfp4", 64, 8192, 8192), PrefillConfig(columns=64), 1e-5)
    assert configs.nearest(replace(WORK, m=33), [narrow]) == narrow
    assert configs.nearest(replace(WORK, m=65), [narrow]) is None


def test_a_launch_serves_no_more_rows_than_it_was_tuned_for_no_other_format_and_no_far_shape():
    assert configs.nearest(WORK, [entry(4), entry(8, format="nvfp4"), entry(8, n=8192 * 9)]) is None


def test_without_an_entry_there_is_a_default_that_fills_the_gpu():
    for n in (16, 2048, 8192, 57344):
        launch = configs.default(replace(WORK, n=n), H200)
        ctas = -(-n // (16 * launch.tiles))
        assert ctas <= 132 if launch.warps == 16 else ctas > 4 * 132
        assert n < 16 * 132 or ctas > 120
    assert configs.default(WORK, H200) in configs.candidates(WORK, H200)


@pytest.mark.parametrize(("m", "columns"), [(17, 32), (64, 64), (65, 128), (1024, 128)])
def test_more_rows_than_the_decode_kernel_takes_go_to_the_other(m, columns):
    assert configs.default(replace(WORK, m=m), H200).columns == columns


def test_work_without_a_kernel_is_an_error():
    with pytest.raises(ValueError, match="no kernel"):
        configs.default(replace(WORK, operand="e4m3", format="nvfp4"), H200)


@pytest.mark.parametrize("m", [1, 16, 17, 64, 128, 300, 5000])
@pytest.mark.parametrize(("operand", "format"), [("bf16", "mxfp4"), ("bf16", "nvfp4"), ("e4m3", "mxfp4")])
def test_candidates_fit_the_gpu_and_the_default_is_one(operand, format, m):
    work = Work(operand, format, m, 8192, 8192)
    found = configs.candidates(work, H200)
    assert found[0] == configs.default(work, H200)
    assert len(found) == len(set(found)) > 8
    for launch in found:
        if isinstance(launch, PrefillConfig):
            size = launch.shared_bytes(1 if operand == "e4m3" else 2, 2 if format == "nvfp4" else 1)
            assert size * launch.ctas <= 227 * 1024
            assert launch.depth * (1 if operand == "e4m3" else 2) >= 128
            assert launch.columns >= min(m, 128)
            assert launch.accumulators < launch.registers
    assert any(isinstance(launch, PrefillConfig) for launch in found) == (m > 8 or operand == "e4m3")


def test_a_table_is_read_as_it_was_written(tmp_path):
    tail = PrefillConfig(rows=64, columns=128, depth=128, stages=8, along_k=True)
    wide = Entry(replace(WORK, m=512), PrefillConfig(columns=256, streamed=False, tail=tail), 1e-3)
    table = Table("NVIDIA H200", (9, 0), 132, {"triton": "3.6.0"}, (entry(8, tiles=3), entry(16), wide))
    path = tmp_path / "table.json"
    path.write_text(configs.dump(table))
    assert configs.load(path) == table


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"format": 9}, "another format"),
        ({"entries": [{"operand": "bf16"}]}, "no 'format'"),
        ({"entries": [WORK.__dict__ | {"seconds": -1.0, "launch": {"kernel": "decode"}}]}, "seconds"),
        ({"entries": [WORK.__dict__ | {"seconds": 1.0, "launch": {"kernel": "sorcery"}}]}, "sorcery"),
        ({"entries": [WORK.__dict__ | {"seconds": 1.0, "launch": {"kernel": "decode", "tiles": 99}}]}, "tiles"),
        ({"entries": [WORK.__dict__ | {"seconds": 1.0, "launch": {"kernel": "decode"}}] * 2}, "two entries"),
        ({"entries": [WORK.__dict__ | {"seconds": 1.0, "launch": {"kernel": "prefill", "tail": 64}}]}, "a launch of its own"),
        ({"entries": [WORK.__dict__ | {"seconds": 1.0, "launch": {"kernel": "prefill", "tail": {"spell": 1}}}]}, "no spell"),
    ],
)
def test_a_file_that_is_no_table_is_one_sentence(tmp_path, change, why):
    path = tmp_path / "table.json"
    good = {"format": 1, "gpu": "g", "capability": [9, 0], "sm_count": 132, "versions": {}, "entries": []}
    path.write_text(json.dumps(good | change))
    with pytest.raises(ValueError, match=why) as error:
        configs.load(path)
    assert str(path) in str(error.value)


def test_a_folder_of_ones_own_goes_first_and_a_like_gpu_lends_what_is_nearer(tmp_path, monkeypatch):
    monkeypatch.setenv(configs.FOLDER_VARIABLE, str(tmp_path))
    table = Table("NVIDIA Own", (9, 0), 99, {}, (entry(8, tiles=5),))
    lent = Table("NVIDIA Lender", (9, 0), 99, {}, (entry(8, tiles=6), entry(16, tiles=7), entry(8, n=16384, tiles=8)))
    (tmp_path / "own.json").write_text(configs.dump(table))
    (tmp_path / "a-lender.json").write_text(configs.dump(lent))
    assert configs.choose(WORK, replace(H200, name="NVIDIA Own", sm_count=99)).tiles == 5
    own = replace(H200, name="NVIDIA Own", sm_count=99)
    assert configs.choose(replace(WORK, m=16), own).tiles == 7
    assert configs.choose(replace(WORK, n=12000), own).tiles == 8
    assert configs.tables_of(own) == [table, lent]
    assert configs.tables_of(replace(H200, name="NVIDIA Like", sm_count=99)) == [lent, table]
    assert configs.tables_of(replace(H200, name="NVIDIA Other", sm_count=98)) == []


def test_the_tables_of_the_package_are_tables():
    for path in configs._PACKAGED.glob("*.json"):
        assert configs.load(path).entries
