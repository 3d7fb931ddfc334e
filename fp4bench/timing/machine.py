"""Which machine this is: the key of its baselines, and the few facts that identify it."""

import os
import re
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch

from fp4bench.devices import Device


def machine_key(device: Device) -> str:
    """Name of the folder that holds this machine's baselines: `NVIDIA-H200`, or `cpu-<model>-<cores>c`."""
    name = re.sub(r"[^A-Za-z0-9.]+", "-", device.name).strip("-")
    return name if device.is_cuda else f"cpu-{name.lower()}-{_cores()}c"


def machine_info(device: Device) -> dict[str, Any]:
    """The machine's identity as a run stores it. `gpu` and what belongs to it are None on a CPU."""
    return {
        "machine": machine_key(device),
        "gpu": device.name if device.is_cuda else None,
        "compute_capability": ".".join(map(str, device.capability)) if device.capability else None,
        "sm_count": device.sm_count,
        "l2_bytes": device.l2_bytes,
        "uuid": _uuid(device),
        "driver": _driver() if device.is_cuda else None,
        "cuda": torch.version.cuda,
        "torch": torch.__version__,
        "triton": _version("triton"),
        "cpu": device.name if not device.is_cuda else None,
        "cores": _cores(),
        "threads": torch.get_num_threads(),
    }


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _uuid(device: Device) -> str | None:
    if not device.is_cuda:
        return None
    return f"GPU-{torch.cuda.get_device_properties(device.torch_name).uuid}"


def _driver() -> str | None:
    """The driver's version through nvidia-ml-py, or None where that is not installed or finds no driver."""
    try:
        import pynvml
    except ModuleNotFoundError:
        return None
    try:
        pynvml.nvmlInit()
        version_ = str(pynvml.nvmlSystemGetDriverVersion())
        pynvml.nvmlShutdown()
    except pynvml.NVMLError:
        return None
    return version_


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
