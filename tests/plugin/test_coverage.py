"""Which cases of a baseline a selection asks for."""

import pytest
from project import TINY, TINY_MOE

from fp4bench.cases import CASES, select
from fp4bench.devices import find_device
from fp4bench.plugin.coverage import covers

CPU = find_device("cpu")
ALL = {
    "models": [str(TINY), "llama3.2-1b", str(TINY_MOE)],
    "tp_sizes": ["1", "2"],
    "routing": ["uniform", "zipf"],
    "per_act_token": ["all"],
    "batch_sizes": ["1", "64"],
    "had_sizes": ["none", "32"],
    "modes": ["all"],
}


@pytest.fixture(scope="module")
def records():
    """The facts of every case of a grid, by id."""
    selection = select(ALL, CPU)
    return {str(case): case.facts() for op in CASES for case in CASES[op](selection)}


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"models": ["llama3.2-1b"]},
        {"tp_sizes": ["2"]},
        {"batch_sizes": ["64"]},
        {"had_sizes": ["32"]},
        {"had_sizes": ["none"]},
        {"formats": ["nvfp4"]},
        {"modes": ["bf16"]},
        {"modes": ["w4a16", "w4a4"], "had_sizes": ["32"], "formats": ["mxfp4"]},
        {"limit_k": ["2048"], "models": ["llama3.2-1b"], "tp_sizes": ["1"]},
        {"models": [str(TINY_MOE)], "routing": ["zipf"]},
        {"models": [str(TINY_MOE)], "limit_num_groups": ["9"]},
        {"models": [str(TINY_MOE)], "limit_n": ["64"], "per_act_token": ["no"]},
        {"limit_n": ["128"], "models": [str(TINY)], "tp_sizes": ["1"]},
        {"limit_k": ["2048"], "limit_n": ["2048"], "models": ["llama3.2-1b"], "tp_sizes": ["1"]},
    ],
)
def test_a_selection_covers_exactly_the_cases_that_it_generates(records, options):
    selection = select(ALL | options, CPU)
    generated = {str(case) for op in CASES for case in CASES[op](selection)}
    covered = {case_id for case_id, record in records.items() if covers(selection, record)}
    assert covered == generated
    assert len(covered) == len(records) or options
