"""The order of scales in memory: row-major, and the 128x4 blocked layout of cuBLAS and tcgen05.

The blocked layout cuts a (rows, columns) matrix of scale bytes into tiles of 128 x 4, stored one after the other, row of tiles
by row of tiles. Within a tile the byte of (r, c) lies at (r % 32) * 16 + (r // 32) * 4 + c: four scales of a row together, and
rows 32 apart beside each other. cuBLAS documentation, "1D Block Scaling Factors Layout".
"""

from math import prod

import torch

TILE_ROWS = 128
TILE_COLUMNS = 4


def padded_shape(rows: int, columns: int) -> tuple[int, int]:
    """Rows and columns of scales rounded up to whole tiles: multiples of 128 and of 4."""
    return -(-rows // TILE_ROWS) * TILE_ROWS, -(-columns // TILE_COLUMNS) * TILE_COLUMNS


def to_blocked(scales: torch.Tensor) -> torch.Tensor:
    """Row-major scales in the blocked layout, padded with zero bytes.

    (..., rows, columns) -> (..., padded rows * padded columns), of the same 1-byte dtype. Each leading index (an expert) is
    blocked on its own.
    """
    *lead, rows, columns = scales.shape
    padded_rows, padded_columns = padded_shape(rows, columns)
    raw = torch.nn.functional.pad(scales.view(torch.uint8), (0, padded_columns - columns, 0, padded_rows - rows))
    # (expert, row tile, row // 32, row % 32, column tile, column)
    # -> (expert, row tile, column tile, row % 32, row // 32, column)
    tiles = raw.reshape(prod(lead), padded_rows // TILE_ROWS, 4, 32, padded_columns // TILE_COLUMNS, 4)
    return tiles.permute(0, 1, 4, 3, 2, 5).reshape(*lead, padded_rows * padded_columns).view(scales.dtype)


def from_blocked(blocked: torch.Tensor, rows: int, columns: int) -> torch.Tensor:
    """Inverse of `to_blocked`, padding dropped. (..., padded rows * padded columns) -> (..., rows, columns)."""
    padded_rows, padded_columns = padded_shape(rows, columns)
    if blocked.shape[-1] != padded_rows * padded_columns:
        raise ValueError(
            f"blocked scales of {rows} x {columns} take {padded_rows * padded_columns} bytes, not {blocked.shape[-1]}"
        )
    lead = blocked.shape[:-1]
    tiles = blocked.view(torch.uint8).reshape(prod(lead), padded_rows // TILE_ROWS, padded_columns // TILE_COLUMNS, 32, 4, 4)
    padded = tiles.permute(0, 1, 4, 3, 2, 5).reshape(*lead, padded_rows, padded_columns)
    return padded[..., :rows, :columns].contiguous().view(blocked.dtype)
