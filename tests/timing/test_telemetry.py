"""What NVML says of a GPU, through a made-up pynvml: what it refuses is None, and whose process is whose."""

import os
import sys
from types import ModuleType, SimpleNamespace

import pytest
import torch

from fp4bench.devices import Device
from fp4bench.timing.telemetry import Process, Snapshot, Telemetry, throttle_reasons

H200 = Device("cuda:3", "NVIDIA H200", (9, 0), sm_count=132, l2_bytes=60 << 20)
UUID = "4f0e-11"
MIB = 1 << 20


class NVMLError(Exception):
    pass


def refuse(*_):
    raise NVMLError("Not Supported")


def fake_pynvml(**changes):
    """A pynvml for one GPU. `changes` replace functions; a None takes one away. `log` counts starts and stops."""
    nvml = ModuleType("pynvml")
    log = []

    def by_uuid(uuid):
        if uuid != f"GPU-{UUID}":
            refuse()
        return "gpu"

    functions = {
        "nvmlInit": lambda: log.append("init"),
        "nvmlShutdown": lambda: log.append("shutdown"),
        "nvmlSystemGetDriverVersion": lambda: "580.1",
        "nvmlDeviceGetVbiosVersion": lambda handle: "96.00.A5",
        "nvmlDeviceGetBoardPartNumber": lambda handle: "692-2G520",
        "nvmlDeviceGetHandleByUUID": by_uuid,
        "nvmlDeviceGetDeviceHandleFromMigDeviceHandle": refuse,
        "nvmlDeviceGetClockInfo": lambda handle, kind: {1: 1965, 2: 3201}[kind],
        "nvmlDeviceGetMaxClockInfo": lambda handle, kind: {1: 1980, 2: 3202}[kind],
        "nvmlDeviceGetPowerUsage": lambda handle: 123456,
        "nvmlDeviceGetEnforcedPowerLimit": lambda handle: 700000,
        "nvmlDeviceGetPowerManagementLimit": lambda handle: 650000,
        "nvmlDeviceGetTemperature": lambda handle, sensor: {0: 41}[sensor],
        "nvmlDeviceGetCurrentClocksEventReasons": lambda handle: 0x4,
        "nvmlDeviceGetCurrentClocksThrottleReasons": lambda handle: 0x8,
        "nvmlDeviceGetUtilizationRates": lambda handle: SimpleNamespace(gpu=17),
        "nvmlDeviceGetMemoryInfo": lambda handle, version=None: SimpleNamespace(used=5 * MIB if version == 2 else 600 * MIB),
        "nvmlDeviceGetComputeRunningProcesses": lambda handle: [],
    } | changes
    for name, function in functions.items():
        if function is not None:
            setattr(nvml, name, function)
    nvml.NVMLError, nvml.nvmlMemory_v2, nvml.log = NVMLError, 2, log
    return nvml


@pytest.fixture
def install(monkeypatch):
    """Makes a pynvml the installed one, and torch one that sees an H200 as its fourth GPU."""

    def properties(name):
        assert name == "cuda:3"
        return SimpleNamespace(uuid=UUID)

    def install(**changes):
        nvml = fake_pynvml(**changes)
        monkeypatch.setitem(sys.modules, "pynvml", nvml)
        return nvml

    monkeypatch.setattr(torch.cuda, "get_device_properties", properties)
    return install


def processes(*listed):
    return lambda handle: [SimpleNamespace(pid=pid, usedGpuMemory=used) for pid, used in listed]


def test_a_snapshot_holds_what_nvml_says(install):
    install(nvmlDeviceGetComputeRunningProcesses=processes((os.getpid(), 900), (7, 300)))
    telemetry = Telemetry.open(H200)
    assert telemetry.reason is None
    expected = Snapshot(
        sm_mhz=1965,
        memory_mhz=3201,
        power_w=123.456,
        power_limit_w=700.0,
        temperature_c=41,
        throttle=("sw_power_cap",),
        processes=(Process(7, 300),),
        memory_used_bytes=5 * MIB,
        utilization_percent=17,
    )
    assert telemetry.snapshot() == telemetry.at_open == expected
    assert telemetry.machine_facts() == {
        "driver": "580.1",
        "vbios": "96.00.A5",
        "board": "692-2G520",
        "power_limit_w": 700.0,
        "max_sm_mhz": 1980,
        "max_memory_mhz": 3202,
    }


QUESTIONS = [name for name in vars(fake_pynvml()) if name.startswith(("nvmlDeviceGet", "nvmlSystem")) and "UUID" not in name]


@pytest.mark.parametrize("change", [refuse, None], ids=["refused", "not-in-this-version"])
def test_a_question_that_nvml_does_not_answer_is_none_alone(change, install):
    fallbacks = {  # these have a second way
        "nvmlDeviceGetEnforcedPowerLimit": {"power_limit_w": 650.0},
        "nvmlDeviceGetCurrentClocksEventReasons": {"throttle": ("hw_slowdown",)},
    }
    unknown = {
        "nvmlDeviceGetClockInfo": {"sm_mhz": None, "memory_mhz": None},
        "nvmlDeviceGetPowerUsage": {"power_w": None},
        "nvmlDeviceGetTemperature": {"temperature_c": None},
        "nvmlDeviceGetUtilizationRates": {"utilization_percent": None},
        "nvmlDeviceGetMemoryInfo": {"memory_used_bytes": None},
        "nvmlDeviceGetComputeRunningProcesses": {"processes": None},
    }
    install()
    full = vars(Telemetry.open(H200).snapshot())
    for question in QUESTIONS:
        install(**{question: change})
        assert vars(Telemetry.open(H200).snapshot()) == full | fallbacks.get(question, {}) | unknown.get(question, {}), question


def test_everything_may_be_refused(install):
    install(**dict.fromkeys(QUESTIONS, refuse))
    telemetry = Telemetry.open(H200)
    assert telemetry.snapshot() == Snapshot()
    assert set(telemetry.machine_facts().values()) == {None}


def test_memory_is_asked_the_old_way_where_the_new_is_refused(install):
    def old(handle, version=None):
        return SimpleNamespace(used=7) if version is None else refuse()

    install(nvmlDeviceGetMemoryInfo=old)
    assert Telemetry.open(H200).snapshot().memory_used_bytes == 7


def test_a_slice_of_a_gpu_has_its_own_processes_and_the_clocks_of_its_card(install):
    def of_the_card(handle, *_):
        return 1000 if handle == "card" else refuse()

    install(
        nvmlDeviceGetHandleByUUID=lambda uuid: "slice" if uuid == f"MIG-{UUID}" else refuse(),
        nvmlDeviceGetDeviceHandleFromMigDeviceHandle=lambda handle: "card",
        nvmlDeviceGetClockInfo=of_the_card,
        nvmlDeviceGetPowerUsage=of_the_card,
        nvmlDeviceGetComputeRunningProcesses=lambda handle: [SimpleNamespace(pid=7, usedGpuMemory={"slice": 1}[handle])],
    )
    snapshot = Telemetry.open(H200).snapshot()
    assert (snapshot.sm_mhz, snapshot.power_w, snapshot.processes) == (1000, 1.0, (Process(7, 1),))


def test_a_cpu_has_no_telemetry(install):
    nvml = install()
    telemetry = Telemetry.open(Device("cpu", "Some CPU"))
    assert telemetry.reason == "a CPU"
    assert telemetry.snapshot() == telemetry.at_open == Snapshot()
    assert nvml.log == []
    telemetry.close()


def test_without_nvidia_ml_py_the_reason_says_so(install, monkeypatch):
    monkeypatch.setitem(sys.modules, "pynvml", None)  # import raises ModuleNotFoundError
    telemetry = Telemetry.open(H200)
    assert telemetry.reason == "nvidia-ml-py is not installed"
    assert telemetry.snapshot() == Snapshot()
    assert set(telemetry.machine_facts().values()) == {None}
    assert telemetry.foreign() is None


def test_without_a_driver_the_reason_says_so(install):
    def no_driver():
        raise NVMLError("Driver Not Loaded")

    nvml = install(nvmlInit=no_driver)
    assert Telemetry.open(H200).reason == "NVML does not start: Driver Not Loaded"
    assert nvml.log == []


def test_a_gpu_that_nvml_does_not_know_has_no_telemetry(install):
    nvml = install(nvmlDeviceGetHandleByUUID=refuse)
    assert Telemetry.open(H200).reason == f"NVML does not know the GPU {UUID}"
    assert nvml.log == ["init", "shutdown"]


def test_closing_twice_stops_nvml_once(install):
    nvml = install()
    telemetry = Telemetry.open(H200)
    telemetry.close()
    telemetry.close()
    assert nvml.log == ["init", "shutdown"]
    assert telemetry.snapshot() == Snapshot()
    assert telemetry.reason == "closed"


def test_closing_survives_a_gpu_that_is_lost(install):
    install(nvmlShutdown=refuse)
    Telemetry.open(H200).close()


@pytest.mark.parametrize(
    ("bits", "names"),
    [
        (0, ()),
        (0x1, ()),
        (0x2 | 0x100, ()),
        (0x4 | 0x1, ("sw_power_cap",)),
        (0x8 | 0x40, ("hw_slowdown", "hw_thermal")),
        (0x20 | 0x80, ("sw_thermal", "hw_power_brake")),
        (0x10 | 0x200 | 0x400, ("sync_boost", "board_limit", "reliability")),
        (0x8 | 0x800, ("hw_slowdown", "0x800")),
    ],
)
def test_a_mask_of_reasons_is_read_as_names(bits, names):
    assert throttle_reasons(bits) == names


def test_the_names_of_reasons_are_those_of_the_installed_pynvml():
    pynvml = pytest.importorskip("pynvml")
    of = {
        "sw_power_cap": pynvml.nvmlClocksEventReasonSwPowerCap,
        "hw_slowdown": pynvml.nvmlClocksThrottleReasonHwSlowdown,
        "sync_boost": pynvml.nvmlClocksEventReasonSyncBoost,
        "sw_thermal": pynvml.nvmlClocksEventReasonSwThermalSlowdown,
        "hw_thermal": pynvml.nvmlClocksThrottleReasonHwThermalSlowdown,
        "hw_power_brake": pynvml.nvmlClocksThrottleReasonHwPowerBrakeSlowdown,
    }
    assert {name: throttle_reasons(bit) for name, bit in of.items()} == {name: (name,) for name in of}
    ignored = pynvml.nvmlClocksEventReasonGpuIdle | pynvml.nvmlClocksEventReasonApplicationsClocksSetting
    assert throttle_reasons(ignored | pynvml.nvmlClocksEventReasonDisplayClockSetting) == ()


def test_the_installed_pynvml_has_what_is_asked():
    pynvml = pytest.importorskip("pynvml")
    assert [name for name in (*QUESTIONS, "nvmlDeviceGetHandleByUUID") if not hasattr(pynvml, name)] == []


ME = os.getpid()
OTHER = ME + 1  # a worker of ours


@pytest.mark.parametrize(
    ("before", "now", "own", "foreign"),
    [
        pytest.param((), ((ME, 9),), (), (), id="we-alone"),
        pytest.param((), ((ME, 9), (7, 3)), (), (7,), id="another-came"),
        pytest.param(((7, 3),), ((7, 3), (ME, 9)), (), (7,), id="another-was-there"),
        pytest.param((), ((ME, 9), (OTHER, 9)), (OTHER,), (), id="we-and-our-worker"),
        pytest.param((), ((OTHER, 9), (7, 3)), (OTHER,), (7,), id="our-worker-and-another"),
        pytest.param(((7, 3),), ((7, 3),), (), (7,), id="another-before-we-have-a-context"),
        # Pids of another namespace: ours is 70 there, our worker's 71.
        pytest.param((), ((70, 9),), (), (), id="we-alone-in-a-container"),
        pytest.param((), ((70, 9), (71, 9)), (OTHER,), (), id="we-and-our-worker-in-a-container"),
        pytest.param(((7, 3),), ((7, 3), (70, 9)), (), (7,), id="another-was-there-outside-a-container"),
        pytest.param((), ((7, 3), (70, 9)), (), (7,), id="another-came-outside-a-container"),
        pytest.param((), ((7, None), (70, 9)), (), (7,), id="of-unknown-memory"),
        pytest.param((), ((8, 3), (7, 2), (70, 9), (71, 5)), (OTHER,), (7, 8), id="two-came-outside-a-container"),
        pytest.param(((7, 3),), ((70, 9),), (), (), id="another-left"),
    ],
)
def test_foreign_processes_are_those_that_cannot_be_ours(before, now, own, foreign, install):
    nvml = install(nvmlDeviceGetComputeRunningProcesses=processes(*before))
    telemetry = Telemetry.open(H200)
    nvml.nvmlDeviceGetComputeRunningProcesses = processes(*now)
    assert tuple(process.pid for process in telemetry.foreign(own)) == foreign
    assert telemetry.snapshot(own).processes == telemetry.foreign(own)


def test_once_our_pid_was_listed_pids_are_believed(install):
    nvml = install()
    telemetry = Telemetry.open(H200)
    nvml.nvmlDeviceGetComputeRunningProcesses = processes((OTHER, 9))
    assert telemetry.foreign({OTHER}) == ()
    nvml.nvmlDeviceGetComputeRunningProcesses = processes((7, 3))  # our worker has ended, another is there
    assert telemetry.foreign() == (Process(7, 3),)
