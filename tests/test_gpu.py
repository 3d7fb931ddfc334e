"""On a GPU: the eager truth has the same bits as on the CPU, and every case is right and can be captured."""

from statistics import median

import contract
import pytest
import torch
from eager import EAGER
from project import TINY_MOE

from fp4bench.cases import gemm_cases, moe_cases, quantize_cases, select
from fp4bench.checking import check
from fp4bench.devices import find_device
from fp4bench.formats import FORMATS, layouts
from fp4bench.problems import W4A16, MoeProblem
from fp4bench.quantize import decode, quantize
from fp4bench.timing.clock import clock_for

pytestmark = pytest.mark.gpu

RULES = [(fmt, rule) for fmt in FORMATS.values() for rule in fmt.rules]


@pytest.mark.parametrize("hadamard", [None, 16, 128], ids="had{}".format)
@pytest.mark.parametrize(("fmt", "rule"), RULES, ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_quantize_has_the_bits_of_the_cpu(fmt, rule, hadamard, dtype):
    x = torch.randn(257, 2050, generator=torch.Generator().manual_seed(3)).to(dtype)
    here, there = (quantize(t, fmt, rule=rule, hadamard=hadamard) for t in (x, x.cuda()))
    assert torch.equal(here.codes, there.codes.cpu())
    assert torch.equal(here.scales.view(torch.uint8), there.scales.cpu().view(torch.uint8))
    assert torch.equal(decode(here), decode(there).cpu())


def test_the_contract_holds_on_the_gpu():
    contract.check_contract(EAGER, device="cuda")


def test_the_blocked_layout_has_the_bytes_of_the_cpu():
    scales = torch.randint(0, 256, (3, 130, 5), dtype=torch.uint8)
    assert torch.equal(layouts.to_blocked(scales), layouts.to_blocked(scales.cuda()).cpu())


def _cases():
    if not torch.cuda.is_available():
        return []
    selection = select({"models": ["llama3.2-1b"], "batch_sizes": ["1", "64", "1024"], "modes": ["all"]}, find_device())
    return [*gemm_cases(selection), *quantize_cases(selection)]


@pytest.mark.parametrize("case", _cases(), ids=str)
def test_every_case_is_right_and_runs_in_a_cuda_graph(case):
    if reason := case.why_not(find_device()):
        pytest.skip(reason)
    inputs = case.problem.inputs("cuda")
    call = case.provider.prepare(case.problem, inputs)
    check(case.problem, inputs, case.rule, call(), case.accumulation(find_device()))
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = call()
    for tensor in (out,) if isinstance(out, torch.Tensor) else (out.codes, out.scales.view(torch.uint8)):
        tensor.zero_()
    graph.replay()
    check(case.problem, inputs, case.rule, out, case.accumulation(find_device()))


def _moe_cases():
    """Those that a graph can hold: the eager provider waits for the choices."""
    if not torch.cuda.is_available():
        return []
    sizes = {"batch_sizes": ["1", "64"], "routing": ["uniform", "one_hot"], "modes": ["bf16", "fp8", "w4a16", "w4a8"]}
    selection = select({"models": [str(TINY_MOE)], **sizes}, find_device())
    return [case for case in moe_cases(selection) if case.provider.name != "eager"]


@pytest.mark.parametrize("case", _moe_cases(), ids=str)
def test_every_moe_case_runs_in_a_cuda_graph_that_follows_its_choices(case):
    if reason := case.why_not(find_device()):
        pytest.skip(reason)
    problem = case.problem
    inputs = problem.inputs("cuda")
    call = case.provider.prepare(problem, inputs)
    check(problem, inputs, case.rule, call(), case.accumulation(find_device()))
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = call()
    for number in (0, 3):
        inputs.topk_ids.copy_(problem.copy(inputs, number).topk_ids)
        out.fill_(torch.nan)
        graph.replay()
        check(problem, inputs, case.rule, out, case.accumulation(find_device()))


def test_choices_that_move_on_keep_experts_out_of_the_l2():
    # Two of eight experts of 11.7 MB: together they are warm in any L2 of a data center GPU.
    problem = MoeProblem("mixtral-8x7b", "experts", 8, 1, 4096, 1792, 8, 2, W4A16, FORMATS["mxfp4"])
    clocks = [clock_for(find_device(), warm=warm) for warm in (False, True)]
    inputs = problem.inputs("cuda")
    copies = [inputs, *(problem.copy(inputs, number) for number in range(1, clocks[0].copies(problem.bytes)))]
    calls = [_reading(problem, one) for one in copies]
    cold, warm = clocks[0].measure(calls, problem.bytes), clocks[1].measure(calls[:1], problem.bytes)
    assert (cold.l2, warm.l2) == ("cold", "warm")
    assert cold.copies == len(copies) > 4
    assert median(cold.seconds) > 1.1 * median(warm.seconds)


def _reading(problem, inputs):
    """What reads the bytes of the experts hit, and does nothing else."""
    layer = inputs.weights.keep("bytes", lambda: torch.ones(problem.experts, problem.expert_bytes // 4, device="cuda"))
    experts = [layer[expert] for expert in inputs.topk_ids.unique().tolist()]
    return lambda: [expert.sum() for expert in experts]
