"""How a product of `prefill` is launched: the tiles of its CTAs, who gets which, and the launches that are worth measuring."""

from dataclasses import dataclass, replace
from itertools import product
from math import ceil
from typing import Any

from fp4bench.kernels.weights import TILE_N, UNIT_K

WARPGROUP_ROWS = 64  # rows of one wgmma
SHARED_BYTES = 227 * 1024  # of an SM, to one CTA

_COLUMNS = (8, 16, 32, 64, 128, 256)
_BARRIERS_AND_SCRATCH = 6 * 1024
_REGISTERS = 65536  # of an SM
_PRODUCER_REGISTERS = 24  # the fewest that setmaxnreg allows
FEWEST_STEPS = 4  # a share of a tile is not worth its partial sum below that


@dataclass(frozen=True)
class PrefillConfig:
    """How one product is launched.

    rows, columns: the tile of a CTA, rows of W (n) and rows of x (m). depth: columns of k in a step.
    stages: steps that shared memory holds. warpgroups: 1, 2 or 4, which share the rows. ctas: CTAs an SM.
    group: m tiles that are worked on together, to share the L2. streamed: whether tiles are cut along k to fill all SMs.
    along_k: whether the warpgroups take steps of the same rows in turn, instead of rows of the same step.
    tail: the launch of the rows of W whose tiles fill no whole round of CTAs; None: they are part of this one.
    pairs: whether tiles for one round more are cut along k with those that fill none, so that no more than two CTAs share one.
    """

    rows: int = 128
    columns: int = 128
    depth: int = 64
    stages: int = 4
    warpgroups: int = 2
    ctas: int = 1
    group: int = 8
    streamed: bool = True
    along_k: bool = False
    tail: "PrefillConfig | None" = None
    pairs: bool = False

    def __post_init__(self) -> None:
        for name, allowed in (
            ("rows", (64, 128, 256)),
            ("columns", _COLUMNS),
            ("depth", (64, 128, 256)),
            ("warpgroups", (1, 2, 4)),
            ("ctas", (1, 2, 3, 4)),
        ):
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name} is one of {allowed}, not {getattr(self, name)}")
        least = WARPGROUP_ROWS * self.warpgroups // self.split
        if self.rows < least:
            raise ValueError(f"{self.warpgroups} warpgroups need at least {least} rows, not {self.rows}")
        if self.along_k and (self.warpgroups == 1 or self.columns > 128):
            raise ValueError(f"{self.warpgroups} warpgroups cannot share the k of {self.columns} columns")
        # A warpgroup that sees only some fills of a stage takes the one before last for its own: a barrier tells parity alone.
        if self.stages % self.split:
            raise ValueError(f"{self.split} warpgroups that share k need a multiple of {self.split} stages, not {self.stages}")
        if self.accumulators > 128:
            raise ValueError(f"a {self.rows} x {self.columns} tile takes {self.accumulators} registers a thread, more than 128")
        if self.tail and (self.tail.tail or self.tail.rows * self.tail.columns >= self.rows * self.columns):
            raise ValueError(f"a tail has smaller tiles than {self.rows} x {self.columns}, and none of its own: {self.tail}")
        if self.pairs and not self.streamed:
            raise ValueError("pairs of CTAs share tiles that are cut along k: such a launch is streamed")
        if self.pairs and self.tail:
            raise ValueError("the tiles that pairs of CTAs share are those that a tail would take: a launch has one of both")
        if self.stages < 2 or self.group < 1:
            raise ValueError(f"at least 2 stages and 1 m tile a group, not {self.stages} and {self.group}")

    @property
    def split(self) -> int:
        """Warpgroups that share the k of the same rows."""
        return self.warpgroups if self.along_k else 1

    @property
    def accumulators(self) -> int:
        """Registers of a thread that hold sums."""
        return self.rows * self.columns * self.split // (128 * self.warpgroups)

    @property
    def registers(self) -> int:
        """Registers a thread at the launch, by which the consumers' share is known."""
        threads = 128 * (self.warpgroups + 1) * self.ctas
        return min(255, _REGISTERS // threads // 8 * 8)

    @property
    def consumer_registers(self) -> int:
        """Registers of a consumer's thread, after the producer's warps gave theirs."""
        free = self.registers * (self.warpgroups + 1) - _PRODUCER_REGISTERS
        return min(240, free // self.warpgroups // 8 * 8)

    def has_registers(self, x_itemsize: int) -> bool:
        """Whether a consumer's thread has room for sums, the decoded weights of two steps, and some 40 registers of the rest.

        ptxas (13.0) refuses a wgmma whose operands exceed the registers of the launch, whatever the consumers are given later.
        """
        weights_of_a_step = self.rows * self.depth * self.split * x_itemsize // 4 // (128 * self.warpgroups)
        needed = self.accumulators + 2 * weights_of_a_step + 40
        return needed <= self.consumer_registers and self.accumulators + 32 <= self.registers

    def most_stages(self, x_itemsize: int, scales_per_byte: int) -> int:
        """How many fit beside the other CTAs of an SM; bytes as `shared_bytes` takes them."""
        rest = _BARRIERS_AND_SCRATCH + self._sums_bytes
        one = self.shared_bytes(x_itemsize, scales_per_byte) - rest
        return (SHARED_BYTES // self.ctas - rest) * self.stages // one

    def shared_bytes(self, x_itemsize: int, scales_per_byte: int) -> int:
        """Shared memory of a CTA; scales_per_byte: 1 for MXFP4, 2 for NVFP4 scales of a k of 32."""
        words = self.rows * self.depth // 2 + self.rows * self.depth // 32 * scales_per_byte
        return self.stages * (self.columns * self.depth * x_itemsize + words) + _BARRIERS_AND_SCRATCH + self._sums_bytes

    @property
    def _sums_bytes(self) -> int:
        """What warpgroups that share k hand over in shared memory: all but the first one's sums."""
        return (self.split - 1) * self.rows * self.columns * 4


@dataclass(frozen=True)
class Schedule:
    """Which CTA computes what: `shared` tiles are cut along k among all, the others are taken whole, in turn."""

    ctas: int
    shared: int
    tiles: int
    steps: int
    n_tiles: int
    m_tiles: int

    @classmethod
    def of(cls, m: int, tiles_16: int, units: int, config: PrefillConfig, sms: int) -> "Schedule":
        """The schedule of an m-row product with a weight of so many tiles of 16 rows and units of 64 columns."""
        n_tiles, m_tiles = ceil(tiles_16 * TILE_N / config.rows), ceil(m / config.columns)
        tiles, steps = n_tiles * m_tiles, ceil(units * UNIT_K / (config.depth * config.split))
        ctas = sms * config.ctas
        if not config.streamed:
            return cls(min(ctas, tiles), 0, tiles, steps, n_tiles, m_tiles)
        if tiles >= ctas:
            shared = tiles % ctas
            if shared * steps < FEWEST_STEPS * ctas:  # not worth cutting; and a share of no step has no sum to collect
                shared = 0
            elif config.pairs:
                shared += ctas
            return cls(ctas, shared, tiles, steps, n_tiles, m_tiles)
        ctas = max(tiles, min(ctas, tiles * steps // FEWEST_STEPS))
        return cls(ctas, tiles if ctas > tiles else 0, tiles, steps, n_tiles, m_tiles)

    @property
    def sharers(self) -> str:
        """How many CTAs may share a tile: "one", "two" where each CTA's share is longer than a tile, or "many"."""
        if not self.shared:
            return "one"
        return "two" if self.shared >= self.ctas else "many"


def shares(m: int, tiles_16: int, config: PrefillConfig, sms: int) -> list[tuple[int, int, PrefillConfig]]:
    """The launches of an m-row product: (first, last) of the weight's tiles of 16 rows, and how they are launched.

    A product is one launch, or two where the configuration has a tail: rows whose tiles fill whole rounds of CTAs, then the
    others in smaller tiles. On an H200 qkv of Llama-3.3-70B at m = 512 is 1.2 rounds of 128 x 256.
    """
    alone = replace(config, tail=None)
    n_tiles, m_tiles = ceil(tiles_16 * TILE_N / config.rows), ceil(m / config.columns)
    ctas = sms * config.ctas
    whole = n_tiles * m_tiles // ctas * ctas // m_tiles
    if not config.tail or not 0 < whole < n_tiles:
        return [(0, tiles_16, alone)]
    end = whole * (config.rows // TILE_N)
    return [(0, end, replace(alone, streamed=False)), (end, tiles_16, config.tail)]


def default_config(m: int, x_itemsize: int = 2) -> PrefillConfig:
    """A launch for m rows of x: the narrowest tile that holds them all, up to 128, of those that spill no registers."""
    columns = min(128, max(16, 1 << (m - 1).bit_length()))
    return PrefillConfig(columns=columns, depth=128 // x_itemsize, ctas=2 if columns <= 32 else 1)


def candidates(m: int, x_itemsize: int, scales_per_byte: int) -> list[PrefillConfig]:
    """The launches that are worth measuring for m rows of x, whatever the weight. Bytes as `shared_bytes` takes them.

    One tile holds all rows of x where it can: a second would decode the weight again. Where several are needed, 128 and 256.
    """
    least = 128 // x_itemsize
    covering = max(8, 1 << (m - 1).bit_length())
    found = []
    if covering <= 64:
        shapes = [
            (64, 1, 2),
            (64, 1, 3),
            (64, 1, 4),
            (128, 1, 1),
            (128, 1, 2),
            (128, 1, 3),
            (128, 2, 1),
            (128, 2, 2),
            (256, 2, 1),
            (256, 4, 1),
        ]
        depths = sorted({least, 2 * least, 256})  # longer steps wait less often
        for (rows, warpgroups, ctas), depth in product(shapes, depths):
            made = PrefillConfig(rows, covering, depth, 2, warpgroups, ctas)
            most = made.most_stages(x_itemsize, scales_per_byte)
            found += [replace(made, stages=stages) for stages in sorted({min(4, most), min(8, most)}) if stages > 1]
        for (warpgroups, ctas), depth, streamed in product(((2, 1), (2, 2), (4, 1)), depths, (True, False)):
            made = PrefillConfig(64, covering, depth, warpgroups, warpgroups, ctas, streamed=streamed, along_k=True)
            most = min(8, made.most_stages(x_itemsize, scales_per_byte)) // warpgroups * warpgroups
            # Four stages leave room for a CTA of the next kernel, which then begins early.
            found += [replace(made, stages=stages) for stages in sorted({min(4, most), most}) if stages > warpgroups]
    else:
        shapes = [(128, 1, 1), (128, 2, 1), (256, 2, 1), (64, 1, 2)]
        groups = (8,) if m <= 256 else (4, 16)
        tiles = product(shapes, (128, 256), (least, 2 * least), groups)
        for (rows, warpgroups, ctas), columns, depth, group in tiles:
            if rows * columns // (128 * warpgroups) > 128 or (columns > covering):
                continue
            made = PrefillConfig(rows, columns, depth, 2, warpgroups, ctas, group)
            most = min(6, made.most_stages(x_itemsize, scales_per_byte))
            found += [replace(made, stages=most, streamed=s, pairs=p) for s, p in _CUTS if most > 1]
            if most > 1 and columns == 256 and m > columns:  # else a tile is all columns, and a tail decodes W again
                whole = replace(made, stages=most, streamed=False)
                found += [replace(whole, tail=tail) for tail in _tails(whole, x_itemsize, scales_per_byte)]
    return [config for config in found if config.has_registers(x_itemsize)]


_CUTS = ((True, False), (True, True), (False, False))


def _tails(whole: PrefillConfig, x_itemsize: int, scales_per_byte: int) -> list[PrefillConfig]:
    """Launches for the rows that `whole` leaves: its tiles with fewer columns, or of 64 rows, which wait for less decoding."""
    low: dict[str, Any] = {"rows": 64, "columns": 128}
    changes: list[dict[str, Any]] = [{"columns": 64}, {"columns": 128}, {"columns": 128, "streamed": True}]
    changes += [{**low, "warpgroups": 1}, {**low, "warpgroups": 2, "along_k": True}]
    if whole.depth <= 128:
        changes += [{**change, "depth": 2 * whole.depth} for change in ({"columns": 128}, {**low, "warpgroups": 1})]
    found = []
    for change in changes:
        tail = replace(whole, stages=2, **change)
        most = min(8, tail.most_stages(x_itemsize, scales_per_byte)) // tail.split * tail.split
        if most > tail.split and tail.has_registers(x_itemsize):
            found.append(replace(tail, stages=most))
    return found
