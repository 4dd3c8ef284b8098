"""The two FP8 types, how a tensor gets into them, and the product of two such tensors.

E4M3 numbers are finer, E5M2 numbers reach further (arXiv 2209.05433).
"""

import torch
from torch import Tensor

FINE = torch.float8_e4m3fn
WIDE = torch.float8_e5m2
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
        a_scale, b_scale: fp32 scalars.
        is_rough: sum in the tensor cores' 14 bits, which is faster and enough for the way forth.
    """
    product: Tensor = torch._scaled_mm(
        a, b.T, scale_a=a_scale, scale_b=b_scale, out_dtype=dtype, use_fast_accum=is_rough
    )
    return product
