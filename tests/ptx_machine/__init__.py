"""A compiled kernel, run from its PTX in numpy: threads of many CTAs an instruction at a time.

It runs the text that ptxas is given, so that what a GPU would compute is tested without one, and it is stricter than a GPU. It
raises where a kernel

- reads or writes what no tensor holds, or at an address that is not aligned (`OutOfBoundsError`);
- reads shared memory that another thread wrote, or overwrites what another reads, with no barrier between, reads what
  `cp.async` has not brought yet, or what another CTA writes (`RaceError`);
- reads what the kernel before may still write, or writes, before `griddepcontrol.wait` (`TooEarlyError`).

It does not see one CTA read what another writes later, threads of a CTA that race in global memory, or a `fence` that is
missing; lanes of a warp arrive at an mbarrier together; and a tensor ends where its storage does.

Shared memory that was not written is NaN. A branch that threads of a warp take differently is not run. Instructions mean what
the PTX ISA 8.x says in section 9.7; one that is not here raises. Approximate functions are exact here, and the sums of an `mma`
or a `wgmma` are rounded once.
"""

from math import prod

import compiling
import torch
from triton.experimental.gluon._runtime import GluonJITFunction
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from ptx_machine.copies import Box
from ptx_machine.machine import Machine
from ptx_machine.memory import Memory, OutOfBoundsError, RaceError, TooEarlyError
from ptx_machine.program import Program

__all__ = ["Emulated", "OutOfBoundsError", "RaceError", "TooEarlyError", "run"]

_AT_ONCE = 64  # CTAs: an instruction of a few hundred threads costs numpy as much as one of thousands
_OPTIONS = ("num_warps", "launch_pdl", "maxnreg", "num_stages", "enable_fp_fusion")  # of the compiler, None: its own choice
_POINTED = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32", torch.int32: "i32", torch.int64: "i64"}
_POINTED |= {torch.uint8: "u8", torch.int16: "i16", torch.float8_e4m3fn: "fp8e4nv"}
_MAPS = 1 << 40  # where tensor maps would be


class Emulated:
    """What stands for a kernel: launched as it is, on tensors of the CPU, it runs here as compiled for these arguments.

    early: names of arguments that were complete before the kernel before this one was launched.
    edit: what is done to the PTX before it is run.
    """

    def __init__(self, kernel, *, early=(), edit=lambda text: text):
        self._kernel, self._early, self._edit = kernel, early, edit

    def __getitem__(self, grid):
        return lambda *arguments, **constants: self._launch(grid, arguments, constants)

    def _launch(self, grid, arguments, constants):
        names = [p.name for p in self._kernel.params if p.name not in constants]
        binary, given = _compiled(self._kernel, dict(zip(names, arguments, strict=True)), constants)
        early = [value for name, value in given.items() if name in self._early]
        boxes = getattr(binary.metadata, "tensordesc_meta", None) or ()
        run(self._edit(binary.asm["ptx"]), binary.metadata.shared, grid, list(given.values()), early=early, boxes=boxes)


def _compiled(kernel, arguments, constants):
    """The kernel for arguments by name, as Triton's launcher would specialize it. -> it, and the arguments that it has left."""
    options = {name: value for name in _OPTIONS if (value := constants.get(name)) is not None}
    constants = {name: value for name, value in constants.items() if name not in _OPTIONS}
    special = {p.name for p in kernel.params if not p.do_not_specialize}
    ones = {name: 1 for name, value in arguments.items() if isinstance(value, int) and value == 1 and name in special}
    given = {name: value for name, value in arguments.items() if name not in ones}
    compile_ = compiling.compile_gluon if isinstance(kernel, GluonJITFunction) else compiling.compile_triton
    binary = compile_(
        kernel,
        {name: _type_of(value) for name, value in given.items()},
        constants | ones,
        aligned={name for name in special & given.keys() if _is_multiple_of_16(given[name])},
        warps=options.pop("num_warps", 4),
        **options,
    )
    return binary, given


def _type_of(argument):
    if isinstance(argument, torch.Tensor):
        return f"*{_POINTED[argument.dtype]}"
    if isinstance(argument, TensorDescriptor):
        return f"tensordesc<{_POINTED[argument.base.dtype]}{argument.block_shape},{argument.layout!r}>"
    return "fp32" if isinstance(argument, float) else "i32"


def _is_multiple_of_16(argument):
    number = argument.data_ptr() if isinstance(argument, torch.Tensor) else argument
    return isinstance(number, int) and number % 16 == 0


def run(text, shared, grid, arguments, *, early=(), boxes=()):
    """Run PTX with so many bytes of shared memory. Arguments: tensors of the CPU, which are written, descriptors and numbers.

    early: those that may be read before `griddepcontrol.wait`. boxes: what the compiler says of each descriptor's.
    """
    program = Program(text)
    memory = Memory(*([_base(one) for one in some if not isinstance(one, int | float)] for some in (arguments, early)))
    values, maps = [], {}
    for argument in arguments:
        if isinstance(argument, TensorDescriptor):
            values.append(_MAPS + 128 * len(maps))
            maps[values[-1]] = _box(memory.address(argument.base), argument, boxes[len(maps)])
            values += [*argument.shape, *argument.strides]
        else:
            values.append(memory.address(argument) if isinstance(argument, torch.Tensor) else argument)
    for first in range(0, prod(grid), _AT_ONCE):
        Machine(program, memory, shared, grid, range(first, min(first + _AT_ONCE, prod(grid))), values, maps).run()
    memory.give_back()


def _base(argument):
    return argument.base if isinstance(argument, TensorDescriptor) else argument


def _box(address, descriptor, told):
    size = told["elem_size"]
    assert descriptor.strides[1] == 1
    return Box(
        address,
        *descriptor.shape,
        descriptor.strides[0] * size,
        size,
        *told["block_size"],
        {0: 0, 1: 32, 2: 64, 3: 128}[told["swizzle"]],
    )
