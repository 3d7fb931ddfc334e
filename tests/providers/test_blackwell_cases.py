"""The whole case list of a GPU that is not there: who would run what on a B200, with ids, facts and records; none is timed."""

from collections import defaultdict

import pytest
from cuda_library import SASS
from vllm_stand_in import CUTLASS, MARLIN, QUTLASS, operators

from fp4bench import providers as registry
from fp4bench.cases import gemm_cases, select
from fp4bench.devices import Device
from fp4bench.evidence.record import KEYS, make_record

B200 = Device("cuda:0", "NVIDIA B200", (10, 0), 148, 126 << 20)
OPTIONS = {
    "models": ["llama3.1-8b"],
    "batch_sizes": ["1", "4096"],
    "had_sizes": ["none", "16", "32", "128"],
    "modes": ["all"],
    "providers": ["all"],
}
TARGETS = ((SASS, 90), (SASS, 100, 1 << 21))


@pytest.fixture
def cases(tmp_path, monkeypatch):
    """Every case on a B200 where everything is installed."""
    anything = lambda **arguments: None  # noqa: E731
    behind = dict.fromkeys(("marlin_gemm", "gptq_marlin_repack", "cutlass_scaled_fp4_mm", "scaled_fp4_quant"), anything)
    behind |= {"cutlass_scaled_mm_supports_fp4": lambda cuda_device_capability: cuda_device_capability == 100}
    monkeypatch.setattr(registry, "_version", lambda name: "1.0")
    with (
        operators(QUTLASS["0.26.0"], {}, "QUTLASS", monkeypatch, tmp_path, targets=TARGETS) as folder,
        operators((*MARLIN["0.26.0"], *CUTLASS), behind, "MAIN", monkeypatch, tmp_path, targets=TARGETS) as main,
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
    assert able["vllm_marlin"] == {(fmt, "w4a16", None) for fmt in mx_nv}
    assert able["humming"] == {("mxfp4", "w4a16", None), ("nvfp4", "w4a16", None), ("mxfp4", "w4a8", None)}
    assert able["gemlite"] == able["humming"]
    assert able["triton_kernels"] == {("mxfp4", "w4a16", None)}
    assert able["vllm_cutlass"] == {("nvfp4", mode, None) for mode in both}
    assert able["flashinfer_cutlass"] == able["flashinfer_cudnn"] == able["vllm_cutlass"]
    assert able["flashinfer_cute_dsl"] == {(fmt, mode, None) for fmt in mx_nv for mode in both}
    assert able["torch_scaled_mm"] == {(fmt, mode, had) for fmt in mx_nv for mode in both for had in (None, 16, 32, 128)}
    assert able["vllm_qutlass"] == {
        (fmt, mode, had) for fmt in mx_nv for mode in both for had in (None, 16, 32, 128) if (fmt, had) != ("mxfp4", 16)
    }


def test_each_case_has_an_id_and_a_record(cases):
    assert len({str(case) for case in cases}) == len(cases)
    for case in cases:
        if case.why_not(B200) is None:
            record = make_record(case.facts(), [1.0])
            assert list(record) == list(KEYS)
            assert record["provider_version"]
            assert record["scale_rule"] is None or record["scale_rule"] in map(str, case.provider.rules[record["format"]])
            assert case.accumulation(B200) is None or case.accumulation(B200).bits >= 7
