"""The key and identity of a machine, and the session that a run belongs to."""

import json
import sys
from datetime import datetime, timedelta, timezone
from importlib import metadata
from types import SimpleNamespace

import pytest
import torch

from fp4bench.devices import Device, find_device
from fp4bench.timing import machine
from fp4bench.timing.machine import machine_info, machine_key, session
from fp4bench.timing.telemetry import Telemetry

H200 = Device("cuda:0", "NVIDIA H200", (9, 0), sm_count=132, l2_bytes=60 << 20)
FACTS = {"driver": "580.1", "power_limit_w": 700.0, "max_sm_mhz": 1980, "max_memory_mhz": 3201}


@pytest.fixture
def an_h200(monkeypatch):
    """torch sees an H200, and NVML answers; gives what was closed."""
    closed = []
    telemetry = SimpleNamespace(reason=None, machine_facts=lambda: FACTS, close=lambda: closed.append(True))
    monkeypatch.setattr(Telemetry, "open", lambda device: telemetry)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda name: SimpleNamespace(uuid="4f0e-11"))
    return closed


def test_a_gpu_is_keyed_by_its_name():
    assert machine_key(H200) == "NVIDIA-H200"
    assert machine_key(Device("cuda:0", "NVIDIA RTX PRO 6000 (Blackwell)", (12, 0))) == "NVIDIA-RTX-PRO-6000-Blackwell"


def test_a_cpu_is_keyed_by_model_and_cores():
    key = machine_key(Device("cpu", "Some CPU 9000"))
    assert key.startswith("cpu-some-cpu-9000-")
    assert key.endswith("c")


def test_the_identity_is_small_stable_and_json():
    info = machine_info(find_device("cpu"))
    assert json.loads(json.dumps(info)) == info == machine_info(find_device("cpu"))
    assert {"machine", "gpu", "compute_capability", "sm_count", "l2_bytes", "driver", "cuda", "torch", "triton", "uuid"} <= set(
        info
    )
    assert {"power_limit_w", "max_sm_mhz", "vllm", "platform", "nvml"} <= set(info)
    assert len(info) <= 24
    assert info["gpu"] is info["uuid"] is info["power_limit_w"] is info["max_sm_mhz"] is None
    assert info["nvml"] == "a CPU"
    assert info["python"] == f"{sys.version_info.major}.{sys.version_info.minor}"


def test_the_identity_of_a_gpu_has_what_its_driver_says(an_h200):
    info = machine_info(H200)
    assert json.loads(json.dumps(info)) == info
    assert FACTS.items() <= info.items()
    assert info["nvml"] is None
    assert (info["machine"], info["gpu"], info["uuid"]) == ("NVIDIA-H200", "NVIDIA H200", "GPU-4f0e-11")
    assert an_h200 == [True]


def test_without_nvml_the_identity_says_why(an_h200, monkeypatch):
    monkeypatch.setattr(Telemetry, "open", lambda device: Telemetry(reason="nvidia-ml-py is not installed"))
    info = machine_info(H200)
    assert info["nvml"] == "nvidia-ml-py is not installed"
    assert {info[key] for key in FACTS} == {None}


def test_versions_are_read_without_an_import(monkeypatch):
    known = {"vllm": "0.19.0"}

    def version(package):
        if package not in known:
            raise metadata.PackageNotFoundError(package)
        return known[package]

    monkeypatch.setattr(machine, "version", version)
    info = machine_info(find_device("cpu"))
    assert (info["vllm"], info["triton"]) == ("0.19.0", None)
    assert "vllm" not in sys.modules


NOON = datetime(2026, 11, 21, 12, tzinfo=timezone.utc)


def test_a_session_is_a_card_and_a_day():
    assert session({"machine": "NVIDIA-H200", "uuid": "GPU-4f0e-11"}, NOON) == "GPU-4f0e-11 2026-11-21"
    assert session({"machine": "NVIDIA-H200", "uuid": "GPU-4f0e-11"}, NOON + timedelta(days=1)) == "GPU-4f0e-11 2026-11-22"
    assert session({"machine": "cpu-some-2c", "uuid": None}, NOON) == "cpu-some-2c 2026-11-21"


def test_the_day_of_a_session_is_that_of_utc():
    tokyo = timezone(timedelta(hours=9))
    early = datetime(2026, 11, 22, 8, tzinfo=tokyo)
    assert session({"machine": "cpu-some-2c", "uuid": None}, early) == "cpu-some-2c 2026-11-21"
    with pytest.raises(ValueError, match="no time zone"):
        session({"machine": "cpu-some-2c", "uuid": None}, NOON.replace(tzinfo=None))
