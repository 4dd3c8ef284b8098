"""A batch is one grid of micro-batches for any world size, and its rows are there when they are asked for."""

import dataclasses
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from ray_ds.config.train import TrainSettings
from ray_ds.data.rows import StreamRows
from ray_ds.data.shard_cache import ShardCache
from ray_ds.data.shard_folder import ShardFolder
from ray_ds.data.shards import TokenSplit
from ray_ds.data.teacher_logits import open_logits
from ray_ds.errors import ArtifactError, ConfigError
from ray_ds.model.loss import IGNORED_TARGET
from ray_ds.train.batches import Batches, check_cache, open_split, share_of, validation_batches
from ray_ds.train.objective import MicroBatch
from tests.data.fake_store import BUCKET, FakeStore, installed_store, put_shards
from tests.data.made_up_logits import store_made_up
from tests.train.runs import make_settings, write_shards

CPU = torch.device("cpu")


@pytest.fixture
def split(tmp_path: Path) -> TokenSplit:
    write_shards(tmp_path)
    return open_split(str(tmp_path), "train", make_settings().shard_cache_bytes)


@pytest.fixture
def store(tmp_path: Path) -> Iterator[FakeStore]:
    with installed_store(tmp_path) as store:
        yield store


def make_batches(split: TokenSplit, settings: TrainSettings, rank: int = 0, world_size: int = 1) -> Batches:
    return Batches(rows_of(split), settings, rank=rank, world_size=world_size, device=CPU)


def rows_of(split: TokenSplit) -> StreamRows:
    return StreamRows(split, make_settings().seq_len)


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
    tokens, targets, *_ = next(make_batches(split, make_settings()).of_batch(0))
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


@pytest.mark.gpu
def test_rows_on_a_gpu_are_those_on_the_cpu(split: TokenSplit) -> None:
    """While the GPU is busy, the memory that is copied from must not be used again before the copy is made."""
    settings, device = make_settings(), torch.device("cuda")
    on_gpu = Batches(rows_of(split), settings, rank=0, world_size=1, device=device)
    on_cpu, found, busy = make_batches(split, settings), [], torch.randn(8192, 8192, device=device)
    for cursor in range(50):
        for batch in on_gpu.of_batch(cursor):
            busy = busy @ busy / 8192  # 1 ms or more on the stream that the copy waits for
            found.append((batch.tokens, batch.targets))
    expected = [batch for cursor in range(50) for batch in on_cpu.of_batch(cursor)]
    for (tokens, targets), batch in zip(found, expected, strict=True):
        assert tokens.device.type == targets.device.type == "cuda"
        assert torch.equal(tokens.cpu(), batch.tokens) and torch.equal(targets.cpu(), batch.targets)
    on_gpu.close()


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
    split = open_split(str(tmp_path), "validation", make_settings().shard_cache_bytes)
    settings = make_settings(validate_every=1, validation_tokens=10**6)
    options = {"world_size": world_size, "device": CPU}
    ranks = [list(validation_batches(rows_of(split), settings, rank=rank, **options)) for rank in range(world_size)]
    assert len({len(batches) for batches in ranks}) == 1
    batches = [batch for rank in ranks for batch in rank]
    rows = [row for batch in batches for row in batch.targets.numpy() if row[0] != IGNORED_TARGET]
    expected = [split.row(index, 16)[1:] for index in range(split.num_rows(16))]
    assert list(map(tuple, rows)) == list(map(tuple, expected))  # a fixed grid: the same order for any world size
    assert all((batch.targets == IGNORED_TARGET).all() for batch in batches if batch.index is None)
    assert [batch.index for batch in batches if batch.index is not None] == list(range(-(-len(expected) // 4)))


def train_on(batches: Batches, cursors: range, micro_batch_s: float) -> list[float]:
    """Take the micro-batches of batches as a model would; return how long it waited for each batch."""
    waits = []
    for cursor in cursors:
        stream, waited_s = batches.of_batch(cursor), 0.0
        for _ in range(4):
            started = time.perf_counter()
            next(stream)
            waited_s += time.perf_counter() - started
            time.sleep(micro_batch_s)
        waits.append(waited_s)
    batches.close()
    return waits


@pytest.mark.shows("Shards on an object store are fetched ahead of use: training waits for the first ones only")
def test_training_does_not_wait_for_an_object_store_that_keeps_up(
    tmp_path: Path, store: FakeStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A window of 98 rows trains for 0.6 s; its two shards take 0.3 s to fetch."""
    uri = put_shards(store, num_shards=12, tokens=800)
    FakeStore(store.root, store.log, block_s=0.15).install()
    settings = make_settings(window_shards=2)
    ahead = make_batches(TokenSplit.open(uri, "train", ShardCache(tmp_path / "a")), settings)
    waits = train_on(ahead, range(18), 0.025)
    assert waits[0] > 0.1 and sum(waits[1:]) < 0.3 and max(waits[1:]) < 0.12
    monkeypatch.setattr(ShardCache, "read_ahead", lambda *_: None)
    late = make_batches(TokenSplit.open(uri, "train", ShardCache(tmp_path / "b")), settings)
    assert sum(train_on(late, range(18), 0.025)[1:]) > 0.4


@pytest.mark.parametrize("world_size", [1, 3])
def test_remote_shards_give_the_rows_of_local_ones_within_the_budget(
    tmp_path: Path, store: FakeStore, world_size: int
) -> None:
    """For three epochs, with room for the two windows of three shards that a step may read."""
    uri = put_shards(store, num_shards=12, tokens=[300 + 16 * number for number in range(12)])
    settings = make_settings(window_shards=3, seed=5)
    local = TokenSplit.open(str(store.path(uri)), "train")
    alone = make_batches(local, settings)
    opened = TokenSplit.open(uri, "train", tmp_path / "sizes")
    sizes = sorted(opened.bytes_in_cache())
    budget = sum(sizes[-6:])
    splits = [TokenSplit.open(uri, "train", ShardCache(tmp_path / "cache", budget)) for _ in range(world_size)]
    ranks = [make_batches(split, settings, rank, world_size) for rank, split in enumerate(splits)]
    for cursor in range(3 * local.num_rows(16) // 16 + 1):
        expected = batch_of(alone, cursor)
        found = [batch for rank in ranks for batch in batch_of(rank, cursor) if batch.index is not None]
        assert all(torch.equal(a.tokens, b.tokens) for a, b in zip(found, expected, strict=True))
        used = sum(size for _, size, _ in ShardFolder(tmp_path / "cache", None).files())
        assert used <= budget + world_size * sizes[-1]  # each may fetch one ahead while all others are in use
    assert len(store.fetched()) > 2 * 12  # what was evicted was fetched again
    for rank in ranks:
        rank.close()


def test_remote_logits_come_and_go_with_their_shards(tmp_path: Path, store: FakeStore) -> None:
    uri = put_shards(store, num_shards=8, tokens=[300 + 160 * number for number in range(8)])
    settings = make_settings(window_shards=2, seed=5)
    local = rows_of(TokenSplit.open(str(store.path(uri)), "train"))
    artifact = store_made_up(store.root, {"train": local})
    stored = open_logits(artifact, "train", local)
    far = dataclasses.replace(artifact, uri=artifact.uri.replace(str(store.root), BUCKET))
    opened = TokenSplit.open(uri, "train", tmp_path / "sizes")
    alone = opened.bytes_in_cache()
    open_logits(far, "train", rows_of(opened))
    sizes = opened.bytes_in_cache()
    assert sum(sizes) == sum(alone) + sum(info.bytes for info in artifact.manifest.files)
    budget = sum(sorted(sizes)[-4:])
    opened = TokenSplit.open(uri, "train", ShardCache(tmp_path / "cache", budget))
    teacher = open_logits(far, "train", rows_of(opened))
    near, remote = (
        Batches(rows_of(split), settings, rank=0, world_size=1, device=CPU, stored=logits)
        for split, logits in ((local.split, stored), (opened, teacher))
    )
    for cursor in range(2 * local.split.num_rows(16) // 16 + 1):
        for a, b in zip(batch_of(remote, cursor), batch_of(near, cursor), strict=True):
            assert len(a.stored) == 3
            assert all(torch.equal(x, y) for x, y in zip(a.stored, b.stored, strict=True))
        assert sum(size for _, size, _ in ShardFolder(tmp_path / "cache", None).files()) <= budget + max(sizes)
    fetched = store.fetched()
    assert {name.rsplit("/", 1)[-1] for name in fetched} >= {info.path[6:] for info in artifact.manifest.files}
    for batches in (near, remote):
        batches.close()


def test_validation_reads_remote_shards_and_lets_them_go(tmp_path: Path, store: FakeStore) -> None:
    uri = put_shards(store, num_shards=4, tokens=400, split="validation")
    settings = make_settings(validate_every=1, validation_tokens=10**6)
    split = TokenSplit.open(uri, "validation", ShardCache(tmp_path / "cache", 1))
    local = TokenSplit.open(str(store.path(uri)), "validation")
    options = {"rank": 0, "world_size": 1, "device": CPU}
    for _ in range(2):
        found = list(validation_batches(rows_of(split), settings, **options))
        expected = list(validation_batches(rows_of(local), settings, **options))
        assert all(torch.equal(a.targets, b.targets) for a, b in zip(found, expected, strict=True))
    assert len(list((tmp_path / "cache").glob("*.arrow"))) <= 2


def test_a_cache_too_small_for_a_step_is_refused(tmp_path: Path, store: FakeStore) -> None:
    uri = put_shards(store, num_shards=9, tokens=[*range(400, 409)])
    settings = make_settings(window_shards=2)
    sizes = TokenSplit.open(uri, "train", tmp_path / "cache").bytes_in_cache()
    needed = sum(sizes[-4:])
    split = open_split(uri, "train", needed - 1)
    with pytest.raises(ConfigError) as caught:
        check_cache(split, settings, field="pretrain.shard_cache_bytes")
    assert str(caught.value) == (
        f"pretrain.shard_cache_bytes ({needed - 1}) must be at least {needed}, the size of two windows of 2 shards; "
        "raise it or lower window_shards."
    )
    with pytest.raises(ConfigError, match=r"^shard_cache_bytes \("):
        make_batches(split, settings)
    check_cache(open_split(uri, "train", needed), settings, field="pretrain.shard_cache_bytes")
