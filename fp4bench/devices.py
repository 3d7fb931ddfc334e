"""The device that problems run on, as a value: providers decide from it alone, so a test can make up any GPU."""

import platform
import re
from dataclasses import dataclass
from pathlib import Path

import torch


@dataclass(frozen=True)
class Device:
    """A CPU or one CUDA GPU. `capability`, `sm_count` and `l2_bytes` are None on a CPU."""

    torch_name: str  # what torch.device takes: "cpu", "cuda:0"
    name: str
    capability: tuple[int, int] | None = None
    sm_count: int | None = None
    l2_bytes: int | None = None

    @property
    def is_cuda(self) -> bool:
        return self.capability is not None

    @property
    def file_name(self) -> str:
        """The name with nothing in it that a file's name may not have: `NVIDIA-H200`."""
        return re.sub(r"[^A-Za-z0-9.]+", "-", self.name).strip("-")

    @property
    def has_fp8(self) -> bool:
        """FP8 tensor cores: Ada, Hopper and later."""
        return self.capability is not None and self.capability >= (8, 9)

    def __str__(self) -> str:
        return f"{self.name} ({self.torch_name})"


def find_device(wanted: str = "auto") -> Device:
    """The device of a name: "cpu", "cuda", "cuda:<index>", or "auto" for a GPU where there is one.

    Raises ValueError for a GPU that is not there, and for any other name.
    """
    if wanted == "cpu" or (wanted == "auto" and not torch.cuda.is_available()):
        return Device("cpu", cpu_name())
    kind, colon, index = ("cuda" if wanted == "auto" else wanted).partition(":")
    if kind != "cuda" or (colon and not (index.isascii() and index.isdecimal())):
        raise ValueError(f"unknown device {wanted!r}: it is auto, cpu, cuda or cuda:<index>")
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    number = int(index or 0)
    if number >= count:
        raise ValueError(f"device {wanted!r} is not there: torch {torch.__version__} sees {count} CUDA GPUs; use --device cpu")
    properties = torch.cuda.get_device_properties(number)
    return Device(
        f"cuda:{number}",
        properties.name,
        (properties.major, properties.minor),
        properties.multi_processor_count,
        properties.L2_cache_size,
    )


def cpu_name() -> str:
    """The processor's model name, from the kernel where it tells one."""
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text(encoding="utf-8").splitlines():
            key, _, value = line.partition(":")
            if key.strip() == "model name":
                return value.strip()
    return platform.processor() or platform.machine()
