"""Whether two raters agree more than by chance: Cohen's kappa, with quadratic weights for scores on a scale."""

from collections.abc import Hashable, Sequence

import numpy as np
from numpy.typing import NDArray

from ray_ds.evaluate.clusters import cluster_sums
from ray_ds.evaluate.metrics import Metric, Numbers


def kappa_metric(
    first: NDArray[np.int64],
    second: NDArray[np.int64],
    clusters: Sequence[Hashable],
    *,
    num_values: int,
    is_scale: bool,
) -> Metric:
    """Return Cohen's kappa of what two raters said of the same n things, as a metric over clusters of them.

    Where both always say the same one thing, chance explains it all and kappa is 0 / 0, here NaN.

    Args:
        first: (n,), values from 0 to `num_values` - 1.
        clusters: n names; what belongs together is resampled together.
        is_scale: a disagreement counts by the square of its distance; else each counts the same.
    Source: Cohen 1960; weighted, Cohen 1968.
    """
    place = np.arange(num_values)
    difference = (place[:, None] - place) ** 2 if is_scale else place[:, None] != place
    weights = difference.astype(np.float64)
    cells = np.zeros((len(first), num_values * num_values))
    cells[np.arange(len(first)), first * num_values + second] = 1.0

    def kappa(sums: Numbers) -> Numbers:
        table = sums.reshape(-1, num_values, num_values)
        by_first, by_second = table.sum(axis=2), table.sum(axis=1)
        chance = by_first[:, :, None] * by_second[:, None, :] / table.sum(axis=(1, 2))[:, None, None]
        observed, expected = (table * weights).sum(axis=(1, 2)), (chance * weights).sum(axis=(1, 2))
        undefined = np.full_like(observed, np.nan)
        return np.asarray(1 - np.divide(observed, expected, out=undefined, where=expected > 0))

    return Metric(statistics=(cluster_sums(cells, clusters),), formula=kappa)
