"""What a run's machine is compared with."""

from types import SimpleNamespace

import pytest
from recorded import baseline

from fp4bench.plugin.conditions import incomparable_reasons


def canary(seconds):
    return {"name": "bf16", "at_s": 0.0, "seconds": seconds, "sm_mhz": None, "cycles": None}


@pytest.mark.parametrize(
    ("card", "seconds", "comparable"),
    [
        pytest.param("GPU-1", 1.04, True, id="as-this-card-was"),
        pytest.param("GPU-1", 1.06, False, id="not-as-this-card-was"),
        pytest.param("GPU-1", 1.20, False, id="as-another-card-was"),
        pytest.param("GPU-3", 1.28, True, id="an-unknown-card-within-twice-the-limit"),
        pytest.param("GPU-3", 1.33, False, id="an-unknown-card-beyond-it"),
    ],
)
def test_canaries_are_held_to_this_card_where_it_is_known(card, seconds, comparable):
    accepted = baseline({}, {}, {}, sessions=["GPU-1 2026-11-01", "GPU-2 2026-11-01", "GPU-2 2026-11-02"], card=card)
    for run, level in zip(accepted.runs, (1.0, 1.2, 1.2), strict=True):
        run.info["canaries"] = [canary(level)]
    reasons = incomparable_reasons(SimpleNamespace(canaries=lambda: [canary(seconds)]), accepted, on_gpu=True)
    assert len(reasons) == (not comparable)
