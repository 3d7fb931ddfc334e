"""What the driver says of a GPU while it works: clocks, power, temperature, what slows it, and who else is on it.

Through NVML (nvidia-ml-py, optional). Its clocks are coarse: a kernel's own is that of the stamps. What NVML refuses is None.
"""

import os
from collections.abc import Collection
from contextlib import suppress
from dataclasses import dataclass
from types import ModuleType
from typing import Any, NamedTuple

import torch

from fp4bench.devices import Device

# Why clocks are below their highest (nvml.h, nvmlClocksEventReasons, before driver 535 nvmlClocksThrottleReasons). Left out,
# because they slow no kernel below what its user asked for: 0x1 idle, 0x2 application clocks, 0x100 display clocks.
_REASONS = {
    0x4: "sw_power_cap",
    0x8: "hw_slowdown",
    0x10: "sync_boost",
    0x20: "sw_thermal",
    0x40: "hw_thermal",
    0x80: "hw_power_brake",
    0x200: "board_limit",
    0x400: "reliability",
}
_NO_SLOWDOWN = 0x1 | 0x2 | 0x100

_CLOCK_SM, _CLOCK_MEMORY, _TEMPERATURE_GPU = 1, 2, 0  # NVML_CLOCK_SM, NVML_CLOCK_MEM, NVML_TEMPERATURE_GPU


class Process(NamedTuple):
    """A process with a context on the GPU. `used_bytes` is None where the driver does not tell."""

    pid: int
    used_bytes: int | None


@dataclass(frozen=True)
class Snapshot:
    """One look at a GPU: MHz, watts, degrees Celsius, bytes, percent of the last second or less. None: not known.

    throttle: what holds the clocks down (`sw_power_cap`, `hw_slowdown`, ...); empty: nothing does.
    processes: those of others, see `Telemetry.foreign`. memory_used_bytes: of everyone, ourselves too.
    """

    sm_mhz: int | None = None
    memory_mhz: int | None = None
    power_w: float | None = None
    power_limit_w: float | None = None
    temperature_c: int | None = None
    throttle: tuple[str, ...] | None = None
    processes: tuple[Process, ...] | None = None
    memory_used_bytes: int | None = None
    utilization_percent: int | None = None


class Telemetry:
    """NVML's view of one GPU, until `close`. `reason` says why there is none; then every snapshot holds only None.

    at_open: the snapshot taken by `open`. Opened before this run's first CUDA context, it shows the GPU without us.
    """

    def __init__(self, nvml: ModuleType | None = None, handle: Any = None, reason: str | None = None) -> None:
        self.reason = reason
        self._nvml = nvml
        self._handle = handle
        self._board = self._ask("nvmlDeviceGetDeviceHandleFromMigDeviceHandle") or handle  # clocks and power are a whole card's
        self._sees_us = False
        self._before = frozenset(process.pid for process in self._listed() or ())
        self.at_open = self.snapshot()

    @classmethod
    def open(cls, device: Device) -> "Telemetry":
        """Find the GPU in NVML by its UUID: CUDA and NVML count GPUs differently. Never raises for what is not there."""
        if not device.is_cuda:
            return cls(reason="a CPU")
        try:
            import pynvml
        except ModuleNotFoundError:
            return cls(reason="nvidia-ml-py is not installed")
        try:
            pynvml.nvmlInit()
        except pynvml.NVMLError as error:
            return cls(reason=f"NVML does not start: {error}")
        uuid = torch.cuda.get_device_properties(device.torch_name).uuid
        for kind in ("GPU", "MIG"):
            with suppress(pynvml.NVMLError):
                return cls(pynvml, pynvml.nvmlDeviceGetHandleByUUID(f"{kind}-{uuid}"))
        _shut_down(pynvml)
        return cls(reason=f"NVML does not know the GPU {uuid}")

    def snapshot(self, own: Collection[int] = ()) -> Snapshot:
        """Look now. `own`: the pids of this run's other processes, as for `foreign`."""
        if self._nvml is None:
            return Snapshot()
        utilization = self._ask("nvmlDeviceGetUtilizationRates")
        return Snapshot(
            sm_mhz=self._ask_board("nvmlDeviceGetClockInfo", _CLOCK_SM),
            memory_mhz=self._ask_board("nvmlDeviceGetClockInfo", _CLOCK_MEMORY),
            power_w=_watts(self._ask_board("nvmlDeviceGetPowerUsage")),
            power_limit_w=self._power_limit(),
            temperature_c=self._ask_board("nvmlDeviceGetTemperature", _TEMPERATURE_GPU),
            throttle=self._throttle(),
            processes=self.foreign(own),
            memory_used_bytes=self._memory_used(),
            utilization_percent=None if utilization is None else utilization.gpu,
        )

    def foreign(self, own: Collection[int] = ()) -> tuple[Process, ...] | None:
        """The processes on the GPU that are neither this one nor of `own` (this run's pids with a CUDA context).

        In a container NVML may give the pids of another namespace, where ours mean nothing. Once a pid of ours was listed,
        pids are believed. Until then those listed at opening count as foreign, and of the later ones as many as we cannot be:
        all but one for each pid of ours; which ones is not known, so the smallest are given. Not seen are then a process that
        comes while we hold no context, a process whose pid happens to equal one of ours, and one that the driver hides
        from a container: compare `at_open.memory_used_bytes` and `utilization_percent`. None: NVML does not list processes.
        """
        listed = self._listed()
        if listed is None:
            return None
        ours = {os.getpid(), *own}
        self._sees_us = self._sees_us or any(process.pid in ours for process in listed)
        if self._sees_us:
            return tuple(process for process in listed if process.pid not in ours)
        before = [process for process in listed if process.pid in self._before]
        later = sorted((p for p in listed if p.pid not in self._before), key=lambda process: process.used_bytes or 0)
        return (*before, *later[: max(0, len(later) - len(ours))])

    def machine_facts(self) -> dict[str, Any]:
        """What identifies the GPU's abilities for comparisons: driver, board, highest clocks (MHz) and power limit (W).

        The board's firmware and part number: eager products take 1.2 % less on H200s of part number 692-2G520-0282-001 than on
        those of -000 (baselines/README.md), and nothing else that a driver says tells which.
        """
        return {
            "driver": self._text(self._answer("nvmlSystemGetDriverVersion")),
            "vbios": self._text(self._ask_board("nvmlDeviceGetVbiosVersion")),
            "board": self._text(self._ask_board("nvmlDeviceGetBoardPartNumber")),
            "power_limit_w": self._power_limit(),
            "max_sm_mhz": self._ask_board("nvmlDeviceGetMaxClockInfo", _CLOCK_SM),
            "max_memory_mhz": self._ask_board("nvmlDeviceGetMaxClockInfo", _CLOCK_MEMORY),
        }

    def close(self) -> None:
        """Let NVML go; a second call does nothing, and later snapshots hold only None."""
        if self._nvml is not None:
            _shut_down(self._nvml)
            self._nvml, self.reason = None, "closed"

    def _ask(self, function: str, *arguments: Any) -> Any:
        return self._answer(function, self._handle, *arguments)

    def _ask_board(self, function: str, *arguments: Any) -> Any:
        return self._answer(function, self._board, *arguments)

    def _answer(self, function: str, *arguments: Any) -> Any:
        """What an NVML function returns, or None where it refuses, or this nvidia-ml-py has none of that name."""
        call = getattr(self._nvml, function, None)
        if call is None:
            return None
        assert self._nvml is not None
        with suppress(self._nvml.NVMLError):
            return call(*arguments)
        return None

    @staticmethod
    def _text(answer: object) -> str | None:
        return None if answer is None else str(answer)

    def _power_limit(self) -> float | None:
        enforced = self._ask_board("nvmlDeviceGetEnforcedPowerLimit")
        return _watts(self._ask_board("nvmlDeviceGetPowerManagementLimit") if enforced is None else enforced)

    def _throttle(self) -> tuple[str, ...] | None:
        bits = self._ask_board("nvmlDeviceGetCurrentClocksEventReasons")
        if bits is None:
            bits = self._ask_board("nvmlDeviceGetCurrentClocksThrottleReasons")
        return None if bits is None else throttle_reasons(bits)

    def _memory_used(self) -> int | None:
        # The second version leaves out what the driver keeps for itself, hundreds of MiB that vary by card.
        memory = self._ask("nvmlDeviceGetMemoryInfo", getattr(self._nvml, "nvmlMemory_v2", None))
        memory = memory or self._ask("nvmlDeviceGetMemoryInfo")
        return None if memory is None else int(memory.used)

    def _listed(self) -> tuple[Process, ...] | None:
        listed = self._ask("nvmlDeviceGetComputeRunningProcesses")
        return None if listed is None else tuple(Process(each.pid, each.usedGpuMemory) for each in listed)


def throttle_reasons(bits: int) -> tuple[str, ...]:
    """The names in a mask of NVML's clock event reasons, without idle and chosen clocks; a bit without a name as `0x800`."""
    rest = bits & ~_NO_SLOWDOWN
    return tuple(_REASONS.get(1 << i, hex(1 << i)) for i in range(rest.bit_length()) if rest >> i & 1)


def _watts(milliwatts: int | None) -> float | None:
    return None if milliwatts is None else milliwatts / 1e3


def _shut_down(nvml: ModuleType) -> None:
    with suppress(nvml.NVMLError):
        nvml.nvmlShutdown()
