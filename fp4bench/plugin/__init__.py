"""The pytest plugin: options, the `bench` fixture over pytest-benchmark, stored runs by machine, verdicts as test reports.

Glue only. A project's conftest.py loads it (`pytest_plugins = ["fp4bench.plugin"]`) and its settings name `fp4bench_baselines`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest

from fp4bench.plugin.options import add_options

if TYPE_CHECKING:
    from fp4bench.cases import Case
    from fp4bench.plugin.suite import Suite


def pytest_addoption(parser: pytest.Parser) -> None:
    add_options(parser)


@pytest.hookimpl(tryfirst=True)
def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line(
        "markers", "cases(op): run the test once for each selected case of an operation: gemm, quantize, moe"
    )
    config.addinivalue_line("markers", "floor(share): the smallest slowdown of the test's cases that fails, such as 0.03")
    if not config.getini("fp4bench_baselines") or not config.pluginmanager.hasplugin("benchmark"):
        return
    from fp4bench.plugin.suite import Suite

    suite = Suite(config)
    config.stash[_SUITE] = suite
    config.pluginmanager.register(suite, "fp4bench-suite")
    try:
        suite.prepare_options()
    except ValueError as error:
        raise pytest.UsageError(f"fp4bench: {error}") from error


_SUITE = pytest.StashKey["Suite"]()


class Bench:
    """Checks a case's output against its reference, then times it: `bench(case)`."""

    def __init__(self, suite: Suite, benchmark: Any, item: pytest.Item) -> None:
        self._suite, self._benchmark, self._item = suite, benchmark, item

    def __call__(self, case: Case) -> None:
        """Prepare the case in a process of its own, compare its output with the reference, time it and store the record.

        A case that is wrong, hangs, or takes its process down fails, and stores no number. With --benchmark-disable nothing is
        timed.
        """
        self._suite.bench(case, self._benchmark, self._item)


@pytest.fixture
def bench(request: pytest.FixtureRequest, benchmark: Any) -> Bench:
    """Checks a case's output against its reference, then times it: `bench(case)`."""
    suite = request.config.stash.get(_SUITE, None)
    if suite is None:
        raise pytest.UsageError("the bench fixture needs `fp4bench_baselines = baselines` in the project's pytest settings")
    return Bench(suite, benchmark, request.node)
