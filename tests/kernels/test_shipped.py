"""No launch of the packaged tables spills; each is compiled here, or was when the file of those that do not was written."""

from dataclasses import replace

import pytest

pytest.importorskip("triton")

from shipped import Decode, Prefill, shipped, spills, unspilled

SHIPPED = shipped()


@pytest.mark.triton_3_6
@pytest.mark.parametrize("one", SHIPPED, ids=str)
def test_no_shipped_launch_spills(one, tmp_path):
    assert one.compilation().key in unspilled() or spills(one, tmp_path) is None


@pytest.mark.triton_3_6
def test_the_file_of_those_that_spill_nothing_is_of_today():
    """Otherwise they are compiled each time, which takes minutes."""
    today = {one.compilation().key for one in SHIPPED}
    assert today == unspilled(), "a kernel, a launch or Triton changed: python tests/shipped.py, with Triton 3.6"


@pytest.mark.triton_3_6
def test_what_spills_is_seen(tmp_path):
    one = next(one for one in SHIPPED if isinstance(one, Decode) and one.launch.tiles >= 4 and one.columns == 16)
    assert "bytes of the stack" in spills(replace(one, launch=replace(one.launch, max_registers=32)), tmp_path)


@pytest.mark.triton_3_6
def test_what_decides_is_in_the_key(monkeypatch):
    """And so is what the kernel calls: that is Triton's to hash, whose own cache stands on it."""
    decode, prefill = (next(one for one in SHIPPED if isinstance(one, kind)) for kind in (Decode, Prefill))
    others = [replace(decode, k=decode.k + 64), replace(decode, launch=replace(decode.launch, max_registers=64))]
    others.append(replace(prefill, sharers={"one": "many"}.get(prefill.sharers, "one")))
    assert len({one.compilation().key for one in (decode, prefill, *others)}) == 5
    known = unspilled()
    assert {decode.compilation().key, prefill.compilation().key} <= known
    for changed, value in (("__version__", "3.6.1"), ("experimental.gluon._runtime.GluonASTSource.hash", lambda source: "x")):
        with monkeypatch.context() as patch:
            patch.setattr(f"triton.{changed}", value)
            assert not {decode.compilation().key, prefill.compilation().key} & known
