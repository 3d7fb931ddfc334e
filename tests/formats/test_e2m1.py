"""Codes of the 4-bit element, typed from the standard: OCP Microscaling Formats v1.0, section 5.3.3."""

from math import inf, nan, nextafter

import ml_dtypes
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fp4bench.formats import e2m1

VALUES = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0]  # codes 0 to 15

# (input, code). The seven ties each go to the even code.
ROUNDING = [
    *((0.0, 0), (0.2, 0), (0.3, 1), (0.7, 1), (0.8, 2), (1.2, 2), (1.3, 3), (1.7, 3), (1.8, 4), (2.4, 4), (2.6, 5)),
    *((3.4, 5), (3.6, 6), (4.9, 6), (5.1, 7)),
    *((0.25, 0), (0.75, 2), (1.25, 2), (1.75, 4), (2.5, 4), (3.5, 6), (5.0, 6)),
    *((6.0, 7), (6.5, 7), (7.0, 7), (8.0, 7), (1e30, 7), (inf, 7), (nan, 7)),
    *((1e-45, 0), (1.1754942e-38, 0), (1.1754944e-38, 0)),
]

# (midpoint, code just below it, code just above it)
MIDPOINTS = [(0.25, 0, 1), (0.75, 1, 2), (1.25, 2, 3), (1.75, 3, 4), (2.5, 4, 5), (3.5, 5, 6), (5.0, 6, 7)]


def encode(*values):
    return e2m1.encode(torch.tensor(values, dtype=torch.float32)).tolist()


@pytest.mark.parametrize(("code", "value"), list(enumerate(VALUES)), ids=str)
def test_each_code_has_its_value_and_back(code, value):
    decoded = e2m1.decode(torch.tensor([code], dtype=torch.uint8))
    assert decoded.item() == value
    assert decoded.signbit().item() == (code >= 8)
    assert encode(value) == [code]


@pytest.mark.parametrize("sign", [1, -1], ids=["positive", "negative"])
@pytest.mark.parametrize(("x", "code"), ROUNDING, ids=str)
def test_encode_rounds_to_nearest_even_and_saturates(x, code, sign):
    x = torch.tensor([x], dtype=torch.float32).copysign(torch.tensor(float(sign)))  # gives NaN a sign as well
    assert e2m1.encode(x).tolist() == [code if sign > 0 else code + 8]


@pytest.mark.parametrize("sign", [1, -1], ids=["positive", "negative"])
@pytest.mark.parametrize(("midpoint", "below", "above"), MIDPOINTS, ids=str)
def test_one_ulp_beside_a_tie_decides(midpoint, below, above, sign):
    ulp_down = float(np.nextafter(np.float32(midpoint), np.float32(0)))
    ulp_up = float(np.nextafter(np.float32(midpoint), np.float32(8)))
    assert nextafter(midpoint, 0) != ulp_down  # a float32 ulp, not Python's
    assert encode(sign * ulp_down, sign * ulp_up) == [below + 8 * (sign < 0), above + 8 * (sign < 0)]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bfloat16", "float16"])
def test_encode_agrees_with_ml_dtypes_on_every_16_bit_value(dtype):
    x = torch.arange(1 << 16, dtype=torch.int32).to(torch.int16).view(dtype).float()
    x = x[~x.isnan()]
    assert len(x) >= 65536 - 2046  # float16 has 2046 NaNs, bfloat16 254
    assert torch.equal(e2m1.encode(x), from_ml_dtypes(x))


def test_encode_agrees_with_ml_dtypes_on_a_million_float32_bit_patterns():
    bits = torch.randint(-(1 << 31), 1 << 31, (1 << 20,), generator=torch.Generator().manual_seed(0))
    x = bits.to(torch.int32).view(torch.float32)
    near = torch.empty(1 << 20).uniform_(-8, 8, generator=torch.Generator().manual_seed(1))
    x = torch.cat((x[~x.isnan()], near))
    assert torch.equal(e2m1.encode(x), from_ml_dtypes(x))


def from_ml_dtypes(x):
    return torch.from_numpy(x.numpy().astype(ml_dtypes.float4_e2m1fn).view(np.uint8))


def test_encode_keeps_shape_and_takes_views():
    x = torch.tensor([[0.5, 1.0, 6.0], [-0.5, -1.0, -6.0]])
    assert e2m1.encode(x).tolist() == [[1, 2, 7], [9, 10, 15]]
    assert e2m1.encode(x.T).tolist() == [[1, 9], [2, 10], [7, 15]]
    assert e2m1.encode(x[:, ::2]).tolist() == [[1, 7], [9, 15]]
    assert e2m1.encode(torch.empty(3, 0)).shape == (3, 0)
    assert x.tolist() == [[0.5, 1.0, 6.0], [-0.5, -1.0, -6.0]], "the input was written to"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64, torch.int32], ids=str)
def test_encode_takes_float32_only(dtype):
    with pytest.raises(TypeError, match=f"takes float32 values, not {dtype}"):
        e2m1.encode(torch.ones(2, dtype=dtype))


def test_decode_makes_its_table_once(monkeypatch):
    # A copy from the host on each call could not be captured in a CUDA graph.
    codes = torch.arange(16, dtype=torch.uint8)
    first = e2m1.decode(codes)
    monkeypatch.setattr(torch, "tensor", None)
    again = e2m1.decode(codes)
    assert torch.equal(again, first)
    again.zero_()
    assert torch.equal(e2m1.decode(codes), first), "the table was handed out"


def test_the_even_element_is_in_the_low_nibble():
    assert e2m1.pack(e2m1.encode(torch.tensor([0.5, 6.0]))).tolist() == [0x71]
    assert e2m1.pack(torch.tensor([1, 2, 3, 4], dtype=torch.uint8)).tolist() == [0x21, 0x43]
    assert e2m1.unpack(torch.tensor([0x71], dtype=torch.uint8)).tolist() == [1, 7]
    assert e2m1.unpack(torch.tensor([0x8F], dtype=torch.uint8)).tolist() == [15, 8]


def test_every_byte_unpacks_and_packs_to_itself():
    every_byte = torch.arange(256, dtype=torch.uint8).reshape(4, 64)
    codes = e2m1.unpack(every_byte)
    assert codes.shape == (4, 128)
    assert codes.dtype == torch.uint8
    assert codes.max() == 15
    assert torch.equal(e2m1.pack(codes), every_byte)


@settings(max_examples=100, deadline=None, derandomize=True)
@given(st.lists(st.tuples(st.integers(0, 15), st.integers(0, 15)), max_size=40))
def test_unpack_is_the_inverse_of_pack(pairs):
    codes = torch.tensor(pairs, dtype=torch.uint8).reshape(-1)
    packed = e2m1.pack(codes)
    assert packed.tolist() == [even + 16 * odd for even, odd in pairs]
    assert torch.equal(e2m1.unpack(packed), codes)


@pytest.mark.parametrize("shape", [(0,), (2, 0), (0, 4), (3, 2, 6)], ids=str)
def test_pack_halves_the_last_axis(shape):
    codes = torch.full(shape, 5, dtype=torch.uint8)
    packed = e2m1.pack(codes)
    assert packed.shape == (*shape[:-1], shape[-1] // 2)
    assert torch.equal(e2m1.unpack(packed), codes)


def test_pack_takes_views():
    codes = torch.arange(12, dtype=torch.uint8).reshape(3, 4).T
    assert codes.stride() == (1, 4)
    assert e2m1.pack(codes[:, :2]).tolist() == [[0x40], [0x51], [0x62], [0x73]]


def test_an_odd_number_of_codes_is_refused():
    with pytest.raises(ValueError, match="cannot pack 3 codes: two go into a byte"):
        e2m1.pack(torch.zeros(2, 3, dtype=torch.uint8))
