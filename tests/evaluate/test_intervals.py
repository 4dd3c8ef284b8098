"""Intervals and tests against scipy, and whether intervals hold what they promise."""

import math

import numpy as np
import pytest
from scipy import stats

from ray_ds.evaluate.intervals import bootstrap, mcnemar, permutation_test, wilson
from ray_ds.evaluate.metrics import make_metric
from tests.evaluate.test_metrics import labelled, outcome


@pytest.mark.parametrize(("right", "items"), [(0, 1), (0, 30), (1, 2), (7, 9), (50, 100), (99, 100), (1000, 1000)])
def test_wilson_is_scipys(right: int, items: int) -> None:
    expected = stats.binomtest(right, items).proportion_ci(0.95, method="wilson")
    assert wilson(right, items) == pytest.approx((expected.low, expected.high), abs=1e-12)


@pytest.mark.parametrize(("only_first", "only_second"), [(0, 0), (0, 1), (3, 3), (2, 9), (40, 71), (600, 480)])
def test_mcnemar_is_scipys_binomial_test(only_first: int, only_second: int) -> None:
    first = np.array([True] * only_first + [False] * only_second + [True, False] * 5)
    second = np.array([False] * only_first + [True] * only_second + [True, False] * 5)
    total = only_first + only_second
    expected = stats.binomtest(only_first, total).pvalue if total else 1.0
    assert mcnemar(first, second) == pytest.approx(expected, rel=1e-9)
    assert mcnemar(second, first) == pytest.approx(expected, rel=1e-9)


def test_the_bootstrap_interval_of_a_share_is_scipys() -> None:
    report = labelled(300)
    right = np.array([own.is_right for own in report], float)
    expected = stats.bootstrap((right,), np.mean, n_resamples=20_000, method="percentile", rng=0).confidence_interval
    low, high = bootstrap(make_metric("accuracy", report), seed=0)
    assert (low, high) == pytest.approx((expected.low, expected.high), abs=0.25 * right.std() / math.sqrt(len(right)))


def test_the_paired_bootstrap_interval_of_a_difference_is_scipys() -> None:
    rng = np.random.default_rng(2)
    chances = rng.random(400)  # items are easy or hard for both models
    hits = [rng.random(400) < chances, rng.random(400) < np.minimum(1, chances + 0.06)]
    first, second = ([outcome("a", "a" if hit else "b") for hit in own] for own in hits)
    columns = tuple(own.astype(float) for own in hits)
    expected = stats.bootstrap(
        columns, lambda a, b, axis: b.mean(axis=axis) - a.mean(axis=axis), paired=True, n_resamples=20_000,
        method="percentile", rng=0,
    ).confidence_interval  # fmt: skip
    low, high = bootstrap(make_metric("accuracy", first, second), seed=0)
    error = (columns[1] - columns[0]).std() / math.sqrt(400)
    assert (low, high) == pytest.approx((expected.low, expected.high), abs=0.25 * error)
    # Two models on their own items would differ less surely.
    assert high - low < 0.95 * 2 * 1.96 * math.hypot(*(own.std() for own in columns)) / math.sqrt(400)


def test_the_bootstrap_follows_from_its_seed() -> None:
    metric = make_metric("macro_f1", labelled(300))
    assert bootstrap(metric, seed=0) == bootstrap(metric, seed=0) != bootstrap(metric, seed=1)


def test_the_bootstrap_resamples_items_in_blocks_as_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    report = labelled(50)
    expected = bootstrap(make_metric("macro_f1", report), seed=3)
    monkeypatch.setattr("ray_ds.evaluate.intervals._BLOCK_NUMBERS", 700)
    assert bootstrap(make_metric("macro_f1", report), seed=3) == expected


@pytest.mark.slow
@pytest.mark.shows("Intervals of 95 % hold the true score in 95 % of repeated evaluations")
def test_intervals_hold_the_truth_as_often_as_they_promise() -> None:
    whole = make_metric("macro_f1", labelled(200_000, 999))
    truth = float(whole.formula(whole.statistics[0].sum(axis=0)[None])[0])
    held = 0
    for seed in range(40):
        low, high = bootstrap(make_metric("macro_f1", labelled(1500, seed)), seed)
        held += low <= truth <= high
    assert stats.binomtest(held, 40, 0.95).pvalue > 1e-3


def test_the_permutation_test_of_a_share_is_scipys() -> None:
    rng = np.random.default_rng(0)
    first = [outcome("a", "a" if hit else "b") for hit in rng.random(120) < 0.5]
    second = [outcome("a", "a" if hit else "b") for hit in rng.random(120) < 0.62]
    columns = [np.array([own.is_right for own in report], float) for report in (first, second)]
    expected = stats.permutation_test(
        columns, lambda a, b: abs(b.mean() - a.mean()), permutation_type="samples", alternative="greater",
        n_resamples=20_000, rng=1, vectorized=False,
    ).pvalue  # fmt: skip
    found = permutation_test(make_metric("accuracy", first, second), seed=0)
    assert found == pytest.approx(expected, abs=4 * math.sqrt(expected * (1 - expected) / 10_000))


def test_equal_reports_do_not_differ() -> None:
    report = labelled(60)
    metric = make_metric("macro_f1", report, report)
    assert permutation_test(metric, seed=0) == 1.0
    assert bootstrap(metric, seed=0) == (0.0, 0.0)
