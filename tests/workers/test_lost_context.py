"""A case that kills the GPU's context costs itself alone: the next is measured in a fresh process."""

import pytest
import torch

from fp4bench.cases import Case
from fp4bench.formats import ScaleRule
from fp4bench.problems import BF16, GemmProblem
from fp4bench.workers.measure import TimeCase
from fp4bench.workers.process import CaseFailed, Worker


class Provider:
    """cuBLAS, and before it, at m = 2, an index beyond its tensor: the device asserts, and its context is lost."""

    name, version, ops, modes = "lossy", "1", ("gemm",), ("bf16",)
    rules = {"mxfp4": (ScaleRule.FLOOR,)}

    def prepare(self, problem, inputs):
        def run():
            if problem.m == 2:
                inputs.w[torch.tensor([1 << 20], device=inputs.w.device)]
            return inputs.x @ inputs.w.T

        return run


def case(m):
    return Case(GemmProblem("none", "o", 1, m, 128, 256, BF16, None, None), Provider())


@pytest.mark.gpu
def test_the_next_case_gets_a_fresh_process():
    with Worker("fp4bench.workers.measure:Measurer", "cuda:0") as worker:
        first = worker.ask(TimeCase(case(1)), 60)
        with pytest.raises(CaseFailed) as failure:
            worker.ask(TimeCase(case(2)), 60)
        assert failure.value.fatal
        assert "device-side assert" in str(failure.value) + failure.value.traceback
        third = worker.ask(TimeCase(case(3)), 60)
        assert worker.starts == 2
    assert first.record["clock"] == third.record["clock"] == "cuda_graph_stamps"
