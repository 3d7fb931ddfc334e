"""The operands that launches are measured with, and what is held against an output: on the CPU, by stand-ins of the kernels."""

from dataclasses import dataclass

import pytest
import torch

pytest.importorskip("triton")

from fp4bench import quantize as eager
from fp4bench.devices import Device
from fp4bench.kernels import weights
from fp4bench.kernels.configs import Work
from fp4bench.kernels.decode import DecodeConfig
from fp4bench.kernels.fp8_rows import Columns
from fp4bench.kernels.prefill_launch import PrefillConfig
from fp4bench.timing.clock import Measurement
from fp4bench.tuning import product
from fp4bench.tuning.search import WrongOutputError

DEVICE = Device("cpu", "made up", (9, 0), 132, 1 << 20)
PLACES = [weights.E4M3_ORDER.index(column) for column in range(16)]


@dataclass
class Kernels:
    """Both kernels in torch. damage: done to an output after `calls_before` calls."""

    damage: object = None
    calls_before: int = 0
    copies: tuple = ()

    def gemm(self, x, weight, out, *, x_scale=None, **launch):
        self.copies = (*self.copies, weight)
        if x.dtype == torch.float8_e4m3fn:
            x = x.float().unflatten(-1, (-1, 16))[..., PLACES].flatten(-2) * x_scale[:, None]
        out.copy_(x.float() @ eager.decode(weights.restore(weight)).T)
        if self.damage and len(self.copies) > self.calls_before:
            self.damage(out)


@dataclass
class Clock:
    device: Device
    pace: object

    def copies(self, size):
        return 3

    def measure(self, calls, size):
        for call in calls:
            call()
        return Measurement((2e-6, 1e-6, 3e-6), 3, "made up", "cold")


def fp8_rows(x, columns=Columns.NATURAL):
    rows = eager.quantize_fp8_rows(x)
    values = rows.values.float().unflatten(-1, (-1, 16))
    values = values[..., list(weights.E4M3_ORDER)] if columns is Columns.FRAGMENTS else values
    return eager.RowQuantized(values.flatten(-2).to(torch.float8_e4m3fn), rows.scales)


@pytest.fixture
def kernels(monkeypatch):
    made = Kernels()
    monkeypatch.setattr(product.decode, "gemm", made.gemm)
    monkeypatch.setattr(product.prefill, "gemm", made.gemm)
    monkeypatch.setattr(product, "quantize_fp8_rows", fp8_rows)
    monkeypatch.setattr(product, "CudaClock", Clock)
    return made


LAUNCHES = {"decode": DecodeConfig(), "prefill": PrefillConfig(columns=16, depth=128)}


@pytest.mark.parametrize(
    ("operand", "format", "launch"),
    [("bf16", "mxfp4", "decode"), ("bf16", "nvfp4", "decode"), ("bf16", "mxfp4", "prefill"), ("e4m3", "mxfp4", "prefill")],
)
def test_a_right_launch_passes_and_each_copy_of_the_weight_is_timed(kernels, operand, format, launch):
    with product.Products(DEVICE).open(Work(operand, format, 5, 96, 128)) as opened:
        opened.check(LAUNCHES[launch])
        kernels.copies = ()
        assert opened.time(LAUNCHES[launch], careful=False) == (2e-6, 1e-6, 3e-6)
    assert len({id(weight.words) for weight in kernels.copies}) == 3


def test_works_of_one_weight_share_it(kernels):
    products, seen = product.Products(DEVICE), []
    for m, n in ((5, 96), (7, 96), (7, 64)):
        with products.open(Work("bf16", "mxfp4", m, n, 128)) as opened:
            opened.check(DecodeConfig())
            seen.append(kernels.copies[-1])
    assert seen[0] is seen[1]
    assert seen[2].shape == (64, 128)


def one_element(out):
    out[2, 3] += 0.1


def all_a_little(out):
    out *= 1.004


def a_hole(out):
    out[1, 1] = torch.nan


@pytest.mark.parametrize(
    ("damage", "why"), [(one_element, "1 of 6144 elements"), (all_a_little, "off by"), (a_hole, "two outputs")]
)
def test_a_wrong_output_is_found(kernels, damage, why):
    kernels.damage = damage
    with (
        product.Products(DEVICE).open(Work("bf16", "mxfp4", 64, 96, 128)) as opened,
        pytest.raises(WrongOutputError, match=why),
    ):
        opened.check(DecodeConfig())


@pytest.mark.parametrize(("fp8_k", "passes"), [(0, False), (8192, False), (28672, True)])
def test_long_sums_of_fp8_may_be_off_by_more(fp8_k, passes):
    """Launches of whole tiles of the down layer, all right, are off by 0.0031 of the norm (H200), 0.043 of the rms (H100)."""
    want = torch.randn(64, 96, generator=torch.Generator().manual_seed(0))
    out = want * 1.0031
    out[0, 0] += 0.043 * want.square().mean().sqrt()
    if passes:
        product.check_product(out, want, fp8_k)
        out *= 1.004
    with pytest.raises(WrongOutputError, match="of the norm"):
        product.check_product(out, want, fp8_k)


def test_an_output_that_differs_from_call_to_call_or_while_it_is_timed_is_found(kernels):
    kernels.damage, kernels.calls_before = one_element, 1
    with product.Products(DEVICE).open(Work("bf16", "mxfp4", 5, 96, 128)) as opened:
        with pytest.raises(WrongOutputError, match="two outputs"):
            opened.check(DecodeConfig())
        kernels.copies, kernels.calls_before = (), 3
        with pytest.raises(WrongOutputError, match="changed while"):
            opened.time(DecodeConfig(), careful=True)
