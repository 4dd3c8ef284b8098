"""Scores of clustered things, and that an interval widens with what a cluster has in common."""

import numpy as np
import pytest

from ray_ds.evaluate.clusters import cluster_sums, mean_metric, score_of
from ray_ds.evaluate.intervals import bootstrap


def test_sums_of_clusters_in_order_of_appearance() -> None:
    rows = np.array([[1.0, 2.0], [10.0, 20.0], [100.0, 200.0]])
    assert cluster_sums(rows, ["q", "p", "q"]).tolist() == [[101.0, 202.0], [10.0, 20.0]]


def test_copies_within_a_cluster_make_nothing_surer() -> None:
    values = np.random.default_rng(3).integers(1, 6, 60).astype(float)
    once = mean_metric(values.tolist(), range(60))
    thrice = mean_metric(np.repeat(values, 3).tolist(), np.repeat(np.arange(60), 3).tolist())
    assert score_of(thrice, seed=0) == pytest.approx(score_of(once, seed=0))
    assert score_of(once, seed=0)["score"] == pytest.approx(values.mean())
    low, high = bootstrap(mean_metric(np.repeat(values, 3).tolist(), range(180)), seed=0)
    assert high - low < 0.7 * (score_of(once, seed=0)["high"] - score_of(once, seed=0)["low"])


def test_one_cluster_has_no_interval() -> None:
    assert score_of(mean_metric([1.0, 4.0], ["p", "p"]), seed=0) == {"score": 2.5, "low": None, "high": None}
