"""Kernels compiled for a GPU that need not be there, and what their binaries say of registers and stack."""

import os
import re
import subprocess

import triton


def compile_gluon(kernel, types, constants, *, warps, capability=90, **options):
    """`kernel` for pointers and strides that are multiples of 16. types: of its arguments that are no constants."""
    from triton.backends.compiler import GPUTarget
    from triton.experimental.gluon._runtime import GluonASTSource

    names = kernel.arg_names
    aligned = [i for i, name in enumerate(names) if types.get(name, "").startswith("*") or "stride" in name]
    source = GluonASTSource(
        fn=kernel,
        signature=types | dict.fromkeys(constants, "constexpr"),
        constexprs={(names.index(name),): value for name, value in constants.items()},
        attrs={(i,): [["tt.divisibility", 16]] for i in aligned},
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
