"""`fp4bench tune`: measure which launches of this package's kernels are the fastest on this GPU, and write its table."""

from __future__ import annotations

import argparse
import math
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fp4bench.devices import Device
    from fp4bench.kernels.configs import Work
    from fp4bench.tuning.campaign import Progress
    from fp4bench.tuning.readings import Readings

_HOPPER = (9, 0)
_BATCH_SIZES = (1, 8, 16, 32, 64, 128, 256, 512, 1024, 4096)
_FORMATS, _OPERANDS = ("mxfp4", "nvfp4"), ("bf16", "e4m3")


def add_parser(commands: Any) -> None:
    parser = commands.add_parser(
        "tune",
        help="find the fastest launches of this package's kernels on this GPU",
        description="Compiles the launches that are worth a try, checks and times each, and writes the best into the table of "
        "this GPU. A launch that is in the table already is replaced by one that is more than 1 %% faster. What was measured "
        "is on the disk at once: after Ctrl-C, and after a launch that hangs, the same command goes on.",
    )
    parser.add_argument("--device", default="auto", help="auto, cuda or cuda:<index>")
    parser.add_argument(
        "--models", nargs="+", default=["llama3.3-70b"], metavar="MODEL", help="as of pytest perf (llama3.3-70b)"
    )
    parser.add_argument("--tp-sizes", nargs="+", type=_positive, default=[1], metavar="TP", help="tensor parallel sizes (1)")
    parser.add_argument("--layers", nargs="+", metavar="LAYER", help="of these names alone, such as qkv or down")
    parser.add_argument("--shapes", nargs="+", type=_shape, default=[], metavar="NxK", help="instead of a model's layers")
    parser.add_argument(
        "--batch-sizes",
        nargs="+",
        type=_positive,
        default=list(_BATCH_SIZES),
        metavar="M",
        help=" ".join(map(str, _BATCH_SIZES)),
    )
    parser.add_argument("--formats", nargs="+", choices=_FORMATS, default=list(_FORMATS), help="of the weights (both)")
    parser.add_argument(
        "--operands",
        nargs="+",
        choices=_OPERANDS,
        default=list(_OPERANDS),
        help="what weights are multiplied as: bf16 for w4a16, e4m3 for w4a8 (both)",
    )
    parser.add_argument(
        "--budget", type=float, default=math.inf, metavar="SECONDS", help="stop by then; the table gets what is done"
    )
    parser.add_argument("--silence", type=float, default=60.0, metavar="SECONDS", help="a launch takes no longer (60)")
    parser.add_argument("--processes", type=_positive, default=os.cpu_count() or 1, help="that compile at once (one a core)")
    parser.add_argument("--journals", type=Path, default=Path(".benchmarks/tune"), help="folder of what was measured")
    parser.add_argument("--anew", action="store_true", help="measure again what an unfinished search has measured")
    parser.add_argument("--output", type=Path, metavar="FOLDER", help="of the table (FP4BENCH_TABLES, else the package's own)")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Tune, and say what changed. Returns 0 if all was measured, 1 if the budget was too short for that.

    Raises ValueError for works, models and devices that are not there, and for a GPU without kernels.
    """
    # torch takes seconds to import, and the other commands do without.
    from fp4bench.devices import find_device
    from fp4bench.providers import import_optional

    device = find_device(args.device)
    if device.capability != _HOPPER:
        raise ValueError(f"there is nothing to tune for {device.name}: the kernels with tables are for Hopper")
    if import_optional("triton") is None:
        raise ValueError("Triton is not installed")
    return _tune(args, device)


def _tune(args: argparse.Namespace, device: Device) -> int:
    from fp4bench.evidence import journal
    from fp4bench.tuning import campaign, compiling
    from fp4bench.tuning.readings import Readings
    from fp4bench.tuning.search import launches

    until = time.time() + args.budget
    works = works_of(args)
    path = campaign.open_journal(args.journals, device)
    if args.anew:
        path.unlink()
        path = campaign.open_journal(args.journals, device)
    show = Line(sys.stderr)
    before = Readings(journal.read(path)[1])
    left = [work for work in works if not before.is_done(work)]
    jobs = [(work, launch) for work in left for launch in launches(work, device)]
    compiling.compile_all(jobs, device, args.processes, lambda done, of: show.compiling(done, of))
    try:
        done = campaign.measure_all(left, device, path, until=until, silence=args.silence, show=show.measuring)
    except KeyboardInterrupt:
        show.end(f"stopped; the same command goes on with {path}")
        raise
    readings = Readings(journal.read(path)[1])
    show.end("")
    sys.stdout.write("\n".join([*_written(args, device, readings), ""]))
    if done:
        sys.stdout.write(f"all readings: {campaign.close_journal(path)}\n")
    else:
        sys.stdout.write(f"the budget is spent: the same command goes on with {path}\n")
    return 0 if done else 1


def works_of(args: argparse.Namespace) -> list[Work]:
    """What is to be tuned, same weights one after the other. Raises ValueError for models and layers that are not there."""
    from fp4bench.formats import FORMATS
    from fp4bench.kernels.configs import Work

    return [
        Work(operand, name, m, n, k)
        for operand in args.operands
        for name in args.formats
        if operand != "e4m3" or not FORMATS[name].has_tensor_scale
        for n, k in args.shapes or _layer_shapes(args.models, args.tp_sizes, args.layers)
        for m in args.batch_sizes
    ]


def _layer_shapes(models: Sequence[str], tp_sizes: Sequence[int], names: Sequence[str] | None) -> list[tuple[int, int]]:
    from fp4bench.models import get_model, layers

    found = [layer for model in models for tp in tp_sizes for layer in layers(get_model(model), tp)]
    if unknown := sorted(set(names or ()) - {layer.name for layer in found}):
        raise ValueError(
            f"no layer is named {', '.join(unknown)}: there are {', '.join(dict.fromkeys(at.name for at in found))}"
        )
    return list(dict.fromkeys((layer.n, layer.k) for layer in found if names is None or layer.name in names))


def _written(args: argparse.Namespace, device: Device, readings: Readings) -> list[str]:
    """Write the table, and say in lines what it has that is new."""
    from fp4bench.kernels import configs
    from fp4bench.tuning import campaign, refresh

    path = configs.table_path(device, args.output)
    table, changes = refresh.refreshed(
        device,
        campaign.versions(),
        readings.works_done(),
        readings,
        lambda work: configs.choose(work, device),
        configs.load(path) if path.exists() else None,
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_suffix(".new")
    beside.write_text(configs.dump(table), encoding="utf-8")
    beside.replace(path)
    broken = [f"{refresh.describe(work)}: {launch}: {why}" for (work, launch), why in readings.failures().items()]
    return [
        *map(str, changes),
        *(f"not measured: {refresh.describe(work)}: {why}" for work, why in readings.given_up().items()),
        *(f"does not work: {line}" for line in broken),
        f"{len(changes)} of {len(readings.works_done())} products get another launch; {path} has {len(table.entries)}",
    ]


class Line:
    """Progress, on one line of a terminal; elsewhere a line a product."""

    def __init__(self, stream: Any) -> None:
        self._stream, self._last, self._live = stream, "", stream.isatty()
        self._started = time.monotonic()

    def compiling(self, done: int, of: int) -> None:
        """done kernels `of` so many are compiled."""
        if self._live or done == of:
            self._show(f"{_bar(done, of)} compiled {done} of {of} kernels")

    def measuring(self, now: Progress) -> None:
        """How far the measuring is."""
        text = f"{now.works_done} of {now.works} products"
        if self._live:
            text += f", {now.launches_done} of {now.launches} launches, {time.monotonic() - self._started:.0f} s"
        self._show(
            f"{_bar(now.launches_done if self._live else now.works_done, now.launches if self._live else now.works)} {text}"
        )

    def end(self, text: str) -> None:
        """Leave the line."""
        self._stream.write(("\n" if self._live and self._last else "") + (text + "\n" if text else ""))

    def _show(self, text: str) -> None:
        if text != self._last:
            self._stream.write(f"\r{text:<{len(self._last)}}" if self._live else text + "\n")
            self._stream.flush()
            self._last = text


def _bar(done: int, of: int, width: int = 30) -> str:
    filled = width * done // max(1, of)
    return f"[{'#' * filled}{'.' * (width - filled)}]"


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) == 0:
        raise argparse.ArgumentTypeError(f"{text!r} is not a positive whole number")
    return int(text)


def _shape(text: str) -> tuple[int, int]:
    n, _, k = text.partition("x")
    return _positive(n), _positive(k)
