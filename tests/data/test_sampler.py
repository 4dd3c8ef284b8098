"""The order of rows: every row once an epoch, near its shard, whatever was asked before."""

import math
import random
from itertools import pairwise

import numpy as np
import pytest

from ray_ds.data.sampler import Sampler


def sizes(case: int) -> tuple[list[int], int, int]:
    rng = random.Random(case)
    shard_rows = [rng.choice([0, 1, rng.randint(1, 40)]) for _ in range(rng.randint(1, 12))]
    shard_rows[rng.randrange(len(shard_rows))] += 1
    return shard_rows, rng.randint(1, 14), rng.randint(1, 3 * sum(shard_rows))


def stream(sampler: Sampler, num_rows: int) -> list[int]:
    rows: list[int] = []
    step = 0
    while len(rows) < num_rows:
        rows += sampler.rows(step).tolist()
        step += 1
    return rows[:num_rows]


@pytest.mark.parametrize("case", range(60))
def test_every_epoch_has_every_row_once(case: int) -> None:
    shard_rows, window_shards, batch_rows = sizes(case)
    total = sum(shard_rows)
    sampler = Sampler(shard_rows, seed=case, window_shards=window_shards, batch_rows=batch_rows)
    rows = stream(sampler, 3 * total)
    for epoch in range(3):
        assert sorted(rows[epoch * total : (epoch + 1) * total]) == list(range(total))


@pytest.mark.shows("The rows of a step are a pure function of seed and step; every row comes once an epoch")
@pytest.mark.parametrize("case", range(20))
def test_order_is_a_pure_function_of_the_step(case: int) -> None:
    shard_rows, window_shards, batch_rows = sizes(case)
    arguments = {"seed": 3, "window_shards": window_shards, "batch_rows": batch_rows}
    used = Sampler(shard_rows, **arguments)
    steps = list(range(2 * math.ceil(used.num_rows / batch_rows)))
    in_order = {step: used.rows(step).tolist() for step in steps}
    random.Random(case).shuffle(steps)
    assert all(used.rows(step).tolist() == in_order[step] for step in steps)
    assert all(Sampler(shard_rows, **arguments).rows(step).tolist() == in_order[step] for step in steps[:3])


@pytest.mark.parametrize("case", range(20))
def test_order_does_not_depend_on_the_batch(case: int) -> None:
    shard_rows, window_shards, batch_rows = sizes(case)
    total = 2 * sum(shard_rows)
    one = stream(Sampler(shard_rows, seed=1, window_shards=window_shards, batch_rows=1), total)
    assert stream(Sampler(shard_rows, seed=1, window_shards=window_shards, batch_rows=batch_rows), total) == one


@pytest.mark.parametrize("window_shards", [1, 2, 3, 8])
def test_rows_of_a_window_come_together(window_shards: int) -> None:
    shard_rows = [5, 9, 1, 0, 14, 3, 8, 2]
    owner = np.repeat(np.arange(len(shard_rows)), shard_rows)
    rows = stream(Sampler(shard_rows, seed=5, window_shards=window_shards, batch_rows=4), sum(shard_rows))
    last_use = {shard: max(i for i, row in enumerate(rows) if owner[row] == shard) for shard in set(owner)}
    first_use = {shard: min(i for i, row in enumerate(rows) if owner[row] == shard) for shard in set(owner)}
    open_shards = [sum(first_use[s] <= i <= last_use[s] for s in last_use) for i in range(len(rows))]
    assert max(open_shards) <= window_shards


@pytest.mark.parametrize("case", range(60))
def test_shards_at_hand_are_those_of_the_rows(case: int) -> None:
    """Of any part of the stream, over ends of windows and epochs, all rows lie in the shards that are asked for."""
    shard_rows, window_shards, batch_rows = sizes(case)
    sampler = Sampler(shard_rows, seed=case, window_shards=window_shards, batch_rows=batch_rows)
    owner = np.repeat(np.arange(len(shard_rows)), shard_rows)
    rows = owner[stream(sampler, 3 * sum(shard_rows))]
    rng = random.Random(case)
    for _ in range(20):
        start = rng.randrange(len(rows))
        stop = rng.randint(start + 1, len(rows))
        needed = sampler.shards(start, stop)
        assert set(rows[start:stop]) <= set(needed) and all(shard_rows[shard] for shard in needed)
        assert len(set(needed)) == len(needed)
        one = sampler.shards(start, start + 1)
        assert one == needed[: len(one)] and len(one) <= window_shards


@pytest.mark.parametrize("case", range(60))
def test_shards_by_next_use_are_in_the_order_of_their_windows(case: int) -> None:
    shard_rows, window_shards, batch_rows = sizes(case)
    sampler = Sampler(shard_rows, seed=case, window_shards=window_shards, batch_rows=batch_rows)
    total = sum(shard_rows)
    start = random.Random(case).randrange(2 * total)
    order = sampler.shards_by_next_use(start)
    assert sorted(order) == [shard for shard, rows in enumerate(shard_rows) if rows]
    uses = [set(sampler.shards(position, position + 1)) for position in range(start, start + 2 * total)]
    firsts = [next(i for i, shards in enumerate(uses) if shard in shards) for shard in order]
    assert firsts == sorted(firsts)


def test_epochs_and_seeds_differ_and_rows_are_mixed() -> None:
    arguments = {"window_shards": 4, "batch_rows": 400}
    first = Sampler([100] * 4, seed=0, **arguments)
    orders = [first.rows(0), first.rows(1), Sampler([100] * 4, seed=1, **arguments).rows(0)]
    assert len({tuple(order) for order in orders}) == 3
    for order in orders:
        assert sum(abs(a - b) == 1 for a, b in pairwise(order.tolist())) < 10  # 400 * 2 / 400 = 2 are expected
        assert abs(np.corrcoef(order, np.arange(400))[0, 1]) < 0.15


def test_order_stays_what_it_was() -> None:
    """A checkpoint resumed with another version of numpy must see the same rows."""
    rows = Sampler([4, 3, 5], seed=7, window_shards=2, batch_rows=12)
    assert rows.rows(0).tolist() == [8, 1, 2, 10, 9, 7, 0, 11, 3, 4, 5, 6]
