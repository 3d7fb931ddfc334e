"""NVFP4 at the speed of memory, tested as `test_mxfp4_lanes` does it."""

import numpy as np
import pytest
import torch

from fp4bench import quantize as eager
from fp4bench.formats import NVFP4, scales

triton = pytest.importorskip("triton", reason="needs Triton")

import ptx  # noqa: E402
from compiling import compile_gluon, resources  # noqa: E402
from emulating import emulate, from_ptx  # noqa: E402

from fp4bench.kernels import nvfp4_lanes as kernel  # noqa: E402
from fp4bench.kernels import quantize as fused  # noqa: E402

ROTATIONS = [None, 32, 64]
G, T = ptx.LANES // 4, ptx.LANES % 4

each_rotation = pytest.mark.parametrize("hadamard", ROTATIONS, ids="had{}".format)


def randn(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


# --- The assembly, run in numpy ---------------------------------------------------------------------------------------------


def floats(x, hadamard, lane):
    """Values 0 to 3 and values 4 to 7 of each eight of a lane, of both rows."""
    count = lane // 2
    low, high = ptx.rows_of_lanes(x, lane)
    nothing = [np.zeros(32, dtype=np.uint32)] * count
    if hadamard is None:
        done = [ptx.run(kernel._unpacked(lane), [*nothing, *nothing, *rows]) for rows in (low, high)]
        return [(of_row[:count], of_row[count : 2 * count]) for of_row in done]
    lanes = [ptx.LANES.astype(np.uint32)] * count
    done = ptx.run(kernel._rotated(hadamard), [*nothing * 4, *low, *high, *lanes])
    return [(done[:count], done[count : 2 * count]), (done[2 * count : 3 * count], done[3 * count : 4 * count])]


def emulated(x, s, hadamard, lane):
    """x (16, 4 lane) as one warp quantizes it. -> codes uint8 (16, 2 lane), scale bytes uint8 (16, lane / 4)."""
    zero, unit = np.zeros(32, dtype=np.uint32), {64: 0.125}.get(hadamard, 1.0)
    codes, bytes_ = torch.empty(16, 4, lane // 8, dtype=torch.int32), torch.empty(16, 4, dtype=torch.uint8)
    for half, (first, second) in enumerate(floats(x, hadamard, lane)):
        eights = [[*first[i : i + 4], *second[i : i + 4]] for i in range(0, lane // 2, 4)]
        top = np.max([ptx.run(kernel._largest(), [zero, *eight])[0] for eight in eights], axis=0)
        if lane == 8:
            top = np.maximum(top, top[ptx.LANES ^ 1])
        byte = eager._two_level_scales(torch.from_numpy(top.view(np.float32).copy()) * unit, s, 0.0)
        multiplier = (eager._two_level_multiplier(byte, s) * unit).numpy().view(np.uint32)
        bytes_[G + 8 * half, T] = byte.view(torch.uint8)
        for word, eight in enumerate(eights):
            done = ptx.run(kernel._codes(), [zero, *eight, multiplier])[0]
            codes[G + 8 * half, T, word] = torch.from_numpy(done.view(np.int32))
    return codes.flatten(1).contiguous().view(torch.uint8), bytes_[:, :: max(1, 16 // lane)]


def assert_same(x, s, hadamard):
    lane = kernel.shape(hadamard).lane
    want = eager.quantize(x, NVFP4, hadamard=hadamard, tensor_scale=s)
    codes, bytes_ = emulated(x, s, hadamard, lane)
    numbers = want.scales.view(torch.uint8) != scales.E4M3_NAN
    assert torch.equal(bytes_ != scales.E4M3_NAN, numbers)
    assert torch.equal(bytes_[numbers], want.scales.view(torch.uint8)[numbers])
    numbers = numbers.repeat_interleave(8, dim=1)
    assert torch.equal(codes[numbers], want.codes[numbers])


@each_rotation
@pytest.mark.parametrize("s", [1.0, 0.37, 1000.0, 3.0e-5], ids=str)
def test_a_warp_has_the_bits_of_the_eager_truth(s, hadamard):
    for seed, power in enumerate((0, -6, 5, -20)):
        x = randn(16, 4 * kernel.shape(hadamard).lane, seed=seed) * 2.0**power
        x *= torch.exp2(4 * randn(16, 1, seed=seed + 9))
        assert_same(x.bfloat16(), torch.tensor(s), hadamard)


def test_ties_are_rounded_to_even_and_zeros_keep_their_signs():
    quarters = torch.arange(-24, 25).float() / 4
    x = quarters[torch.randint(49, (16, 64), generator=torch.Generator().manual_seed(0))]
    x[:, ::16], x[3, 16:32] = 6.0, -0.0
    assert_same(x.bfloat16(), torch.tensor(1.0), None)


@each_rotation
def test_what_is_no_number_is_a_nan_of_its_rotation_alone(hadamard):
    for value in (float("inf"), float("nan")):
        x = randn(16, 4 * kernel.shape(hadamard).lane).bfloat16()
        x[3, 1], x[12, -1] = value, -value
        with np.errstate(invalid="ignore"):  # infinity less infinity
            assert_same(x, torch.tensor(2.0), hadamard)


# --- Compiled ---------------------------------------------------------------------------------------------------------------


@each_rotation
@pytest.mark.parametrize("given", ["number", "largest"])
@pytest.mark.parametrize("rows", [1, 10**6])
def test_loads_come_first_and_nothing_goes_through_shared_memory(rows, given, hadamard, tmp_path):
    how = kernel.shape(hadamard).of(rows)
    types = {"x": "*bf16", "codes": "*i32", "scales": "*u8", "tensor_scale": "*fp32", "parts": "i32", "rows": "i32"}
    types["source"] = "fp32" if given == "number" else "*i32"
    constants = {"LANE": how.lane, "REPEATS": how.repeats, "HADAMARD": hadamard or 1, "GIVEN": given}
    binary = compile_gluon(kernel._quantize, types, constants, warps=how.warps, enable_fp_fusion=False)
    text = binary.asm["ptx"]
    loads = 2 * how.repeats * how.lane // 8
    assert text.count("ld.global.v4") == loads
    assert text.count("mma.sync") == (0 if hadamard is None else 2 * loads)
    if given == "number":  # the largest of a thousand parts is found by all warps
        assert text.rindex("ld.global") < text.index("max.NaN.f32")
        assert not any(instruction in text for instruction in ("st.shared", "bar.sync"))
    assert resources(binary, tmp_path)[1] == 0  # nothing is spilled


@each_rotation
def test_the_largest_magnitude_is_found_without_shared_memory_in_the_loop(hadamard, tmp_path):
    how = kernel.shape(hadamard)
    constants = {"LANE": how.lane, "REPEATS": how.repeats, "HADAMARD": hadamard or 1}
    types = {"x": "*bf16", "parts": "*i32", "rows": "i32"}
    binary = compile_gluon(kernel._largest_of_all, types, constants, warps=how.warps)
    text = binary.asm["ptx"]
    assert text.count("ld.global.v4") == text.count("ld.global") == 2 * how.repeats * how.lane // 8
    assert text.rindex("mma.sync" if hadamard else "max.NaN.f32") < text.index("bar.sync")
    assert resources(binary, tmp_path)[1] == 0  # nothing is spilled


# --- What fits, and a GPU ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("x", "hadamard", "whether"),
    [
        (torch.ones(3, 64).bfloat16(), None, True),
        (torch.ones(3, 64).bfloat16(), 64, True),
        (torch.ones(3, 96).bfloat16(), 32, True),
        (torch.ones(3, 96).bfloat16(), None, False),
        (torch.ones(3, 64).bfloat16(), 16, False),
        (torch.ones(3, 128).bfloat16(), 128, False),
        (torch.ones(3, 64), None, False),
    ],
)
def test_what_fits(x, hadamard, whether):
    assert kernel.fits(x, hadamard) is whether


def check(m, given, hadamard, device):
    x = randn(m, 1280, seed=m).bfloat16()
    assert kernel.fits(x, hadamard)
    s = {"number": 3.7, "tensor": torch.tensor(0.11), "largest": None}[given]
    want = eager.quantize(x, NVFP4, hadamard=hadamard, tensor_scale=s)
    # One row more than is written.
    out = fused.empty(torch.empty(m + 1, 1280, dtype=torch.bfloat16, device=device), NVFP4, hadamard=hadamard)
    bytes_ = out.scales.view(torch.uint8)
    out.codes.fill_(0xA5), bytes_.fill_(0xA5)
    s = s.to(device) if given == "tensor" else s
    source, parts, kind = fused._encode_scale_source(x.to(device), out, s, False)
    kernel.quantize(x.to(device), out.codes[:m], bytes_[:m], out.tensor_scale, source, parts, kind, hadamard)
    assert kind == given
    assert out.tensor_scale == want.tensor_scale
    assert torch.equal(out.codes[:m].cpu(), want.codes)
    assert torch.equal(bytes_[:m].cpu(), want.scales.view(torch.uint8))
    assert (out.codes[m:] == 0xA5).all()
    assert (bytes_[m:] == 0xA5).all()


@pytest.mark.gpu
@each_rotation
@pytest.mark.parametrize("given", ["number", "tensor", "largest"])
@pytest.mark.parametrize("m", [1, 77, 9000])
def test_a_gpu_has_the_bits_of_the_eager_truth(m, given, hadamard):
    check(m, given, hadamard, "cuda")


@from_ptx
@pytest.mark.parametrize(("hadamard", "given"), list(zip(ROTATIONS, ["largest", "number", "tensor"], strict=True)), ids=str)
def test_the_ptx_has_the_bits_of_the_eager_truth(hadamard, given, monkeypatch):
    emulate(monkeypatch, (kernel, "_quantize", ()), (kernel, "_largest_of_all", ()), (fused, "largest_of_tiles", ()))
    check(77, given, hadamard, "cpu")
