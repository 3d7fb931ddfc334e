"""vLLM's operators, loaded from its operator libraries; shared by the providers that call them.

`FP4BENCH_VLLM_LIBS=<folder>` names a folder that holds the libraries (what a build leaves, and enough for kernels); without it
they are those of the installed package. Either way the package itself is never imported: `import vllm` (0.26.0) changes torch's
compiler, sets environment variables and switches a kind of attention off, which a process that times others must not.

An operator is called by the names of its schema, since versions take different arguments: `gptq_marlin_gemm` became
`marlin_gemm`, and lost `g_idx`, `perm` and `is_k_full` between 0.26.0 and 0.33.0.
"""

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from hashlib import sha256
from importlib.metadata import PackageNotFoundError
from importlib.metadata import version as installed_version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from fp4bench.providers.fatbin import runs_on, targets

VARIABLE = "FP4BENCH_VLLM_LIBS"

_WRITTEN_VERSION = r"^(?:__version__ = )?version = ['\"](.+?)['\"]"

# Names that older versions have for an argument.
_OLD_NAMES = {"b_q_type": "b_type_id"}


@dataclass(frozen=True)
class Operators:
    """A namespace of `torch.ops` and the files that register it, whichever of them a version has."""

    namespace: str
    files: tuple[str, ...]

    def version(self) -> str | None:
        """vLLM's version and what its libraries were built for, "0.26.0 (sm_80 sm_90a)"; None where there are none.

        A folder without a version is told by a hash of its libraries.
        """
        paths = self._paths()
        return f"{_version(tuple(paths))} ({' '.join(_targets(tuple(paths)))})" if paths else None

    def why_not(self, capability: tuple[int, int], *names: str | tuple[str, ...]) -> str | None:
        """What keeps these operators from running on a GPU of this compute capability, or None; loads the libraries.

        names: each an operator, or the names that versions have for it. Raises OSError, torch's own, for a library that cannot
        be loaded, say because it was built for another torch.
        """
        paths = self._paths()
        if not paths:
            return f"vLLM is not installed, and {VARIABLE} names no folder" if _folder() is None else self._missing()
        built_for = _targets(tuple(paths))
        if not runs_on(built_for, capability):
            here = "compute capability {}.{}".format(*capability)
            return f"this vLLM's {' and '.join(path.name for path in paths)} has code for {' '.join(built_for)}, not for {here}"
        for name in names:
            if self._find(name) is None:
                return f"this vLLM has no operator {self.namespace}::{name if isinstance(name, str) else name[-1]}"
        return None

    def operator(self, *names: str) -> Any:
        """The operator by the first of its names that this version has. Raises AttributeError where it has none."""
        found = self._find(names)
        return getattr(getattr(torch.ops, self.namespace), names[-1]) if found is None else found

    def _find(self, names: str | tuple[str, ...]) -> Any:
        _load(tuple(self._paths()))
        operators = getattr(torch.ops, self.namespace)
        for name in (names,) if isinstance(names, str) else names:
            if hasattr(operators, name):
                return getattr(operators, name)
        return None

    def _paths(self) -> list[Path]:
        folder = _folder()
        return [] if folder is None else [path for name in self.files if (path := folder / name).is_file()]

    def _missing(self) -> str:
        return f"{_folder()} has no {' or '.join(self.files)} of vLLM"


# 0.20.0 has all but NVFP4 in the first file, 0.26.0 nothing; QuTLASS got its own.
MAIN = Operators("_C", ("_C.abi3.so", "_C_stable_libtorch.abi3.so"))
QUTLASS = Operators("_qutlass_C", ("_C.abi3.so", "_qutlass_C.abi3.so"))
MOE = Operators("_moe_C", ("_moe_C.abi3.so", "_moe_C_stable_libtorch.abi3.so"))


def arguments(operator: Any, given: Mapping[str, Any], dispensable: Mapping[str, Any]) -> list[Any]:
    """The arguments of `operator` in the order of its schema, by name; names without `_or_none`, the newest version's.

    given: what every version must take. dispensable: what only some versions take, and the others do without.
    Raises TypeError for an argument that is in neither, and for a given one that this version does not take.
    """
    schema = operator.default._schema
    names = [_argument_name(argument.name) for argument in schema.arguments]
    everything = {**dispensable, **given}
    if unknown := [name for name in names if name not in everything]:
        raise TypeError(f"this version of {schema.name} takes {', '.join(unknown)}, which fp4bench does not know: {schema}")
    if missing := [name for name in given if name not in names]:
        raise TypeError(f"this version of {schema.name} does not take {', '.join(missing)}: {schema}")
    return [everything[name] for name in names]


def third_party(package: str) -> Path | None:
    """The folder to import a package from that vLLM brings along, or None: its `third_party`, or that of the libraries."""
    folder = _folder()
    places = () if folder is None else (folder / "third_party", folder)
    return next((place for place in places if (place / package / "__init__.py").is_file()), None)


def third_party_version(package: str) -> str | None:
    """vLLM's version, of which the package is a part, or None where it is not there."""
    folder = third_party(package)
    if folder is None:
        return None
    return f"vLLM {_version((folder / package / '__init__.py',))}"


def python_file(path: str) -> Path | None:
    """A file of vLLM's Python sources, by its path in the package, or None where it is not there."""
    folder = _folder()
    return found if folder is not None and (found := folder / path).is_file() else None


def _argument_name(name: str) -> str:
    name = name.removesuffix("_or_none")
    return _OLD_NAMES.get(name, name)


def _folder() -> Path | None:
    """Where the libraries are to be: the named folder, or that of the installed package.

    Raises ValueError if the variable names no folder.
    """
    if named := os.environ.get(VARIABLE):
        folder = Path(named)
        if not folder.is_dir():
            raise ValueError(f"{VARIABLE} names {named!r}, which is no folder")
        return folder
    spec = find_spec("vllm")  # does not import it
    places = spec.submodule_search_locations if spec else None
    return Path(next(iter(places))) if places else None


@cache
def _load(paths: tuple[Path, ...]) -> None:
    for path in paths:
        torch.ops.load_library(str(path))


@cache
def _targets(paths: tuple[Path, ...]) -> tuple[str, ...]:
    found = dict.fromkeys(target for path in paths for target in targets(path))
    return tuple(found)


@cache
def _version(paths: tuple[Path, ...]) -> str:
    """By the file that vLLM's build writes beside its libraries, else by the installed package, else by content."""
    written = [folder / "_version.py" for folder in (_folder(),) if folder and (folder / "_version.py").is_file()]
    if written and (match := re.search(_WRITTEN_VERSION, written[0].read_text(encoding="utf-8"), re.MULTILINE)):
        return match[1]
    if not os.environ.get(VARIABLE):
        try:
            return installed_version("vllm")
        except PackageNotFoundError:
            pass
    digest = sha256()
    for path in paths:
        digest.update(path.read_bytes())
    return f"sha256:{digest.hexdigest()[:12]}"
