"""vLLM's operators: where their libraries are looked for; the missing is a reason, the broken raises its own error."""

import sys

import pytest
import torch
from cuda_library import SASS, container, image
from vllm_stand_in import MARLIN, operators

from fp4bench.providers import vllm_ops
from fp4bench.providers.vllm_ops import MAIN, VARIABLE, Operators

H200 = (9, 0)


@pytest.fixture(autouse=True)
def no_vllm(monkeypatch):
    monkeypatch.delenv(VARIABLE, raising=False)
    monkeypatch.setitem(sys.modules, "vllm", None)  # find_spec raises for it, unlike for a missing one
    monkeypatch.setattr(vllm_ops, "find_spec", lambda name: None)


def test_nothing_is_a_reason():
    assert MAIN.version() is None
    assert MAIN.why_not(H200, "marlin_gemm") == f"vLLM is not installed, and {VARIABLE} names no folder"


def test_a_folder_without_the_libraries_is_a_reason(tmp_path, monkeypatch):
    monkeypatch.setenv(VARIABLE, str(tmp_path))
    assert MAIN.version() is None
    assert MAIN.why_not(H200) == f"{tmp_path} has no _C.abi3.so or _C_stable_libtorch.abi3.so of vLLM"


def test_a_variable_that_names_no_folder_is_an_error(tmp_path, monkeypatch):
    monkeypatch.setenv(VARIABLE, str(tmp_path / "gone"))
    with pytest.raises(ValueError, match=f"^{VARIABLE} names '.*gone', which is no folder$"):
        MAIN.version()


def test_a_library_that_cannot_be_loaded_raises_its_own_error(tmp_path, monkeypatch):
    (tmp_path / "_C.abi3.so").write_bytes(container(image(SASS, 90)))
    monkeypatch.setenv(VARIABLE, str(tmp_path))
    with pytest.raises(OSError, match=r"_C\.abi3\.so"):
        MAIN.why_not(H200, "marlin_gemm")


def test_the_installed_package_is_found_and_not_imported(tmp_path, monkeypatch):
    package = tmp_path / "vllm"
    package.mkdir()
    (package / "__init__.py").write_text("raise AssertionError('imported')", encoding="utf-8")
    (package / "_C.abi3.so").write_bytes(container(image(SASS, 90)))
    (package / "_version.py").write_text("__version__ = version = '0.31.1.dev3+g12ab'\n", encoding="utf-8")
    monkeypatch.undo()
    monkeypatch.delenv(VARIABLE, raising=False)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "vllm", raising=False)
    assert MAIN.version() == "0.31.1.dev3+g12ab (sm_90)"


def test_the_version_says_what_all_libraries_were_built_for(tmp_path, monkeypatch):
    (tmp_path / "_C.abi3.so").write_bytes(container(image(SASS, 80)))
    (tmp_path / "_C_stable_libtorch.abi3.so").write_bytes(container(image(SASS, 90, 1 << 20), image(SASS, 80)))
    monkeypatch.setenv(VARIABLE, str(tmp_path))
    told = MAIN.version()
    assert told.startswith("sha256:")
    assert told.endswith(" (sm_80 sm_90a)")
    (tmp_path / "_C.abi3.so").write_bytes(container(image(SASS, 80, code=b"other")))
    vllm_ops._version.cache_clear()
    assert MAIN.version() != told


def test_libraries_for_other_gpus_are_a_reason_and_not_loaded(tmp_path, monkeypatch):
    (tmp_path / "_qutlass_C.abi3.so").write_bytes(container(image(SASS, 100, 1 << 21)))
    monkeypatch.setenv(VARIABLE, str(tmp_path))
    why = "this vLLM's _qutlass_C.abi3.so has code for sm_100f, not for compute capability 9.0"
    assert vllm_ops.QUTLASS.why_not(H200, "fusedQuantizeNv") == why


def test_a_missing_operator_is_a_reason(tmp_path, monkeypatch):
    behind = dict.fromkeys(("marlin_gemm", "gptq_marlin_repack"), lambda **arguments: arguments["a"])
    with operators(MARLIN["0.26.0"], behind, "MAIN", monkeypatch, tmp_path):
        here = vllm_ops.MAIN
        assert here.why_not(H200, ("gptq_marlin_gemm", "marlin_gemm"), "gptq_marlin_repack") is None
        assert here.why_not(H200, "machete_mm") == f"this vLLM has no operator {here.namespace}::machete_mm"
        assert here.why_not(H200, ("older", "newer")) == f"this vLLM has no operator {here.namespace}::newer"
        assert here.operator("gptq_marlin_gemm", "marlin_gemm") is getattr(torch.ops, here.namespace).marlin_gemm
        with pytest.raises(AttributeError, match="newer"):
            here.operator("older", "newer")


@pytest.fixture
def repack(tmp_path, monkeypatch):
    def make(version):
        behind = {"gptq_marlin_repack": lambda **arguments: arguments["b_q_weight"]}
        with operators(MARLIN[version][1:], behind, "MAIN", monkeypatch, tmp_path):
            yield vllm_ops.MAIN.operator("gptq_marlin_repack")

    return make


GIVEN = {"b_q_weight": 1, "size_k": 2, "size_n": 3, "num_bits": 4}


@pytest.mark.parametrize(
    ("version", "order"),
    [("0.11", [1, "none", 2, 3, 4]), ("0.26.0", [1, "none", 2, 3, 4, False]), ("0.33.0", [1, 2, 3, 4, False])],
)
def test_arguments_come_in_the_order_of_the_schema(version, order, repack):
    for operator in repack(version):
        assert vllm_ops.arguments(operator, GIVEN, {"perm": "none", "is_a_8bit": False}) == order


def test_an_argument_that_is_not_known_is_an_error(repack):
    for operator in repack("0.26.0"):
        with pytest.raises(TypeError, match="takes is_a_8bit, which fp4bench does not know"):
            vllm_ops.arguments(operator, GIVEN, {"perm": None})
        with pytest.raises(TypeError, match="does not take global_scale"):
            vllm_ops.arguments(operator, GIVEN | {"global_scale": None}, {"perm": None, "is_a_8bit": False})


def test_names_of_versions():
    assert Operators("_C", ()).version() is None
    assert vllm_ops._argument_name("c_or_none") == "c"
    assert vllm_ops._argument_name("b_q_type") == "b_type_id"
