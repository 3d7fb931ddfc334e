"""Which launch a product gets: a pure function of the work and the device, over launches tuned once and stored as JSON.

`tables/<GPU>.json` holds what `fp4bench tune` measured on a GPU. Nothing is tuned while a case is timed or a request served.

The rule, for work (operand, format, m, n, k): of the entries with its operand and format, those tuned for an m of at least its
own come first, the nearest such m before the others; then the nearest shape, |log2(n / n')| + |log2(k / k')|; then the first in
the file. A `decode` entry serves no more rows than it was tuned for, nor does a `prefill` entry of a tile narrower than 128
rows of x. Shapes further off than `FARTHEST` serve nobody: then, and without a table, the kernels' defaults are taken. Tables
of GPUs with as many SMs of the same compute capability are read too: of entries as near, a GPU's own comes first.

Beyond 128 rows of x it matters more how many rounds the tiles take than which shape is near (`rounds`): where the nearest entry
was tuned for other tiles, and another's launch costs at least `GAIN` less, that one is taken.
"""

import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from functools import lru_cache
from math import log2
from pathlib import Path
from typing import Any, TypeGuard

from fp4bench.devices import Device
from fp4bench.formats import FORMATS
from fp4bench.kernels import blackwell, decode, prefill_launch, rounds
from fp4bench.kernels.blackwell import BlackwellConfig
from fp4bench.kernels.decode import DecodeConfig
from fp4bench.kernels.prefill_launch import PrefillConfig

Launch = DecodeConfig | PrefillConfig | BlackwellConfig

KERNELS: dict[str, type[Any]] = {"decode": DecodeConfig, "prefill": PrefillConfig, "blackwell": BlackwellConfig}

# What the weight is multiplied as: bfloat16 (and float16, which runs alike), E4M3, or FP4 as it is.
OPERANDS = ("bf16", "e4m3", "fp4")

_ITEMSIZE = {"bf16": 2, "e4m3": 1}  # bytes of an element of x, for the kernels that decode the weight

FORMAT = 1  # of the files
_WORK = ("operand", "format", "m", "n", "k")
_WIDE = 128  # columns of a tile that suits any larger m
FARTHEST = 3.0  # binades of n and k together
GAIN = 0.05  # of its cost, by which a launch goes before the nearest: `rounds` is no more exact

# A folder of the user's own tables, which go before those of the package.
FOLDER_VARIABLE = "FP4BENCH_TABLES"
_PACKAGED = Path(__file__).with_name("tables")


@dataclass(frozen=True)
class Work:
    """A product as launches know it: y (m, n) = x (m, k) times a weight of `format` that is multiplied as `operand`.

    x_scaled: the rows of x have scales of their own, which the decode kernel has not. It is no part of a table.
    """

    operand: str
    format: str
    m: int
    n: int
    k: int
    x_scaled: bool = False

    def __post_init__(self) -> None:
        if self.operand not in OPERANDS or self.format not in FORMATS or min(self.m, self.n, self.k) < 1:
            raise ValueError(f"there is no {self}")


@dataclass(frozen=True)
class Entry:
    """The fastest launch that was found for some work, and the median seconds of a call."""

    work: Work
    launch: Launch
    seconds: float


@dataclass(frozen=True)
class Table:
    """The launches tuned on one model of GPU. `versions`: of what they were tuned with."""

    gpu: str
    capability: tuple[int, int]
    sm_count: int
    versions: Mapping[str, str]
    entries: tuple[Entry, ...]


def choose(work: Work, device: Device) -> Launch:
    """The launch of `work` on a CUDA device: tuned where a table has it, else the kernel's default."""
    assert device.sm_count is not None
    entry = suited(work, [entry for table in tables_of(device) for entry in table.entries], device.sm_count)
    return entry.launch if entry else default(work, device)


def suited(work: Work, entries: Sequence[Entry], sms: int) -> Entry | None:
    """The entry that serves `work` best by the rules above, or None. sms: of the GPU."""
    entry = nearest(work, entries)
    if entry is None or not isinstance(entry.launch, PrefillConfig) or work.m <= _WIDE or _same_tiles(entry, work, sms):
        return entry
    costs = [
        (_cost(other.launch, work, sms), _row_distance(other.work, work), _shape_distance(other.work, work), i)
        for i, other in enumerate(entries)
        if other.work.m > _WIDE and _serves(other, work) and _decodes_once(other.launch, work)
    ]
    if not costs:
        return entry
    least, _, _, found = min(costs)
    return entries[found] if least <= (1 - GAIN) * _cost(entry.launch, work, sms) else entry


def nearest(work: Work, entries: Iterable[Entry]) -> Entry | None:
    """The entry that serves `work` by the rule above, or None."""
    near = [entry for entry in entries if _serves(entry, work) and _shape_distance(entry.work, work) <= FARTHEST]
    return min(near, key=lambda entry: (_row_distance(entry.work, work), _shape_distance(entry.work, work)), default=None)


def default(work: Work, device: Device) -> Launch:
    """A launch by arithmetic, for GPUs and shapes that nobody tuned. Raises ValueError for work that has no kernel."""
    assert device.capability is not None
    assert device.sm_count is not None
    if work.operand == "fp4":
        return blackwell.default_config(work.m, work.n, device.capability)
    if work.operand == "bf16" and work.m <= decode.MOST_ROWS and not work.x_scaled:
        return _default_decode(work, device.sm_count)
    if work.operand == "e4m3" and FORMATS[work.format].has_tensor_scale:
        raise ValueError(f"there is no kernel for {work}")
    return prefill_launch.default_config(work.m, _ITEMSIZE[work.operand])


def candidates(work: Work, device: Device) -> list[Launch]:
    """The launches that are worth measuring for some work, the default among them."""
    found: list[Launch] = [default(work, device)]
    if work.operand == "fp4":
        found += [BlackwellConfig(128, n, k, s, w) for n in (128, 256) for k in (128, 256) for s in (3, 4) for w in (4, 8)]
    elif work.operand == "bf16" and work.m <= decode.MOST_ROWS and not work.x_scaled:
        found += decode.candidates(work.m)
    if work.operand in _ITEMSIZE and (work.m > 8 or work.operand != "bf16"):  # up to 8 rows `decode` waits for memory alone
        found += prefill_launch.candidates(work.m, _ITEMSIZE[work.operand], 2 if FORMATS[work.format].has_tensor_scale else 1)
    return list(dict.fromkeys(found))


def _default_decode(work: Work, sm_count: int) -> DecodeConfig:
    """One CTA of 16 warps an SM, in one wave, where 5 tiles of 16 rows each are enough for that; else many small CTAs.

    What the best launches of the four layers of Llama-3.3-70B have in common (NVIDIA H200): on qkv at m = 1 5 tiles, 128 CTAs,
    take 14.0 us, and 4 tiles, 160 CTAs, 21.9. x through slots is the fastest of qkv and o at m = 1, 8 and 16, with two units of
    weights ahead while there are registers for them: up to 8 rows of x.
    """
    all_tiles = -(-work.n // 16)
    tiles = -(-all_tiles // sm_count)
    if tiles > 5:
        return DecodeConfig(4, 4)
    return DecodeConfig(tiles, 16, slots=4, depth=2) if work.m <= 8 else DecodeConfig(tiles, 16, slots=2)


def _serves(entry: Entry, work: Work) -> bool:
    tuned = entry.work
    if (tuned.operand, tuned.format) != (work.operand, work.format):
        return False
    if isinstance(entry.launch, DecodeConfig):
        return work.m <= tuned.m and not work.x_scaled
    # A tile that holds all rows of x is that narrow for their sake: more rows would have the weight decoded once a tile.
    return not isinstance(entry.launch, PrefillConfig) or work.m <= tuned.m or entry.launch.columns >= _WIDE


def _row_distance(tuned: Work, work: Work) -> tuple[bool, float]:
    return tuned.m < work.m, abs(log2(tuned.m / work.m))


def _shape_distance(tuned: Work, work: Work) -> float:
    return abs(log2(tuned.n / work.n)) + abs(log2(tuned.k / work.k))


def _same_tiles(entry: Entry, work: Work, sms: int) -> bool:
    """Whether the entry's launch works on the very tiles that it was tuned on."""
    assert isinstance(entry.launch, PrefillConfig)
    own, here = (rounds.schedules(entry.launch, w.m, w.n, w.k, sms) for w in (entry.work, work))
    return own == here


def _decodes_once(launch: Launch, work: Work) -> TypeGuard[PrefillConfig]:
    """Whether it is one of `prefill` whose tail decodes no weight again; `prefill_launch.candidates` has no other."""
    return isinstance(launch, PrefillConfig) and (launch.tail is None or work.m > launch.columns)


def _cost(launch: PrefillConfig, work: Work, sms: int) -> float:
    return rounds.cost(launch, work.operand, work.m, work.n, work.k, sms)


# --- Files ------------------------------------------------------------------------------------------------------------------


def tables_of(device: Device) -> list[Table]:
    """The tables that serve a GPU: its own, then those of like ones. Raises ValueError for a file that is no table."""
    tables = _tables(tuple(_folders()))
    own = [table for table in tables if table.gpu == device.name]
    like = [t for t in tables if (t.capability, t.sm_count) == (device.capability, device.sm_count)]
    return own + [table for table in like if table not in own]


def table_path(device: Device, folder: Path | None = None) -> Path:
    """Where the table of a GPU belongs: in `folder`, else the user's own, else the package's."""
    return (folder or next(_folders())) / f"{device.file_name}.json"


def load(path: Path) -> Table:
    """Read a table. Raises ValueError, one sentence, for a file that cannot be read or is none."""
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"cannot read the table of launches {path}: {error}") from error
    try:
        return _parsed(raw)
    except (KeyError, TypeError, ValueError) as error:
        what = f"it has no {error}" if isinstance(error, KeyError) else error
        raise ValueError(f"{path} is no table of launches of format {FORMAT} ({what}): measure it anew") from error


def dump(table: Table) -> str:
    """A table as the text of its file: a line an entry, so that the change of one is a line of a diff."""
    head = {"format": FORMAT, "gpu": table.gpu, "capability": table.capability, "sm_count": table.sm_count}
    head_lines = [f"  {json.dumps(key)}: {json.dumps(value)}," for key, value in (head | {"versions": table.versions}).items()]
    entries = ",\n".join(f"    {json.dumps(_entry_as_json(entry))}" for entry in table.entries)
    return "\n".join(["{", *head_lines, '  "entries": [', entries, "  ]", "}", ""])


def launch_as_json(launch: Launch) -> dict[str, Any]:
    """A launch by its kernel and what differs from the kernel's defaults."""
    kernel = next(name for name, kind in KERNELS.items() if type(launch) is kind)
    return {"kernel": kernel, **_changed(launch)}


def launch_from_json(raw: Mapping[str, Any]) -> Launch:
    """Inverse of `launch_as_json`. Raises ValueError for what is no launch."""
    rest = dict(raw)
    kernel = rest.pop("kernel", None)
    if kernel not in KERNELS:
        raise ValueError(f"there is no kernel {kernel!r}")
    return _made(KERNELS[kernel], rest)


def _changed(launch: Launch) -> dict[str, Any]:
    plain, values = type(launch)(), {field.name: getattr(launch, field.name) for field in fields(launch)}
    changed = {name: value for name, value in values.items() if value != getattr(plain, name)}
    return {name: _changed(value) if name == "tail" else value for name, value in changed.items()}


def _made(kind: type[Any], raw: Mapping[str, Any]) -> Launch:
    """Inverse of `_changed`."""
    values = dict(raw)
    if unknown := values.keys() - {field.name for field in fields(kind)}:
        raise ValueError(f"{kind.__name__} has no {', '.join(sorted(unknown))}")
    if "tail" in values:
        if not isinstance(values["tail"], Mapping):
            raise ValueError(f"a tail is a launch of its own, not {values['tail']!r}")
        values["tail"] = _made(kind, values["tail"])
    launch: Launch = kind(**values)
    return launch


def _entry_as_json(entry: Entry) -> dict[str, Any]:
    work = {name: getattr(entry.work, name) for name in _WORK}
    return work | {"seconds": entry.seconds, "launch": launch_as_json(entry.launch)}


def _parsed(raw: Any) -> Table:
    if not isinstance(raw, dict) or raw.get("format") != FORMAT:
        raise ValueError("another format")
    major, minor = raw["capability"]
    entries = tuple(_entry_from_json(entry) for entry in raw["entries"])
    if len({entry.work for entry in entries}) < len(entries):
        raise ValueError("two entries for the same work")
    return Table(str(raw["gpu"]), (int(major), int(minor)), int(raw["sm_count"]), dict(raw["versions"]), entries)


def _entry_from_json(raw: Mapping[str, Any]) -> Entry:
    work = Work(*(raw[name] for name in _WORK))
    seconds = raw["seconds"]
    if not (isinstance(seconds, float) and 0 < seconds < float("inf")):
        raise ValueError(f"{work} takes {seconds!r} seconds")
    return Entry(work, launch_from_json(raw["launch"]), seconds)


def _folders() -> Iterator[Path]:
    if own := os.environ.get(FOLDER_VARIABLE):
        yield Path(own)
    yield _PACKAGED


@lru_cache
def _tables(folders: tuple[Path, ...]) -> tuple[Table, ...]:
    """Read once a process: launches do not change under a running server."""
    return tuple(load(path) for folder in folders for path in sorted(folder.glob("*.json")))
