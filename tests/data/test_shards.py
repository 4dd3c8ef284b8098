"""Shards hold documents exactly, rows of any length cover every target once, and those of an object store come late."""

import gc
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from ray_ds.data.rows import StreamRows, check_any_row
from ray_ds.data.shard_cache import ShardCache
from ray_ds.data.shard_file import token_dtype, write_shard
from ray_ds.data.shards import TokenSplit
from ray_ds.errors import ArtifactError, InputError
from tests.data.fake_store import FakeStore, installed_store, put_shards

COUNTS = [500, 90_000, 1, 33_000]


def random_documents(seed: int, count: int, vocab_size: int = 4096) -> list[np.ndarray]:
    rng = np.random.default_rng(seed)
    dtype = token_dtype(vocab_size)
    return [np.concatenate([[0], rng.integers(3, vocab_size, rng.integers(0, 60))]).astype(dtype) for _ in range(count)]


def write_split(folder: Path, shards: list[list[np.ndarray]], vocab_size: int = 4096) -> TokenSplit:
    for i, documents in enumerate(shards):
        ids = [f"s{i}:{j}" for j in range(len(documents))]
        write_shard(str(folder / "train" / f"{i:05d}.arrow"), documents, ids, token_dtype(vocab_size))
    return TokenSplit.open(str(folder), "train")


def test_documents_come_back(tmp_path: Path) -> None:
    shards = [random_documents(i, 7) for i in range(3)]
    split = write_split(tmp_path, shards)
    written = [document for shard in shards for document in shard]
    assert split.num_shards == 3 and split.num_documents == 21
    assert split.num_tokens == sum(map(len, written))
    assert [found.tolist() for found in split.documents()] == [document.tolist() for document in written]
    assert list(split.doc_ids()) == [f"s{i}:{j}" for i in range(3) for j in range(7)]


def test_shards_are_memory_mapped_and_the_same_bytes(tmp_path: Path) -> None:
    write_split(tmp_path / "a", [random_documents(0, 5000)])
    gc.collect()  # what other tests left must not be freed between the two readings
    before = pa.total_allocated_bytes()
    split = TokenSplit.open(str(tmp_path / "a"), "train")
    assert pa.total_allocated_bytes() == before
    assert not split.shard_tokens(0).flags.owndata and not split.shard_tokens(0).flags.writeable
    write_split(tmp_path / "b", [random_documents(0, 5000)])
    assert (tmp_path / "a/train/00000.arrow").read_bytes() == (tmp_path / "b/train/00000.arrow").read_bytes()


@pytest.mark.parametrize("seq_len", [1, 2, 7, 16, 64, 1000])
def test_rows_have_every_target_once(tmp_path: Path, seq_len: int) -> None:
    split = write_split(tmp_path, [random_documents(i, count) for i, count in enumerate((9, 1, 30, 2))])
    rows = [split.row(i, seq_len) for i in range(split.num_rows(seq_len))]
    expected: list[list[int]] = []
    for shard in range(split.num_shards):
        stream = split.shard_tokens(shard).tolist()
        whole = (len(stream) - 1) // seq_len
        expected += [stream[i * seq_len : (i + 1) * seq_len + 1] for i in range(whole)]
        assert split.shard_rows(seq_len)[shard] == whole
    assert [row.tolist() for row in rows] == expected
    assert all(row.dtype == np.int64 for row in rows)
    with pytest.raises(IndexError):
        split.row(len(rows), seq_len)


def test_empty_documents_and_shards_hold(tmp_path: Path) -> None:
    split = write_split(tmp_path, [[], [np.array([0], np.uint16)]])
    assert split.num_documents == 1 and split.num_tokens == 1 and split.num_rows(4) == 0
    with pytest.raises(InputError, match=r"\(its longest shard has 1 tokens\) must have a shard of at least seq_len"):
        check_any_row(StreamRows(split, 4), str(tmp_path), 4)


def test_missing_and_damaged_shards_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match=r"validation \(no shards\) must hold Arrow files"):
        TokenSplit.open(str(tmp_path), "validation")
    write_split(tmp_path, [random_documents(0, 4)])
    path = tmp_path / "train/00000.arrow"
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(ArtifactError, match="must be one record batch of doc_id and tokens"):
        TokenSplit.open(str(tmp_path), "train")
    with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_file(sink, pa.schema([("x", pa.int8())])) as writer:
        writer.write_table(pa.table({"x": pa.array([1], pa.int8())}))
    with pytest.raises(ArtifactError, match=r"\(columns x\)"):
        TokenSplit.open(str(tmp_path), "train")


@pytest.fixture
def store(tmp_path: Path) -> Iterator[FakeStore]:
    with installed_store(tmp_path) as store:
        yield store


@pytest.mark.parametrize("has_counts", [True, False])
def test_remote_shards_are_counted_without_a_fetch(tmp_path: Path, store: FakeStore, has_counts: bool) -> None:
    uri = put_shards(store, num_shards=4, tokens=COUNTS, has_counts=has_counts)
    split = TokenSplit.open(uri, "train", tmp_path / "cache")
    assert split.tokens_per_shard == tuple(COUNTS) and split.num_tokens == sum(COUNTS)
    assert split.shard_rows(100) == [4, 899, 0, 329] and split.num_rows(100) == 1232
    check_any_row(StreamRows(split, 100), uri, 100)
    assert store.fetched() == []


def test_remote_shards_are_those_written_and_fetched_when_used(tmp_path: Path, store: FakeStore) -> None:
    uri = put_shards(store, num_shards=4, tokens=COUNTS)
    local = TokenSplit.open(str(store.path(uri)), "train")
    split = TokenSplit.open(uri, "train", tmp_path / "cache")
    for index in (0, 3, 4, 1231):
        assert split.row(index, 100).tolist() == local.row(index, 100).tolist()
    assert [name.rpartition("/")[2] for name in store.fetched()] == ["00000.arrow", "00001.arrow", "00003.arrow"]
    assert not split.shard_tokens(0).flags.owndata and not split.shard_tokens(0).flags.writeable
    assert list(split.doc_ids()) == list(local.doc_ids()) and split.num_documents == local.num_documents == 4
    assert [ids.tolist() for ids in split.documents()] == [ids.tolist() for ids in local.documents()]
    assert len(store.fetched()) == 4


def test_a_remote_shard_in_use_is_not_evicted_until_it_is_let_go(tmp_path: Path, store: FakeStore) -> None:
    uri = put_shards(store, num_shards=3, tokens=1000)
    cache = ShardCache(tmp_path / "cache", 1)  # room for nothing that is not in use
    split = TokenSplit.open(uri, "train", cache)

    def num_cached() -> int:
        return len(list((tmp_path / "cache").glob("*.arrow")))

    kept = [split.shard_tokens(shard).copy() for shard in (0, 1)]
    assert num_cached() == 2
    split.keep_mapped([1])
    split.shard_tokens(2)
    assert num_cached() == 2 and len(store.fetched()) == 3
    split.keep_mapped(())
    assert [split.shard_tokens(shard).tolist() for shard in (0, 1)] == [tokens.tolist() for tokens in kept]
    split.release()
    split.shard_tokens(2)
    assert num_cached() == 1


def test_remote_shards_need_a_manifest_that_is_right(tmp_path: Path, store: FakeStore) -> None:
    uri = put_shards(store, num_shards=2, tokens=1000)
    with pytest.raises(ArtifactError, match=r"validation \(no shards\) must hold Arrow files"):
        TokenSplit.open(uri, "validation", tmp_path / "cache")
    manifest = store.path(uri) / "manifest.json"
    manifest.write_text(manifest.read_text().replace('"00001.arrow": 1000', '"00001.arrow": 999'))
    split = TokenSplit.open(uri, "train", tmp_path / "cache")
    split.shard_tokens(0)
    with pytest.raises(ArtifactError, match=r"\(1000 tokens\) must have 999 tokens, as its manifest says; run the tok"):
        split.shard_tokens(1)
    manifest.unlink()
    with pytest.raises(ArtifactError, match=r"\(no manifest\) must be a finished TokenShards"):
        TokenSplit.open(uri, "train", tmp_path / "cache")
