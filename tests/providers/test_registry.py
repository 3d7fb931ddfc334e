"""The registry: every provider has the parts of the protocol, and a broken one is an error, never left out."""

import re
import sys
from dataclasses import replace
from itertools import product

import pytest

from fp4bench.cases import Case
from fp4bench.devices import Device
from fp4bench.formats import FORMATS, MXFP4, NVFP4, ScaleRule
from fp4bench.problems import BF16, MODES, W4A4, W4A16, GemmProblem, QuantizeProblem
from fp4bench.providers import import_optional, providers, why_not

DEVICES = [
    Device("cpu", "made-up CPU"),
    Device("cuda:0", "NVIDIA A100-SXM4-80GB", (8, 0), 108, 40 << 20),
    Device("cuda:0", "NVIDIA H200", (9, 0), 132, 50 << 20),
    Device("cuda:0", "NVIDIA B200", (10, 0), 148, 126 << 20),
]


def test_torch_and_eager_are_always_there():
    assert {"torch", "eager"} <= set(providers())


def test_providers_have_the_parts_of_the_protocol():
    for name, provider in providers().items():
        assert provider.name == name
        assert re.fullmatch(r"[a-z0-9_]+", name), f"{name!r} does not fit into a case id"
        assert provider.version is None or isinstance(provider.version, str), name
        assert set(provider.ops) <= {"gemm", "quantize", "moe"}, name
        assert provider.ops, name
        assert set(provider.modes) <= set(MODES), name
        for format_name, rules in provider.rules.items():
            assert set(rules) <= set(FORMATS[format_name].rules), name
            assert rules, name


def test_why_not_is_none_or_one_sentence():
    problems = [
        GemmProblem("tiny", "fc", 1, m, n, k, mode, fmt)
        for mode in MODES.values()
        for fmt in ((MXFP4, NVFP4) if mode.weights == "fp4" else (None,))
        for m, n, k in ((1, 64, 128), (129, 51, 205))
    ] + [
        QuantizeProblem("tiny", "fc", 1, 7, k, fmt, rule) for fmt in FORMATS.values() for rule in fmt.rules for k in (128, 205)
    ]
    for provider, device, problem in product(providers().values(), DEVICES, problems):
        reason = why_not(provider, problem, device)
        assert reason is None or (reason.strip() == reason != "" and not reason.endswith(".")), (provider.name, reason)


class Declared:
    """A provider of MXFP4 GEMMs in one mode, and of quantization by one rule; it runs nowhere, and says so when asked."""

    name, version, ops, modes = "declared", None, ("gemm", "quantize"), ("w4a16",)
    rules = {"mxfp4": (ScaleRule.FLOOR,)}

    def __init__(self, **changes):
        self.asked = []
        for name, value in changes.items():
            setattr(self, name, value)

    def why_not(self, problem, device):
        self.asked.append((problem, device))
        return f"it does not run on {device.name}"


GEMM = GemmProblem("tiny", "fc", 1, 16, 64, 128, W4A16, MXFP4)
QUANTIZE = QuantizeProblem("tiny", "fc", 1, 16, 128, MXFP4, ScaleRule.FLOOR)


@pytest.mark.parametrize(
    ("changes", "problem", "reason"),
    [
        ({"ops": ("quantize",)}, GEMM, "declared has no gemm"),
        ({"ops": ("gemm",)}, QUANTIZE, "declared has no quantize"),
        ({}, replace(GEMM, format=NVFP4), "declared has no format nvfp4"),
        ({"rules": {}}, GEMM, "declared has no format mxfp4"),
        ({}, replace(QUANTIZE, format=NVFP4, rule=ScaleRule.TWO_LEVEL), "declared has no format nvfp4"),
        ({}, replace(GEMM, mode=W4A4), "declared has no mode w4a4"),
        ({}, replace(GEMM, mode=BF16, format=None), "declared has no mode bf16"),
        ({}, replace(QUANTIZE, rule=ScaleRule.RCEIL), "declared has no scale rule rceil"),
        # The first of several reasons.
        ({"ops": (), "rules": {}, "modes": ()}, GEMM, "declared has no gemm"),
        ({"rules": {}, "modes": ()}, GEMM, "declared has no format mxfp4"),
    ],
)
def test_why_not_looks_at_what_a_provider_declares_first(changes, problem, reason):
    provider = Declared(**changes)
    assert why_not(provider, problem, DEVICES[0]) == reason
    assert provider.asked == []


@pytest.mark.parametrize(
    ("modes", "problem"),
    [
        (("w4a16",), GEMM),
        ((), QUANTIZE),  # a quantization has no mode
        (("bf16",), replace(GEMM, mode=BF16, format=None)),  # and this GEMM no format
    ],
    ids=["gemm", "quantize", "bf16"],
)
def test_the_rest_is_the_providers_own_word(modes, problem):
    provider = Declared(modes=modes)
    assert why_not(provider, problem, DEVICES[0]) == "it does not run on made-up CPU"
    assert provider.asked == [(problem, DEVICES[0])]
    provider.why_not = lambda problem, device: None
    assert why_not(provider, problem, DEVICES[0]) is None


def test_a_case_has_the_reason_of_its_provider():
    assert Case(GEMM, Declared()).why_not(DEVICES[2]) == "it does not run on NVIDIA H200"
    assert Case(replace(GEMM, format=NVFP4), Declared()).why_not(DEVICES[2]) == "declared has no format nvfp4"
    assert Case(GEMM, providers()["eager"]).why_not(DEVICES[0]) is None
    assert Case(GEMM, providers()["torch"]).why_not(DEVICES[0]) == "torch has no format mxfp4"


def test_each_call_makes_its_own_registry():
    first = providers()
    first.clear()
    assert providers()


@pytest.fixture
def install(tmp_path, monkeypatch):
    """Installs a package with one module, `made_up`, and the entry point made_up = made_up:Provider, for one test."""

    def install(source, entry="made_up:Provider"):
        metadata = tmp_path / "made_up-1.0.dist-info"
        metadata.mkdir()
        (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: made-up\nVersion: 1.0\n", encoding="utf-8")
        (metadata / "entry_points.txt").write_text(f"[fp4bench.providers]\nmade_up = {entry}\n", encoding="utf-8")
        (tmp_path / "made_up.py").write_text(source, encoding="utf-8")
        monkeypatch.syspath_prepend(tmp_path)

    yield install
    sys.modules.pop("made_up", None)


WHOLE = """
class Provider:
    name, version, ops, modes, rules = "made_up", None, ("gemm",), ("w4a16",), {}
    def why_not(self, problem, device): return "its library is not installed"
    def prepare(self, problem, inputs): raise RuntimeError(self.why_not(problem, None))
"""


def test_an_installed_provider_comes_after_the_built_in_ones(install):
    install(WHOLE)
    assert list(providers())[-1] == "made_up"
    assert providers()["made_up"].why_not(None, None) == "its library is not installed"


# Name: (source of the installed module, the error, its message).
BROKEN = {
    "parts_missing": (
        'class Provider:\n    name, version, prepare = "made_up", "1.0", None',
        (ValueError, r"the provider of entry point made_up = made_up:Provider has no ops, modes, rules, why_not: see fp4bench"),
    ),
    "no_provider_at_all": (
        "Provider = dict",
        (ValueError, "made_up:Provider has no name, version, ops, modes, rules, why_not, pre"),
    ),
    "name_taken": (
        WHOLE.replace('"made_up"', '"eager"'),
        (ValueError, "two providers are named 'eager', the second from entry point made_up = made_up:Provider: rename it"),
    ),
    "dependency_missing": ("import no_such_dependency", (ModuleNotFoundError, "No module named 'no_such_dependency'")),
    "import_fails": ("raise ImportError('libcudart.so.99 is missing')", (ImportError, "libcudart.so.99 is missing")),
    "attribute_missing": ("", (AttributeError, "has no attribute 'Provider'")),
    "making_fails": ("def Provider(): raise OSError('no config')", (OSError, "no config")),
}


@pytest.mark.parametrize(
    "name", ["", "Made_up", "made-up", "made.up", "made up", "made_up\n", "m\u00e4de", "\u0663"], ids=ascii
)
def test_a_name_that_does_not_fit_into_a_case_id_is_refused(name, install):
    install(WHOLE.replace('"made_up"', ascii(name)))
    message = (
        f"the provider of entry point made_up = made_up:Provider is named {name!r}: "
        "use lower-case letters, digits and underscores"
    )
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        providers()


@pytest.mark.parametrize("broken", BROKEN)
def test_a_broken_provider_is_an_error(broken, install):
    source, (error, message) = BROKEN[broken]
    install(source)
    with pytest.raises(error, match=message):
        providers()


def test_an_entry_point_without_its_module_is_an_error(install):
    install(WHOLE, entry="made_up_and_gone:Provider")
    with pytest.raises(ModuleNotFoundError, match="No module named 'made_up_and_gone'"):
        providers()


def test_import_optional_of_a_module_that_is_there():
    assert import_optional("json").__name__ == "json"
    assert import_optional("json.decoder").__name__ == "json.decoder"


@pytest.mark.parametrize("module", ["no_such_module", "no_such_package.module"])
def test_import_optional_of_a_module_that_is_not_installed_is_none(module):
    assert import_optional(module) is None


@pytest.mark.parametrize(
    ("source", "error"),
    [("import no_such_dependency", ModuleNotFoundError), ("raise ImportError('x')", ImportError), ("1 / 0", ZeroDivisionError)],
)
def test_import_optional_of_a_broken_module_raises_its_error(source, error, install):
    install(source)
    with pytest.raises(error):
        import_optional("made_up")


def test_import_optional_of_a_missing_part_of_an_installed_package_raises():
    with pytest.raises(ModuleNotFoundError, match=r"json\.no_such_part"):
        import_optional("json.no_such_part")


def test_the_first_rule_of_a_provider_is_that_of_its_gemms():
    assert providers()["eager"].rules["mxfp4"][0] is ScaleRule.FLOOR
    assert providers()["eager"].rules["nvfp4"] == (ScaleRule.TWO_LEVEL,)
