"""FP4 weights as Marlin reads them: codes in the order of its fragments, scales in the order of its columns.

MXFP4 scales stay E8M0 bytes. NVFP4 scales become S0E5M3, which has no room for a scale below 2**-6 of a tensor whose largest is
448: those blocks become zero, as in vLLM (https://github.com/vllm-project/vllm/pull/37502). The tensor's scale is a factor of
the result, in the decode sense, 1 / S.
"""

import torch

from fp4bench.providers import vllm_ops
from fp4bench.quantize import Quantized

REPACK = "gptq_marlin_repack"

FLOAT4_E2M1 = 562949953487106  # vLLM's ScalarType.id of it, the same since 0.10

# The kernel reads E2M1, whose bias is 1, as if it had that of the activations' dtype: values are so many binades too small.
_BIASES = {torch.bfloat16: 126, torch.float16: 14}

# Within 64 output columns, and then within 4, a thread's fragments want this order of scales.
_COLUMNS_64 = [i + 8 * j for i in range(8) for j in range(8)]
_COLUMNS_4 = [0, 2, 1, 3]
# And within 32 this order of a bias.
_COLUMNS_32 = [2 * i + j for i in range(4) for j in (0, 1, 8, 9, 16, 17, 24, 25)]


def fits(n: int, k: int) -> bool:
    """Whether Marlin has tiles for such weights."""
    return (n % 64 == 0 and k % 128 == 0) or (n % 128 == 0 and k % 64 == 0)


def processors(device: torch.device) -> int:
    """Streaming multiprocessors: Marlin's workspace has an int32 for each block that it runs on one."""
    return torch.cuda.get_device_properties(device).multi_processor_count


def marlin_scales(w: Quantized, dtype: torch.dtype = torch.bfloat16) -> tuple[torch.Tensor, torch.Tensor | None]:
    """The scales of (n, k) weights as Marlin reads them: (k / block, n) in its order, and NVFP4's float32 (1) factor.

    dtype: of the activations, bfloat16 or float16, in which the kernel decodes. Raises ValueError for NVFP4 scales that are
    negative or NaN, which S0E5M3 cannot say.
    """
    by_block = w.scales.view(torch.uint8).T.contiguous()  # (k / block, n)
    blocks, n = by_block.shape
    ordered = by_block.reshape(-1, 64)[:, _COLUMNS_64].reshape(-1, 4)[:, _COLUMNS_4].reshape(blocks, n).contiguous()
    if w.tensor_scale is None:
        return ordered.view(w.format.scale_dtype), None
    return _s0e5m3(ordered.view(w.format.scale_dtype), w.tensor_scale, dtype)


def marlin_bias(bias: torch.Tensor) -> torch.Tensor:
    """A bias (n) in Marlin's order, n a multiple of 32."""
    return bias.reshape(-1, 32)[:, _COLUMNS_32].reshape(-1).contiguous()


def repacked(w: Quantized, n: int, k: int) -> torch.Tensor:
    """Codes in the order of Marlin's fragments. uint8 (n, k / 2) -> int32 (k / 16, 2 n)."""
    repack = vllm_ops.MAIN.operator(REPACK)
    given = {"b_q_weight": w.codes.view(torch.int32).T.contiguous(), "size_k": k, "size_n": n, "num_bits": 4}
    no_order = torch.empty(0, dtype=torch.int32, device=w.codes.device)
    return repack(*vllm_ops.arguments(repack, given, {"perm": no_order, "is_a_8bit": False}))


def _s0e5m3(scales: torch.Tensor, encode_scale: torch.Tensor, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """E4M3 scales as the upper byte of a float16 shifted left by one, which drops its sign, and what the result is scaled by.

    2**7 times a scale of 448 still is a float16. Scales are first moved up by a power of two where all are small, but not for
    float16 activations (vLLM 0.26.0).
    """
    values = scales.half()
    if not (values >= 0).all():
        raise ValueError("Marlin takes no block scales that are negative or NaN")
    largest = values.float().max()
    moved = (largest > 0) & (dtype != torch.float16)
    shift = torch.where(moved, (448.0 / largest).log2().floor().exp2(), 1.0)
    values = (values.float() * shift).half() * 2.0**7
    values = torch.where(values < 2, 0, values)
    upper = (values.view(torch.int16) << 1).view(torch.uint8)[:, 1::2]  # little endian
    factor = (2.0 ** (_BIASES[dtype] - 7) / encode_scale / shift).reshape(1)
    return upper.contiguous().view(scales.dtype), factor
