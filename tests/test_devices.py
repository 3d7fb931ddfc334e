"""The device as a value: found by name, or made up."""

from types import SimpleNamespace

import pytest
import torch

from fp4bench.devices import Device, cpu_name, find_device

CPU = Device("cpu", "made-up CPU")
H200 = Device("cuda:0", "NVIDIA H200", (9, 0), 132, 50 << 20)


@pytest.fixture
def no_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


@pytest.fixture
def two_gpus(monkeypatch):
    gpus = [
        SimpleNamespace(name="NVIDIA H200", major=9, minor=0, multi_processor_count=132, L2_cache_size=50 << 20),
        SimpleNamespace(name="NVIDIA B200", major=10, minor=0, multi_processor_count=148, L2_cache_size=126 << 20),
    ]
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: len(gpus))
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda number: gpus[number])


def test_the_cpu_is_always_found():
    device = find_device("cpu")
    assert device == Device("cpu", cpu_name())
    assert device.name.strip()
    assert not device.is_cuda
    assert (device.capability, device.sm_count, device.l2_bytes) == (None, None, None)


def test_auto_is_the_cpu_without_a_gpu(no_gpu):
    assert find_device() == find_device("auto") == find_device("cpu")


@pytest.mark.parametrize("wanted", ["cuda", "cuda:0", "cuda:7"])
def test_a_gpu_that_is_not_there_is_refused(wanted, no_gpu):
    with pytest.raises(ValueError, match=rf"device '{wanted}' is not there: torch .* sees 0 CUDA GPUs; use --device cpu"):
        find_device(wanted)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_cuda_without_a_gpu_is_refused():
    with pytest.raises(ValueError, match="device 'cuda' is not there"):
        find_device("cuda")


@pytest.mark.parametrize("wanted", ["auto", "cuda", "cuda:0"])
def test_a_gpu_is_found_by_its_properties(wanted, two_gpus):
    assert find_device(wanted) == H200


def test_a_gpu_is_found_by_index(two_gpus):
    assert find_device("cuda:1") == Device("cuda:1", "NVIDIA B200", (10, 0), 148, 126 << 20)
    assert find_device("cpu").torch_name == "cpu"
    with pytest.raises(ValueError, match=r"device 'cuda:2' is not there: .* sees 2 CUDA GPUs"):
        find_device("cuda:2")


@pytest.mark.parametrize(
    "wanted", ["", "gpu", "CUDA", "cpu:0", "cuda:x", "cuda:-1", "cuda:1.0", "cuda:0:1", "0", "cuda0", "mps"]
)
def test_any_other_name_is_refused(wanted):
    with pytest.raises(ValueError, match=f"unknown device '{wanted}': it is auto, cpu, cuda or cuda:<index>"):
        find_device(wanted)


@pytest.mark.parametrize(
    ("name", "capability", "has_fp8"),
    [
        ("made-up CPU", None, False),
        ("V100", (7, 0), False),
        ("A100", (8, 0), False),
        ("RTX 3090", (8, 6), False),
        ("RTX 4090", (8, 9), True),
        ("H200", (9, 0), True),
        ("B200", (10, 0), True),
        ("RTX 5090", (12, 0), True),
    ],
)
def test_fp8_tensor_cores_begin_with_ada(name, capability, has_fp8):
    device = Device("cpu" if capability is None else "cuda:0", name, capability)
    assert device.has_fp8 is has_fp8
    assert device.is_cuda is (capability is not None)


def test_a_device_reads_as_name_and_torch_name():
    assert str(H200) == "NVIDIA H200 (cuda:0)"
    assert str(CPU) == "made-up CPU (cpu)"


def test_the_file_name_has_no_blanks_and_slashes():
    assert H200.file_name == "NVIDIA-H200"
    assert Device("cuda:0", "NVIDIA H100 80GB HBM3", (9, 0)).file_name == "NVIDIA-H100-80GB-HBM3"
    assert Device("cpu", "A/B (C) 2.0GHz").file_name == "A-B-C-2.0GHz"
