"""How far a score can be trusted: intervals of 95 %, and whether two models differ on the same items."""

import math
from collections.abc import Iterator
from statistics import NormalDist

import numpy as np
from numpy.typing import NDArray

from ray_ds.evaluate.metrics import Metric, Numbers

CONFIDENCE = 0.95
NUM_RESAMPLES = 2000
"""The ends of a percentile interval move by about 3 % of its width from seed to seed."""
NUM_PERMUTATIONS = 10_000
"""Enough for a p-value near 0.05 to be right within 0.005."""
_BLOCK_NUMBERS = 1 << 22
"""Numbers of a block of resamples: 32 MB."""


def wilson(num_right: int, num_items: int, confidence: float = CONFIDENCE) -> tuple[float, float]:
    """Return the score interval of a proportion, which holds near 0 and 1 and for few items.

    Source: Wilson 1927; without correction for continuity.
    """
    z = NormalDist().inv_cdf(0.5 + confidence / 2)
    share, weight = num_right / num_items, z * z / num_items
    middle = (share + weight / 2) / (1 + weight)
    half = z / (1 + weight) * math.sqrt(share * (1 - share) / num_items + weight / (4 * num_items))
    # The ends are 0 and 1 where none or all are right; rounding may miss that.
    return (0.0 if num_right == 0 else middle - half), (1.0 if num_right == num_items else middle + half)


def bootstrap(metric: Metric, seed: int, confidence: float = CONFIDENCE) -> tuple[float, float]:
    """Return the percentile interval of a metric's score, or with two reports of the second's score less the first's.

    Items are drawn with replacement, the same ones for both reports.
    Source: Efron and Tibshirani 1993, 13.3; paired, Koehn 2004.
    """
    drawn: list[Numbers] = []
    for weights in _resample_weights(len(metric.statistics[0]), seed):
        scores = [metric.formula(weights @ statistics) for statistics in metric.statistics]
        drawn.append(scores[0] if len(scores) == 1 else scores[1] - scores[0])
    low, high = np.quantile(np.concatenate(drawn), [0.5 - confidence / 2, 0.5 + confidence / 2])
    return float(low), float(high)


def _resample_weights(num_items: int, seed: int) -> Iterator[Numbers]:
    """Yield blocks (R, n) of how often each item is drawn."""
    rng = np.random.default_rng([seed, 0])
    rows = max(1, _BLOCK_NUMBERS // num_items)
    for start in range(0, NUM_RESAMPLES, rows):
        count = min(rows, NUM_RESAMPLES - start)
        drawn = rng.integers(0, num_items, (count, num_items)) + np.arange(count)[:, None] * num_items
        weights = np.bincount(drawn.ravel(), minlength=count * num_items).reshape(count, num_items)
        yield weights.astype(np.float64)


def mcnemar(first: NDArray[np.bool_], second: NDArray[np.bool_]) -> float:
    """Return the exact two-sided p-value that two models answer the same items rightly equally often.

    Of the items that only one of them gets right, each should get half: a binomial test.
    Source: McNemar 1947, in its exact form.
    """
    only_first, only_second = int((first & ~second).sum()), int((second & ~first).sum())
    total, fewer = only_first + only_second, min(only_first, only_second)
    if total == 0:
        return 1.0
    log_half = total * math.log(2)
    log_binomials = (math.lgamma(total + 1) - math.lgamma(k + 1) - math.lgamma(total - k + 1) for k in range(fewer + 1))
    return min(1.0, 2 * math.fsum(math.exp(own - log_half) for own in log_binomials))


def permutation_test(metric: Metric, seed: int) -> float:
    """Return the two-sided p-value that two reports' scores differ by chance: each item's outcomes are swapped or not.

    Source: approximate randomisation, Noreen 1989; (c + 1) / (R + 1) as in Phipson and Smyth 2010.
    """
    first, second = metric.statistics
    sums = first.sum(axis=0), second.sum(axis=0)
    observed = abs(float(metric.formula(sums[1][None])[0] - metric.formula(sums[0][None])[0]))
    rng = np.random.default_rng([seed, 1])
    rows = max(1, _BLOCK_NUMBERS // len(first))
    extreme = 0
    for start in range(0, NUM_PERMUTATIONS, rows):
        is_swapped = rng.integers(0, 2, (min(rows, NUM_PERMUTATIONS - start), len(first))).astype(np.float64)
        moved = is_swapped @ (second - first)  # (R, K)
        differences = metric.formula(sums[1] - moved) - metric.formula(sums[0] + moved)
        # Sums that are equal but for rounding count as equal.
        extreme += int((np.abs(differences) >= observed - 1e-9 * max(observed, 1.0)).sum())
    return (extreme + 1) / (NUM_PERMUTATIONS + 1)
