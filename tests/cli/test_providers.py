"""`fp4bench providers`: what each declares, and why not here."""

import argparse

import pytest

from fp4bench import providers as registry
from fp4bench.cli import providers
from fp4bench.devices import Device
from fp4bench.formats import ScaleRule
from fp4bench.providers.torch_native import TorchProvider

CPU = Device("cpu", "Some CPU")
H200 = Device("cuda:0", "NVIDIA H200", (9, 0), sm_count=132, l2_bytes=60 << 20)


def command(*arguments):
    """The exit code of `fp4bench providers ...`."""
    parser = argparse.ArgumentParser()
    providers.add_parser(parser.add_subparsers())
    asked = parser.parse_args(["providers", *arguments])
    return asked.run(asked)


class Picky:
    """Declares much and refuses some of it, for two reasons."""

    name = "picky"
    version = None
    ops = ("gemm", "quantize")
    modes = ("w4a16", "w4a4")
    rules = {"mxfp4": (ScaleRule.FLOOR, ScaleRule.EVEN), "nvfp4": (ScaleRule.TWO_LEVEL,)}

    def why_not(self, problem, device):
        if problem.hadamard:
            return "it does not rotate"
        return "it has no weights of 16 values a scale" if problem.op == "gemm" and problem.format.name == "nvfp4" else None


def test_each_reason_is_given_once_with_all_that_it_keeps_from_running():
    assert providers.describe(Picky(), CPU) == [
        "picky (not installed)",
        "  operations   gemm, quantize",
        "  modes        w4a16, w4a4",
        "  scale rules  mxfp4: floor, even",
        "               nvfp4: two_level",
        "  here         5 of 12 kinds of work; not",
        "    w4a16 nvfp4, w4a4 nvfp4: it has no weights of 16 values a scale",
        "    w4a4 mxfp4 had64, w4a4 nvfp4 had64, quantize mxfp4 floor had64, quantize mxfp4 even had64, "
        "quantize nvfp4 two_level had64: it does not rotate",
    ]


def test_the_device_decides():
    assert providers.describe(TorchProvider(), CPU)[-2:] == [
        "  here         3 of 4 kinds of work; not",
        "    fp8: Some CPU has no FP8 tensor cores (compute capability 8.9 or later)",
    ]
    assert providers.describe(TorchProvider(), H200)[-2:] == ["  scale rules  -", "  here         all of it"]


def test_a_provider_that_declares_nothing_can_nothing():
    class Idle(Picky):
        ops = ()

    assert providers.describe(Idle(), CPU)[-1] == "  here         nothing: it declares no work"


def test_what_this_version_does_not_know_is_listed():
    class Later(Picky):
        ops = ("moe", "quantize")
        rules = {"mxfp6": ("floor",)}

    described = providers.describe(Later(), CPU)
    assert "  operations   moe, quantize" in described
    assert "  scale rules  mxfp6: floor" in described


def test_every_provider_is_listed(monkeypatch, capsys):
    known = registry.providers()
    monkeypatch.setattr(registry, "providers", lambda: known | {"picky": Picky()})
    assert command("--device", "cpu") == 0
    out = capsys.readouterr().out
    assert out.startswith("on ")
    table, *blocks = out.split("\n\n")[1:]
    assert [block.split()[0] for block in blocks] == [*known, "picky"]
    assert [line.split()[0] for line in table.splitlines()] == ["provider", *known, "picky"]


def test_the_table_tells_what_runs_here():
    class Idle(Picky):
        name, ops = "idle", ()

    class Far(Picky):
        name, version = "far", "1.2 (sm_100f)"

        def why_not(self, problem, device):
            return "it needs a GPU" if problem.op == "gemm" else "it needs a driver"

    assert providers.table([TorchProvider(), Picky(), Far(), Idle()], H200) == [
        "provider  formats       modes            version" + " " * (len(TorchProvider.version) - 7) + "  here",
        f"torch     -             bf16, fp16, fp8  {TorchProvider.version}  yes",
        f"picky     mxfp4, nvfp4  w4a16, w4a4      {'-':<{len(TorchProvider.version)}}  partly",
        f"far       mxfp4, nvfp4  w4a16, w4a4      {'1.2':<{len(TorchProvider.version)}}  it needs a GPU",
        f"idle      mxfp4, nvfp4  w4a16, w4a4      {'-':<{len(TorchProvider.version)}}  it declares no work",
    ]


def test_a_device_that_is_unknown_is_refused():
    with pytest.raises(ValueError, match="unknown device 'tpu'"):
        command("--device", "tpu")
