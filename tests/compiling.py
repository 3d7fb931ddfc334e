"""Kernels compiled for a GPU that need not be there, and what their binaries say of registers and stack."""

import os
import re
import subprocess

import triton


def compile_gluon(kernel, types, constants, *, warps, capability=90, aligned=None, **options):
    """`kernel`, where multiples of 16 are the arguments in `aligned`, by default pointers and strides.

    types: of its arguments that are no constants.
    """
    from triton.backends.compiler import GPUTarget
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
    return triton.compile(source, target=GPUTarget("cuda", capability, 32), options={"num_warps": warps, **options})


def compile_triton(kernel, types, constants, aligned, *, warps, capability=90, **options):
    """`kernel`, whose arguments named in `aligned` are multiples of 16. types: of its arguments that are no constants."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    names = kernel.arg_names
    source = ASTSource(
        kernel,
        {name: types.get(name, "constexpr") for name in names},
        constants,
        {(names.index(name),): [["tt.divisibility", 16]] for name in aligned},
    )
    return triton.compile(source, target=GPUTarget("cuda", capability, 32), options={"num_warps": warps, **options})


def resources(binary, tmp_path):
    """Registers and stack bytes of a thread, as cuobjdump reads them: what was spilled lies on the stack."""
    tool = os.path.join(os.path.dirname(triton.__file__), "backends", "nvidia", "bin", "cuobjdump")
    path = tmp_path / "kernel.cubin"
    path.write_bytes(binary.asm["cubin"])
    done = subprocess.run([tool, "-res-usage", path], capture_output=True, text=True, check=True)
    found = re.search(r"REG:(\d+) STACK:(\d+)", done.stdout)
    assert found, done.stdout
    return int(found[1]), int(found[2])
