"""The targets of a CUDA library: containers made up byte by byte, and what runs where."""

import struct

import pytest
from cuda_library import MAGIC, PTX, SASS, container, image

from fp4bench.providers.fatbin import runs_on, targets


def library(tmp_path, data):
    path = tmp_path / "lib.so"
    path.write_bytes(data)
    return path


def test_targets_of_a_made_up_library(tmp_path):
    data = (
        b"\x7fELF" + bytes(60) + container(image(SASS, 90, 1 << 20), image(PTX, 90))
        + bytes(8) + container(image(SASS, 100, 1 << 21), image(SASS, 80), image(SASS, 80, 1 << 24))
    )  # fmt: skip
    assert targets(library(tmp_path, data)) == ("sm_80", "sm_90a", "sm_100f", "compute_90")


def test_the_magic_elsewhere_and_a_container_cut_off_give_nothing(tmp_path):
    magic = struct.pack("<I", MAGIC)
    data = (
        b"abcd" + magic + bytes(8) + container(image(SASS, 75)) + magic + b"\1\0\x10\0" + struct.pack("<Q", 1 << 40) + bytes(8)
    )
    assert targets(library(tmp_path, data)) == ("sm_75",)


@pytest.mark.parametrize("data", [b"", b"\x7fELF", bytes(200), container()], ids=["empty", "tiny", "zeros", "no image"])
def test_a_library_without_code_for_gpus_has_no_targets(data, tmp_path):
    assert targets(library(tmp_path, data)) == ()


def test_an_unknown_kind_of_image_is_left_out(tmp_path):
    assert targets(library(tmp_path, container(image(7, 90), image(SASS, 90)))) == ("sm_90",)


def test_a_missing_library_is_an_error(tmp_path):
    with pytest.raises(FileNotFoundError):
        targets(tmp_path / "none.so")


@pytest.mark.parametrize(
    ("target", "runs", "does_not"),
    [
        ("sm_80", [(8, 0), (8, 6), (8, 9)], [(7, 5), (9, 0), (12, 0)]),
        ("sm_86", [(8, 6), (8, 9)], [(8, 0), (9, 0)]),
        ("sm_90a", [(9, 0)], [(8, 9), (10, 0)]),
        ("sm_100a", [(10, 0)], [(10, 3), (12, 0)]),
        ("sm_100f", [(10, 0), (10, 3)], [(9, 0), (12, 0)]),
        ("sm_120f", [(12, 0), (12, 1)], [(10, 0)]),
        ("compute_80", [(8, 0), (9, 0), (10, 0), (12, 0)], [(7, 5)]),
        ("compute_90a", [(9, 0)], [(10, 0)]),
        ("compute_100f", [(10, 0), (10, 3)], [(9, 0), (12, 0)]),
    ],
)
def test_what_code_runs_where(target, runs, does_not):
    assert [capability for capability in runs if not runs_on((target,), capability)] == []
    assert [capability for capability in does_not if runs_on((target,), capability)] == []
    assert all(runs_on(("sm_75", target), capability) for capability in runs)


def test_no_code_runs_nowhere():
    assert not runs_on((), (9, 0))
