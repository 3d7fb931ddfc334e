"""The key and identity of a machine."""

import json

from fp4bench.devices import Device, find_device
from fp4bench.timing.machine import machine_info, machine_key

H200 = Device("cuda:0", "NVIDIA H200", (9, 0), sm_count=132, l2_bytes=60 << 20)


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
    assert info["gpu"] is None
