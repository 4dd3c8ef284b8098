from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from ray_ds.artifacts import find_artifact
from ray_ds.data.shard_file import MappedShard, map_shard, read_num_tokens, token_dtype, write_shard
from ray_ds.errors import ArtifactError
from tests.data.fake_store import FakeStore, installed_store, put_shards


@pytest.mark.parametrize(("vocab_size", "dtype"), [(259, "uint16"), (1 << 16, "uint16"), ((1 << 16) + 1, "uint32")])
def test_ids_take_the_narrowest_type(tmp_path: Path, vocab_size: int, dtype: str) -> None:
    path = tmp_path / "0.arrow"
    write_shard(str(path), [np.array([0, vocab_size - 1], token_dtype(vocab_size))], ["a"], token_dtype(vocab_size))
    tokens = MappedShard(map_shard(str(path), path), None).tokens
    assert tokens.dtype == dtype and tokens.tolist() == [0, vocab_size - 1]


def test_file_is_plain_arrow(tmp_path: Path) -> None:
    documents = [[0, 5, 7], [0], [0, 4095]]
    write_shard(str(tmp_path / "0.arrow"), [np.array(ids, np.uint16) for ids in documents], ["a", "b", "c"], np.uint16)
    with pa.OSFile(str(tmp_path / "0.arrow")) as file:
        table = pa.ipc.open_file(file).read_all()
    assert table.schema.field("tokens").type == pa.large_list(pa.uint16())
    assert table.to_pydict() == {"doc_id": ["a", "b", "c"], "tokens": documents}


@pytest.fixture
def store(tmp_path: Path) -> Iterator[FakeStore]:
    with installed_store(tmp_path) as store:
        yield store


def test_counting_a_shard_reads_its_ends_only(store: FakeStore) -> None:
    """Between the ends lies nothing that matters."""
    uri = put_shards(store, num_shards=1, tokens=[300_000])
    artifact = find_artifact(uri)
    assert artifact is not None
    (info,) = artifact.manifest.files
    path = store.path(uri) / info.path
    data = bytearray(path.read_bytes())
    assert len(data) == info.bytes > 590_000
    data[1 << 16 : -(1 << 16)] = bytes(len(data) - (2 << 16))
    path.write_bytes(data)
    assert read_num_tokens(f"{uri}/{info.path}", info.bytes) == 300_000
    path.write_bytes(data[:-100] + b"x" * 100)
    with pytest.raises(ArtifactError, match="must be one record batch of doc_id and tokens"):
        read_num_tokens(f"{uri}/{info.path}", info.bytes)
