"""Orthonormal Hadamard rotation of blocks along k, and its inverse.

Rotating x and w by the same orthonormal matrix leaves x @ w.T as it is and spreads an outlier over its block, which helps 4-bit
quantization (QuaRot, arXiv 2404.00456). The matrix is Sylvester's, entries +-size**-0.5, and its own inverse.
"""

import torch


def hadamard_matrix(size: int, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu") -> torch.Tensor:
    """Sylvester's Hadamard matrix times size**-0.5: symmetric, orthonormal. -> (size, size).

    The entries are rounded to `dtype`: in bfloat16 it is exactly orthonormal only for sizes that are powers of 4.
    """
    check_size(size)
    h = torch.ones(1, 1, dtype=torch.float64, device=device)
    while h.shape[0] < size:
        h = torch.cat((torch.cat((h, h), dim=1), torch.cat((h, -h), dim=1)))
    return (h * size**-0.5).to(dtype)


def rotate(x: torch.Tensor, size: int) -> torch.Tensor:
    """Each `size` neighbours along the last axis times the Hadamard matrix. float (..., k) -> float32 (..., k).

    A butterfly of float32 additions and one multiplication at the end, always in the same order: the same bits on every device,
    which a matrix product would not give. Raises ValueError if k is not a multiple of `size`.
    """
    check_size(size)
    if x.shape[-1] % size:
        raise ValueError(f"cannot rotate k = {x.shape[-1]} by a Hadamard matrix of {size}: k must be a multiple of it")
    y = x.float()
    half = 1
    while half < size:
        a, b = y.unflatten(-1, (x.shape[-1] // (2 * half), 2, half)).unbind(-2)
        y = torch.stack((a + b, a - b), dim=-2).flatten(-3)
        half *= 2
    return y * size**-0.5


def unrotate(y: torch.Tensor, size: int) -> torch.Tensor:
    """Inverse of `rotate`: the matrix is its own inverse. float (..., k) -> float32 (..., k)."""
    return rotate(y, size)


def check_size(size: int) -> None:
    """Raise ValueError where there is no Hadamard matrix of this size: it must be a power of two."""
    if size < 1 or size & (size - 1):
        raise ValueError(f"there is no Hadamard matrix of size {size} here: the size must be a power of two")
