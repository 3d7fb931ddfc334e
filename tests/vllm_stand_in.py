"""Stand-ins for vLLM's operators: schemas as the real libraries register them, with what a test puts behind them.

The schemas were read off the wheels on PyPI, those of BEFORE_0_12 off vLLM's csrc/torch_bindings.cpp of that time.
"""

from contextlib import ExitStack, contextmanager

import torch
from cuda_library import SASS, container, image

from fp4bench.providers import vllm_ops

_MARLIN_END = "SymInt size_m, SymInt size_n, SymInt size_k, "

MARLIN = {
    "0.11": (
        "gptq_marlin_gemm(Tensor a, Tensor? c_or_none, Tensor b_q_weight, Tensor? b_bias_or_none, Tensor b_scales, "
        "Tensor? global_scale, Tensor? b_zeros_or_none, Tensor? g_idx_or_none, Tensor? perm_or_none, Tensor workspace, "
        f"int b_q_type, {_MARLIN_END}bool is_k_full, bool use_atomic_add, bool use_fp32_reduce, bool is_zp_float) -> Tensor",
        "gptq_marlin_repack(Tensor b_q_weight, Tensor perm, SymInt size_k, SymInt size_n, int num_bits) -> Tensor",
    ),
    "0.26.0": (  # and 0.20.0
        "marlin_gemm(Tensor a, Tensor? c_or_none, Tensor b_q_weight, Tensor? b_bias_or_none,Tensor b_scales, Tensor? a_scales, "
        "Tensor? global_scale, Tensor? b_zeros_or_none, Tensor? g_idx_or_none, Tensor? perm_or_none, Tensor workspace, "
        f"int b_type_id, {_MARLIN_END}bool is_k_full, bool use_atomic_add, bool use_fp32_reduce, bool is_zp_float) -> Tensor",
        "gptq_marlin_repack(Tensor b_q_weight, Tensor perm, SymInt size_k, SymInt size_n, int num_bits, "
        "bool is_a_8bit) -> Tensor",
    ),
    "0.33.0": (
        "marlin_gemm(Tensor a, Tensor? c_or_none, Tensor b_q_weight, Tensor? b_bias_or_none,Tensor b_scales, Tensor? a_scales, "
        "Tensor? global_scale, Tensor? b_zeros_or_none, Tensor workspace, int b_type_id, "
        f"{_MARLIN_END}bool use_atomic_add, bool use_fp32_reduce, bool is_zp_float) -> Tensor",
        "gptq_marlin_repack(Tensor b_q_weight, SymInt size_k, SymInt size_n, int num_bits, bool is_a_8bit) -> Tensor",
    ),
}

CUTLASS = (  # 0.20.0 to 0.33.0
    "cutlass_scaled_fp4_mm(Tensor! out, Tensor a, Tensor b, Tensor block_scale_a, Tensor block_scale_b, Tensor alpha) -> ()",
    "scaled_fp4_quant(Tensor input, Tensor input_scale, bool is_sf_swizzled_layout) -> (Tensor, Tensor)",
    "scaled_fp4_quant.out(Tensor input, Tensor input_scale, bool is_sf_swizzled_layout, *, "
    "Tensor(a!) output, Tensor(b!) output_scale) -> ()",
    "cutlass_scaled_mm_supports_fp4(int cuda_device_capability) -> bool",
)

_QUTLASS = (
    "matmul_mxf4_bf16_tn(Tensor A, Tensor B, Tensor A_sf, Tensor B_sf, Tensor alpha) -> Tensor",
    "matmul_nvf4_bf16_tn(Tensor A, Tensor B, Tensor A_sf, Tensor B_sf, Tensor alpha) -> Tensor",
    "fusedQuantizeMxQuest(Tensor A, Tensor R, Tensor OUT, Tensor OUT_sf) -> (Tensor, Tensor)",
    "fusedQuantizeMxAbsMax(Tensor A, Tensor R, Tensor OUT, Tensor OUT_sf) -> (Tensor, Tensor)",
)
QUTLASS = {
    "0.26.0": (
        *_QUTLASS,
        "fusedQuantizeNv(Tensor A, Tensor R, Tensor OUT, Tensor OUT_sf, Tensor global_scale) -> (Tensor, Tensor)",
    ),
    "0.33.0": (
        *_QUTLASS,
        *(
            f"fusedQuantizeNv{method}(Tensor A, Tensor R, Tensor OUT, Tensor OUT_sf, Tensor global_scale) -> (Tensor, Tensor)"
            for method in ("Quest", "AbsMax")
        ),
    ),
}

# Steps around the products of MoE layers, in `_C`; and what `_moe_C` has (0.26.0).
MOE_STEPS = (
    "silu_and_mul(Tensor! result, Tensor input) -> ()",
    "silu_and_mul_with_clamp(Tensor! result, Tensor input, float limit, float alpha=1.0, float beta=0.0) -> ()",
    "dynamic_scaled_fp8_quant(Tensor! result, Tensor input, Tensor! scale) -> ()",
    "dynamic_per_token_scaled_fp8_quant(Tensor! result, Tensor input, Tensor! scale, Tensor? scale_ub) -> ()",
    "per_token_group_fp8_quant(Tensor input, Tensor! output_q, Tensor! output_s, int group_size, float eps, float fp8_min, "
    "float fp8_max, bool scale_ue8m0, bool dummy_is_scale_transposed, bool dummy_is_tma_aligned) -> ()",
)
MOE = (
    "moe_align_block_size(Tensor topk_ids, int num_experts, int block_size, Tensor! sorted_token_ids, Tensor! experts_ids, "
    "Tensor! num_tokens_post_pad, Tensor? maybe_expert_map) -> ()",
    "moe_sum(Tensor input, Tensor! output, Tensor? topk_ids=None, Tensor? expert_map=None) -> ()",
    "moe_wna16_marlin_gemm(Tensor! a, Tensor? c_or_none, Tensor! b_q_weight, Tensor? b_bias_or_none, Tensor! b_scales, "
    "Tensor? a_scales, Tensor? global_scale, Tensor? b_zeros_or_none, Tensor? g_idx_or_none, Tensor? perm_or_none, "
    "Tensor! workspace, Tensor sorted_token_ids, Tensor! expert_ids, Tensor! num_tokens_past_padded, Tensor! topk_weights, "
    "int moe_block_size, int top_k, bool mul_topk_weights, int b_type_id, int size_m, int size_n, int size_k, "
    "bool is_full_k, bool use_atomic_add, bool use_fp32_reduce, bool is_zp_float, int thread_k, int thread_n, "
    "int blocks_per_sm) -> Tensor",
    "shuffle_rows(Tensor input_tensor, Tensor dst2src_map, Tensor! output_tensor) -> ()",
)
CUTLASS_MOE = (  # 0.20.0 to 0.33.0, but the last, which 0.20.0 has not
    "get_cutlass_moe_mm_data(Tensor topk_ids, Tensor! expert_offsets, Tensor! problem_sizes1, Tensor! problem_sizes2, "
    "Tensor! input_permutation, Tensor! output_permutation, int num_experts, int n, int k, Tensor? blockscale_offsets, "
    "bool is_gated) -> ()",
    "cutlass_fp4_group_mm(Tensor! out, Tensor a, Tensor b, Tensor a_blockscale, Tensor b_blockscales, Tensor alphas, "
    "Tensor problem_sizes, Tensor expert_offsets, Tensor sf_offsets) -> ()",
    *(
        f"{name}(Tensor! output, Tensor! output_scale, Tensor input, Tensor input_global_scale, "
        "Tensor input_offset_by_experts, Tensor output_scale_offset_by_experts) -> ()"
        for name in ("scaled_fp4_experts_quant", "silu_and_mul_scaled_fp4_experts_quant")
    ),
    "cutlass_mxfp4_group_mm(Tensor! out, Tensor a, Tensor b, Tensor a_blockscale, Tensor b_blockscales, "
    "Tensor problem_sizes, Tensor expert_offsets, Tensor sf_offsets) -> ()",
    *(
        f"{name}(Tensor! output, Tensor! output_scale, Tensor input, Tensor input_offset_by_experts, "
        "Tensor output_scale_offset_by_experts, int n_experts) -> ()"
        for name in ("mxfp4_experts_quant", "silu_and_mul_mxfp4_experts_quant")
    ),
    "mxfp4_experts_quant_supported(int cuda_device_capability) -> bool",
)

_count = 0


@contextmanager
def operators(schemas, behind, family, monkeypatch, tmp_path, targets=((SASS, 90),), version="0.26.0", key="CPU"):
    """Registers `schemas` and has `vllm_ops.<family>` find them; yields the folder of its library.

    behind: by operator, a function of its arguments by name. key: "CPU", or "Meta" for functions of shapes alone.
    """
    global _count
    _count += 1
    folder = tmp_path / f"vllm{_count}"
    folder.mkdir()
    real = getattr(vllm_ops, family)
    (folder / real.files[-1]).write_bytes(container(*(image(*target) for target in targets)))
    (folder / "_version.py").write_text(f"__version__ = version = {version!r}\n", encoding="utf-8")
    monkeypatch.setenv(vllm_ops.VARIABLE, str(folder))
    monkeypatch.setattr(vllm_ops, "_load", lambda paths: None)
    stand_in = vllm_ops.Operators(f"fp4bench_stand_in_{_count}", real.files)
    monkeypatch.setattr(vllm_ops, family, stand_in)
    with ExitStack() as stack:
        library = stack.enter_context(torch.library._scoped_library(stand_in.namespace, "DEF"))
        for schema in schemas:
            library.define(schema)
            name = schema.partition("(")[0]
            overload = getattr(getattr(torch.ops, stand_in.namespace), name.partition(".")[0])
            if name in behind:
                schema_of = getattr(overload, name.partition(".")[2] or "default")._schema
                takes_tensors = any("Tensor" in str(argument.type) for argument in schema_of.arguments)
                library.impl(name, by_name(schema_of, behind[name]), key if takes_tensors else "CompositeExplicitAutograd")
        yield folder


def by_name(schema, function):
    """`function`, called by position, with its arguments by the names of `schema`."""
    names = [argument.name for argument in schema.arguments]
    return lambda *arguments, **rest: function(**dict(zip(names, arguments, strict=False)), **rest)


def parsed(schema):
    """A schema as torch has it, of the text that a library registers."""
    return torch._C.parse_schema(schema.replace("Tensor!", "Tensor(z!)"))


def same(one, other):
    """Whether two schemas take and return the same, by the same names."""

    def form(schema):
        return [(a.name, str(a.type), a.kwarg_only) for a in schema.arguments], [str(r.type) for r in schema.returns]

    return form(one) == form(other)
