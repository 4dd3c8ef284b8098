"""The one place that calls oneDNN's packed integer operators, which PyTorch ships but does not document.

They want activations as unsigned bytes with a zero point, and are not exact on every processor:
- without VNNI (and under `ONEDNN_MAX_CPU_ISA` below it) they add pairs of products in saturating 16-bit integers, so
  that bytes beyond 127 give silently wrong sums;
- with AMX (seen with PyTorch 2.11) they take the zero point off in fp32, which rounds sums of bytes beyond 2**24.
`TwoPassWeight` stays exact there: with x = 2 * high + low, high from -64 to 63 and low 0 or 1, no pair of products
leaves 16 bits and no sum of bytes 2**24 or more. `kernels.self_test` finds out what a processor needs. Signed bytes
would need no zero point, but without AMX run on oneDNN's reference code, a thousand times slower.
"""

import torch
from torch import Tensor

from ray_ds.quantize.scheme import quantize_tokens

FULL_ZERO_POINT = 128
HALF_ZERO_POINT = 64
EXACT_IN_FEATURES = 1024
"""Inputs over which sums of bytes up to 127 stay below 2**24, as fp32 holds integers: 127 * 127 * 1024 < 2**24."""


def is_available() -> bool:
    """Tell whether this build of PyTorch has the operators."""
    return hasattr(torch.ops.onednn, "qlinear_prepack") and hasattr(torch.ops.onednn, "qlinear_pointwise")


class _Packed:
    """An int8 weight (N, K) in oneDNN's own layout, with one fp32 factor a row."""

    def __init__(self, weight: Tensor, factors: Tensor, zero_point: int) -> None:
        self._weight: Tensor = torch.ops.onednn.qlinear_prepack(weight.contiguous(), None)
        self._factors = factors
        self._weight_zero_points = torch.zeros(weight.shape[0], dtype=torch.int32)
        self._zero_point = zero_point
        self._call = torch.ops.onednn.qlinear_pointwise.default

    def multiply(self, x: Tensor) -> Tensor:
        """Return the sums of bytes (M, K), their zero point taken off, times the factors: fp32 (M, N)."""
        product: Tensor = self._call(
            x,
            1.0,  # scale of the input; the token's own scale is applied by the caller
            self._zero_point,
            self._weight,
            self._factors,
            self._weight_zero_points,
            None,  # bias
            1.0,  # scale and zero point of the output
            0,
            torch.float32,
            "none",  # nothing fused behind it
            [],
            "",
        )
        return product


class OneDnnWeight:
    """A weight for processors with VNNI: one call."""

    def __init__(self, weight: Tensor, scale: Tensor) -> None:
        self.out_features, self.in_features = weight.shape
        self._packed = _Packed(weight, scale.flatten().contiguous(), FULL_ZERO_POINT)

    def quantize(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return tokens (M, K) as bytes around `FULL_ZERO_POINT` and their scales (M, 1)."""
        return quantize_tokens(x, FULL_ZERO_POINT)

    def multiply(self, x: Tensor, token_scale: Tensor) -> Tensor:
        """Return the product of tokens from `quantize` with the weight: fp32 (M, N)."""
        return self._packed.multiply(x).mul_(token_scale)


class TwoPassWeight:
    """A weight for processors without VNNI: both halves of the tokens as one batch of 2 * M rows."""

    def __init__(self, weight: Tensor, scale: Tensor) -> None:
        self.out_features, self.in_features = weight.shape
        self._scale = scale.flatten()
        ones = torch.ones(self.out_features)
        blocks = torch.split(weight, EXACT_IN_FEATURES, dim=1)
        self._blocks = [_Packed(block, ones, HALF_ZERO_POINT) for block in blocks]

    def quantize(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return tokens (M, K) as int8 and their scales (M, 1)."""
        return quantize_tokens(x)

    def multiply(self, x: Tensor, token_scale: Tensor) -> Tensor:
        """Return the product of tokens from `quantize` with the weight: fp32 (M, N)."""
        halves = torch.cat((x >> 1, x & 1)).add_(HALF_ZERO_POINT).view(torch.uint8)  # (2 M, K)
        pieces = torch.split(halves, EXACT_IN_FEATURES, dim=1)
        sums = [block.multiply(piece.contiguous()) for block, piece in zip(self._blocks, pieces, strict=True)]
        # A block's sums are exact in fp32; those of several blocks may only be rounded once all are added.
        high, low = (sums[0] if len(sums) == 1 else torch.stack(sums).double().sum(dim=0)).chunk(2)  # (M, N) each
        return low.add(high, alpha=2).float().mul_(self._scale).mul_(token_scale)
