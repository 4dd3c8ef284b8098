"""The INT8 scheme: symmetric, one scale an output channel for weights, one a token for activations.

`y[m, n] = (sum_k x_q[m, k] * w_q[n, k]) * weight_scale[n] * token_scale[m]`. The sum is over integers and exact; it is
rounded once, to fp32, and the two factors are multiplied in this order. So a token's result depends neither on the
other tokens of its batch nor on the order in which a kernel adds, and every kernel of `kernels.py` gives the same bits.
"""

import torch
from torch import Tensor

INT8_MAX = 127
"""Largest magnitude used; -128 is left out, so that the range is symmetric."""
MAX_IN_FEATURES = 65_536
"""Inputs a layer may have: below it no sum of u8 * s8 products leaves int32 (255 * 127 * 65536 < 2**31)."""
SMALLEST_MAXIMUM = 1e-20
"""Rows whose largest magnitude is below it count as zeros; far above fp32's subnormal numbers, which round badly."""

ROUNDER = 3.0 * 2**22
"""Added to an fp32 number below 2**22, it rounds it to an integer, halves to even, whose bits are then the lowest of
the sum's: one pass over memory where rounding, adding the zero point and converting take three."""


def quantize_weight(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Return a weight (N, K) as int8 (N, K) and its fp32 scales (N, 1); `int8 * scale` is the weight it stands for."""
    exact = weight.float()
    scale = exact.abs().amax(dim=1, keepdim=True).clamp_min_(SMALLEST_MAXIMUM) / INT8_MAX  # (N, 1)
    return (exact / scale).round_().to(torch.int8), scale


def quantize_tokens(x: Tensor, zero_point: int = 0) -> tuple[Tensor, Tensor]:
    """Return activations (M, K) as 8-bit integers (M, K) and their fp32 scales (M, 1).

    Args:
        zero_point: what is added to every integer; the result is int8 for 0 and uint8 for 128.
    """
    exact = x.float()
    # Multiplied and not divided: on CUDA, PyTorch divides by a plain number inexactly, so that bits would differ.
    scale = exact.abs().amax(dim=1, keepdim=True).clamp_min_(SMALLEST_MAXIMUM).mul_(1 / INT8_MAX)  # (M, 1)
    lowest_bytes = (exact / scale).add_(ROUNDER + zero_point).view(torch.int32)
    return lowest_bytes.to(torch.uint8 if zero_point else torch.int8), scale


def integer_sums(x: Tensor, weight: Tensor) -> Tensor:
    """Return the exact sums of int8 tokens (M, K) with int8 weights (N, K), rounded once to fp32 (M, N).

    The plain reference of every kernel: fp64 holds all integers below 2**53.
    """
    return (x.double() @ weight.double().T).float()


def dequantize_weight(weight: Tensor, scale: Tensor) -> Tensor:
    """Return the fp32 weight (N, K) that int8 (N, K) and scales (N, 1) stand for."""
    return weight.float() * scale
