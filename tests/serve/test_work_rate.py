import pytest

from ray_ds.serve.work_rate import WINDOW_S, WorkRate


def test_a_rate_is_tokens_by_the_seconds_spent_on_them() -> None:
    rate = WorkRate()
    assert rate.per_s == 0
    rate.add(100, 0.5)
    rate.add(20, 0.1)
    assert rate.per_s == pytest.approx(200)


def test_work_beyond_the_window_is_forgotten() -> None:
    rate = WorkRate()
    rate.add(1_000_000, 1.0)
    for _ in range(100):
        rate.add(10, WINDOW_S / 50)
    assert rate.per_s == pytest.approx(10 / (WINDOW_S / 50))


def test_one_part_longer_than_the_window_counts_whole() -> None:
    rate = WorkRate()
    rate.add(30, 3 * WINDOW_S)
    assert rate.per_s == pytest.approx(10 / WINDOW_S)
