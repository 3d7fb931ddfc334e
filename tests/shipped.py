"""The launches of the packaged tables as they are compiled, and which of them were seen to spill nothing.

Compiling all of them takes minutes, and what has the same source, constants and Triton becomes the same binary. So those that
spill nothing are written to `unspilled.txt`, by a hash of all that decides; tests compile what is not in there.

    python tests/shipped.py    compiles what is not in there, and writes the file anew
"""

import sys
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import compiling
import torch

from fp4bench.devices import Device
from fp4bench.formats import FORMATS, MXFP4
from fp4bench.kernels import configs, decode, prefill
from fp4bench.kernels.decode import DecodeConfig
from fp4bench.kernels.prefill_kernel import wgmma_product
from fp4bench.kernels.prefill_launch import PrefillConfig, Schedule, shares

H200 = Device("cuda:0", "NVIDIA H200", (9, 0), 132, 60 << 20)
UNSPILLED = Path(__file__).with_name("unspilled.txt")
REGISTERS = 65536  # of an SM


@dataclass(frozen=True)
class Decode:
    """One kernel of decode. columns: rows of x that it has room for."""

    format: str
    launch: DecodeConfig
    columns: int
    k: int
    dtype: torch.dtype

    def compilation(self):
        launch = self.launch
        constants = {"EXCHANGE": launch.exchange, "AHEAD": launch.ahead, "DEPTH": launch.depth, "SLOTS": launch.slots}
        how: dict[str, Any] = {"k": self.k, "columns": self.columns, "fmt": FORMATS[self.format], "dtype": self.dtype}
        registers = {} if launch.max_registers is None else {"maxnreg": launch.max_registers}
        return decode_compilation(tiles=launch.tiles, warps=launch.warps, options=registers, **how, **constants)

    def __str__(self):
        return f"decode {self.format} {self.dtype} {self.columns} x {self.k} {self.launch}"


@dataclass(frozen=True)
class Prefill:
    """One wgmma kernel. form: what it multiplies as; sharers: how many CTAs share a tile."""

    form: str
    format: str
    launch: PrefillConfig
    sharers: str

    def compilation(self):
        return prefill_compilation(self.form, FORMATS[self.format], self.launch, self.form == "e4m3", self.sharers)

    def __str__(self):
        return f"prefill {self.format} {self.form} {self.sharers} {self.launch}"


def shipped():
    """Every kernel of the tables, each once."""
    found: set[Decode | Prefill] = set()
    for entry in (entry for table in configs.tables_of(H200) for entry in table.entries):
        work, launch = entry.work, entry.launch
        if isinstance(launch, DecodeConfig):
            columns = 8 if work.m <= 8 else 16
            found |= {Decode(work.format, launch, columns, work.k, dtype) for dtype in (torch.bfloat16, torch.float16)}
        elif isinstance(launch, PrefillConfig):
            found |= {Prefill(work.operand, work.format, *one) for one in _shares(work, launch)}
    return sorted(found, key=str)


def _shares(work, launch):
    """The launches that a product is made of, and their sharers."""
    for first, last, part in shares(work.m, -(-work.n // 16), launch, 132):
        sharers = Schedule.of(work.m, last - first, -(-work.k // 64), part, 132).sharers
        yield replace(part, streamed=True, pairs=False), sharers


def decode_compilation(
    capability=90, k=8192, columns=8, fmt=MXFP4, dtype=torch.bfloat16, tiles=4, warps=8, options=None, **constants
):
    """For contiguous operands with k a multiple of 64."""
    units = -(-k // 64)
    types = {"x": "*bf16" if dtype is torch.bfloat16 else "*fp16", "words": "*i32", "scales": "*i32", "row_scale": "*fp32"}
    types |= {"bias": types["x"], "out": types["x"], "alpha": "fp32", "m": "i32", "n": "i32", "k": "i32", "tiles": "i32"}
    types |= {"x_stride": "i32", "out_stride": "i32"}
    constants = {
        **{"UNITS": units, "STEPS": -(-units // warps), "TILES": tiles, "WARPS": warps, "COLUMNS": columns, "DEPTH": 1},
        **{"TWO_LEVEL": fmt.has_tensor_scale, "HAS_BIAS": False, "ALL_COLUMNS": True, "PAIRS": True},
        **{"EXCHANGE": False, "AHEAD": False, "SLOTS": 0},
        **constants,
    }
    return compiling.gluon(decode._decode, types, constants, warps=warps, capability=capability, **(options or {}))


def prefill_compilation(form, fmt, config, in_bytes=False, sharers="many"):
    """For sm_90a and contiguous operands."""
    dtype = next(dtype for dtype, name in prefill._FORMS.items() if name == form)
    tiles, units = config.rows // 16, config.depth // 64
    per_unit = 16 if fmt.has_tensor_scale else 8
    element = {"bf16": "bf16", "fp16": "fp16", "e4m3": "fp8e4nv"}[form]
    types = {
        "x_tiles": _described(element, torch.empty(8, 4096, dtype=dtype), [config.columns, config.depth], 128),
        "words": _described("i32", torch.empty(8, 4096, dtype=torch.int32), [tiles, 128 * units], 0),
        "scales": _described("i32", torch.empty(8, 4096, dtype=torch.int32), [tiles, per_unit * units], 0),
        "out": "*fp16" if form == "fp16" else "*bf16",
        **dict.fromkeys(("row_scale", "x_scale", "bias", "partial"), "*fp32"),
        "counters": "*i32",
        **dict.fromkeys(("m", "n", "stride", "ctas", "shared", "tiles", "steps", "n_tiles", "m_tiles"), "i32"),
        "alpha": "fp32",
    }
    constants = {
        "REPEATS": config.rows * config.split // (64 * config.warpgroups),
        "SPLIT": config.split,
        "WARPGROUPS": config.warpgroups,
        "COLUMNS": config.columns,
        "UNITS": units,
        "STAGES": config.stages,
        "GROUP": config.group,
        "FORM": form,
        "TWO_LEVEL": fmt.has_tensor_scale,
        "IN_BYTES": in_bytes,
        "SHARERS": "two" if config.pairs else sharers,
        "HAS_X_SCALE": form == "e4m3",
        "HAS_BIAS": False,
        "REGISTERS": config.consumer_registers,
    }
    aligned = {"n", "stride", *(name for name, type in types.items() if type.startswith("*"))}
    return compiling.gluon(wgmma_product, types, constants, warps=4, aligned=aligned, maxnreg=config.registers)


def _described(element, tensor, block, swizzle):
    layout = prefill.descriptor(tensor, block, swizzle).layout
    return f"tensordesc<{element}{block},{layout!r}>"


def spills(one, tmp_path):
    """What is wrong with a shipped kernel as it is compiled: bytes of the stack, or registers that an SM has not; else None."""
    registers, stack = compiling.resources(one.compilation().binary(), tmp_path)
    if stack:
        return f"{stack} bytes of the stack"
    if isinstance(one, Decode) and registers * 32 * one.launch.warps > REGISTERS:
        return f"{registers} registers of {32 * one.launch.warps} threads"
    return None


def unspilled():
    """The keys of the file."""
    return {line.split()[0] for line in UNSPILLED.read_text(encoding="utf-8").splitlines() if not line.startswith("#")}


def main():
    known, lines, wrong = unspilled() if UNSPILLED.exists() else set(), [], []
    with tempfile.TemporaryDirectory() as folder:
        for one in shipped():
            if (key := one.compilation().key) not in known and (what := spills(one, Path(folder))):
                wrong.append(f"{what}: {one}")
            else:
                lines.append(f"{key} {one}\n")
    head = "# Kernels of the packaged tables that spill nothing, by what they are compiled from: python tests/shipped.py\n"
    UNSPILLED.write_text(head + "".join(lines), encoding="utf-8")
    sys.exit("\n".join(wrong) or None)


if __name__ == "__main__":
    main()
