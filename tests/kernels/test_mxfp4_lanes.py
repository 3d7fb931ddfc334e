"""MXFP4 at the speed of memory. The inline assembly runs here, in numpy (`ptx`), a warp at a time, against the eager truth; the
kernel around it, which Triton's interpreter cannot run because of that assembly, is compiled, and its PTX and registers are
read. That the whole writes the right bytes to the right places is tested from its PTX (`ptx_machine`), and on a GPU here and in
test_quantize.py.
"""

import numpy as np
import pytest
import torch

from fp4bench.formats import MXFP4, ScaleRule, scales
from fp4bench.quantize import quantize

triton = pytest.importorskip("triton", reason="needs Triton")

import ptx  # noqa: E402
from compiling import compile_gluon, resources  # noqa: E402
from emulating import emulate, from_ptx  # noqa: E402

from fp4bench.kernels import mxfp4_lanes as kernel  # noqa: E402

ROTATIONS = [None, 16, 32, 64, 128]
RULES = kernel.RULES
G, T = ptx.LANES // 4, ptx.LANES % 4

each_rotation = pytest.mark.parametrize("hadamard", ROTATIONS, ids="had{}".format)


def randn(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


# --- The assembly, run in numpy ---------------------------------------------------------------------------------------------


def pairs(x, hadamard, lane):
    """Pairs of a result, of both rows."""
    count = lane // 2
    low, high = ptx.rows_of_lanes(x, lane)
    nothing = [np.zeros(32, dtype=np.uint32)] * count
    if hadamard is None:
        return [ptx.run(kernel._rearranged(lane), [*nothing, *rows])[:count] for rows in (low, high)]
    done = ptx.run(kernel._rotated(hadamard), [*nothing, *nothing, *low, *high, *[ptx.LANES.astype(np.uint32)] * count])
    return done[:count], done[count : 2 * count]


def emulated(x, rule, hadamard, lane):
    """x (16, 4 lane) as one warp quantizes it. -> codes uint8 (16, 2 lane), scale bytes uint8 (16, lane / 8)."""
    both = pairs(x, hadamard, lane)
    zero = np.zeros(32, dtype=np.uint32)
    of_lane = []
    for rows in both:
        largest = zero
        for i in range(0, len(rows), 4):
            largest = np.maximum(
                largest.view(np.uint16), ptx.run(kernel._largest_pair(), [zero, *rows[i : i + 4]])[0].view(np.uint16)
            ).view(np.uint32)
        of_lane.append(largest)
    top = ptx.run(kernel._largest_of_block(lane), [zero, *of_lane])[0]
    unit = {16: 0.25, 64: 0.125}.get(hadamard, 1.0)
    codes, bytes_ = torch.empty(16, lane // 2, 4, dtype=torch.int32), torch.empty(16, 4, dtype=torch.uint8)
    for half, bits in enumerate((top << np.uint32(16), top & np.uint32(0xFFFF0000))):
        byte = scales.e8m0_encode(torch.from_numpy(bits.view(np.float32).copy()) * unit, rule)
        multiplier = (scales.e8m0_decode_inverse(byte) * unit).numpy().view(np.uint32)
        twice = multiplier | multiplier >> np.uint32(16)
        bytes_[G + 8 * half, T] = byte.view(torch.uint8)
        for word in range(lane // 8):
            done = ptx.run(kernel._codes(), [zero, *both[half][4 * word : 4 * word + 4], twice])[0]
            codes.view(16, 4, lane // 8, 4)[G + 8 * half, T, word, 0] = torch.from_numpy(done.view(np.int32))
    words = codes.view(16, 4 * (lane // 8), 4)[..., 0].contiguous()
    return words.view(torch.uint8), bytes_[:, :: max(1, 32 // lane)]


def assert_same(x, rule, hadamard, lane):
    want = quantize(x, MXFP4, rule=rule, hadamard=hadamard)
    codes, bytes_ = emulated(x, rule, hadamard, lane)
    assert torch.equal(bytes_, want.scales.view(torch.uint8))
    finite = (bytes_ != scales.E8M0_NAN).repeat_interleave(16, dim=1)
    assert torch.equal(codes[finite], want.codes[finite])


@each_rotation
@pytest.mark.parametrize("rule", RULES, ids=str)
def test_a_warp_has_the_bits_of_the_eager_truth(rule, hadamard):
    lane = kernel.shape(hadamard).lane
    for seed, power in enumerate((0, -20, 90, -120)):
        assert_same((randn(16, 4 * lane, seed=seed) * 2.0**power).bfloat16(), rule, hadamard, lane)


@pytest.mark.parametrize("rule", RULES, ids=str)
@pytest.mark.parametrize("mantissa", [1.0, 1.4921875, 1.5, 1.5078125, 1.75, 1.9921875])
def test_numbers_near_the_bounds_of_a_scale_and_of_bfloat16(mantissa, rule):
    # Blocks whose largest is `first`, of its own magnitude and of any below, subnormal numbers included.
    numbers = torch.arange(1 << 16).to(torch.int16).view(torch.bfloat16)
    for power in (-133, -130, -126, -100, -1, 0, 126, 127):
        first = torch.tensor(mantissa * 2.0**power, dtype=torch.float64).bfloat16()
        below = numbers[numbers.abs() <= first]
        near = below[below.abs() >= first / 64]
        choose = torch.Generator().manual_seed(power + 200)
        x = torch.stack([own[torch.randint(len(own), (16, 32), generator=choose)] for own in (below, near)], dim=1).flatten(1)
        x[:, ::32] = first
        assert_same(x, rule, None, 16)


@each_rotation
def test_what_is_no_number_is_a_nan_of_its_block_alone(hadamard):
    lane = kernel.shape(hadamard).lane
    for value in (float("inf"), float("nan")):
        x = randn(16, 4 * lane).bfloat16()
        x[3, 1], x[12, -1] = value, -value
        with np.errstate(invalid="ignore"):  # infinity less infinity
            assert_same(x, ScaleRule.FLOOR, hadamard, lane)


@pytest.mark.parametrize("size", [32, 128])
def test_rotations_are_orthonormal_to_the_last_bit(size):
    bits = np.float32(size**-0.5).view(np.uint32)
    assert f"0f{bits:08x};" in kernel._rotated(size)


def test_blocks_of_zeros_keep_their_signs():
    x = torch.zeros(16, 64, dtype=torch.bfloat16)
    x[:, 1::3] = -0.0
    assert_same(x, ScaleRule.FLOOR, None, 16)
    assert emulated(x, ScaleRule.FLOOR, None, 16)[0].any()


# --- Compiled ---------------------------------------------------------------------------------------------------------------


def test_few_rows_are_spread_over_more_programs():
    how = kernel.shape(64)
    assert how.of(1024 * how.rows) == how
    assert how.of(1024 * how.rows - 1).rows == how.rows // how.repeats


@each_rotation
@pytest.mark.parametrize("rows", [1, 10**6])
def test_loads_come_first_and_nothing_goes_through_shared_memory(rows, hadamard, tmp_path):
    how = kernel.shape(hadamard).of(rows)
    types = {"x": "*bf16", "codes": "*i32", "scales": "*u8", "rows": "i32"}
    constants = {"LANE": how.lane, "REPEATS": how.repeats, "HADAMARD": hadamard or 1, "RULE": "floor"}
    binary = compile_gluon(kernel._quantize, types, constants, warps=how.warps)
    text = binary.asm["ptx"]
    loads = 2 * how.repeats * how.lane // 8
    assert text.count("ld.global") == text.count("ld.global.v4") == loads
    assert text.rindex("ld.global") < text.index("max.u16x2")  # none waits for the result of another
    assert text.count("mma.sync") == (0 if hadamard is None else 2 * loads)
    assert not any(instruction in text for instruction in ("st.shared", "bar.sync"))
    assert binary.metadata.shared == 0
    registers, stack = resources(binary, tmp_path)
    assert registers <= 80
    assert stack == 0


# --- What fits, and a GPU ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("x", "rule", "hadamard", "whether"),
    [
        (torch.ones(3, 64).bfloat16(), ScaleRule.EVEN, None, True),
        (torch.ones(3, 64).bfloat16(), ScaleRule.EVEN, 64, True),
        (torch.ones(3, 96).bfloat16(), ScaleRule.EVEN, None, False),
        (torch.ones(3, 96).bfloat16(), ScaleRule.EVEN, 16, True),
        (torch.ones(3, 80).bfloat16(), ScaleRule.EVEN, 16, False),  # a block of 32 is half a rotation and half nothing
        (torch.ones(3, 64).bfloat16(), ScaleRule.EVEN, 128, False),
        (torch.ones(3, 128).bfloat16()[:, :64], ScaleRule.EVEN, None, False),
        (torch.ones(193).bfloat16()[1:].view(3, 64), ScaleRule.EVEN, None, False),
        (torch.ones(3, 64).half(), ScaleRule.EVEN, None, False),
        (torch.ones(3, 64).bfloat16(), ScaleRule.QUTLASS_ABS_MAX, None, False),
    ],
)
def test_what_fits(x, rule, hadamard, whether):
    assert kernel.fits(x, rule, hadamard) is whether


def check(m, rule, hadamard, device):
    x = randn(m, 1280, seed=m).bfloat16()
    assert kernel.fits(x, rule, hadamard)
    want = quantize(x, MXFP4, rule=rule, hadamard=hadamard)
    codes = torch.full((m + 1, 640), 0xA5, dtype=torch.uint8, device=device)
    bytes_ = torch.full((m + 1, 40), 0xA5, dtype=torch.uint8, device=device)
    kernel.quantize(x.to(device), codes[:m], bytes_[:m], rule, hadamard)
    assert torch.equal(codes[:m].cpu(), want.codes)
    assert torch.equal(bytes_[:m].cpu(), want.scales.view(torch.uint8))
    assert torch.equal(codes[m:] ^ 0xA5, torch.zeros_like(codes[m:]))
    assert torch.equal(bytes_[m:] ^ 0xA5, torch.zeros_like(bytes_[m:]))


@pytest.mark.gpu
@each_rotation
@pytest.mark.parametrize("rule", RULES, ids=str)
@pytest.mark.parametrize("m", [1, 77, 9000])
def test_a_gpu_has_the_bits_of_the_eager_truth(m, rule, hadamard):
    check(m, rule, hadamard, "cuda")


@from_ptx
@pytest.mark.parametrize(("hadamard", "rule"), list(zip(ROTATIONS, (*RULES, RULES[0]), strict=True)), ids=str)
def test_the_ptx_has_the_bits_of_the_eager_truth(hadamard, rule, monkeypatch):
    emulate(monkeypatch, (kernel, "_quantize", ()))
    check(77, rule, hadamard, "cpu")
