"""`fp4bench machine`: the identity, what NVML says, and the baselines, as text and as JSON."""

import argparse
import json
import sys
from types import ModuleType, SimpleNamespace

import pytest
import torch
from products import product, run_of
from recorded import write

from fp4bench import devices
from fp4bench.cli import machine
from fp4bench.devices import Device
from fp4bench.timing.machine import machine_key

CPU = machine_key(devices.find_device("cpu"))
H200 = Device("cuda:0", "NVIDIA H200", (9, 0), sm_count=132, l2_bytes=60 << 20)


def command(*arguments):
    """The exit code of `fp4bench machine ...`."""
    parser = argparse.ArgumentParser()
    machine.add_parser(parser.add_subparsers())
    asked = parser.parse_args(["machine", *map(str, arguments)])
    return asked.run(asked)


@pytest.fixture
def folder(tmp_path):
    """Baselines: two of this CPU, one of an H200, and things that are none."""
    for name in (f"{CPU}/0001_one.json", f"{CPU}/0002_two.json", "NVIDIA-H200/0001_one.json", "empty/notes.txt", "notes.txt"):
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_text("{}", encoding="utf-8")
    return tmp_path


@pytest.fixture
def an_h200(monkeypatch):
    """torch finds an H200, and NVML another process on it; it refuses power and temperature."""

    class NVMLError(Exception):
        pass

    def refuse(*_):
        raise NVMLError("Not Supported")

    nvml = ModuleType("pynvml")
    nvml.NVMLError = NVMLError
    nvml.nvmlInit = nvml.nvmlShutdown = lambda: None
    nvml.nvmlSystemGetDriverVersion = lambda: "580.1"
    nvml.nvmlDeviceGetHandleByUUID = lambda uuid: {"GPU-4f0e": "gpu"}[uuid]
    nvml.nvmlDeviceGetClockInfo = nvml.nvmlDeviceGetMaxClockInfo = lambda handle, kind: 1000 * kind
    nvml.nvmlDeviceGetPowerUsage = nvml.nvmlDeviceGetTemperature = refuse
    nvml.nvmlDeviceGetEnforcedPowerLimit = lambda handle: 700000
    nvml.nvmlDeviceGetCurrentClocksEventReasons = lambda handle: 0x28
    nvml.nvmlDeviceGetComputeRunningProcesses = lambda handle: [
        SimpleNamespace(pid=7, usedGpuMemory=300 << 20),
        SimpleNamespace(pid=8, usedGpuMemory=None),
    ]
    monkeypatch.setitem(sys.modules, "pynvml", nvml)
    monkeypatch.setattr(devices, "find_device", lambda wanted: H200)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda name: SimpleNamespace(uuid="4f0e"))


def test_a_cpu_as_text(folder, capsys):
    assert command("--device", "cpu", "--folder", folder) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == CPU
    assert "  gpu                 -" in lines
    assert f"  torch               {torch.__version__}" in lines
    at = lines.index("now")
    assert lines[at + 1 :] == [
        "  none: a CPU",
        "",
        f"accepted runs of this machine, in {folder / CPU}",
        "  0001_one.json",
        "  0002_two.json",
        "",
        "other machines",
        "  NVIDIA-H200  1 accepted",
    ]


def test_a_cpu_as_json(folder, capsys):
    assert command("--device", "cpu", "--folder", folder, "--json") == 0
    found = json.loads(capsys.readouterr().out)
    assert found["identity"]["machine"] == CPU
    assert found["telemetry"] is None
    assert found["baselines"] == {CPU: ["0001_one.json", "0002_two.json"], "NVIDIA-H200": ["0001_one.json"]}


def test_without_baselines_it_says_so(tmp_path, capsys):
    assert command("--device", "cpu", "--folder", tmp_path / "nowhere") == 0
    assert capsys.readouterr().out.endswith(f"\n\nno accepted run of this machine in {tmp_path / 'nowhere' / CPU}\n")


def test_a_gpu_as_text(an_h200, folder, capsys):
    assert command("--folder", folder) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "NVIDIA-H200"
    assert "  uuid                GPU-4f0e" in lines
    assert "  power_limit_w       700" in lines
    at = lines.index("now")
    assert lines[at + 1 : at + 10] == [
        "  sm_mhz               1000",
        "  memory_mhz           2000",
        "  power_w              -",
        "  power_limit_w        700",
        "  temperature_c        -",
        "  throttle             hw_slowdown, sw_thermal",
        "  processes            7 (300 MiB), 8 (unknown memory)",
        "  memory_used_bytes    -",
        "  utilization_percent  -",
    ]
    assert lines[-2:] == ["other machines", f"  {CPU}  2 accepted"]


def test_a_gpu_as_json(an_h200, folder, capsys):
    assert command("--folder", folder, "--json") == 0
    found = json.loads(capsys.readouterr().out)
    assert found["telemetry"]["processes"] == [{"pid": 7, "used_bytes": 300 << 20}, {"pid": 8, "used_bytes": None}]
    assert found["telemetry"]["throttle"] == ["hw_slowdown", "sw_thermal"]
    assert (found["identity"]["driver"], found["identity"]["nvml"]) == ("580.1", None)


def test_a_device_that_is_unknown_is_refused():
    with pytest.raises(ValueError, match="unknown device 'tpu'"):
        command("--device", "tpu")


def test_who_was_fastest_is_what_stored_runs_say(an_h200, folder, capsys):
    own = folder / "NVIDIA-H200" / "kernels"
    bf16 = [product("torch", "bf16", m, 8) for m in (1, 4, 16)]
    example = [product("example", "w4a16", m, us) for m, us in ((1, 2), (4, 4), (16, 3))]
    other = [product("other", "w4a16", m, us) for m, us in ((1, 3), (16, 1), (64, 1))]  # the last is not beside BF16
    write(own / "a.json", run_of(*bf16, *example, *other, product("other", "w4a8", 1, 4)))
    write(own / "b.json", run_of(*bf16, *(product("example", "w4a16", m, 2 * m) for m in (1, 16))))
    write(own / "c.json", run_of(*bf16))
    (own / "notes.json").write_text("{}", encoding="utf-8")
    assert command("--folder", folder, "--json") == 0
    found = json.loads(capsys.readouterr().out)["fastest"]
    assert {name: list(answers) for name, answers in found.items()} == {
        "kernels/a.json": ["mxfp4 w4a16", "mxfp4 w4a8"],
        "kernels/b.json": ["mxfp4 w4a16"],
    }
    first = found["kernels/a.json"]["mxfp4 w4a16"]
    assert (first["provider"], first["cells"], first["of"], first["m_least"], first["m_most"]) == ("example", 2, 3, 1, 4)
    assert (first["least"], first["most"]) == pytest.approx((2, 4))
    assert command("--folder", folder) == 0
    lines = capsys.readouterr().out.splitlines()
    at = lines.index("fastest in kernels/b.json")
    assert lines[at + 1] == "  mxfp4 w4a16  example 1.0, 0.25x to 4.00x BF16 in 2 of 2 layers and batch sizes (m = 1 to 16)"
