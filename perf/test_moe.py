"""The experts of every selected model that has some, by batch size, routing, mode, format and provider: checked, then timed.

Nothing is timed where no selected model has experts; README shows the list of vLLM's benchmark.
"""

import pytest


@pytest.mark.cases("moe")
def test_moe(case, bench):
    bench(case)
