"""Which GPUs a CUDA library was built for, read from the headers of its fat binaries; nothing is loaded and no tool is run.

nvcc puts images into containers: a header with magic 0xBA55ED50, then one image after the other, each with a header of its own.
The layout is not documented; it was read off vLLM's libraries (0.20.0, 0.26.0, 0.33.0) and agrees with `cuobjdump --list-elf`
there, which tells no suffixes. An unknown kind of image and a broken container are left out.
"""

import mmap
import re
import struct
from pathlib import Path

_MAGIC = struct.pack("<I", 0xBA55ED50)
_CONTAINER = struct.Struct("<IHHQ")  # magic, version, bytes of this header, bytes of all images
_IMAGE = struct.Struct("<HHIQ12xI8xQ")  # kind, version, bytes of this header, bytes after it, ..., architecture, ..., flags
_PTX, _SASS = 1, 2
_ARCHITECTURE_SPECIFIC = 1 << 20  # sm_90a: this architecture only
_FAMILY_SPECIFIC = 1 << 21  # sm_100f: the architectures of one major version


def targets(library: Path) -> tuple[str, ...]:
    """What `library` holds code for: machine code as sm_<n>, PTX as compute_<n>, in order. Empty where it has no GPU code.

    Raises OSError for a file that cannot be read.
    """
    with library.open("rb") as file:
        if not file.seek(0, 2):
            return ()
        with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            found = {target for start in _containers(data) for target in _images(data, start)}
    return tuple(sorted(found, key=lambda target: (target.startswith("compute"), _number(target), target)))


def runs_on(targets: tuple[str, ...], capability: tuple[int, int]) -> bool:
    """Whether some of the code runs on a GPU of this compute capability, if need be by the driver's compiler of PTX."""
    return any(_runs_on(target, capability) for target in targets)


def _runs_on(target: str, capability: tuple[int, int]) -> bool:
    built_for = divmod(_number(target), 10)
    if target.endswith("a"):
        return built_for == capability
    if target.startswith("compute") and not target.endswith("f"):
        return built_for <= capability
    return built_for[0] == capability[0] and built_for[1] <= capability[1]


def _number(target: str) -> int:
    match = re.search(r"\d+", target)
    assert match is not None
    return int(match[0])


def _containers(data: mmap.mmap) -> list[int]:
    """Where containers start. They lie on 8 bytes; the magic may occur elsewhere as a constant in code."""
    starts, at = [], data.find(_MAGIC)
    while at >= 0:
        if at % 8 == 0:
            starts.append(at)
        at = data.find(_MAGIC, at + 4)
    return starts


def _images(data: mmap.mmap, start: int) -> list[str]:
    if start + _CONTAINER.size > len(data):
        return []
    _, _, header, size = _CONTAINER.unpack_from(data, start)
    at, end = start + header, min(start + header + size, len(data))
    found = []
    while at + _IMAGE.size <= end:
        kind, _, image_header, image_size, architecture, flags = _IMAGE.unpack_from(data, at)
        if kind in (_PTX, _SASS) and 0 < architecture < 1000:
            found.append(("sm_" if kind == _SASS else "compute_") + f"{architecture}{_suffix(flags)}")
        if image_header + image_size == 0:
            break
        at += image_header + image_size
    return found


def _suffix(flags: int) -> str:
    if flags & _ARCHITECTURE_SPECIFIC:
        return "a"
    return "f" if flags & _FAMILY_SPECIFIC else ""
