"""perf/test_moe.py in a real pytest session, on a tiny model's experts."""

import pytest
from project import TINY_MOE, Project

from fp4bench.models import get_model

MODEL = get_model(str(TINY_MOE))


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    return Project.create(tmp_path_factory.mktemp("moe") / "project")


def test_experts_are_checked_timed_and_stored(project):
    arguments = ("--device=cpu", f"--models={TINY_MOE}", "--batch-sizes=4", "--modes=bf16,w4a8", "--formats=mxfp4")
    options = ("--providers=torch,eager", "--routing=uniform,one_hot", "--limit-num-groups=8", "-k", "test_moe", "--nvtx")
    result = project.run(*arguments, *options)
    assert result.ret == 0, result.text
    assert "4 passed" in result.text
    records = {bench["extra_info"]["case_id"]: bench["extra_info"] for bench in project.stored("0001_run")["benchmarks"]}
    at = f"{MODEL}.experts.tp1-m4"
    assert set(records) == {
        f"moe-{what}-{at}{routing}" for what in ("bf16-torch", "mxfp4-w4a8-eager") for routing in ("", "-one_hot")
    }
    eager, bf16 = records[f"moe-mxfp4-w4a8-eager-{at}-one_hot"], records[f"moe-bf16-torch-{at}-one_hot"]
    assert (eager["experts"], eager["topk"], eager["most_tokens"], eager["routing"]) == (8, 2, 4, "one_hot")
    assert 2 <= eager["experts_hit"] <= 5
    assert 0 < eager["error"] < 0.01
    assert eager["speedup_vs_bf16"] > 0
    assert bf16["speedup_vs_bf16"] == pytest.approx(1)
