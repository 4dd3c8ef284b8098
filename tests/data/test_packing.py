import numpy as np
import pytest

from ray_ds.data.packing import best_fit


@pytest.mark.parametrize("seed", range(20))
def test_every_item_that_fits_is_in_one_row_that_holds_it(seed: int) -> None:
    rng = np.random.default_rng(seed)
    capacity = int(rng.integers(1, 200))
    lengths = rng.integers(0, 250, size=int(rng.integers(0, 400)))
    rows = best_fit(lengths, capacity)
    fitting = [i for i, length in enumerate(lengths) if 0 < length <= capacity]
    assert sorted(item for row in rows for item in row) == fitting
    assert all(lengths[row].sum() <= capacity for row in rows)
    assert rows == best_fit(lengths, capacity)
    least = -(-int(lengths[fitting].sum()) // capacity)
    assert len(rows) <= 11 / 9 * max(least, int((lengths[fitting] > capacity / 2).sum())) + 4


def test_an_item_goes_where_it_leaves_the_least_room() -> None:
    assert best_fit(np.array([6, 5, 4, 5, 3, 2]), 10) == [[0, 2], [1, 3], [4, 5]]
    assert best_fit(np.array([7, 8, 2, 3]), 10) == [[1, 2], [0, 3]]
