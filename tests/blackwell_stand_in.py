"""What Blackwell's libraries are called with, as shapes: operators that check them and return what the real ones do."""

import torch

from fp4bench.formats import layouts


def _operands(a, b, a_scales, b_scales, block):
    """Check codes (rows, k / 2) and their scales in tiles of 128 x 4. -> rows of both."""
    assert a.shape[1] == b.shape[1]
    for codes, scales in ((a, a_scales), (b, b_scales)):
        rows, columns = layouts.padded_shape(codes.shape[0], 2 * codes.shape[1] // block)
        assert scales.numel() == rows * columns, f"{scales.numel()} scales of {tuple(codes.shape)} codes, not {rows * columns}"
    return a.shape[0], b.shape[0]


def qutlass_product(block):
    def multiply(A, B, A_sf, B_sf, alpha):  # noqa: N803
        assert alpha.shape == (1,)
        return A.new_empty(_operands(A, B, A_sf, B_sf, block), dtype=torch.bfloat16)

    return multiply


def qutlass_quantizer(block):
    def quantize(A, R, OUT, OUT_sf, global_scale=None):  # noqa: N803
        rows, k = A.shape
        assert R.shape[0] == R.shape[1]
        assert k % R.shape[0] == 0
        assert OUT.shape == (rows, k // 2)
        assert OUT_sf.numel() >= rows * k // block
        assert (global_scale is None) == (block == 32)
        return OUT.clone(), OUT_sf.clone()

    return quantize


def cutlass_product(out, a, b, block_scale_a, block_scale_b, alpha):
    assert out.shape == _operands(a, b, block_scale_a, block_scale_b, 16)
    assert alpha.numel() == 1


def cutlass_quantizer(input, input_scale, is_sf_swizzled_layout, output, output_scale):
    rows, columns = layouts.padded_shape(input.shape[0], input.shape[1] // 16)
    assert is_sf_swizzled_layout
    assert output.shape == (input.shape[0], input.shape[1] // 2)
    assert output_scale.shape == (rows, columns // 4)  # four to an int32


BEHIND = {
    "matmul_mxf4_bf16_tn": qutlass_product(32),
    "matmul_nvf4_bf16_tn": qutlass_product(16),
    "fusedQuantizeMxAbsMax": qutlass_quantizer(32),
    "fusedQuantizeMxQuest": qutlass_quantizer(32),
    "fusedQuantizeNv": qutlass_quantizer(16),
    "cutlass_scaled_fp4_mm": cutlass_product,
    "scaled_fp4_quant.out": cutlass_quantizer,
}


class FlashInfer:
    """The part of the module that is called."""

    class SfLayout:
        layout_128x4 = 0

    @staticmethod
    def mm_fp4(a, b, a_descale, b_descale, alpha, out_dtype, block_size, use_8x4_sf_layout, backend, use_nvfp4):
        return a.new_empty(_operands(a, b.T, a_descale, b_descale.T, block_size), dtype=out_dtype)

    @staticmethod
    def shuffle_matrix_a(input_tensor, epilogue_tile_m):
        assert input_tensor.shape[0] % epilogue_tile_m == 0
        return input_tensor.clone()

    @staticmethod
    def shuffle_matrix_sf_a(input_tensor, epilogue_tile_m):
        assert input_tensor.shape[0] % epilogue_tile_m == 0
        rows, columns = layouts.padded_shape(*input_tensor.shape)
        return input_tensor.new_empty(rows * columns)

    @staticmethod
    def nvfp4_quantize(a, a_global_sf, sfLayout, do_shuffle):  # noqa: N803
        return FlashInfer._quantized(a, 16)

    @staticmethod
    def mxfp4_quantize(a, backend):
        return FlashInfer._quantized(a, 32)

    @staticmethod
    def _quantized(a, block):
        rows, k = a.shape
        scales = layouts.padded_shape(rows, k // block)
        return a.new_empty(rows, k // 2, dtype=torch.uint8), a.new_empty(scales, dtype=torch.uint8)
