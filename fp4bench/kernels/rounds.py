"""What a launch of `prefill` costs beside another on work that neither was tuned for: its tiles, in rounds of all CTAs.

With many rows of x a product waits for tensor cores and decoding, not for memory, and takes as long as its tiles take rounds; a
last round that few tiles fill takes as long as a full one. So the launch of the nearest shape can be a bad one: Qwen3-32B's o
(5120 x 8192) at m = 1024 is 160 tiles of 128 x 256, on 132 SMs two rounds, as are the 256 tiles of Llama-3.3-70B's o. They take
158.9 and 161.0 us (NVIDIA H200, `2026-11-28_all-providers.json`); Llama's qkv at m = 512 is 160 tiles as well, and takes 111.8
by a launch of its own. `tests/kernels/test_rounds.py` compares what is chosen by cost with what was measured.
"""

from math import ceil

from fp4bench.kernels.prefill_launch import PrefillConfig, Schedule, shares
from fp4bench.kernels.weights import TILE_N, UNIT_K

# Columns of x that cost a tile as much as decoding its rows of W: 72 of bfloat16, for a round of 128 x 128 takes 0.61 of one of
# 128 x 256 (qkv and o at m = 1024, NVIDIA H200); E4M3 is multiplied twice as fast.
_DECODING = {"bf16": 72, "e4m3": 144}
# Rounds that it costs to cut tiles along k, by how many CTAs share one (qkv at m = 512 and 256, NVIDIA H200).
_CUTS = {"many": 0.25, "two": 0.15}


def schedules(config: PrefillConfig, m: int, n: int, k: int, sms: int) -> list[tuple[Schedule, PrefillConfig]]:
    """Of each launch of the product, with its configuration."""
    tiles, units = ceil(n / TILE_N), ceil(k / UNIT_K)
    parts = shares(m, tiles, config, sms)
    return [(Schedule.of(m, last - first, units, part, sms), part) for first, last, part in parts]


def cost(config: PrefillConfig, operand: str, m: int, n: int, k: int, sms: int) -> float:
    """To compare with that of another launch of the same work; the unit is a row of W by a column of x.

    operand: "bf16" or "e4m3". sms: of the GPU.
    """
    return sum(
        _rounds(schedule) * part.ctas * part.rows * (part.columns + _DECODING[operand])
        for schedule, part in schedules(config, m, n, k, sms)
    )


def _rounds(schedule: Schedule) -> float:
    """How often all CTAs take a tile."""
    rounds = schedule.tiles / schedule.ctas
    return rounds + _CUTS[schedule.sharers] if schedule.shared else ceil(rounds)
