"""Run by test_blackwell.py in a process whose Triton interprets: the GEMM of both FP4 operands against the float64 reference.

Triton's interpreter has no dot_scaled. It gets one here, by the formula in Triton's documentation, so what this proves is all
around it: tiles, scale layout, tails, epilogue.
"""

import sys

import contract
import torch
import triton.language as tl
from torch.nn.functional import pad
from triton.runtime import interpreter

from fp4bench import reference
from fp4bench.formats import FORMATS, MXFP4, NVFP4, e2m1, scales
from fp4bench.kernels.blackwell import BlackwellConfig, blocked, gemm
from fp4bench.quantize import quantize


def dot_scaled(a, a_scales, a_type, b, b_scales, b_type, total):
    assert (a_type, b_type) == ("e2m1", "e2m1")
    product = decoded(a.handle, a_scales.handle) @ decoded(b.T.handle, b_scales.handle).T
    return tl.tensor(interpreter.TensorHandle(total.handle.data + product.float().numpy(), total.dtype), total.type)


def decoded(codes, scale_bytes):
    """Values of packed codes (rows, k / 2) times their blocks' scales. -> float64 (rows, k)."""
    values = e2m1.decode(e2m1.unpack(torch.from_numpy(codes.data.copy()))).double()
    raw = torch.from_numpy(scale_bytes.data.copy())
    of_blocks = scales.e4m3_decode(raw) if scale_bytes.dtype.is_fp8() else scales.e8m0_decode(raw)
    return values * of_blocks.double().repeat_interleave(values.shape[1] // of_blocks.shape[1], dim=1)


def product(x, w, config, **epilogue):
    """In float32: the interpreter cuts bits off where a GPU rounds to bfloat16."""
    out = torch.full((x.shape[0], w.shape[0]), torch.nan)
    gemm(blocked(x), blocked(w), out, config=config, **epilogue)
    return out


def random(rows, k, fmt, seed, hadamard=None):
    x = torch.randn(rows, k, generator=torch.Generator().manual_seed(seed))
    return quantize(x * torch.exp2(torch.arange(rows) % 9 - 4.0)[:, None], fmt, hadamard=hadamard)


def assert_close(got, want, **options):
    # Sums of exact products of this size are exact in float32; tensor scales, alpha and bias round.
    torch.testing.assert_close(got.double(), want, rtol=2.0**-21, atol=2.0**-21, **options)


def check_shapes():
    """Whole tiles and tails of every axis, a rotation that pads k, and several tiles along m, n and k."""
    for fmt in FORMATS.values():
        for m, n, k, hadamard, config in (
            (1, 1, 32, None, BlackwellConfig()),
            (128, 128, 256, None, BlackwellConfig(k=128)),
            (130, 257, 288, None, BlackwellConfig(k=128, stages=4)),
            (3, 300, 320, 64, BlackwellConfig(128, 256)),
            (257, 129, 544, None, BlackwellConfig(256, 128)),
        ):
            x, w = random(m, k, fmt, 1, hadamard), random(n, k, fmt, 2, hadamard)
            assert_close(product(x, w, config), reference.gemm(x, w))


def check_epilogue():
    x, w = random(5, 64, NVFP4, 1), random(130, 64, NVFP4, 2)
    bias = torch.randn(130, generator=torch.Generator().manual_seed(3)).bfloat16()
    want = reference.gemm(x, w) * 0.3 + bias.double()
    assert_close(product(x, w, BlackwellConfig(), alpha=0.3, bias=bias), want)


def check_contract_blocks():
    """Every named block is a row of x. Each value comes out alone, times 1, and a NaN block gives NaN."""
    for fmt, tensor_scale in ((MXFP4, None), (NVFP4, 1.0)):
        named = [
            block.tensor()
            for block in contract.BLOCKS
            if (block.format, block.rule) == (str(fmt), str(fmt.default_rule))
            and (block.dtype, block.tensor_scale) == (torch.float32, tensor_scale)
        ]
        x = quantize(pad(torch.cat(named), (0, 32 - fmt.block_size)), fmt, tensor_scale=tensor_scale)
        want = reference.gemm(x, torch.eye(32))
        assert want.isnan().any(dim=1).sum() >= 1
        assert want.isfinite().all(dim=1).sum() >= 4
        assert_close(product(x, quantize(torch.eye(32), fmt), BlackwellConfig()), want, equal_nan=True)


def with_new_numpy(patch):
    """Triton 3.6 makes an int of an array with one element, which numpy 2.4 refuses."""

    def patched(tensor, scope):
        patch(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: self.handle.data.item())

    return patched


def main():
    tl.dot_scaled = dot_scaled
    interpreter._patch_lang_tensor = with_new_numpy(interpreter._patch_lang_tensor)
    for check in (check_shapes, check_epilogue, check_contract_blocks):
        check()
    return 0


if __name__ == "__main__":
    sys.exit(main())
