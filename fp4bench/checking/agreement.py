"""How an output compares with its reference, and the refusal of one that is wrong."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch


class WrongResultError(AssertionError):
    """An output that is not what the reference says."""


@dataclass(frozen=True)
class Agreement:
    """How an output compares with its reference.

    error: ||out - ref|| / ||ref|| of a GEMM or MoE layer; the share of codes that differ of a quantization.
    exact: every compared element is the reference, rounded to the output's dtype.
    rows: how many rows were compared; every element of a product's output is checked to be finite.
    """

    error: float
    exact: bool
    rows: int


Check = Callable[[Any], Agreement]


def spread_rows(rows: int, affordable: float, device: torch.device) -> torch.Tensor:
    """Indices of all rows, or of as many as are affordable, evenly spaced from the first to the last."""
    count = min(rows, max(2, int(affordable)))
    # On the CPU: unique on a GPU takes 17 ms (H200).
    return torch.linspace(0, rows - 1, count, dtype=torch.float64).round().long().unique().to(device)


def compare(out: torch.Tensor, rows: torch.Tensor, want: torch.Tensor, bound: torch.Tensor) -> Agreement:
    """Refuse an output with an element that is not finite, or one of `rows` further from float64 `want` than `bound`."""
    refuse(~out.isfinite(), "output is not finite", lambda at: f"{out[at].item()}")
    got = out[rows].double()
    difference = (got - want).abs()
    refuse(
        difference > bound,
        "output is wrong",
        lambda at: f"{got[at].item():.6g} where the reference is {want[at].item():.6g} +- {bound[at].item():.2g}",
    )
    error = difference.norm() / want.norm().clamp(min=torch.finfo(torch.float64).tiny)
    return Agreement(error.item(), torch.equal(got, want.to(out.dtype).double()), len(rows))


def check_shape(out: torch.Tensor, shape: tuple[int, int], dtype: torch.dtype = torch.bfloat16) -> None:
    """Refuse an output that is not of this shape and dtype."""
    if out.shape != shape or out.dtype != dtype:
        raise WrongResultError(f"output is {out.dtype} {tuple(out.shape)}, not {dtype} {shape}")


def refuse(bad: torch.Tensor, message: str, describe: Callable[[tuple[int, ...]], str]) -> None:
    """Raise WrongResultError with the count and the first place of the elements that are bad, if any is."""
    if bad.any():
        at = tuple(bad.nonzero()[0].tolist())
        raise WrongResultError(f"{message} in {int(bad.sum())} of {bad.numel()} elements, first at {list(at)}: {describe(at)}")
