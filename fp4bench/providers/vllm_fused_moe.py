"""vLLM's Triton kernels of MoE layers, out of its files `fused_moe.py` and others, without the package around them.

`import vllm` changes torch and needs some forty packages (`vllm_ops`); of such a file's kernels, their launch and the choice of
launches nothing does. So the file is run with stand-ins for the modules of vLLM that it imports. Those that the launch really
asks are told here as vLLM 0.26.0 tells them on a CUDA GPU; each other name is a class that can be named, and not called.
"""

import logging
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from importlib.util import find_spec, module_from_spec, spec_from_file_location
from math import prod
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import torch

FILE = "model_executor/layers/fused_moe/fused_moe.py"
SUM_FILE = "model_executor/layers/fused_moe/moe_fused_mul_sum.py"
OGS_FILE = "model_executor/layers/fused_moe/experts/gpt_oss_triton_kernels_moe.py"

_FOLDER_VARIABLE = "VLLM_TUNED_CONFIG_FOLDER"


@cache
def load(path: Path) -> ModuleType:
    """The module of vLLM's file at `path`. Raises what running the file raises."""
    parts = path.with_suffix("").parts
    place = parts[len(parts) - 1 - parts[::-1].index("model_executor") :]  # what it imports may be relative to it
    spec = spec_from_file_location(".".join(("vllm", *place)), path)
    assert spec is not None
    assert spec.loader is not None
    module = module_from_spec(spec)
    with _stand_ins():
        spec.loader.exec_module(module)
    return module


class _Named(type):
    """Of classes that stand for names of vLLM that are imported and not used."""

    def __getattr__(cls, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        setattr(cls, name, _named(f"{cls.__name__}.{name}"))  # the same one each time: members of enumerations are compared
        return getattr(cls, name)

    def __call__(cls, *_: Any, **__: Any) -> Any:
        raise RuntimeError(f"{cls.__name__} of vLLM is called, which fp4bench does not have")


def _named(name: str) -> Any:
    return _Named(name, (), {})


class _Module(ModuleType):
    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        setattr(self, name, _named(f"{self.__name__}.{name}"))
        return getattr(self, name)


class _Finder(MetaPathFinder, Loader):
    """Finds every module of vLLM that nobody imported before, as a stand-in."""

    def find_spec(self, name: str, path: Sequence[str] | None, target: ModuleType | None = None) -> ModuleSpec | None:
        return ModuleSpec(name, self, is_package=True) if name.split(".")[0] == "vllm" else None

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        module = _Module(spec.name)
        for name, value in _told().get(spec.name.removeprefix("vllm."), {}).items():
            setattr(module, name, value)
        return module

    def exec_module(self, module: ModuleType) -> None:
        pass


@contextmanager
def _stand_ins() -> Iterator[None]:
    before, finder = set(sys.modules), _Finder()
    sys.meta_path.insert(0, finder)
    try:
        yield
    finally:
        sys.meta_path.remove(finder)
        for name in set(sys.modules) - before:
            if name.split(".")[0] == "vllm":
                del sys.modules[name]


def _told() -> dict[str, dict[str, Any]]:
    """By module below `vllm`, what the launch asks it for."""
    import triton
    import triton.language as tl

    return {
        "triton_utils": {"triton": triton, "tl": tl},
        "logger": {"init_logger": _logger},
        "envs": {"VLLM_BATCH_INVARIANT": False, _FOLDER_VARIABLE: os.environ.get(_FOLDER_VARIABLE)},
        "platforms": {"current_platform": _PLATFORM},
        "utils.platform_utils": {"get_device_name_as_file_name": lambda: torch.cuda.get_device_name().replace(" ", "_")},
        "utils.torch_utils": {"direct_register_custom_op": lambda *_, **__: None},
        "utils.import_utils": {"has_triton_kernels": lambda: find_spec("triton_kernels") is not None},
        "model_executor.layers.fused_moe.utils": {"enable_swap_ab": _swaps, "_resize_cache": _resized},
    }


def _has_capability(capability: tuple[int, int] | int) -> bool:
    """Whether this GPU is of a compute capability, (9, 0) or 90, or later."""
    return torch.cuda.get_device_capability() >= (capability if isinstance(capability, tuple) else divmod(capability, 10))


_PLATFORM = SimpleNamespace(is_rocm=lambda: False, is_cuda=lambda: True, has_device_capability=_has_capability)


def _logger(name: str) -> logging.Logger:
    """A logger with vLLM's methods, which say a thing once: which launches it found. fp4bench asks for them itself."""
    logger = logging.getLogger(name)
    for method in ("debug_once", "info_once", "warning_once"):
        setattr(logger, method, lambda *_, **__: None)
    return logger


def _swaps(rows: int, columns: int) -> bool:
    """Hopper multiplies few rows with operands exchanged, so that weights fill the 64 rows of its instruction."""
    return torch.cuda.get_device_capability() == (9, 0) and rows < 64 <= columns


def _resized(buffer: torch.Tensor, shape: tuple[int, ...]) -> torch.Tensor:
    """The beginning of a buffer, in another shape."""
    return buffer.flatten()[: prod(shape)].view(*shape)
