"""Kernels compiled for a GPU that need not be there, and what their binaries say of registers and stack."""

import os
import re
import subprocess
from dataclasses import dataclass
from hashlib import sha256
from typing import Any

import triton


@dataclass(frozen=True)
class Compilation:
    """A kernel with all that decides what it is compiled to."""

    source: Any
    capability: int
    options: dict[str, Any]

    @property
    def key(self):
        """A hash of it: of the source of the kernel and of all that it calls, of types, constants, options and Triton."""
        told = triton.__version__, self.source.hash(), self.capability, sorted(self.options.items())
        return sha256(repr(told).encode()).hexdigest()[:16]

    def binary(self):
        from triton.backends.compiler import GPUTarget

        return triton.compile(self.source, target=GPUTarget("cuda", self.capability, 32), options=self.options)


def gluon(kernel, types, constants, *, warps, capability=90, aligned=None, **options):
    """`kernel`, where multiples of 16 are the arguments in `aligned`, by default pointers and strides.

    types: of its arguments that are no constants.
    """
    from triton.experimental.gluon._runtime import GluonASTSource

    names = kernel.arg_names
    if aligned is None:
        aligned = {name for name in names if types.get(name, "").startswith("*") or "stride" in name}
    source = GluonASTSource(
        fn=kernel,
        signature={name: types.get(name, "constexpr") for name in names},
        constexprs={(names.index(name),): value for name, value in constants.items()},
        attrs={(names.index(name),): [["tt.divisibility", 16]] for name in sorted(aligned)},
    )
    return Compilation(source, capability, {"num_warps": warps, **options})


def compile_gluon(*what, **how):
    return gluon(*what, **how).binary()


def compile_triton(kernel, types, constants, aligned, *, warps, capability=90, **options):
    """`kernel`, whose arguments named in `aligned` are multiples of 16. types: of its arguments that are no constants."""
    from triton.compiler import ASTSource

    names = kernel.arg_names
    source = ASTSource(
        kernel,
        {name: types.get(name, "constexpr") for name in names},
        constants,
        {(names.index(name),): [["tt.divisibility", 16]] for name in aligned},
    )
    return Compilation(source, capability, {"num_warps": warps, **options}).binary()


def resources(binary, tmp_path):
    """Registers and stack bytes of a thread: what was spilled lies on the stack."""
    text = dumped(binary, "-res-usage", tmp_path)
    found = re.search(r"REG:(\d+) STACK:(\d+)", text)
    assert found, text
    return int(found[1]), int(found[2])


def dumped(binary, what, tmp_path):
    """What cuobjdump tells of the binary."""
    tool = os.path.join(os.path.dirname(triton.__file__), "backends", "nvidia", "bin", "cuobjdump")
    path = tmp_path / "kernel.cubin"
    path.write_bytes(binary.asm["cubin"])
    return subprocess.run([tool, what, path], capture_output=True, text=True, check=True).stdout
