"""What vLLM's operators of MoE layers do, in plain torch, and a file `fused_moe.py` that imports as vLLM's does."""

import torch

from fp4bench.quantize import quantize_fp8_rows, quantize_fp8_tiles

CALLS: list[str] = []  # of steps, in their order


def align(topk_ids, num_experts, block_size, sorted_token_ids, experts_ids, num_tokens_post_pad, maybe_expert_map=None):
    CALLS.append("align")
    assert maybe_expert_map is None
    assert topk_ids.dtype == sorted_token_ids.dtype == experts_ids.dtype == num_tokens_post_pad.dtype == torch.int32
    pairs = topk_ids.numel()
    sorted_token_ids.fill_(pairs)
    experts_ids.fill_(-12345)  # never to be read
    at = 0
    for expert in range(num_experts):
        mine = (topk_ids.flatten() == expert).nonzero()[:, 0].int()
        sorted_token_ids[at : at + len(mine)] = mine
        whole = -(-len(mine) // block_size)
        experts_ids[at // block_size :][:whole] = expert
        at += whole * block_size
    num_tokens_post_pad.fill_(at)


def add_up(input, output, topk_ids=None, expert_map=None):
    CALLS.append("sum")
    assert topk_ids is None
    assert expert_map is None
    output.copy_(input.float().sum(dim=1))


def silu_and_mul(result, input):
    CALLS.append("silu")
    gate, up = input.double().chunk(2, dim=-1)
    result.copy_(gate * torch.sigmoid(gate) * up)


def silu_and_mul_with_clamp(result, input, limit, alpha=1.0, beta=0.0):
    CALLS.append("clamp")
    gate, up = input.double().chunk(2, dim=-1)
    gate, up = gate.clamp(max=limit), up.clamp(-limit, limit)
    result.copy_(gate * torch.sigmoid(alpha * gate) * (up + beta))


def quantize_tensor(result, input, scale):
    q = quantize_fp8_tiles(input, None, None)
    result.copy_(q.values), scale.copy_(q.scales.view(1))


def quantize_rows(result, input, scale, scale_ub=None):
    assert scale_ub is None
    q = quantize_fp8_rows(input)
    result.copy_(q.values), scale.copy_(q.scales)


def quantize_blocks(input, output_q, output_s, group_size, eps, fp8_min, fp8_max, scale_ue8m0, **dummies):
    assert (fp8_min, fp8_max, scale_ue8m0, eps, any(dummies.values())) == (-448, 448, False, 1e-10, False)
    q = quantize_fp8_tiles(input, 1, group_size)
    output_q.copy_(q.values), output_s.copy_(q.scales)


STEPS = {
    "silu_and_mul": silu_and_mul,
    "silu_and_mul_with_clamp": silu_and_mul_with_clamp,
    "dynamic_scaled_fp8_quant": quantize_tensor,
    "dynamic_per_token_scaled_fp8_quant": quantize_rows,
    "per_token_group_fp8_quant": quantize_blocks,
    "moe_align_block_size": align,
    "moe_sum": add_up,
}


def tile_products(x, weights, out, pairs, experts, rows, height, topk, topk_weights, weighted, bias):
    """out[pair] = x[pair // topk] @ weights(expert of its tile).T, tile by tile, as the kernels go."""
    flat = out.view(-1, out.shape[-1])
    flat.fill_(float("nan"))
    for tile in range(rows // height):
        mine = pairs[tile * height : (tile + 1) * height].long()
        mine = mine[mine < len(flat)]
        if len(mine):
            expert = int(experts[tile])
            y = x(mine // topk).double() @ weights(expert).double().T
            y = y if bias is None else y + bias(expert).double()
            flat[mine] = ((topk_weights.flatten()[mine, None].double() if weighted else 1) * y).to(flat.dtype)


FUSED_MOE = '''
"""A stand-in."""
import functools, json, os
from typing import Any
import torch
import vllm.envs as envs
import vllm.model_executor.layers.fused_moe.modular_kernel as mk
from vllm import _custom_ops as ops
from vllm.logger import init_logger
from vllm.model_executor.layers.fused_moe.activation import MoEActivation, apply_moe_activation
from vllm.model_executor.layers.fused_moe.config import FUSED_MOE_UNQUANTIZED_CONFIG, FusedMoEQuantConfig
from vllm.model_executor.layers.fused_moe.utils import enable_swap_ab
from vllm.platforms import current_platform
from vllm.triton_utils import tl, triton
from vllm.utils.platform_utils import get_device_name_as_file_name
from vllm.utils.torch_utils import direct_register_custom_op

logger = init_logger(__name__)

@triton.jit
def kernel(a, BLOCK: tl.constexpr):
    tl.store(a, BLOCK)

class Experts(mk.FusedMoEExpertsModular):
    pass

def old(activation: MoEActivation = MoEActivation.SILU, config: FusedMoEQuantConfig | None = None):
    return mk.FusedMoEExpertsModular(config)

direct_register_custom_op(op_name="old", op_func=old)

def get_moe_configs(E, N, dtype, block_n=None, block_k=None):
    logger.warning_once("none for %s", get_device_name_as_file_name)
    return TUNED

TUNED = None

def get_default_config(M, E, N, K, topk, dtype, block_shape=None):
    assert not envs.VLLM_BATCH_INVARIANT and not current_platform.is_rocm()
    return {"BLOCK_SIZE_M": 16, "of": (M, E, N, K, topk, dtype, block_shape)}

SEEN = []

def invoke_fused_moe_triton_kernel(A, B, C, A_scale, B_scale, topk_weights, sorted_token_ids, expert_ids,
        num_tokens_post_padded, mul_routed_weight, top_k, config, compute_type, use_fp8_w8a8, use_int8_w8a8,
        use_int8_w8a16, use_int4_w4a16, per_channel_quant, block_shape=None, B_bias=None):
    from vllm_moe_stand_in import tile_products
    assert use_fp8_w8a8 and not (use_int8_w8a8 or use_int8_w8a16 or use_int4_w4a16) and compute_type is tl.bfloat16
    SEEN.append((config, sorted_token_ids is None))
    height = config["BLOCK_SIZE_M"]
    if sorted_token_ids is None:
        pairs = torch.full((len(expert_ids), height), C.shape[0] * C.shape[1])
        pairs[:, 0] = torch.arange(len(expert_ids))
        sorted_token_ids = pairs.flatten()
    def x(rows):
        a = A[rows].float()
        if block_shape:
            return a * A_scale[rows].repeat_interleave(block_shape[1], dim=1)
        return a * (A_scale[rows] if per_channel_quant else A_scale)
    def w(expert):
        b = B[expert].float()
        if block_shape:
            s = B_scale[expert].repeat_interleave(block_shape[0], dim=0).repeat_interleave(block_shape[1], dim=1)
            return b * s
        return b * (B_scale[expert][:, None] if per_channel_quant else B_scale[expert])
    bias = None if B_bias is None else B_bias.__getitem__
    tile_products(x, w, C, sorted_token_ids, expert_ids, int(num_tokens_post_padded), height, top_k, topk_weights,
                  mul_routed_weight, bias)
'''
