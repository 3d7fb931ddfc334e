"""Run by test_quantize.py in a process whose Triton interprets: the kernels against `fp4bench.quantize`, byte by byte."""

import sys
from math import inf, nan

import contract
import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from interpreting import put_right
from torch.nn.functional import pad

from fp4bench import quantize as eager
from fp4bench.formats import FORMATS, MXFP4, NVFP4, ScaleRule, e2m1, layouts
from fp4bench.kernels import experts
from fp4bench.kernels import quantize as fused
from fp4bench.kernels.fp8_rows import Columns
from fp4bench.kernels.weights import E4M3_ORDER

ROTATIONS = (None, 16, 32, 64, 128)
DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def raw(tensor):
    return tensor.view(torch.uint8)


def randn(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def rules_of(fmt):
    return [rule for rule in fmt.rules if rule in fused.RULES]


def by_kernel(x, format, rule, tensor_scale):
    q = fused.quantize(x, FORMATS[format], rule=ScaleRule(rule), tensor_scale=tensor_scale)
    return contract.Bytes(q.codes, raw(q.scales), None if q.tensor_scale is None else q.tensor_scale.item())


def check_contract_blocks():
    blocks = [block for block in contract.BLOCKS if ScaleRule(block.rule) in fused.RULES]
    for block in blocks:
        if block.format == "nvfp4" and block.tensor_scale is None:  # the others below, in company
            contract.check_block(by_kernel, block)
    for group in contract.together(blocks):
        contract.check_blocks_together(by_kernel, group)
    for rule in rules_of(MXFP4):
        contract.check_ulp_sweep(by_kernel, str(rule))


def compare(x, fmt, **options):
    got, want = fused.quantize(x, fmt, **options), eager.quantize(x, fmt, **options)
    assert torch.equal(raw(got.scales), raw(want.scales)), (fmt, options)
    finite = (raw(want.scales) != contract.NAN_SCALE[str(fmt)]).repeat_interleave(fmt.block_size // 2, dim=-1)
    assert torch.equal(got.codes[finite], want.codes[finite]), (fmt, options)
    assert got.tensor_scale == want.tensor_scale
    assert (got.format, got.rule, got.hadamard, got.k) == (want.format, want.rule, want.hadamard, want.k)


def check_rotations():
    """Every format, rule, rotation and dtype, k a multiple of none of them; and rows that are no neighbours in memory."""
    x = randn(3, 200) * torch.exp2(torch.tensor([[0.0], [-12.0], [9.0]]))
    for fmt in FORMATS.values():
        for rule in rules_of(fmt):
            for hadamard in ROTATIONS:
                for dtype in DTYPES:
                    compare(x.to(dtype), fmt, rule=rule, hadamard=hadamard)
        compare(randn(5, 2, 80)[..., :72], fmt)
        compare(randn(64, 5).T, fmt)
        compare(randn(300), fmt, hadamard=64)
    for tensor_scale in (0.37, torch.tensor(12.0)):
        compare(x, NVFP4, tensor_scale=tensor_scale)


@settings(max_examples=40, deadline=None, derandomize=True)
@given(data=st.data())
def check_any_shape(data):
    fmt = data.draw(st.sampled_from(sorted(FORMATS.values(), key=str)))
    shape = data.draw(st.tuples(st.integers(1, 40), st.integers(1, 300)))
    bits = torch.randint(-(1 << 31), 1 << 31, shape, generator=torch.Generator().manual_seed(data.draw(st.integers(0, 1000))))
    x = bits.to(torch.int32).view(torch.float32) if data.draw(st.booleans()) else randn(*shape)
    compare(
        x.to(data.draw(st.sampled_from(DTYPES))),
        fmt,
        rule=data.draw(st.sampled_from(rules_of(fmt))),
        hadamard=data.draw(st.sampled_from(ROTATIONS)) if x.abs().nan_to_num(inf).amax() < 100 else None,
    )


def check_blocked_scales():
    for fmt in FORMATS.values():
        for m, k in ((1, 32), (130, 200), (257, 64)):
            x = randn(m, k)
            out = fused.empty(x, fmt, blocked=True)
            raw(out.scales).fill_(0xA5)
            got, want = fused.quantize(x, fmt, blocked=True, out=out), eager.quantize(x, fmt)
            assert got is out
            assert torch.equal(raw(got.scales), raw(layouts.to_blocked(want.scales)))
            assert torch.equal(got.codes, want.codes)
            assert torch.equal(raw(got.row_major().scales), raw(want.scales))


def assert_same_e4m3(got, want):
    """The same bytes; of NaN only that it is one."""
    got, want = raw(got), raw(want)
    numbers = (want & 0x7F) != 0x7F
    assert torch.equal((got & 0x7F) != 0x7F, numbers)
    assert torch.equal(got[numbers], want[numbers])


def in_fragment_order(values):
    padded = pad(raw(values), (0, -values.shape[-1] % 64))
    return padded.unflatten(-1, (-1, 16))[..., list(E4M3_ORDER)].flatten(-2)


def in_order_of_experts(values):
    padded = pad(raw(values), (0, -values.shape[-1] % 64))
    of_32 = padded.unflatten(-1, (-1, 32))[..., list(experts.COLUMNS)]
    return of_32.unflatten(-1, (2, 16))[..., list(E4M3_ORDER)].flatten(-3)


def check_fp8_rows():
    """Also rows whose scale is float32's smallest normal number, near its largest, infinite and NaN."""
    powers = torch.tensor([0, -120, 120, -140, 10, 0, 0, -63, -20])
    for dtype in DTYPES:
        for k in (1, 32, 200, 1024):
            x = (randn(9, k, seed=k) * torch.exp2(powers.float())[:, None]).to(dtype)
            x[5], x[6, 0] = -0.0, inf
            x[4, -1] = nan
            got, want = fused.quantize_fp8_rows(x), eager.quantize_fp8_rows(x)
            assert torch.equal(got.scales.nan_to_num(7.0), want.scales.nan_to_num(7.0))
            assert_same_e4m3(got.values, want.values)
            numbers = ~want.scales[:, 0].isnan()
            for columns, in_order in ((Columns.FRAGMENTS, in_fragment_order), (Columns.EXPERTS, in_order_of_experts)):
                got = fused.quantize_fp8_rows(x, columns=columns)
                assert_same_e4m3(got.values[numbers], in_order(want.values)[numbers])
            wide = eager.RowQuantized(torch.empty(9, k + 7, dtype=torch.float8_e4m3fn), torch.empty(9, 1))
            got = fused.quantize_fp8_rows(x, out=wide)
            assert_same_e4m3(got.values[numbers, :k], want.values[numbers])
            assert not raw(got.values[:4, k:]).any()


def check_rows_too_long_for_registers():
    longest, fused._LONGEST_ROW = fused._LONGEST_ROW, 128
    x = randn(3, 1000)
    got, want = fused.quantize_fp8_rows(x), eager.quantize_fp8_rows(x)
    assert torch.equal(got.scales, want.scales)
    assert torch.equal(raw(got.values), raw(want.values))
    check_as_e4m3(x, ScaleRule.FLOOR, 64)
    fused._LONGEST_ROW = longest


def check_as_e4m3(x, rule, hadamard):
    """Exact to 11 binades below the row's base, and within half of E4M3's last place, 2**-10, below."""
    q = eager.quantize(x, MXFP4, rule=rule, hadamard=hadamard)
    image = fused.fp4_as_e4m3(x, rule=rule, hadamard=hadamard)
    want = pad(eager.decode(q, torch.float64), (0, image.values.shape[-1] - eager.decode(q).shape[-1]))
    order = torch.tensor(E4M3_ORDER).argsort()
    natural = raw(image.values).unflatten(-1, (-1, 16))[..., order].flatten(-2).view(torch.float8_e4m3fn)
    error = (natural.double() * image.scales.double() - want).abs()
    bytes_ = pad(raw(q.scales).int(), (0, want.shape[-1] // 32 - q.scales.shape[-1]))
    base = bytes_.amax(dim=-1, keepdim=True)
    assert bool((error <= torch.exp2(base.double() - 127 - 16)).all())
    assert not error[(base - bytes_ <= 11).repeat_interleave(32, dim=-1)].any()
    return error.max().item()


def check_images_in_e4m3():
    spread = torch.exp2(torch.randint(-30, 3, (4, 320), generator=torch.Generator().manual_seed(1)).float())
    for rule in MXFP4.rules[:4]:
        for hadamard in ROTATIONS:
            check_as_e4m3(randn(4, 320), rule, hadamard)
        blocks = randn(4, 320) * spread[:, ::32].repeat_interleave(32, dim=-1)
        assert check_as_e4m3(blocks, rule, None) > 0  # bits were lost, within the bound
    check_as_e4m3(randn(4, 64) * 2.0**-135, ScaleRule.FLOOR, None)
    check_as_e4m3(randn(4, 64).clamp(-1, 1) * 2.0**127, ScaleRule.FLOOR, None)
    x = randn(3, 64)
    x[1, 40] = nan
    assert fused.fp4_as_e4m3(x).scales.isnan().flatten().tolist() == [False, True, False]


def check_images_in_bf16():
    for fmt in FORMATS.values():
        for hadamard in ROTATIONS:
            x = randn(2, 3, 100).bfloat16()
            q, image = eager.quantize(x, fmt, hadamard=hadamard), fused.fp4_as_bf16(x, fmt, hadamard=hadamard)
            of_blocks = eager.scale_values(q).double().repeat_interleave(fmt.block_size, dim=-1)
            assert torch.equal(image.values.double(), e2m1.decode(e2m1.unpack(q.codes)).double() * of_blocks)
            assert image.tensor_scale == q.tensor_scale
        x = torch.ones(1, 64)
        x[0, 40] = inf
        block = 40 // fmt.block_size
        image = fused.fp4_as_bf16(x, fmt, tensor_scale=1.0 if fmt.has_tensor_scale else None)
        nans = image.values.isnan().unflatten(-1, (-1, fmt.block_size))
        assert nans.all(dim=-1).nonzero().tolist() == nans.any(dim=-1).nonzero().tolist() == [[0, block]]


def check_empty_tensors():
    for fmt in FORMATS.values():
        compare(torch.empty(0, 64), fmt, **({"tensor_scale": 3.0} if fmt.has_tensor_scale else {}))
    assert fused.quantize_fp8_rows(torch.empty(0, 64)).values.shape == (0, 64)


CHECKS = (
    *(check_contract_blocks, check_any_shape, check_fp8_rows, check_images_in_bf16, check_empty_tensors),
    *(check_blocked_scales, check_rotations, check_rows_too_long_for_registers, check_images_in_e4m3),
)


def main():
    """Of two processes the first (argument 0) runs one half of the checks, the second (1) the other."""
    np.seterr(all="ignore")  # an infinite block is 1 / 0 on its way
    put_right()
    half = len(CHECKS) // 2 + 1
    for check in (CHECKS[:half], CHECKS[half:])[int(sys.argv[1])]:
        check()
    return 0


if __name__ == "__main__":
    sys.exit(main())
