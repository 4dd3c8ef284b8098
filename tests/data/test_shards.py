"""Shards hold documents exactly, and rows of any length cover every target once."""

import gc
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from ray_ds.data.shards import TokenSplit, check_rows, token_dtype, write_shard
from ray_ds.errors import ArtifactError, InputError


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


@pytest.mark.parametrize(("vocab_size", "dtype"), [(259, "uint16"), (1 << 16, "uint16"), ((1 << 16) + 1, "uint32")])
def test_ids_take_the_narrowest_type(tmp_path: Path, vocab_size: int, dtype: str) -> None:
    top = np.array([0, vocab_size - 1], token_dtype(vocab_size))
    split = write_split(tmp_path, [[top]], vocab_size)
    assert split.shard_tokens(0).dtype == dtype and split.shard_tokens(0).tolist() == [0, vocab_size - 1]


def test_file_is_plain_arrow(tmp_path: Path) -> None:
    documents = random_documents(0, 4)
    write_split(tmp_path, [documents])
    with pa.OSFile(str(tmp_path / "train/00000.arrow")) as file:
        table = pa.ipc.open_file(file).read_all()
    assert table.schema.field("tokens").type == pa.large_list(pa.uint16())
    assert table.to_pylist() == [{"doc_id": f"s0:{i}", "tokens": d.tolist()} for i, d in enumerate(documents)]


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
        check_rows(split, str(tmp_path), 4)


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
