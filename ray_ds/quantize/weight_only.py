"""The W8A16 scheme: INT8 weights with one scale an output channel; activations stay floats."""

import torch
import torch.nn.functional as F
from torch import Tensor


class WeightOnly:
    """An int8 weight (N, K) that becomes floats, of the activations' type, in each product.

    Integers up to 127 are exact in bf16, and the scale is applied to the sums, so the weight is rounded only once, when
    it becomes INT8. It halves the memory that a bf16 weight takes, and is no faster.
    """

    def __init__(self, weight: Tensor, scale: Tensor) -> None:
        self.out_features, self.in_features = weight.shape
        self._weight = weight
        self._scale = scale.flatten()

    def quantize(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return tokens (M, K) as they are, and scales (M, 1) of 1."""
        return x, torch.ones((len(x), 1), device=x.device)

    def multiply(self, x: Tensor, token_scale: Tensor) -> Tensor:
        """Return the product of tokens from `quantize` with the weight: (M, N), in the type of `x`."""
        sums = F.linear(x, self._weight.to(x.dtype))
        return sums.float().mul_(self._scale).mul_(token_scale).to(x.dtype)
