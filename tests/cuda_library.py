"""CUDA libraries made up byte by byte: what nvcc puts into a fat binary, without code."""

import struct

MAGIC = 0xBA55ED50
PTX, SASS = 1, 2
LINUX_64 = 0x11


def image(kind, architecture, flags=0, code=b"\x7fELF code"):
    """An image's header of 64 bytes, as nvcc writes it, and its code."""
    code += b"\0" * (-len(code) % 8)
    header = struct.pack("<HHIQIIIIIIQ16x", kind, 0x101, 64, len(code), 0, 0, 0, architecture, 0, 0, LINUX_64 | flags)
    assert len(header) == 64
    return header + code


def container(*images):
    body = b"".join(images)
    return struct.pack("<IHHQ", MAGIC, 1, 16, len(body)) + body
