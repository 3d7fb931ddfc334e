"""A product with its operands on a GPU: is a launch's output right, and how long does a call take?"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import lru_cache

import torch

from fp4bench.devices import Device
from fp4bench.formats import FORMATS
from fp4bench.kernels import decode, prefill, weights
from fp4bench.kernels.configs import Launch, Work
from fp4bench.kernels.decode import DecodeConfig
from fp4bench.kernels.fp8_rows import Columns
from fp4bench.kernels.prefill_launch import PrefillConfig
from fp4bench.kernels.quantize import quantize_fp8_rows
from fp4bench.kernels.weights import PreparedWeight, WordOrder
from fp4bench.quantize import decode as values_of
from fp4bench.quantize import quantize
from fp4bench.timing.clock import Call, Clock
from fp4bench.timing.cuda_clock import CudaClock
from fp4bench.timing.pacing import PACED
from fp4bench.tuning.search import WrongOutputError

OPERANDS = {"bf16": torch.bfloat16, "e4m3": torch.float8_e4m3fn}
ORDERS = {"bf16": WordOrder.HALVES, "e4m3": WordOrder.BYTES}

# In haste: three samples without a rest. At the power cap launches keep their order well enough for who goes on.
_HASTE = replace(PACED, gap_seconds=0.0, most_gap_seconds=0.0, fewest=3, most=3)

# Of the norm: rounding to bfloat16 alone is 0.0017. FP8 tensor cores, which add with 14 bits, make it 0.0020 at k = 8192 and
# 0.0031 at 28672 where no tile is cut along k (NVIDIA H200, `2026-11-27_tune-3.jsonl`), so theirs grows with k.
_LARGEST_ERROR, _FP8_ERROR_OF_K = 2.5e-3, 1.5e-7
# Of an element: half a unit of bfloat16's last place, 2**-9 of it, twice over, and some of the rms; FP8's sums add more, at
# k = 8192 and in proportion beyond (0.043 at 28672, NVIDIA H100). One of 117 million was beyond 0.02 (m = 2048, n = 57344,
# NVIDIA H200). A block of 32 that is left out is 0.06 of the rms at k = 8192.
_OF_ELEMENT, _OF_RMS, _FP8_OF_RMS, _SHORT_K = 2.0**-8, 0.02, 0.03, 8192


class Products:
    """Opens works on one GPU. Weights are kept from one work to the next, as long as it has the same."""

    def __init__(self, device: Device) -> None:
        self._device = device
        self._clocks: dict[bool, Clock] = {
            careful: CudaClock(device, PACED if careful else _HASTE) for careful in (False, True)
        }
        self._weights = lru_cache(1)(self._make_weights)

    @contextmanager
    def open(self, work: Work) -> Iterator["GpuProduct"]:
        """The work with random operands, the same in every process. Raises RuntimeError where they do not fit the memory."""
        copies, transposed = self._weights(work.operand, work.format, work.n, work.k)
        generator = torch.Generator(self._device.torch_name).manual_seed(work.m)
        x = torch.randn(work.m, work.k, generator=generator, device=self._device.torch_name).to(torch.bfloat16)
        x_scale, exact = None, x.float()
        if work.operand == "e4m3":
            rows = quantize_fp8_rows(x, columns=Columns.FRAGMENTS)
            plain = quantize_fp8_rows(x)
            x, x_scale, exact = rows.values, rows.scales.flatten(), plain.values.float() * plain.scales
        yield GpuProduct(work, self._device, copies, x, x_scale, exact @ transposed, self._clocks)

    def _make_weights(self, operand: str, format_name: str, n: int, k: int) -> tuple[list[PreparedWeight], torch.Tensor]:
        """Copies that exceed the L2 together, and the decoded weight, float32 (k, n)."""
        self._weights.cache_clear()  # before the next ones: two of the largest do not fit every GPU
        generator = torch.Generator(self._device.torch_name).manual_seed(n)
        w = torch.randn(n, k, generator=generator, device=self._device.torch_name).mul_(k**-0.5)
        q = quantize(w, FORMATS[format_name])
        weight = weights.prepare(q, OPERANDS[operand], ORDERS[operand])
        if weight.rest is not None:
            raise ValueError(f"random {format_name} weights do not fit {operand}")
        more = range(1, self._clocks[True].copies(_bytes(weight)))
        copies = [weight, *(replace(weight, words=weight.words.clone(), scales=weight.scales.clone()) for _ in more)]
        return copies, values_of(q).T


class GpuProduct:
    """One work, ready to be launched in many ways."""

    def __init__(
        self,
        work: Work,
        device: Device,
        copies: list[PreparedWeight],
        x: torch.Tensor,
        x_scale: torch.Tensor | None,
        want: torch.Tensor,
        clocks: dict[bool, Clock],
    ) -> None:
        self._work, self._device, self._copies, self._x, self._x_scale = work, device, copies, x, x_scale
        self._want, self._clocks = want, clocks
        self._out = torch.empty(want.shape, dtype=torch.bfloat16, device=x.device)

    def check(self, launch: Launch) -> None:
        """Two calls give the same bits, and these are near the product in float32. Raises WrongOutputError."""
        calls, outs = self._calls(launch), []
        for call in (calls[0], calls[-1]):
            self._out.fill_(torch.nan)
            call()
            outs.append(self._out.clone())
        if not torch.equal(*outs):
            raise WrongOutputError("two calls gave two outputs, or one that is not a number")
        check_product(outs[0], self._want, self._work.k if self._work.operand == "e4m3" else 0)

    def time(self, launch: Launch, careful: bool) -> tuple[float, ...]:
        """Samples of the seconds of a call, weights cold. Raises WrongOutputError where the output changes meanwhile."""
        calls = self._calls(launch)
        calls[0]()
        before = self._out.clone()
        measured = self._clocks[careful].measure(calls, _bytes(self._copies[0]))
        if not torch.equal(before, self._out):
            raise WrongOutputError("its output changed while it was timed")
        return measured.seconds

    def _calls(self, launch: Launch) -> list[Call]:
        """One call a copy of the weight."""
        size = workspace_bytes(self._x, self._copies[0], launch, self._device)
        workspace = torch.zeros(size, dtype=torch.uint8, device=self._x.device)
        return [_call(self._x, weight, self._out, launch, workspace, self._x_scale) for weight in self._copies]


def check_product(out: torch.Tensor, want: torch.Tensor, fp8_k: int = 0) -> None:
    """Compare a product, bfloat16 (m, n), with the one in float32. Raises WrongOutputError, one sentence.

    fp8_k: so many products FP8 tensor cores have summed up, or 0 where none have.
    """
    wrong = (out.float() - want).abs_()
    error, most = float(wrong.norm() / want.norm()), max(_LARGEST_ERROR, _FP8_ERROR_OF_K * fp8_k)
    if not error <= most:
        raise WrongOutputError(f"its output is off by {error:.2g} of the norm, more than {most:.2g}")
    of_rms = (_FP8_OF_RMS * max(1.0, fp8_k / _SHORT_K) if fp8_k else _OF_RMS) * want.square().mean().sqrt()
    outside = int((wrong > _OF_ELEMENT * want.abs() + of_rms).sum())
    if outside:
        raise WrongOutputError(f"{outside} of {out.numel()} elements are wrong")


def workspace_bytes(x: torch.Tensor, weight: PreparedWeight, launch: Launch, device: Device) -> int:
    """Bytes of workspace that a launch needs."""
    if not isinstance(launch, PrefillConfig):
        return 0
    assert device.sm_count is not None
    return prefill.workspace_bytes(len(x), weight, x.dtype, launch, device.sm_count)


def _call(
    x: torch.Tensor,
    weight: PreparedWeight,
    out: torch.Tensor,
    launch: Launch,
    workspace: torch.Tensor,
    x_scale: torch.Tensor | None,
) -> Call:
    if isinstance(launch, DecodeConfig):
        return lambda: decode.gemm(x, weight, out, config=launch, pdl=True)
    assert isinstance(launch, PrefillConfig)
    return lambda: prefill.gemm(x, weight, out, config=launch, workspace=workspace, x_scale=x_scale, pdl=True)


def _bytes(weight: PreparedWeight) -> int:
    return weight.words.nbytes + weight.scales.nbytes
