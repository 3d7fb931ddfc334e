"""The weights of a layer's experts, one behind another in the kernels' layout (`weights`) but for three things.

Columns. A lane of the tensor cores multiplies what it holds of a word with what it holds of x, wherever the columns come from.
So each 32 columns are in an order in which a lane's share of them is 16 bytes of a row of x that stand together, and x needs
no exchange of registers: position 16 j + 8 h + 2 t + e, which is word j, half h of lane t (`weights`), is column
8 t + 4 j + 2 h + e (`COLUMNS`).

NVFP4's scales. The columns of lanes 0 and 1 are then one block of 16, those of lanes 2 and 3 the other: a lane needs one scale
for two words, as in MXFP4, and half of the instructions. They are int32 (..., 8 g, 2), the last axis t // 2: bytes (columns of
0-31, row g), (columns of 0-31, row g + 8), (columns of 32-63, row g), (columns of 32-63, row g + 8).

Rows of a gated weight (2 i, k), those of the gate first and then those of what it gates. They are stored in tiles of 16, 8 of
each: tile t has rows 8 t .. 8 t + 7 of the gate, then the same rows of the other. A lane holds rows g and g + 8 of a tile, so
both sides of a product meet in one thread, and the activation costs no exchange. Where i is no multiple of 8 each half ends in
rows of zeros.

They are made one expert at a time.
"""

from collections.abc import Iterable
from dataclasses import dataclass, replace

import torch
from torch.nn.functional import pad

from fp4bench.formats import BlockFormat, ScaleRule
from fp4bench.kernels.weights import TILE_N, PreparedWeight, WordOrder, from_words, prepare, restore, to_words
from fp4bench.quantize import Quantized

# The column that each of 32 positions holds.
COLUMNS = tuple(8 * t + 4 * j + 2 * h + e for j in range(2) for h in range(2) for t in range(4) for e in range(2))

_HALF = TILE_N // 2  # rows of each side in a gated tile


@dataclass(frozen=True, eq=False)
class PreparedExperts:
    """Weights (n, k) of `experts` experts; tiles and units as in `PreparedWeight`, which says what they hold but for order.

    words: int32 (experts, tiles, units, 32, 4). scales: int32 (experts, tiles, units, 8), NVFP4 (experts, tiles, units, 8, 2).
    row_scale: float32 (experts, 16 tiles). base: uint8 (experts, 16 tiles), MXFP4 alone.
    tensor_scale: float32 (experts), NVFP4 alone. gated: rows are in the order above, else as they came.
    operand: the type that all of them may be multiplied as (`PreparedWeight.operand`). E4M3 has words in bytes, and is for that
    type alone.
    """

    words: torch.Tensor
    scales: torch.Tensor
    row_scale: torch.Tensor
    base: torch.Tensor | None
    tensor_scale: torch.Tensor | None
    format: BlockFormat
    rule: ScaleRule
    n: int
    k: int
    gated: bool
    operand: torch.dtype

    @property
    def order(self) -> WordOrder:
        """Of the words."""
        return _order(self.operand)

    @property
    def experts(self) -> int:
        """How many there are."""
        return self.words.shape[0]

    @property
    def tiles(self) -> int:
        """Tiles of 16 rows, of each."""
        return self.words.shape[1]

    @property
    def units(self) -> int:
        """Units of 64 columns, of each."""
        return self.words.shape[2]

    @property
    def nbytes(self) -> int:
        """Bytes of one expert that a product reads: codes and scales."""
        return (self.words.nbytes + self.scales.nbytes) // self.experts


def prepare_experts(
    weights: Iterable[Quantized], experts: int, *, gated: bool, operand: torch.dtype = torch.bfloat16
) -> PreparedExperts:
    """Lay out `experts` quantized weights of one shape and format, taken one after another: no two need be there at once.

    Raises ValueError for another number of weights, shapes or formats that differ, rotated codes, a gated weight with an odd
    number of rows, and MXFP4 scales of one row that lie further apart than `operand` reaches (`PreparedWeight.rest`).
    """
    stack = None
    count = 0
    for count, q in enumerate(weights, 1):
        one = _prepare_one(q, gated, operand)
        if stack is None:
            stack = _empty(one, q, experts, gated)
        elif (q.format, q.rule, q.shape) != (stack.format, stack.rule, (stack.n, stack.k)):
            raise ValueError(
                f"expert {count - 1} is a {q.format} weight {q.shape}, the first a {stack.format} {stack.n, stack.k}"
            )
        if count > experts:
            raise ValueError(f"there are more than {experts} weights")
        for whole, part in _pairs(stack, _reordered(one)):
            whole[count - 1] = part
    if stack is None or count < experts:
        raise ValueError(f"there are {count} weights, not {experts}")
    return stack


def restore_expert(stack: PreparedExperts, expert: int) -> Quantized:
    """Inverse of `prepare_experts` for one of them, as far as `weights.restore` inverts `weights.prepare`."""
    padded = TILE_N * stack.tiles if stack.gated else stack.n
    one = PreparedWeight(
        _to_natural(stack.words[expert], stack.order),
        _swapped(stack.scales[expert]),
        stack.row_scale[expert],
        None if stack.base is None else stack.base[expert],
        None if stack.tensor_scale is None else stack.tensor_scale[expert],
        stack.format,
        stack.rule,
        None,
        padded,
        stack.k,
        stack.operand,
        order=stack.order,
    )
    q = restore(one)
    if not stack.gated:
        return q
    half = stack.n // 2
    codes, scale_bytes = (_parted(tensor, half) for tensor in (q.codes, q.scales.view(torch.uint8)))
    return replace(q, codes=codes, scales=scale_bytes.view(q.scales.dtype))


def gated_rows(rows: torch.Tensor) -> torch.Tensor:
    """Rows of a gated weight, or of its bias, in the order of the tiles. (2 i, ...) -> (16 tiles, ...), zeros where i ends."""
    halves = rows.unflatten(0, (2, -1))
    halves = pad(halves, (0, 0) * (halves.dim() - 2) + (0, -halves.shape[1] % _HALF))
    return halves.unflatten(1, (-1, _HALF)).transpose(0, 1).flatten(0, 2)


def _parted(rows: torch.Tensor, half: int) -> torch.Tensor:
    """Inverse of `gated_rows`. (16 tiles, ...) -> (2 half, ...)."""
    return rows.unflatten(0, (-1, 2, _HALF)).transpose(0, 1).flatten(1, 2)[:, :half].flatten(0, 1).contiguous()


def _prepare_one(q: Quantized, gated: bool, operand: torch.dtype) -> PreparedWeight:
    if q.hadamard is not None:
        raise ValueError("codes of experts are not rotated")
    if gated:
        if q.shape[0] % 2:
            raise ValueError(f"a gated weight has an even number of rows, not {q.shape[0]}")
        codes, scale_bytes = gated_rows(q.codes), gated_rows(q.scales.view(torch.uint8))
        q = replace(q, codes=codes, scales=scale_bytes.view(q.scales.dtype))
    one = prepare(q, operand, _order(operand))
    if one.rest is not None:
        raise ValueError(f"block scales of one row of an expert lie further apart than {operand} reaches")
    return one


def _reordered(one: PreparedWeight) -> PreparedWeight:
    """Columns and NVFP4's scales in the order above."""
    at = torch.tensor([COLUMNS[p] // 2 for p in range(0, 32, 2)], device=one.words.device)
    return replace(one, words=_with_pairs(one.words, at, one.order), scales=_swapped(one.scales))


def _to_natural(words: torch.Tensor, order: WordOrder) -> torch.Tensor:
    """Inverse of the reordering of columns."""
    at = torch.tensor([COLUMNS.index(column) // 2 for column in range(0, 32, 2)], device=words.device)
    return _with_pairs(words, at, order)


def _with_pairs(words: torch.Tensor, at: torch.Tensor, order: WordOrder) -> torch.Tensor:
    """Of each 32 columns pair `at[i]` becomes pair i. A pair of columns is a byte of `from_words`."""
    codes = from_words(words, order).unflatten(-1, (-1, 16))
    return to_words(codes[..., at].flatten(-2), order)


def _order(operand: torch.dtype) -> WordOrder:
    return WordOrder.BYTES if operand is torch.float8_e4m3fn else WordOrder.HALVES


def _swapped(scales: torch.Tensor) -> torch.Tensor:
    """NVFP4's scales by block of 32 columns, then by half of the unit; or back. MXFP4's as they are."""
    if scales.dim() == 3:
        return scales
    of_rows = scales.view(torch.uint8).unflatten(-1, (2, 2, 2))
    return of_rows.transpose(-3, -2).contiguous().flatten(-3).view(torch.int32)


def _empty(one: PreparedWeight, q: Quantized, experts: int, gated: bool) -> PreparedExperts:
    def stacked(tensor: torch.Tensor | None) -> torch.Tensor | None:
        return None if tensor is None else tensor.new_empty(experts, *tensor.shape)

    words, scales, row_scale = (one.words, one.scales, one.row_scale)
    return PreparedExperts(
        words.new_empty(experts, *words.shape),
        scales.new_empty(experts, *scales.shape),
        row_scale.new_empty(experts, *row_scale.shape),
        stacked(one.base),
        stacked(one.tensor_scale),
        q.format,
        q.rule,
        q.shape[0],
        q.k,
        gated,
        one.operand,
    )


def _pairs(stack: PreparedExperts, one: PreparedWeight) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Each tensor of the stack with that of one weight."""
    both = [(getattr(stack, name), getattr(one, name)) for name in ("words", "scales", "row_scale", "base", "tensor_scale")]
    return [(whole, part) for whole, part in both if whole is not None]
