"""The FP8 scheme: E4M3 with one scale an output channel for weights and one a token for activations.

`y[m, n] = (sum_k x8[m, k] * w8[n, k]) * weight_scale[n] * token_scale[m]`. E4M3 numbers are multiples of 2**-9 up to
448, so fp64 holds any sum of `MAX_IN_FEATURES` products exactly; the reference rounds it once, to fp32. Tensor cores
round while they add, so their results are near the reference's and not the same bits.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from ray_ds.quantize.scheme import SMALLEST_MAXIMUM

E4M3 = torch.float8_e4m3fn
E4M3_MAX = 448.0
SCALED_MM_MULTIPLE = 16
"""Widths that `torch._scaled_mm` takes are multiples of it."""


def quantize_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    """Return a weight or activations (M, K) in E4M3 (M, K) and the fp32 scales (M, 1) that they are multiplied by."""
    exact = x.float()
    # Multiplied and not divided: on CUDA, PyTorch divides by a plain number inexactly, so that bits would differ.
    scale = exact.abs().amax(dim=1, keepdim=True).clamp_min_(SMALLEST_MAXIMUM).mul_(1 / E4M3_MAX)  # (M, 1)
    return (exact / scale).clamp_(-E4M3_MAX, E4M3_MAX).to(E4M3), scale


def float8_sums(x: Tensor, weight: Tensor) -> Tensor:
    """Return the exact sums of E4M3 tokens (M, K) with E4M3 weights (N, K), rounded once to fp32 (M, N)."""
    return (x.double() @ weight.double().T).float()


class Float8ReferenceWeight:
    """An E4M3 weight multiplied by `float8_sums`: exact on every device, and slow."""

    def __init__(self, weight: Tensor, scale: Tensor) -> None:
        self.out_features, self.in_features = weight.shape
        self._weight = weight
        self._scale = scale.flatten()

    def quantize(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return tokens (M, K) in E4M3 and their scales (M, 1)."""
        return quantize_rows(x)

    def multiply(self, x: Tensor, token_scale: Tensor) -> Tensor:
        """Return the product of tokens from `quantize` with the weight: fp32 (M, N)."""
        return float8_sums(x, self._weight).mul_(self._scale).mul_(token_scale)


class ScaledMmWeight:
    """An E4M3 weight for `torch._scaled_mm` on tensor cores of compute capability 8.9 and later."""

    def __init__(self, weight: Tensor, scale: Tensor) -> None:
        self.out_features, self.in_features = weight.shape
        self._extra_inputs = -self.in_features % SCALED_MM_MULTIPLE
        extra_outputs = -self.out_features % SCALED_MM_MULTIPLE
        padded = F.pad(weight.view(torch.uint8), (0, self._extra_inputs, 0, extra_outputs))  # a zero byte is a zero
        self._weight = padded.contiguous().view(E4M3).T  # (K, N), column-major
        self._scale = scale.flatten()
        self._one = torch.ones((), device=weight.device)

    def quantize(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return tokens (M, K) in E4M3 and their scales (M, 1)."""
        return quantize_rows(x)

    def multiply(self, x: Tensor, token_scale: Tensor) -> Tensor:
        """Return the product of tokens from `quantize` with the weight: fp32 (M, N)."""
        padded = F.pad(x.view(torch.uint8), (0, self._extra_inputs)).view(E4M3)
        sums = torch._scaled_mm(
            padded, self._weight, scale_a=self._one, scale_b=self._one, out_dtype=torch.float32, use_fast_accum=False
        )
        return sums[:, : self.out_features] * self._scale * token_scale
