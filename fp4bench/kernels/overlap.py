"""Kernels of one stream that overlap: programmatic dependent launch, from compute capability 9.0 on.

A kernel that is launched with this attribute may begin once every CTA of the one before it has said so or has ended.
`griddepcontrol.wait` then returns when that one has ended and what it wrote can be read. So a launch costs nothing that the
kernel before does not hide.

Why quantize, product, quantize, product may overlap in one workspace, each saying so at its very beginning:

- Before its wait a kernel touches nothing that any of the others writes: a quantizer waits first, and a product reads weights.
- A kernel ends behind its wait, so it ends only after all kernels before it. The second quantizer therefore writes where the
  first product has read everything, and the second product adds up its partial sums where the first has left its counters zero.
- Weights are read early, so they must be complete before the first of the kernels that overlap one another.
"""

import triton
import triton.language as tl
from triton.language.extra import cuda

# As inline assembly for Gluon, of one register that is given back: let the next kernel begin, wait for the one before, or both.
LAUNCH: tl.constexpr = tl.constexpr("griddepcontrol.launch_dependents; mov.b32 $0, $1;")
WAIT: tl.constexpr = tl.constexpr("griddepcontrol.wait; mov.b32 $0, $1;")
BEGIN: tl.constexpr = tl.constexpr("griddepcontrol.launch_dependents; griddepcontrol.wait; mov.b32 $0, $1;")


def option(pdl: bool) -> dict[str, bool]:
    """The attribute as an option of a launch, where it is wanted: Triton's interpreter has none."""
    return {"launch_pdl": True} if pdl else {}


@triton.jit
def begin() -> None:
    """Let the next kernel begin, and wait for the one before."""
    cuda.gdc_launch_dependents()
    cuda.gdc_wait()
