"""What problems share: an operand's bytes, random values from a seed, and the form of a case id."""

import torch

from fp4bench.formats import BlockFormat


def fp4_bytes(rows: int, k: int, format: BlockFormat) -> int:
    """Codes, block scales and the tensor scale of a (rows, k) operand: 4.25 bits a value for MXFP4, 4.5 for NVFP4."""
    blocks = -(-k // format.block_size)
    return rows * -(-k // 2) + rows * blocks * format.scale_dtype.itemsize + (4 if format.has_tensor_scale else 0)


def normal(rows: int, columns: int, device: torch.device | str, seed: int) -> torch.Tensor:
    """bfloat16 (rows, columns), standard normal. Devices draw different values."""
    generator = torch.Generator(device).manual_seed(seed)
    return torch.randn(rows, columns, generator=generator, device=device, dtype=torch.bfloat16)


def join_case_id(op: str, what: tuple[str, ...], provider: str, where: str, m: int) -> str:
    """`<op>-<what>[-<provider>]-<where>-m<m>`."""
    return "-".join((op, *what, *((provider,) if provider else ()), where, f"m{m}"))
