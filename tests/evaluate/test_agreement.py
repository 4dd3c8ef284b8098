"""Kappa is scikit-learn's, over single things and over clusters of them."""

import numpy as np
import pytest
from sklearn.metrics import cohen_kappa_score

from ray_ds.evaluate.agreement import kappa_metric
from ray_ds.evaluate.clusters import score_of


def two_raters(num_items: int, num_values: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """The second says what the first says, or one more, or something else."""
    rng = np.random.default_rng(seed)
    first = rng.integers(0, num_values, num_items)
    near, other = np.minimum(first + 1, num_values - 1), rng.integers(0, num_values, num_items)
    return first, np.choose(rng.integers(0, 3, num_items), [first, near, other])


@pytest.mark.shows("Two raters' agreement is scikit-learn's Cohen's kappa, weighted for scores on a scale")
@pytest.mark.parametrize("num_items", [3, 40, 1000])
@pytest.mark.parametrize(("num_values", "is_scale"), [(5, True), (3, False)])
def test_kappa_is_scikit_learns(num_items: int, num_values: int, is_scale: bool) -> None:
    first, second = two_raters(num_items, num_values, seed=num_items)
    expected = cohen_kappa_score(first, second, labels=range(num_values), weights="quadratic" if is_scale else None)
    for clusters in (range(num_items), [i // 2 for i in range(num_items)]):
        metric = kappa_metric(first, second, clusters, num_values=num_values, is_scale=is_scale)
        assert score_of(metric, seed=0)["score"] == pytest.approx(expected, abs=1e-12)


def test_raters_who_always_say_the_same_one_thing_have_no_kappa() -> None:
    same = np.full(10, 3)
    metric = kappa_metric(same, same, range(10), num_values=5, is_scale=True)
    assert score_of(metric, seed=0) == {"score": None, "low": None, "high": None}


def test_the_interval_is_that_of_a_plain_bootstrap_over_clusters() -> None:
    first, second = two_raters(200, 5, seed=1)
    clusters = np.arange(200) // 4
    own = score_of(kappa_metric(first, second, list(clusters), num_values=5, is_scale=True), seed=0)
    rng, drawn = np.random.default_rng(9), []
    for _ in range(1000):
        rows = (rng.integers(0, 50, 50)[:, None] * 4 + np.arange(4)).ravel()
        drawn.append(cohen_kappa_score(first[rows], second[rows], weights="quadratic"))
    low, high = np.quantile(drawn, [0.025, 0.975])
    assert (own["low"], own["high"]) == pytest.approx((low, high), abs=0.15 * (high - low))
