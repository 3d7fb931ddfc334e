"""Which machine this is: the key of its baselines, and the few facts that identify it."""

import os
import platform
from collections.abc import Mapping
from contextlib import closing
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch

from fp4bench.devices import Device
from fp4bench.timing.telemetry import Telemetry


def machine_key(device: Device) -> str:
    """Name of the folder that holds this machine's baselines: `NVIDIA-H200`, or `cpu-<model>-<cores>c`."""
    return device.file_name if device.is_cuda else f"cpu-{device.file_name.lower()}-{_cores()}c"


def machine_info(device: Device) -> dict[str, Any]:
    """The machine's identity as a run stores it: small, JSON, and the same in every run until something changes.

    `gpu` and what belongs to it are None on a CPU. `nvml` says why what the driver tells (`driver`, `vbios`, `board`,
    `power_limit_w` in watts, `max_sm_mhz`, `max_memory_mhz`) is None, and is None itself where the driver was asked.
    """
    with closing(Telemetry.open(device)) as telemetry:
        reason, driver_facts = telemetry.reason, telemetry.machine_facts()
    return {
        "machine": machine_key(device),
        "gpu": device.name if device.is_cuda else None,
        "compute_capability": ".".join(map(str, device.capability)) if device.capability else None,
        "sm_count": device.sm_count,
        "l2_bytes": device.l2_bytes,
        "uuid": _uuid(device),
        **driver_facts,
        "nvml": reason,
        "cuda": torch.version.cuda,
        "torch": torch.__version__,
        "triton": _version("triton"),
        "vllm": _version("vllm"),
        "python": ".".join(platform.python_version_tuple()[:2]),
        "platform": f"{platform.system()}-{platform.machine()}",
        "cpu": device.name if not device.is_cuda else None,
        "cores": _cores(),
        "threads": torch.get_num_threads(),
    }


def session(machine_info: Mapping[str, Any], now_utc: datetime) -> str:
    """Which runs share card and day: runs of one card (a CPU: of one machine key) on one day in UTC have the same.

    Raises ValueError for a time without a time zone.
    """
    if now_utc.tzinfo is None:
        raise ValueError(f"the time {now_utc} of a session has no time zone: use datetime.now(timezone.utc)")
    return f"{card(machine_info)} {now_utc.astimezone(timezone.utc):%Y-%m-%d}"


def card(machine_info: Mapping[str, Any]) -> str:
    """Which of the machines with this key it is: the GPU's UUID; of CPUs the key itself."""
    return str(machine_info["uuid"] or machine_info["machine"])


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _uuid(device: Device) -> str | None:
    if not device.is_cuda:
        return None
    return f"GPU-{torch.cuda.get_device_properties(device.torch_name).uuid}"


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
