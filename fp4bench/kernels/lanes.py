"""x (m, k) in the registers of lanes, as `fp4_text` rotates it: four lanes have a row of 4 `lane` values, neighbours each.

Rows follow one another in memory without gaps, so that a row of x is some of these rows. A lane has `lane` neighbours of rows g
and g + 8, loaded 16 bytes at a time: the registers of an A operand as they are.
"""

from dataclasses import dataclass, replace

import torch
from triton.experimental import gluon
from triton.experimental.gluon import language as gl

_MANY_CTAS = 1024  # 8 for each of an H200's 132 SMs


@dataclass(frozen=True)
class Shape:
    """How to launch. lane: neighbours that a lane has, 8, 16 or 32. warps: of a CTA. repeats: times 16 rows that a warp has."""

    lane: int
    warps: int = 4
    repeats: int = 1

    @property
    def rows(self) -> int:
        """Rows of 4 `lane` values that a CTA has."""
        return 16 * self.warps * self.repeats

    def of(self, rows: int) -> "Shape":
        """This for so many rows: where they fill no GPU, each warp has 16, so that more SMs have some."""
        return self if rows >= _MANY_CTAS * self.rows else replace(self, repeats=1)


def fits(x: torch.Tensor, how: Shape) -> bool:
    """Whether x (m, k) is bfloat16 without gaps, each of its rows some rows of lanes."""
    whole = x.is_contiguous() and x.shape[1] % (4 * how.lane) == 0
    return whole and x.dtype == torch.bfloat16 and x.data_ptr() % 16 == 0


@gluon.constexpr_function
def registers_of(lane, warps):  # type: ignore[no-untyped-def]
    """(threads, `lane` / 2) registers of two values."""
    return gl.BlockedLayout([1, lane // 2], [32, 1], [warps, 1], [1, 0])


@gluon.jit
def of_cta(x, codes, scales, rows, LANE: gl.constexpr, REPEATS: gl.constexpr, BLOCK: gl.constexpr):  # type: ignore[no-untyped-def]
    """-> x as registers, codes and scales of the CTA's first row, and how many rows there are from there on."""
    ROWS: gl.constexpr = 16 * gl.num_warps() * REPEATS
    # An int64 once a program: from there on everything is near.
    start = gl.program_id(0).to(gl.int64) * ROWS
    x = x.to(gl.pointer_type(gl.int32), bitcast=True) + start * (2 * LANE)
    return x, codes + start * (LANE // 2), scales + start * (4 * LANE // BLOCK), rows - gl.program_id(0) * ROWS


@gluon.jit
def of_thread(LANE: gl.constexpr, REPEATS: gl.constexpr):  # type: ignore[no-untyped-def]
    """-> (threads) their numbers, which of the four lanes of a row each is, and its first row of the CTA's."""
    thread = gl.arange(0, 32 * gl.num_warps(), gl.SliceLayout(1, registers_of(LANE, gl.num_warps())))
    return thread, thread % 4, thread // 32 * (16 * REPEATS) + thread % 32 // 4


@gluon.jit
def load_rows(x, row, t, left, LANE: gl.constexpr, COUNT: gl.constexpr):  # type: ignore[no-untyped-def]
    """int32 (threads, LANE / 2) of rows row, row + 8, ..., COUNT of them. row, t: (threads). Rows from `left` on are zeros."""
    REGISTERS: gl.constexpr = registers_of(LANE, gl.num_warps())
    place = (row * (2 * LANE) + t * (LANE // 2))[:, None] + gl.arange(0, LANE // 2, gl.SliceLayout(0, REGISTERS))[None, :]
    loaded = ()  # type: ignore[var-annotated]
    for i in gl.static_range(COUNT):
        loaded = loaded + (gl.load(x + place + 16 * LANE * i, mask=(row + 8 * i < left)[:, None], other=0),)
    return loaded


@gluon.jit
def store_words(words, codes, row, t, left, LANE: gl.constexpr):  # type: ignore[no-untyped-def]
    """Words (threads, LANE / 8) to their place among `codes`, int32 (rows, LANE / 2)."""
    LAYOUT: gl.constexpr = words.type.layout
    place = gl.convert_layout(row * (LANE // 2) + t * (LANE // 8), gl.SliceLayout(1, LAYOUT), assert_trivial=True)
    inside = gl.convert_layout(row < left, gl.SliceLayout(1, LAYOUT), assert_trivial=True)
    at = codes + place[:, None] + gl.arange(0, LANE // 8, gl.SliceLayout(0, LAYOUT))[None, :]
    gl.store(at, words, mask=inside[:, None])


@gluon.jit
def quarters(registers):  # type: ignore[no-untyped-def]
    """Registers 0, 1, 2 and 3 of each four. (threads, 4 n) -> (threads, n), four times."""
    even, odd = gl.split(registers.reshape([registers.shape[0], registers.shape[1] // 4, 2, 2]))
    a0, a2 = gl.split(even)
    a1, a3 = gl.split(odd)
    return a0, a1, a2, a3


@gluon.jit
def beside(of_rows, tensor):  # type: ignore[no-untyped-def]
    """A number of each thread beside each of its numbers in `tensor`. (threads) -> (threads, n)."""
    own = gl.convert_layout(of_rows, gl.SliceLayout(1, tensor.type.layout), assert_trivial=True)
    return gl.expand_dims(own, 1) + gl.zeros_like(tensor)
