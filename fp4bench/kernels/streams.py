"""Words and scales of a weight from memory to registers, each read once: loads that Gluon has no words for.

The L2 is asked for the whole 128 bytes around what is read (`.level::prefetch_size` of the PTX ISA's ld): a warp's scales of a
unit are 32 or 64 bytes, and the rest of their line is what the warps beside it read. Llama-3.3-70B at m = 1, microseconds on an
NVIDIA H200 (`baselines/NVIDIA-H200/kernels/2026-11-28_decode-prefetch-trial.jsonl`), without it and with it: NVFP4's down 35.4
and 34.5, gate_up 66.7 and 64.7; MXFP4's 32.5 and 31.9, 61.7 and 60.8. Of 256 bytes: 35.0, 67.6; 32.3, 63.1. It can cost
registers: NVFP4's gate_up by slots has 78 instead of 72, and took 81.1 instead of 66.4; it is shipped without slots.

Words do not enter L1 (`.L1::no_allocate`), where each would be read once: with `.L1::evict_first` down takes 31.5 us instead of
31.0, NVFP4's 35.0 instead of 34.5 (`2026-11-28_decode-order-trial.jsonl`).
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl


@gluon.constexpr_function
def _load(registers: int, bits: int, policy: str, masked: bool) -> str:
    """A load of so many registers from one address. Operands: results, the address as often, and whether to load at all."""
    results = ", ".join(f"${i}" for i in range(registers))
    vector, to = (f".v{registers}", f"{{{results}}}") if registers > 1 else ("", results)
    load = f"ld.global{policy}.L2::128B{vector}.b{bits} {to}, [${registers}];"
    if not masked:
        return load
    zeros = " ".join(f"mov.b{bits} ${i}, 0;" for i in range(registers))
    return f"{{ .reg .pred p; setp.ne.b32 p, ${2 * registers}, 0; {zeros} @p {load} }}"


@gluon.constexpr_function
def _registers(registers: int, bits: int, masked: bool) -> str:
    """Constraints of `_load`."""
    result = "=&l" if bits == 64 else "=&r"
    return ",".join([result] * registers + ["l"] * registers + ["r"] * registers * masked)


@gluon.jit
def load_words(at, inside, MASKED: gl.constexpr):  # type: ignore[no-untyped-def]
    """Four words of a lane, 16 bytes at an aligned address. -> int32 [threads, 4], zeros where not `inside`, bool [threads].

    at: pointers [threads, 4] to int32, neighbours. MASKED: whether `inside` counts.
    """
    operands = (at.to(gl.int64),)
    if MASKED:
        operands = operands + (inside.to(gl.int32)[:, None] + gl.zeros_like(at.to(gl.int64)).to(gl.int32),)
    return gl.inline_asm_elementwise(
        _load(4, 32, ".L1::no_allocate", MASKED), _registers(4, 32, MASKED), operands, dtype=gl.int32, is_pure=True, pack=4
    )


@gluon.jit
def load_scales(at, inside, MASKED: gl.constexpr):  # type: ignore[no-untyped-def]
    """A lane's scales of a unit, 4 or 8 bytes. -> int32 or int64 [threads], zero where not `inside`, bool [threads]."""
    BITS: gl.constexpr = at.dtype.element_ty.primitive_bitwidth
    operands = (at.to(gl.int64),)
    if MASKED:
        operands = operands + (inside.to(gl.int32),)
    return gl.inline_asm_elementwise(
        _load(1, BITS, "", MASKED), _registers(1, BITS, MASKED), operands, dtype=at.dtype.element_ty, is_pure=True, pack=1
    )
