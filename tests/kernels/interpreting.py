"""What Triton's interpreter gets wrong, put right: imported by the scripts that a test runs under TRITON_INTERPRET=1.

The interpreter of Triton 3.6 cuts float32 off where a GPU rounds it to bfloat16, rounds to E4M3 half up and past its
largest value, makes other numbers of bfloat16's subnormals, and rounds an fma twice. It looks through all of
Triton's language anew at each call of a function, for what to replace: 23 of 30 s are left without (CI's test of quantize.py).
"""

from functools import cache
from inspect import getmembers

import numpy as np
import torch
import triton.language as tl
from triton.runtime import interpreter

TORCH = {tl.float32: torch.float32, tl.bfloat16: torch.bfloat16, tl.float16: torch.float16, tl.float8e4nv: torch.float8_e4m3fn}
BITS = {8: torch.uint8, 16: torch.int16, 32: torch.int32}


def convert_float(data, source, target, rounding_mode):
    """Bits of `data` in another type: to nearest, ties to even, E4M3 saturating; as a GPU converts."""
    del rounding_mode
    values = torch.from_numpy(np.ascontiguousarray(data).view(f"i{data.itemsize}" if data.itemsize > 1 else "u1"))
    values = values.view(TORCH[source])
    if target == tl.float8e4nv:
        values = values.float().clamp(-448, 448)
    bits = values.to(TORCH[target]).view(BITS[target.primitive_bitwidth]).numpy()
    return bits.view(f"u{bits.itemsize}").reshape(data.shape)


def fma(self, x, y, z):
    """One rounding, but where float64 rounds the sum to a midpoint of float32."""
    if x.dtype.scalar != tl.float32:
        raise NotImplementedError(f"fma of {x.dtype}")
    exact = x.data.astype(np.float64) * y.data.astype(np.float64) + z.data.astype(np.float64)
    return interpreter.TensorHandle(exact.astype(np.float32), z.dtype.scalar)


def with_new_numpy(patch):
    """Triton 3.6 makes an int of an array with one element, which numpy 2.4 refuses."""

    def patched(tensor, scope):
        patch(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: self.handle.data.item())

    return patched


@cache
def builtins(package):
    """Names and functions. Called first where none is replaced."""
    return [(name, member) for name, member in getmembers(package) if tl.core.is_builtin(member)]


def patch_builtin(package, builder, scope):
    for name, member in builtins(package):
        if getattr(package, name) is member:
            interpreter._patch_attr(package, name, member, builder, scope)


def put_right():
    interpreter._patch_builtin = patch_builtin
    interpreter._convert_float = convert_float
    interpreter.InterpreterBuilder.create_fma = fma
    interpreter._patch_lang_tensor = with_new_numpy(interpreter._patch_lang_tensor)
