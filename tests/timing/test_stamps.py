"""Clock stamps: what they mean, and that their kernels compile for every GPU of this project without one."""

import numpy as np
import pytest

stamps = pytest.importorskip("fp4bench.timing.stamps", reason="needs Triton")


def pair(*sms):
    """Stamps of SMs as ((start ns, start cycles), (stop ns, stop cycles)); None where an SM wrote nothing."""
    found = np.zeros((2, 8, 2), dtype=np.int64)
    for sm, values in enumerate(sms):
        if values:
            found[:, sm] = values
    return found


def test_elapsed_is_the_median_over_sms():
    took = stamps.elapsed(pair(((100, 10), (1100, 1810)), ((105, 900), (1105, 2710)), ((90, 5), (1200, 1900))))
    assert took.seconds == pytest.approx(1000e-9)
    assert took.cycles == 1810


def test_an_sm_that_missed_a_stamp_is_left_out():
    took = stamps.elapsed(pair(None, ((100, 10), (0, 0)), ((100, 10), (300, 410))))
    assert took.seconds == pytest.approx(200e-9)
    assert took.cycles == 400


def test_no_sm_with_both_stamps_is_an_error():
    with pytest.raises(RuntimeError, match="no SM wrote both clock stamps"):
        stamps.elapsed(pair(None, ((100, 10), (0, 0))))


@pytest.mark.parametrize("capability", [90, 100, 120])
def test_the_kernels_compile_for(capability, monkeypatch):
    monkeypatch.setenv("TRITON_DEFAULT_FP_FUSION", "1")  # Triton 3.9 warns of a default that the stamps do not use
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    def ptx(kernel, signature, **constants):
        source = ASTSource(fn=kernel, signature=signature, constexprs=constants)
        return triton.compile(source, target=GPUTarget("cuda", capability, 32), options={"num_warps": 1}).asm["ptx"]

    stamp = ptx(stamps._stamp, {"out": "*i64", "slots": "i32"})
    assert [register for register in ("%smid", "%globaltimer", "%clock64") if register not in stamp] == []
    assert stamp.count("st.global") == 2
    # The timer is read again in the loop: the compiler took none of the reads for a constant.
    spin = ptx(stamps._spin, {"nanoseconds": "i64", "told": "*i64"})
    assert spin.count("%globaltimer") >= 2
    assert spin.count("st.global") == 1
    assert "st.global" not in ptx(stamps._spin, {"nanoseconds": "i64", "told": "constexpr"}, told=None)
