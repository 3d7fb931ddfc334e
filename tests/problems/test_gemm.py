"""Ids, flops, bytes and inputs of problems; the expected numbers are multiplied out by hand."""

import pickle
import re
from dataclasses import FrozenInstanceError, astuple, replace
from itertools import combinations, product

import pytest
import torch

from fp4bench.formats import FORMATS, MXFP4, NVFP4, ScaleRule
from fp4bench.models import get_model, layers, model_names
from fp4bench.problems import (
    BATCH_SIZES,
    BF16,
    FP8,
    FP16,
    MODES,
    W4A4,
    W4A4_NOQUANT,
    W4A8,
    W4A16,
    W4A16_FP16,
    GemmProblem,
    QuantizeProblem,
    fp4_bytes,
)

QKV = GemmProblem("llama3.3-70b", "qkv", tp=1, m=1024, n=10240, k=8192, mode=BF16)
QUANTIZE = QuantizeProblem("llama3.3-70b", "down", tp=8, m=16, k=3584, format=NVFP4, rule=ScaleRule.TWO_LEVEL)


CASE_IDS = [
    (replace(QKV, mode=W4A4, format=MXFP4, hadamard=64), "triton", "gemm-mxfp4-w4a4-had64-triton-llama3.3-70b.qkv.tp1-m1024"),
    (QKV, "torch", "gemm-bf16-torch-llama3.3-70b.qkv.tp1-m1024"),
    (replace(QKV, mode=FP16), "torch", "gemm-fp16-torch-llama3.3-70b.qkv.tp1-m1024"),
    (replace(QKV, mode=FP8), "torch", "gemm-fp8-torch-llama3.3-70b.qkv.tp1-m1024"),
    (
        replace(QKV, mode=W4A4_NOQUANT, format=NVFP4, tp=8, m=1),
        "vllm_marlin",
        "gemm-nvfp4-w4a4_noquant-vllm_marlin-llama3.3-70b.qkv.tp8-m1",
    ),
    (QUANTIZE, "eager", "quantize-nvfp4-two_level-eager-llama3.3-70b.down.tp8-m16"),
    (
        replace(QUANTIZE, format=MXFP4, rule=ScaleRule.QUTLASS_ABS_MAX, hadamard=128),
        "qutlass",
        "quantize-mxfp4-qutlass_abs_max-had128-qutlass-llama3.3-70b.down.tp8-m16",
    ),
]


@pytest.mark.parametrize(("problem", "provider", "case_id"), CASE_IDS, ids=[case_id for _, _, case_id in CASE_IDS])
def test_case_id(problem, provider, case_id):
    assert problem.case_id(provider) == case_id
    assert str(problem) == problem.case_id() == case_id.replace(f"-{provider}-", "-")


def test_modes_are_known_by_name():
    assert {name: str(mode) for name, mode in MODES.items()} == {name: name for name in MODES}
    assert set(MODES) == {"bf16", "fp16", "fp8", "w4a16", "w4a16_fp16", "w4a8", "w4a4", "w4a4_noquant"}


def test_case_ids_are_unique():
    problems = []
    for name, tp in product(model_names(), (1, 2, 4)):
        for layer in layers(get_model(name), tp):
            for m, mode in product(BATCH_SIZES, MODES.values()):
                formats = (MXFP4, NVFP4) if mode.weights == "fp4" else (None,)
                rotations = (None, 32, 64, 128) if mode.activations == "fp4" else (None,)
                problems += [
                    GemmProblem(name, layer.name, tp, m, layer.n, layer.k, mode, fmt, had)
                    for fmt, had in product(formats, rotations)
                ]
            for m, fmt, had in product(BATCH_SIZES, (MXFP4, NVFP4), (None, 64)):
                problems += [QuantizeProblem(name, layer.name, tp, m, layer.k, fmt, rule, had) for rule in fmt.rules]
    ids = [problem.case_id(provider) for problem in problems for provider in ("", "triton", "vllm_marlin")]
    assert len(ids) > 100_000
    assert len(set(ids)) == len(ids)


def test_flops_are_two_a_product():
    assert replace(QKV, m=1).flops == 2 * 10240 * 8192 == 167_772_160
    assert QKV.flops == 171_798_691_840
    assert replace(QKV, mode=W4A4, format=MXFP4, hadamard=64).flops == QKV.flops
    assert QUANTIZE.flops == 0


# m = 16, n = 10240, k = 8192. Operands: w bf16 167,772,160; mxfp4 10240 * (4096 + 256); nvfp4 10240 * (4096 + 512) + 4;
# fp8 10240 * (8192 + 4). x bf16 262,144; mxfp4 16 * 4352; nvfp4 16 * 4608 + 4; fp8 16 * 8196. y 327,680.
@pytest.mark.parametrize(
    ("mode", "fmt", "expected"),
    [
        (BF16, None, 167_772_160 + 262_144 + 327_680),
        (FP16, None, 167_772_160 + 262_144 + 327_680),
        (FP8, None, 83_927_040 + 131_136 + 327_680),
        (W4A16, MXFP4, 44_564_480 + 262_144 + 327_680),
        (W4A16, NVFP4, 47_185_924 + 262_144 + 327_680),
        (W4A16_FP16, NVFP4, 47_185_924 + 262_144 + 327_680),
        (W4A8, MXFP4, 44_564_480 + 262_144 + 327_680),
        (W4A8, NVFP4, 47_185_924 + 262_144 + 327_680),
        (W4A4, MXFP4, 44_564_480 + 262_144 + 327_680),
        (W4A4, NVFP4, 47_185_924 + 262_144 + 327_680),
        (W4A4_NOQUANT, MXFP4, 44_564_480 + 69_632 + 327_680),
        (W4A4_NOQUANT, NVFP4, 47_185_924 + 73_732 + 327_680),
    ],
    ids=str,
)
def test_bytes_are_every_operand_once(mode, fmt, expected):
    assert replace(QKV, m=16, mode=mode, format=fmt).bytes == expected


@pytest.mark.parametrize(
    ("mode", "fmt", "expected"),
    [
        # m = 2, n = 3, k = 33: 17 bytes of codes a row, 2 or 3 scales; y 12.
        (BF16, None, 198 + 132 + 12),
        (FP8, None, 3 * 37 + 2 * 37 + 12),
        (W4A16, MXFP4, 3 * 19 + 132 + 12),
        (W4A16, NVFP4, 3 * 20 + 4 + 132 + 12),
        (W4A4_NOQUANT, MXFP4, 3 * 19 + 2 * 19 + 12),
        (W4A4_NOQUANT, NVFP4, 3 * 20 + 4 + 2 * 20 + 4 + 12),
    ],
    ids=str,
)
def test_a_k_that_is_no_multiple_of_the_block_counts_the_started_block(mode, fmt, expected):
    assert GemmProblem("tiny", "fc", 1, m=2, n=3, k=33, mode=mode, format=fmt).bytes == expected


def test_fp4_weights_are_smaller_than_bf16_by_the_format():
    bf16 = 2 * 10240 * 8192
    assert bf16 / fp4_bytes(10240, 8192, MXFP4) == pytest.approx(16 / 4.25) == pytest.approx(3.7647, abs=1e-4)
    assert bf16 / fp4_bytes(10240, 8192, NVFP4) == pytest.approx(16 / 4.5) == pytest.approx(3.5556, abs=1e-4)
    assert fp4_bytes(1, 32, MXFP4) == 16 + 1
    assert fp4_bytes(1, 32, NVFP4) == 16 + 2 + 4


def test_quantize_reads_bf16_and_writes_fp4():
    assert QUANTIZE.bytes == 2 * 16 * 3584 + 16 * (1792 + 224) + 4
    assert replace(QUANTIZE, format=MXFP4, rule=ScaleRule.CEIL).bytes == 2 * 16 * 3584 + 16 * (1792 + 112)


def test_inputs_are_bfloat16_of_the_problem_shape():
    inputs = GemmProblem("tiny", "fc", 1, m=5, n=7, k=33, mode=BF16).inputs()
    assert (inputs.x.shape, inputs.x.dtype) == ((5, 33), torch.bfloat16)
    assert (inputs.w.shape, inputs.w.dtype) == ((7, 33), torch.bfloat16)
    x = replace(QUANTIZE, m=3, k=48).inputs()
    assert (x.shape, x.dtype) == ((3, 48), torch.bfloat16)


def test_inputs_follow_from_the_seed_alone():
    problem = GemmProblem("tiny", "fc", 1, m=32, n=32, k=64, mode=BF16)
    first, again, other = problem.inputs(seed=3), problem.inputs(seed=3), problem.inputs(seed=4)
    assert torch.equal(first.x, again.x)
    assert torch.equal(first.w, again.w)
    for a, b in ((first.x, other.x), (first.w, other.w), (first.x, first.w)):
        assert (a == b).double().mean() < 0.05
    quantized = replace(QUANTIZE, m=8, k=64)
    assert torch.equal(quantized.inputs(seed=1), quantized.inputs(seed=1))
    assert not torch.equal(quantized.inputs(seed=1), quantized.inputs(seed=2))


def test_no_tensor_of_one_seed_is_that_of_another():
    # 4096 weights of k = 64: the factor 1/8 is exact, so that equal draws would be equal here.
    problem = GemmProblem("tiny", "fc", 1, m=64, n=64, k=64, mode=BF16)
    drawn = [tensor for seed in range(4) for x, w in [astuple(problem.inputs(seed=seed))] for tensor in (x, w * 8)]
    for a, b in combinations(drawn, 2):
        assert (a == b).double().mean() < 0.05


@pytest.mark.parametrize("seed", range(5))
def test_inputs_are_never_zeros(seed):
    inputs = GemmProblem("tiny", "fc", 1, m=512, n=512, k=64, mode=BF16).inputs(seed=seed)
    for tensor in (inputs.x, inputs.w):
        assert tensor.abs().amax(dim=1).min() > 0
        assert (tensor == 0).double().mean() < 0.01


@pytest.mark.parametrize("k", [256, 4096])
def test_weights_are_scaled_so_that_outputs_stay_near_one(k):
    inputs = GemmProblem("tiny", "fc", 1, m=128, n=128, k=k, mode=BF16).inputs()
    assert inputs.x.double().std().item() == pytest.approx(1, rel=0.05)
    assert inputs.w.double().std().item() == pytest.approx(k**-0.5, rel=0.05)
    assert (inputs.x.double() @ inputs.w.double().T).std().item() == pytest.approx(1, rel=0.05)


@pytest.mark.parametrize("problem", [QKV, QUANTIZE], ids=["gemm", "quantize"])
def test_problems_are_frozen_values(problem):
    with pytest.raises(FrozenInstanceError):
        problem.m = 2
    assert {problem: 1}[replace(problem)] == 1
    assert replace(problem, m=2) != problem


@pytest.mark.parametrize("shape", [{"m": 0}, {"n": 0}, {"k": 0}, {"m": -1}, {"n": -8, "k": -8}], ids=str)
def test_a_gemm_of_nothing_is_refused(shape):
    m, n, k = (shape.get(axis, 16) for axis in ("m", "n", "k"))
    message = f"gemm-bf16-tiny.fc.tp1-m{m} has m = {m}, n = {n}, k = {k}: each must be at least 1"
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        GemmProblem("tiny", "fc", 1, m, n, k, BF16)
    with pytest.raises(ValueError, match="each must be at least 1"):
        replace(QKV, **shape)


@pytest.mark.parametrize(("mode", "fmt"), list(product(MODES.values(), (None, MXFP4, NVFP4))), ids=str)
def test_a_gemm_has_an_fp4_format_where_its_weights_are_fp4(mode, fmt):
    if (mode in (BF16, FP16, FP8)) == (fmt is None):
        assert replace(QKV, mode=mode, format=fmt).format is fmt
        return
    reason = "needs an FP4 format" if fmt is None else "has no FP4 format"
    with pytest.raises(ValueError, match=rf"^gemm-.*llama3\.3-70b\.qkv\.tp1-m1024: mode {mode} {reason}$"):
        replace(QKV, mode=mode, format=fmt)


@pytest.mark.parametrize("mode", MODES.values(), ids=str)
def test_a_gemm_is_rotated_only_where_activations_are_fp4(mode):
    fmt = MXFP4 if mode.weights == "fp4" else None
    if mode in (W4A4, W4A4_NOQUANT):
        assert replace(QKV, mode=mode, format=fmt, hadamard=64).hadamard == 64
        return
    with pytest.raises(ValueError, match=f"-had64-.*: mode {mode} has no rotation, which needs FP4 weights and activations$"):
        replace(QKV, mode=mode, format=fmt, hadamard=64)


def test_modes_and_formats_are_the_same_objects_in_every_process():
    for value in (*MODES.values(), *FORMATS.values()):
        assert pickle.loads(pickle.dumps(value)) is value
    other = replace(MODES["w4a8"], name="w4a9")
    assert pickle.loads(pickle.dumps(other)) == other
