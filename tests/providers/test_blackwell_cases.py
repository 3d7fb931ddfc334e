"""The whole case list of a GPU that is not there: who would run what on a B200, with ids, facts, records and reports.

Inputs are drawn, weights laid out and every call made, at full size, on tensors that have shapes and no values, against
operators that check shapes. None is timed.
"""

import argparse
import sys
from collections import Counter, defaultdict

import pytest
import torch
from blackwell_stand_in import BEHIND, FlashInfer
from cuda_library import SASS
from recorded import ALIKE, stored_run, write
from torch._subclasses.fake_tensor import FakeTensorMode
from vllm_stand_in import CUTLASS, CUTLASS_MOE, MARLIN, MOE, MOE_STEPS, QUTLASS, operators

from fp4bench import providers as registry
from fp4bench.cases import gemm_cases, moe_cases, select
from fp4bench.cli import report
from fp4bench.devices import Device
from fp4bench.evidence.record import KEYS, make_record
from fp4bench.providers import vllm_fused_moe, vllm_ops

B200 = Device("cuda:0", "NVIDIA B200", (10, 0), 148, 126 << 20)
OPTIONS = {
    "models": ["llama3.1-8b"],
    "batch_sizes": ["1", "4096"],
    "had_sizes": ["none", "16", "32", "128"],
    "modes": ["all"],
    "providers": ["all"],
}
ALIKE_BUT_WORK = {key: value for key, value in ALIKE.items() if key not in ("flops", "bytes", "scale_rule")}
TARGETS = ((SASS, 90), (SASS, 100, 1 << 21))


@pytest.fixture
def cases(tmp_path, monkeypatch):
    """Every case on a B200 where everything is installed."""
    behind = BEHIND | {"cutlass_scaled_mm_supports_fp4": lambda cuda_device_capability: cuda_device_capability == 100}
    monkeypatch.setattr(registry, "_version", lambda name: "1.0")
    with (
        operators(QUTLASS["0.26.0"], BEHIND, "QUTLASS", monkeypatch, tmp_path, targets=TARGETS, key="Meta") as folder,
        operators((*MARLIN["0.26.0"], *CUTLASS), behind, "MAIN", monkeypatch, tmp_path, targets=TARGETS, key="Meta") as main,
    ):
        (folder / "_qutlass_C.abi3.so").rename(main / "_qutlass_C.abi3.so")
        (main / "triton_kernels").mkdir()
        (main / "triton_kernels" / "__init__.py").touch()
        yield list(gemm_cases(select(OPTIONS, B200)))


def test_every_provider_has_its_cases(cases):
    able = defaultdict(set)
    for case in cases:
        if case.why_not(B200) is None:
            able[case.provider.name].add((str(case.problem.format), case.problem.mode.name, case.problem.hadamard))
    mx_nv = ("mxfp4", "nvfp4")
    both = ("w4a4", "w4a4_noquant")
    assert able["vllm_marlin"] == {(fmt, "w4a16", None) for fmt in mx_nv} | {("nvfp4", "w4a16_fp16", None)}
    assert able["gemlite"] == {("mxfp4", "w4a16", None), ("nvfp4", "w4a16", None), ("mxfp4", "w4a8", None)}
    assert able["humming"] == able["gemlite"] | {(fmt, "w4a16_fp16", None) for fmt in mx_nv}
    assert able["triton_kernels"] == {("mxfp4", "w4a16", None)}
    assert able["vllm_cutlass"] == {("nvfp4", mode, None) for mode in both}
    assert able["flashinfer_cutlass"] == able["flashinfer_cudnn"] == able["flashinfer_trtllm"] == able["vllm_cutlass"]
    assert "flashinfer_b12x" not in able  # compute capability 12
    assert able["flashinfer_cute_dsl"] == {(fmt, mode, None) for fmt in mx_nv for mode in both}
    assert able["torch_scaled_mm"] == {(fmt, mode, had) for fmt in mx_nv for mode in both for had in (None, 16, 32, 128)}
    assert able["vllm_qutlass"] == {
        (fmt, mode, had) for fmt in mx_nv for mode in both for had in (None, 16, 32, 128) if (fmt, had) != ("mxfp4", 16)
    }
    assert able["vllm_qutlass_quest"] == {work for work in able["vllm_qutlass"] if work[0] == "mxfp4"}


def test_each_case_has_an_id_and_a_record(cases):
    assert len({str(case) for case in cases}) == len(cases)
    for case in cases:
        if case.why_not(B200) is None:
            record = make_record(case.facts(), [1.0])
            assert list(record) == list(KEYS)
            assert record["provider_version"]
            assert record["scale_rule"] is None or record["scale_rule"] in map(str, case.provider.rules[record["format"]])
            assert case.accumulation(B200) is None or case.accumulation(B200).bits >= 6


# Providers whose calls are of Blackwell alone. torch's own shape check of MXFP4 (2.11 to 2.13) counts a byte of two codes as
# one value, and refuses what its kernel takes: https://github.com/pytorch/pytorch/issues/172627
CALLED = (
    "torch_scaled_mm",
    "vllm_qutlass",
    "vllm_qutlass_quest",
    "vllm_cutlass",
    "flashinfer_cutlass",
    "flashinfer_cudnn",
    "flashinfer_cute_dsl",
    "flashinfer_trtllm",
)


def is_called(case):
    return case.provider.name in CALLED and (case.provider.name, str(case.problem.format)) != ("torch_scaled_mm", "mxfp4")


@pytest.fixture
def on_shapes(monkeypatch):
    monkeypatch.setattr(sys.modules["fp4bench.quantize"], "_CHUNK_CPU", 1 << 40)  # a loop of one
    monkeypatch.setitem(sys.modules, "flashinfer", FlashInfer)
    with FakeTensorMode():
        yield


def test_every_case_is_called_at_full_size(cases, on_shapes):
    called = Counter()
    for case in cases:
        problem = case.problem
        if problem.layer != "down" or not is_called(case) or case.why_not(B200) is not None:
            continue
        run = case.provider.prepare(problem, problem.inputs())
        for _ in range(2):
            out = run()
            assert (out.shape, out.dtype) == ((problem.m, problem.n), torch.bfloat16), str(case)
        called[case.provider.name] += 1
    # Batch sizes, modes, and formats with their rotations, of each.
    assert called == {
        "torch_scaled_mm": 2 * 2 * 4,
        "vllm_qutlass": 2 * 2 * (3 + 4),
        "vllm_qutlass_quest": 2 * 2 * 3,
        "vllm_cutlass": 4,
        "flashinfer_cutlass": 4,
        "flashinfer_cudnn": 4,
        "flashinfer_cute_dsl": 8,
        "flashinfer_trtllm": 4,
    }


def test_a_scale_that_is_missing_is_found(cases, on_shapes, monkeypatch):
    monkeypatch.setattr("fp4bench.providers.vllm_qutlass.layouts.to_blocked", lambda scales: scales.flatten()[:-1])
    case = next(case for case in cases if case.provider.name == "vllm_qutlass" and case.why_not(B200) is None)
    with pytest.raises(AssertionError, match="scales of"):
        case.provider.prepare(case.problem, case.problem.inputs())()


def test_reports_of_such_a_run_are_those_of_any(cases, tmp_path, capsys):
    """Its times are made up; that every case has its place in a report is what is seen."""
    able = [case for case in cases if case.why_not(B200) is None and case.problem.m == 4096]
    run = stored_run(cases=())
    run["machine_info"] |= {"machine": "NVIDIA-B200", "gpu": B200.name}
    for number, case in enumerate(able):
        record = make_record(case.facts(), [1e-5 * (1 + number % 7)]) | ALIKE_BUT_WORK | {"error": 0.002, "exact": False}
        stats = {"median": 1e-5 * (1 + number % 7), "min": 1e-5, "rounds": 1, "data": [1e-5]}
        run["benchmarks"].append({"name": str(case), "fullname": f"perf::test[{case}]", "stats": stats, "extra_info": record})
    path = write(tmp_path / "NVIDIA-B200" / "0001_dry.json", run)
    answers = {f"{case.problem.format} {case.problem.mode}" for case in able if is_called(case)}
    for kind, wanted in (("--throughput", {case.provider.name for case in able if is_called(case)}), ("--frontier", answers)):
        parser = argparse.ArgumentParser()
        report.add_parser(parser.add_subparsers())
        asked = parser.parse_args(["report", kind, str(path)])
        assert asked.run(asked) == 0
        told = capsys.readouterr().out
        assert "NVIDIA B200" in told
        assert all(name in told for name in wanted)


def test_the_reference_benchmark_of_experts_has_its_cases(tmp_path, monkeypatch):
    """vLLM's NVFP4 experts by CUTLASS beside FP8 in Triton, DeepSeek-R1, at every batch size of the benchmark's list."""
    pytest.importorskip("triton")
    batch_sizes = ["4", "8", "16", "32", "64", "128", "256", "512", "1024", "2048"]
    asked = {"models": ["deepseek-r1"], "batch_sizes": batch_sizes, "formats": ["nvfp4"], "modes": ["fp8", "w4a4"]}
    supports = {"cutlass_scaled_mm_supports_fp4": lambda cuda_device_capability: True}
    schemas = (*CUTLASS, *CUTLASS_MOE, *MOE_STEPS)
    with (
        operators(MOE, {}, "MOE", monkeypatch, tmp_path, targets=TARGETS) as folder,
        operators(schemas, supports, "MAIN", monkeypatch, tmp_path, targets=TARGETS) as main,
    ):
        (folder / vllm_ops.MOE.files[-1]).rename(main / vllm_ops.MOE.files[-1])
        (main / vllm_fused_moe.FILE).parent.mkdir(parents=True)
        (main / vllm_fused_moe.FILE).touch()
        cases = list(moe_cases(select(asked | {"providers": ["vllm_cutlass", "vllm_triton"]}, B200)))
        assert [case.why_not(B200) for case in cases] == [None] * 20
    assert {(case.provider.name, case.problem.mode.name) for case in cases} == {
        ("vllm_cutlass", "w4a4"),
        ("vllm_triton", "fp8"),
    }
