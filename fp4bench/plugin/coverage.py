"""Is a case of the baseline one of those that a run's options ask for?"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fp4bench.cases import Selection, Shard


def covers(selection: Selection, record: Mapping[str, Any]) -> bool:
    """Whether `selection` asks for what a record is of, whatever its provider."""
    if record["op"] == "moe":
        return _covers_moe(selection, record)
    return (
        any(_is_of(record, shard) for shard in selection.shards)
        and record["m"] in selection.batch_sizes
        and _has_mode(selection, record)
        and (record["hadamard"] in selection.had_sizes or not _rotatable(selection, record))
    )


def _covers_moe(selection: Selection, record: Mapping[str, Any]) -> bool:
    return (
        any((record["model"], record["tp"]) == (shard.model.name, shard.tp) for shard in selection.moe_shards)
        and record["m"] in selection.moe_batch_sizes
        and record["routing"] in map(str, selection.routings)
        and record["fp8_scaling"] in (None, *map(str, selection.fp8_scalings))
        and _has_mode(selection, record)
    )


def _is_of(record: Mapping[str, Any], shard: Shard) -> bool:
    """A quantization is named by the first layer of its width, which need not be selected itself."""
    if (record["model"], record["tp"]) != (shard.model.name, shard.tp):
        return False
    return record["k"] == shard.layer.k if record["op"] == "quantize" else record["layer"] == shard.layer.name


def _has_mode(selection: Selection, record: Mapping[str, Any]) -> bool:
    """Its format, and a GEMM's mode; a mode without FP4 is its own format."""
    formats = {format_.name for format_ in selection.formats}
    if record["op"] == "quantize":
        return record["format"] in formats
    mode = next((mode for mode in selection.modes if mode.name == record["mode"]), None)
    return mode is not None and (mode.weights != "fp4" or record["format"] in formats)


def _rotatable(selection: Selection, record: Mapping[str, Any]) -> bool:
    """Whether the choice of Hadamard sizes is about it: only FP4 activations are rotated."""
    return record["op"] == "quantize" or any(
        mode.name == record["mode"] and mode.activations == "fp4" for mode in selection.modes
    )
