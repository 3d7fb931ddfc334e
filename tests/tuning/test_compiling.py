"""Which kernels are compiled before anything is measured: each once, and the very one that is launched later."""

from dataclasses import replace

import pytest
import torch

triton = pytest.importorskip("triton")

from fp4bench.devices import Device  # noqa: E402
from fp4bench.formats import FORMATS  # noqa: E402
from fp4bench.kernels import decode, prefill, weights  # noqa: E402
from fp4bench.kernels.configs import Work  # noqa: E402
from fp4bench.kernels.decode import DecodeConfig  # noqa: E402
from fp4bench.kernels.prefill_launch import PrefillConfig  # noqa: E402
from fp4bench.quantize import quantize  # noqa: E402
from fp4bench.tuning import compiling  # noqa: E402

H200 = Device("cuda:0", "NVIDIA H200", (9, 0), 132, 60 << 20)
WORK = Work("bf16", "mxfp4", 8, 1024, 512)
CASES = [
    (WORK, DecodeConfig()),
    (replace(WORK, format="nvfp4"), DecodeConfig()),
    (replace(WORK, m=32), PrefillConfig(columns=32)),
    (replace(WORK, m=32, format="nvfp4"), PrefillConfig(columns=32)),
    (replace(WORK, m=32, operand="e4m3"), PrefillConfig(columns=32, depth=128)),
]


class Recorded:
    """In place of a kernel: what it would be compiled for."""

    def __init__(self):
        self.launches = []

    def warmup(self, *arguments, grid, **constants):
        self.launches.append((list(map(kind, arguments)), grid, constants))

    def __getitem__(self, grid):
        return lambda *arguments, **constants: self.warmup(*arguments, grid=grid, **constants)


def kind(argument):
    """What of an argument a kernel is compiled for: types and alignment; and the numbers themselves."""
    if isinstance(argument, torch.Tensor):
        return argument.dtype, argument.data_ptr() % 16
    if hasattr(argument, "block_shape"):
        return argument.base.dtype, argument.block_shape, argument.layout
    return argument


@pytest.mark.parametrize(("work", "launch"), CASES)
def test_what_is_compiled_is_what_is_launched(monkeypatch, work, launch):
    recorded = Recorded()
    monkeypatch.setattr(decode, "_decode", recorded)
    monkeypatch.setattr(prefill, "wgmma_product", recorded)
    monkeypatch.setattr(prefill, "count_sms", lambda device: H200.sm_count)
    compiling.compile_one(work, launch, H200)
    dtype = torch.float8_e4m3fn if work.operand == "e4m3" else torch.bfloat16
    order = weights.WordOrder.BYTES if work.operand == "e4m3" else weights.WordOrder.HALVES
    weight = weights.prepare(quantize(torch.randn(work.n, work.k), FORMATS[work.format]), dtype, order)
    x, out = torch.zeros(work.m, work.k).to(dtype), torch.empty(work.m, work.n, dtype=torch.bfloat16)
    if isinstance(launch, DecodeConfig):
        decode.gemm(x, weight, out, config=launch, pdl=True)
    else:
        space = torch.zeros(prefill.workspace_bytes(work.m, weight, dtype, launch, H200.sm_count), dtype=torch.uint8)
        x_scale = torch.ones(work.m) if work.operand == "e4m3" else None
        prefill.gemm(x, weight, out, config=launch, workspace=space, x_scale=x_scale, pdl=True)
    compiled, launched = recorded.launches
    assert compiled == launched


def test_works_whose_numbers_are_arguments_share_a_kernel():
    jobs = [(replace(WORK, m=m, n=n), PrefillConfig(columns=64)) for m in (33, 64) for n in (1024, 2048)]
    assert len(compiling.distinct(jobs, H200)) == 1
    assert (
        len(compiling.distinct([*jobs, (replace(WORK, m=64, n=57344), PrefillConfig(columns=64, streamed=False))], H200)) == 2
    )
    by_k = [(replace(WORK, k=k), DecodeConfig()) for k in (512, 1024)]
    assert len(compiling.distinct(by_k, H200)) == 2
    by_m = [(replace(WORK, m=m), DecodeConfig()) for m in (1, 8, 9, 16)]
    assert len(compiling.distinct(by_m, H200)) == 2


def test_a_compiler_that_refuses_stops_nothing():
    told = []
    impossible = DecodeConfig(max_registers=24)  # where there is no GPU, it fails for that
    compiling.compile_all([CASES[0], (WORK, impossible)], H200, 1, lambda done, of: told.append((done, of)))
    assert told == [(1, 2), (2, 2)]
