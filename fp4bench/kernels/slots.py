"""Units of x on their way to a warp through its own part of a CTA's shared memory, a ring of slots.

A lane asks for 16 bytes at a time (`cp.async`), which need no registers until they are used, and a warp waits for what its own
lanes asked for alone: no barrier of the CTA keeps warps at the same unit. x comes back by `ldmatrix` as the B operand of `mma`.
So the four lanes of a group need not exchange it, which costs `decode` 64 selections and 16 shuffles of the 396 instructions of
a unit (sm_90a, 4 tiles, 16 rows of x), nor hold a unit that is not needed yet.

A slot has 128 bytes for each of 8 or 16 rows of x. Eight lanes of an `ldmatrix` read 16 bytes of eight rows at once: so that
these are in banks of their own, chunk c of row r lies at c ^ r % 8.

Triton does not see these reads and writes. To it the memory is its kernel's one allocation, which therefore lies at the
beginning, `global_smem`, and nothing else touches it before `drain`.
"""

import triton
from triton.experimental import gluon
from triton.experimental.gluon import language as gl

MOST_SLOTS = 4  # of a warp: 128 KiB of 16 warps and 16 rows of x

# As inline assembly: a result first, which where nothing is read is a register given back.
_BASE = gl.constexpr("mov.u32 $0, global_smem; add.u32 $0, $0, $1;")
_COPY = gl.constexpr("cp.async.cg.shared.global [$1], [$2], 16, $3; mov.b32 $0, $3;")  # $3 bytes, the others of 16 are zeros
_COMMIT = gl.constexpr("cp.async.commit_group; mov.b32 $0, $1;")
_TOGETHER = gl.constexpr("bar.warp.sync -1; mov.b32 $0, $1;")
_DRAIN = gl.constexpr("cp.async.wait_group 0; bar.sync 0; mov.b32 $0, $1;")
_MATRICES = gl.constexpr("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {$0, $1, $2, $3}, [$4];")


@triton.constexpr_function
def slot_bytes(columns: int) -> int:
    """Of a unit of so many rows of x."""
    return 128 * columns


@triton.constexpr_function
def _wait(pending: int) -> str:
    """Until at most so many of the latest groups of a lane are on their way, then for all lanes of the warp."""
    return f"cp.async.wait_group {pending}; bar.warp.sync -1; mov.b32 $0, $1;"


# --- Where things lie: arithmetic alone, so that numpy can be asked too ------------------------------------------------------


@gluon.jit
def place(row, chunk):  # type: ignore[no-untyped-def]
    """The byte of a slot at which 16 bytes of a row of x begin, `chunk` from 0 to 7."""
    return row * 128 + (chunk ^ (row % 8)) * 16


@gluon.jit
def asked(i, lane):  # type: ignore[no-untyped-def]
    """-> (row, chunk) that a lane asks for as its i-th, the same chunk of every fourth row: a warp reads 128 bytes of four."""
    return 4 * i + lane // 8, lane % 8


@gluon.jit
def taken(i, lane):  # type: ignore[no-untyped-def]
    """-> (row, chunk) to which a lane points the i-th `ldmatrix`: eight rows, 32 columns of the unit."""
    return 8 * (i // 2) + lane % 8, 4 * (i % 2) + lane // 8


@gluon.jit
def later(first, i):  # type: ignore[no-untyped-def]
    """The place of what a lane takes as its i-th, from that of its first: no register for each."""
    return (first ^ (64 * (i % 2))) + 1024 * (i // 2)


# --- Device code -------------------------------------------------------------------------------------------------------------


@gluon.jit
def first(warp, SLOTS: gl.constexpr, COLUMNS: gl.constexpr):  # type: ignore[no-untyped-def]
    """The address of a warp's first slot in shared memory, int32."""
    offset = warp * (SLOTS * slot_bytes(COLUMNS))
    return gl.inline_asm_elementwise(_BASE, "=r,r", [offset], dtype=gl.int32, is_pure=True, pack=1)


@gluon.jit
def following(slot, start, SLOTS: gl.constexpr, COLUMNS: gl.constexpr):  # type: ignore[no-untyped-def]
    """The address of the slot after one, in the ring that begins at `start`."""
    SIZE: gl.constexpr = slot_bytes(COLUMNS)
    return gl.where(slot == start + (SLOTS - 1) * SIZE, start, slot + SIZE)


@gluon.jit
def ask(slot, x, step, thread, m, x_stride, UNITS: gl.constexpr, WARPS: gl.constexpr, COLUMNS: gl.constexpr):  # type: ignore[no-untyped-def]
    """A group of copies: the unit of x that each warp has at `step`, zeros from row m on and beyond the last unit."""
    lane = thread % 32
    unit = step * WARPS + thread // 32
    # A lane's pieces are four rows apart: an address and a stride, which take six registers fewer than four addresses.
    first_row, first_chunk = asked(0, lane)
    start = x + (first_row * x_stride + unit * 64 + first_chunk * 8)
    for i in gl.static_range(COLUMNS // 4):
        row, chunk = asked(i, lane)
        at = (start + 4 * i * x_stride).to(gl.int64)
        size = gl.where((row < m) & (unit < UNITS), 16, 0)
        to = slot + place(row, chunk)
        gl.inline_asm_elementwise(_COPY, "=r,r,l,r,~{memory}", [to, at, size], dtype=gl.int32, is_pure=False, pack=1)
    gl.inline_asm_elementwise(_COMMIT, "=r,r,~{memory}", [thread], dtype=gl.int32, is_pure=False, pack=1)


@gluon.jit
def take(slot, thread, YOUNGER: gl.constexpr, COLUMNS: gl.constexpr, FOUR: gl.constexpr):  # type: ignore[no-untyped-def]
    """Wait for the group that YOUNGER groups were asked for after, and empty its slot: it can be asked for anew.

    -> for each 8 rows of x two int32 [threads, 4], of 32 columns of the unit each: the B operand of two `mma`.
    """
    gl.inline_asm_elementwise(_wait(YOUNGER), "=r,r,~{memory}", [thread], dtype=gl.int32, is_pure=False, pack=1)
    row, chunk = taken(0, thread % 32)
    b = ()  # type: ignore[var-annotated]
    for i in gl.static_range(COLUMNS // 4):
        at = (slot + later(place(row, chunk), i))[:, None] + gl.zeros([slot.shape[0], 4], gl.int32, FOUR)
        b = b + (
            gl.inline_asm_elementwise(_MATRICES, "=r,=r,=r,=r,r,r,r,r,~{memory}", [at], dtype=gl.int32, is_pure=False, pack=4),
        )
    gl.inline_asm_elementwise(_TOGETHER, "=r,r,~{memory}", [thread], dtype=gl.int32, is_pure=False, pack=1)
    return b


@gluon.jit
def drain(thread):  # type: ignore[no-untyped-def]
    """Until nothing of a CTA is on its way or to be taken: its shared memory is Triton's again."""
    gl.inline_asm_elementwise(_DRAIN, "=r,r,~{memory}", [thread], dtype=gl.int32, is_pure=False, pack=1)
