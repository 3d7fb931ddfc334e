"""The experts of every selected model that has some, by batch size, routing, mode, format and provider: checked, then timed.

Nothing is timed where no selected model has experts. The reference benchmark's list, on a GPU:

    pytest perf/test_moe.py --models deepseek-r1 --formats nvfp4 --modes bf16 fp8 w4a16 w4a4 \\
        --batch-sizes 4 8 16 32 64 128 256 512 1024 2048
"""

import pytest


@pytest.mark.cases("moe")
def test_moe(case, bench):
    bench(case)
