"""Scores of things that come in clusters, such as several ratings of a prompt's answers: clusters are what is drawn."""

from collections.abc import Hashable, Sequence

import numpy as np
from pydantic import JsonValue

from ray_ds.evaluate.intervals import bootstrap
from ray_ds.evaluate.metrics import Metric, Numbers


def cluster_sums(rows: Numbers, clusters: Sequence[Hashable]) -> Numbers:
    """Return the sums (m, K) of the rows (n, K) of each of m clusters, in order of first appearance."""
    places = {name: place for place, name in enumerate(dict.fromkeys(clusters))}
    sums = np.zeros((len(places), rows.shape[1]))
    np.add.at(sums, [places[name] for name in clusters], rows)
    return sums


def mean_metric(values: Sequence[float], clusters: Sequence[Hashable]) -> Metric:
    """Return the mean of values as a metric over their clusters."""
    rows = np.array([[value, 1.0] for value in values])
    return Metric(statistics=(cluster_sums(rows, clusters),), formula=lambda sums: np.asarray(sums[:, 0] / sums[:, 1]))


def score_of(metric: Metric, seed: int) -> dict[str, JsonValue]:
    """Return a metric's score and the ends of its interval of 95 %, each None where it cannot be told.

    One cluster says nothing of others. An interval is not given either where the score of a resample is undefined.
    """
    (statistics,) = metric.statistics
    score = float(metric.formula(statistics.sum(axis=0)[None])[0])
    low, high = bootstrap(metric, seed) if len(statistics) > 1 else (np.nan, np.nan)
    return {"score": _known(score), "low": _known(low), "high": _known(high)}


def _known(value: float) -> float | None:
    return None if np.isnan(value) else value
