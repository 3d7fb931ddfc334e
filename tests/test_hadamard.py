"""The Hadamard rotation: orthonormal, its own inverse, and the same as a product with the matrix."""

import pytest
import torch

from fp4bench.hadamard import hadamard_matrix, rotate, unrotate

SIZES = [1, 2, 4, 8, 16, 32, 64, 128, 256, 1024]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]

# Sylvester's construction by hand: H2 = [[1, 1], [1, -1]], H4 = [[H2, H2], [H2, -H2]]; divided by sqrt(4).
H4 = [[0.5, 0.5, 0.5, 0.5], [0.5, -0.5, 0.5, -0.5], [0.5, 0.5, -0.5, -0.5], [0.5, -0.5, -0.5, 0.5]]


def randn(*shape, dtype=torch.float32, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def test_the_matrix_of_4_is_sylvesters():
    assert hadamard_matrix(4).tolist() == H4
    assert rotate(torch.eye(4), 4).tolist() == H4


@pytest.mark.parametrize("size", SIZES, ids="size{}".format)
def test_an_entry_counts_the_common_bits_of_row_and_column(size):
    h = hadamard_matrix(size, torch.float64)
    common = torch.tensor([[(i & j).bit_count() % 2 for j in range(size)] for i in range(size)])
    assert torch.equal(h, torch.where(common == 1, -1.0, 1.0).double() * size**-0.5)


@pytest.mark.parametrize("size", SIZES, ids="size{}".format)
def test_the_matrix_is_symmetric_orthonormal_and_its_own_inverse(size):
    h = hadamard_matrix(size, torch.float64)
    assert torch.equal(h, h.T)
    # Sums of `size` products +-1 / size, each with the rounding of size**-0.5 twice.
    torch.testing.assert_close(h @ h, torch.eye(size, dtype=torch.float64), rtol=0, atol=size * 2**-52)


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64], ids=str)
@pytest.mark.parametrize("size", [16, 64], ids="size{}".format)
def test_the_matrix_of_a_power_of_4_is_exact_in_every_dtype(size, dtype):
    h = hadamard_matrix(size, dtype)
    assert h.dtype == dtype
    assert torch.equal(h.double() @ h.double(), torch.eye(size, dtype=torch.float64))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", SIZES, ids="size{}".format)
def test_rotate_is_a_product_of_each_group_with_the_matrix(size, dtype):
    x = randn(5, 2 * max(size, 8), dtype=dtype)
    expected = (x.double().unflatten(-1, (-1, size)) @ hadamard_matrix(size, torch.float64)).flatten(-2)
    got = rotate(x, size)
    assert got.dtype == torch.float32
    assert got.shape == x.shape
    # log2(size) additions and the final product round, each by 2**-24 of at most the norm of the group.
    norm = x.double().unflatten(-1, (-1, size)).norm(dim=-1).max().item()
    bound = (size.bit_length() + 1) * 2**-24 * norm
    torch.testing.assert_close(got.double(), expected, rtol=0, atol=bound)


@pytest.mark.parametrize("size", SIZES, ids="size{}".format)
def test_unrotate_is_the_inverse_of_rotate(size):
    x = randn(3, 4 * size)
    norm = x.double().unflatten(-1, (-1, size)).norm(dim=-1).max().item()
    torch.testing.assert_close(unrotate(rotate(x, size), size), x, rtol=0, atol=2 * (size.bit_length() + 1) * 2**-24 * norm)


@pytest.mark.parametrize("size", [16, 64], ids="size{}".format)
def test_small_integers_are_rotated_and_back_without_rounding(size):
    x = torch.randint(-100, 100, (7, 4 * size), generator=torch.Generator().manual_seed(0)).float()
    assert torch.equal(unrotate(rotate(x, size), size), x)


def test_rotating_both_operands_leaves_their_product():
    x, w = randn(8, 256), randn(6, 256, seed=1)
    product = rotate(x, 64).double() @ rotate(w, 64).double().T
    # Each rotated entry errs by at most 8 * 2**-24 of its group's norm: together 2 * 8 * 2**-24 |x| |w|.
    torch.testing.assert_close(product, x.double() @ w.double().T, rtol=0, atol=2**-20 * 256 * 2)


def test_rotation_spreads_an_outlier_evenly():
    x = torch.zeros(64)
    x[5] = 8.0
    assert rotate(x, 64).abs().tolist() == [1.0] * 64


def test_each_group_is_rotated_on_its_own():
    x = randn(4, 128)
    y = rotate(x, 32)
    assert torch.equal(y[:, 32:64], rotate(x[:, 32:64], 32))
    assert torch.equal(rotate(x.reshape(-1), 32), y.reshape(-1))


@pytest.mark.parametrize("shape", [(64,), (0, 64), (3, 0), (2, 0, 64), (2, 3, 4, 64)], ids=str)
def test_any_leading_axes(shape):
    x = randn(*shape)
    y = rotate(x, 16)
    assert y.shape == shape
    assert torch.equal(y.reshape(-1, 16), rotate(x.reshape(-1, 16), 16))


def test_views_are_taken_and_the_input_is_left_alone():
    x = randn(64, 6)
    kept = x.clone()
    assert torch.equal(rotate(x.T, 16), rotate(x.T.contiguous(), 16))
    assert torch.equal(x, kept)
    one = rotate(x.T.contiguous(), 1)
    assert torch.equal(one, x.T)


@pytest.mark.parametrize("size", [0, -1, -4, 3, 12, 96], ids="size{}".format)
def test_a_size_that_is_no_power_of_two_is_refused(size):
    for refuse in (lambda: hadamard_matrix(size), lambda: rotate(randn(2, 96), size)):
        with pytest.raises(ValueError, match=f"no Hadamard matrix of size {size} here: the size must be a power of two"):
            refuse()


def test_a_k_that_is_no_multiple_of_the_size_is_refused():
    with pytest.raises(ValueError, match="cannot rotate k = 40 by a Hadamard matrix of 16: k must be a multiple of it"):
        rotate(randn(2, 40), 16)
