"""Smoothing (SmoothQuant, arXiv 2211.10438): outliers of activations move into the weights before both are rounded.

A channel `c` of activations is divided by `s[c] = max|x[c]| ** alpha / max|w[:, c]| ** (1 - alpha)`, and the weights
that read it are multiplied by it. Here factors are rounded to powers of two: then no float is rounded when they are
folded in, whatever its type, and the smoothed float model computes the same as before, bit for bit. A factor off by
up to sqrt(2) changes little where outliers are 50 times the rest.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ray_ds.config.model import ModelConfig
from ray_ds.quantize.folds import Fold, plan_folds

SMALLEST_MAXIMUM = 1e-5
"""Magnitudes of activations and weights count as at least this, as in SmoothQuant's code."""
MAX_EXPONENT = 16
"""Factors are from 2 ** -16 to 2 ** 16: no sane outlier is beyond, and products stay far from the ends of bf16."""


@dataclass(frozen=True, slots=True)
class TensorFactors:
    """What a tensor is multiplied by; None = by nothing."""

    rows: Tensor | None = None
    """(N,)."""
    columns: Tensor | None = None
    """(K,)."""

    def apply(self, tensor: Tensor) -> Tensor:
        """Return a tensor (N,) or (N, K) with the factors in it, in its own type."""
        wide = tensor.float()
        if self.rows is not None:
            wide = wide * self.rows.view(-1, *[1] * (tensor.dim() - 1))
        if self.columns is not None:
            wide = wide * self.columns
        return wide.to(tensor.dtype)


def find_factors(
    config: ModelConfig, tensors: Mapping[str, Tensor], maxima: Mapping[str, Tensor], alpha: float
) -> dict[str, TensorFactors]:
    """Return what each tensor is multiplied by, by its name on disk; those left out stay as they are.

    Args:
        tensors: of the checkpoint, by their names on disk.
        maxima: the largest magnitude of each channel of activations, by `Fold.point`; a point without, such as an
            expert that no token went to, is not smoothed.
        alpha: from 0, all difficulty stays in the activations, to 1, all goes into the weights.
    """
    rows: dict[str, Tensor] = {}
    columns: dict[str, Tensor] = {}
    for fold in plan_folds(config):
        if fold.point in maxima:
            factors = channel_factors(fold, [tensors[name] for name in fold.readers], maxima[fold.point], alpha)
            rows |= dict.fromkeys(fold.producers, 1 / fold.to_rows(factors))
            columns |= dict.fromkeys((*fold.readers, *fold.float_readers), fold.to_columns(factors))
    return {name: TensorFactors(rows.get(name), columns.get(name)) for name in [*rows, *columns]}


def channel_factors(fold: Fold, weights: Sequence[Tensor], maxima: Tensor, alpha: float) -> Tensor:
    """Return the factor of each channel of a fold, a power of two.

    Args:
        weights: of its readers, (N, K) each.
        maxima: largest magnitudes of the readers' input, (K,).
    """
    of_weights = torch.stack([weight.float().abs().amax(dim=0) for weight in weights]).amax(dim=0)  # (K,)
    x, w = fold.to_channels(maxima.float()), fold.to_channels(of_weights)
    wanted = alpha * x.clamp_min(SMALLEST_MAXIMUM).log2() - (1 - alpha) * w.clamp_min(SMALLEST_MAXIMUM).log2()
    exponents = wanted.round().clamp(-MAX_EXPONENT, MAX_EXPONENT)
    return torch.where((x > 0) & (w > 0), exponents.exp2(), 1.0)
