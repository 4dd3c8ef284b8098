"""INT8 weights on CUDA: `torch._int_mm` for many rows, Triton for few rows and for stacks of experts."""

from collections.abc import Sequence
from importlib.util import find_spec

import torch
import torch.nn.functional as F
from torch import Tensor

from ray_ds.quantize.scheme import quantize_tokens

INT_MM_MIN_TOKENS = 17
"""`torch._int_mm` refuses fewer rows on CUDA, and widths that are no multiple of `INT_MM_MULTIPLE`."""
INT_MM_MULTIPLE = 8
TRITON_MAX_TOKENS = 32
"""Rows up to which Triton multiplies: `torch._int_mm` would be given rows of zeros, or not fill a tile."""


def has_triton() -> bool:
    """Tell whether Triton is installed, as it is with PyTorch for CUDA."""
    return find_spec("triton") is not None


class IntMmWeight:
    """A weight for `torch._int_mm`, with zeros up to the sizes that it takes."""

    def __init__(self, weight: Tensor, scale: Tensor) -> None:
        self.out_features, self.in_features = weight.shape
        self._extra_inputs = -self.in_features % INT_MM_MULTIPLE
        extra_outputs = -self.out_features % INT_MM_MULTIPLE
        self._weight = F.pad(weight, (0, self._extra_inputs, 0, extra_outputs)).contiguous().T  # (K, N), column-major
        self._scale = scale.flatten()

    def quantize(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return tokens (M, K) as int8 and their scales (M, 1)."""
        return quantize_tokens(x)

    def multiply(self, x: Tensor, token_scale: Tensor) -> Tensor:
        """Return the product of tokens from `quantize` with the weight: fp32 (M, N)."""
        extra_tokens = max(INT_MM_MIN_TOKENS, x.shape[0] + -x.shape[0] % INT_MM_MULTIPLE) - x.shape[0]
        padded = F.pad(x, (0, self._extra_inputs, 0, extra_tokens))
        sums = torch._int_mm(padded, self._weight)[: x.shape[0], : self.out_features]
        return sums.float().mul_(self._scale).mul_(token_scale)


class TritonWeight(IntMmWeight):
    """The same weight, multiplied by Triton where there are few rows."""

    def __init__(self, weight: Tensor, scale: Tensor) -> None:
        super().__init__(weight, scale)
        from ray_ds.quantize import triton_int8

        self._kernels = triton_int8
        columns = self._weight.T[: self.out_features, : self.in_features]  # (N, K), a view where nothing was padded
        self._stack = columns.contiguous()[None]
        self._end = torch.zeros(1, dtype=torch.int64, device=weight.device)

    def quantize(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return tokens (M, K) as int8 and their scales (M, 1)."""
        return self._kernels.quantize_tokens(x)

    def multiply(self, x: Tensor, token_scale: Tensor) -> Tensor:
        """Return the product of tokens from `quantize` with the weight: fp32 (M, N)."""
        if len(x) > TRITON_MAX_TOKENS:
            return super().multiply(x, token_scale)
        ends = self._end + len(x)
        return self._kernels.multiply_stack(x, token_scale, self._stack, self._scale[None], ends)


class TritonStack:
    """Weights of one shape, multiplied at once with rows of each."""

    def __init__(self, weights: Sequence[tuple[Tensor, Tensor]]) -> None:
        from ray_ds.quantize import triton_int8

        self._kernels = triton_int8
        self._weights = torch.stack([weight for weight, _ in weights])  # (E, N, K)
        self._scales = torch.stack([scale.flatten() for _, scale in weights])  # (E, N)

    def quantize(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return tokens (M, K) as int8 and their scales (M, 1)."""
        return self._kernels.quantize_tokens(x)

    def multiply(self, x: Tensor, token_scale: Tensor, ends: Tensor) -> Tensor:
        """Return each weight's product with its rows: fp32 (M, N)."""
        return self._kernels.multiply_stack(x, token_scale, self._weights, self._scales, ends)
