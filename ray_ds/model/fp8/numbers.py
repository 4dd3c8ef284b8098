"""The FP8 type, how a tensor gets into it, and the product of two such tensors.

All is in E4M3, gradients too: E5M2 reaches further but is coarser (arXiv 2209.05433), and scales that follow the
numbers leave no need for reach (DeepSeek-V3, arXiv 2412.19437, section 3.3.2).
"""

import torch
from torch import Tensor

FINE = torch.float8_e4m3fn
ALIGNMENT = 16
"""Widths and rows must be a multiple: the kernels move 16 bytes at a time."""


def quantize(x: Tensor, dtype: torch.dtype, dims: tuple[int, ...] = ()) -> tuple[Tensor, Tensor]:
    """Return `x` in FP8 and the fp32 scale it has to be multiplied by: its largest number becomes the type's.

    Args:
        dims: over which the largest number is taken, and which the scale has no more; () = all, the scale is a scalar.
    """
    largest = torch.finfo(dtype).max
    scale = x.abs().amax(dim=dims, keepdim=True).float().clamp(min=1e-12) / largest
    x8 = (x.float() / scale).clamp(-largest, largest).to(dtype)
    return x8, scale.squeeze(dims or tuple(range(x.dim())))


def multiply(a: Tensor, b: Tensor, a_scale: Tensor, b_scale: Tensor, dtype: torch.dtype, *, is_rough: bool) -> Tensor:
    """Return `a @ b.T` in `dtype`; both lie row by row, as the tensor cores want them.

    Args:
        a, b: FP8, (N, D) and (O, D).
        a_scale, b_scale: fp32, both scalars, or of rows: (N, 1) and (1, O), with `dtype` bf16.
        is_rough: sum in the tensor cores' 14 bits, which is faster and enough for the way forth.
    """
    product: Tensor = torch._scaled_mm(
        a, b.T, scale_a=a_scale, scale_b=b_scale, out_dtype=dtype, use_fast_accum=is_rough
    )
    return product
