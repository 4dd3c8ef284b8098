"""A batch is one grid of micro-batches for any world size, and its rows are there when they are asked for."""

import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from ray_ds.config.train import TrainSettings
from ray_ds.data.shards import TokenSplit
from ray_ds.errors import ArtifactError
from ray_ds.model.loss import IGNORED_TARGET
from ray_ds.train.batches import Batches, MicroBatch, open_split, share_of, validation_batches
from tests.train.runs import make_settings, write_shards

CPU = torch.device("cpu")


@pytest.fixture
def split(tmp_path: Path) -> TokenSplit:
    write_shards(tmp_path)
    return open_split(str(tmp_path), "train")


def make_batches(split: TokenSplit, settings: TrainSettings, rank: int = 0, world_size: int = 1) -> Batches:
    return Batches(split, settings, rank=rank, world_size=world_size, device=CPU)


def batch_of(batches: Batches, cursor: int) -> list[MicroBatch]:
    return list(batches.of_batch(cursor))


@pytest.mark.parametrize("num_micro_batches", [1, 2, 5, 8, 12])
@pytest.mark.parametrize("world_size", range(1, 10))
def test_shares_are_neighbours_balanced_and_padded(num_micro_batches: int, world_size: int) -> None:
    shares = [share_of(num_micro_batches, rank=rank, world_size=world_size) for rank in range(world_size)]
    real = [[index for index in share if index is not None] for share in shares]
    assert [index for mine in real for index in mine] == list(range(num_micro_batches))
    assert {len(share) for share in shares} == {-(-num_micro_batches // world_size)}
    counts = {len(share) for share in real}
    assert max(counts) - min(counts) <= 1
    assert all(share[: len(mine)] == mine for share, mine in zip(shares, real, strict=True))


@pytest.mark.parametrize("world_size", [2, 3, 4, 6])
def test_ranks_share_out_one_grid_in_order(split: TokenSplit, world_size: int) -> None:
    settings = make_settings()
    whole = batch_of(make_batches(split, settings), 3)
    assert [batch.index for batch in whole] == [0, 1, 2, 3] and whole[0].tokens.shape == (4, 16)
    parts = [batch_of(make_batches(split, settings, rank, world_size), 3) for rank in range(world_size)]
    assert {len(part) for part in parts} == {-(-4 // world_size)}
    real = [batch for part in parts for batch in part if batch.index is not None]
    for batch, expected in zip(real, whole, strict=True):
        assert batch.index == expected.index
        assert torch.equal(batch.tokens, expected.tokens) and torch.equal(batch.targets, expected.targets)


def test_padding_has_no_target(split: TokenSplit) -> None:
    parts = [batch_of(make_batches(split, make_settings(), rank, 3), 0) for rank in range(3)]
    padding = [batch for part in parts for batch in part if batch.index is None]
    assert len(padding) == 2  # 3 * 2 places for 4 micro-batches
    assert all(bool((batch.targets == IGNORED_TARGET).all()) for batch in padding)
    targets = sum(int((batch.targets != IGNORED_TARGET).sum()) for part in parts for batch in part)
    assert targets == make_settings().batch_tokens


def test_targets_are_the_next_tokens(split: TokenSplit) -> None:
    tokens, targets, _ = next(make_batches(split, make_settings()).of_batch(0))
    assert torch.equal(tokens[:, 1:], targets[:, :-1])


def test_batches_may_be_passed_over_and_read_again(split: TokenSplit) -> None:
    settings = make_settings()
    used = make_batches(split, settings, 1, 3)
    for cursor in (0, 1, 5, 2, 2, 3, 9):
        fresh = batch_of(make_batches(split, settings, 1, 3), cursor)
        for batch, expected in zip(batch_of(used, cursor), fresh, strict=True):
            assert batch.index == expected.index and torch.equal(batch.tokens, expected.tokens)
    next(used.of_batch(4))  # left in the middle
    assert torch.equal(batch_of(used, 4)[0].tokens, batch_of(make_batches(split, settings, 1, 3), 4)[0].tokens)


def test_rows_are_read_while_the_model_computes(split: TokenSplit, monkeypatch: pytest.MonkeyPatch) -> None:
    """Reading a row takes 5 ms, training on a micro-batch of 4 rows 30 ms."""
    row, readers = TokenSplit.row, set()

    def slow_row(self: TokenSplit, index: int, seq_len: int) -> np.ndarray:
        readers.add(threading.current_thread())
        time.sleep(0.005)
        return row(self, index, seq_len)

    monkeypatch.setattr(TokenSplit, "row", slow_row)
    batches, waits = make_batches(split, make_settings()), []
    for cursor in range(4):
        stream = batches.of_batch(cursor)
        for _ in range(4):
            started = time.perf_counter()
            next(stream)
            waits.append(time.perf_counter() - started)
            time.sleep(0.03)
    batches.close()
    assert waits[0] > 0.015 and np.median(waits[1:]) < 0.005
    assert len(readers) == 1 and threading.main_thread() not in readers


def test_an_error_in_the_reader_comes_to_the_loop(split: TokenSplit, monkeypatch: pytest.MonkeyPatch) -> None:
    def damaged(self: TokenSplit, index: int, seq_len: int) -> np.ndarray:
        raise ArtifactError("shard", "x", "must be whole", "restore it")

    batches = make_batches(split, make_settings())
    batch_of(batches, 0)
    monkeypatch.setattr(TokenSplit, "row", damaged)
    with pytest.raises(ArtifactError, match="must be whole"):
        batch_of(batches, 1), batch_of(batches, 2)


@pytest.mark.parametrize("world_size", [1, 3, 4])
def test_validation_reads_each_row_once_and_gives_ranks_as_many_micro_batches(tmp_path: Path, world_size: int) -> None:
    write_shards(tmp_path)
    split = open_split(str(tmp_path), "validation")
    settings = make_settings(validate_every=1, validation_tokens=10**6)
    options = {"world_size": world_size, "device": CPU}
    ranks = [list(validation_batches(split, settings, rank=rank, **options)) for rank in range(world_size)]
    assert len({len(batches) for batches in ranks}) == 1
    batches = [batch for rank in ranks for batch in rank]
    rows = [row for batch in batches for row in batch.targets.numpy() if row[0] != IGNORED_TARGET]
    expected = [split.row(index, 16)[1:] for index in range(split.num_rows(16))]
    assert list(map(tuple, rows)) == list(map(tuple, expected))  # a fixed grid: the same order for any world size
    assert all((batch.targets == IGNORED_TARGET).all() for batch in batches if batch.index is None)
    assert [batch.index for batch in batches if batch.index is not None] == list(range(-(-len(expected) // 4)))
