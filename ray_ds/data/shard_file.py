"""A token shard: an Arrow IPC file, uncompressed and memory-mapped, a row a document."""

import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from io import BufferedReader
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import DTypeLike, NDArray

from ray_ds import storage
from ray_ds.errors import ArtifactError

MAX_UINT16_VOCAB = 1 << 16
EDGE_BYTES = 1 << 16
"""What is read of a shard's head and tail to learn how many tokens it has; both descriptions are far smaller."""


def token_dtype(vocab_size: int) -> type[np.uint16] | type[np.uint32]:
    """Return the narrowest type that shards use for ids below `vocab_size`."""
    return np.uint16 if vocab_size <= MAX_UINT16_VOCAB else np.uint32


def write_shard(
    uri: str,
    documents: Sequence[NDArray[Any]],
    doc_ids: Sequence[str],
    dtype: DTypeLike,
    loss_masks: Sequence[NDArray[Any]] | None = None,
) -> None:
    """Write documents (1-D arrays of ids) as one shard, atomically."""
    storage.write_bytes(uri, encode_shard(documents, doc_ids, dtype, loss_masks))


def encode_shard(
    documents: Sequence[NDArray[Any]],
    doc_ids: Sequence[str],
    dtype: DTypeLike,
    loss_masks: Sequence[NDArray[Any]] | None = None,
) -> bytes:
    """Return documents (1-D arrays of ids) as one shard; the same documents give the same bytes.

    All documents are one record batch, so that the flat values of `tokens` are the shard's token stream.

    Args:
        loss_masks: for each document 1 where a token is learnt and 0 where it is only read; a document's first token
            is never learnt. With them the shard also has `loss_mask` and, of each document, `num_targets`.
    """
    assert len(documents) == len(doc_ids)
    offsets = np.zeros(len(documents) + 1, np.int64)
    np.cumsum([len(document) for document in documents], out=offsets[1:])
    columns = {"doc_id": pa.array(doc_ids, pa.string()), "tokens": _flat_list(documents, offsets, dtype)}
    if loss_masks is not None:
        assert [len(mask) for mask in loss_masks] == [len(document) for document in documents]
        columns["loss_mask"] = _flat_list(loss_masks, offsets, np.uint8)
        columns["num_targets"] = pa.array([int(mask[1:].sum()) for mask in loss_masks], pa.int64())
    batch = pa.record_batch(list(columns.values()), names=list(columns))
    sink = pa.BufferOutputStream()
    with pa.ipc.new_file(sink, batch.schema) as writer:
        writer.write_batch(batch)
    data: bytes = sink.getvalue().to_pybytes()
    return data


def _flat_list(parts: Sequence[NDArray[Any]], offsets: NDArray[np.int64], dtype: DTypeLike) -> pa.LargeListArray:
    """Return a column of lists whose values lie one after another."""
    flat = np.concatenate([np.zeros(0, dtype), *parts]).astype(dtype, casting="same_kind")
    return pa.LargeListArray.from_arrays(pa.array(offsets), pa.array(flat))


@dataclass(frozen=True, slots=True)
class MappedShard:
    """A shard in memory that is a file on this node."""

    batch: pa.RecordBatch
    lock: BufferedReader | None
    """Keeps a cached file from being evicted; None for a file that lies where it was made."""

    @property
    def tokens(self) -> NDArray[Any]:
        """Its documents one after another, a view of the file."""
        tokens: NDArray[Any] = self.batch.column("tokens").values.to_numpy(zero_copy_only=True)
        return tokens

    @property
    def offsets(self) -> NDArray[np.int64]:
        """Where its documents begin, and where the last one ends."""
        offsets: NDArray[np.int64] = self.batch.column("tokens").offsets.to_numpy(zero_copy_only=True)
        return offsets

    @property
    def loss_mask(self) -> NDArray[np.uint8]:
        """1 for each token that is learnt, a view of the file; for shards written with masks."""
        mask: NDArray[np.uint8] = self.batch.column("loss_mask").values.to_numpy(zero_copy_only=True)
        return mask

    @property
    def num_targets(self) -> NDArray[np.int64]:
        """How many tokens of each document are learnt; for shards written with masks."""
        counts: NDArray[np.int64] = self.batch.column("num_targets").to_numpy(zero_copy_only=True)
        return counts


def map_shard(uri: str, path: Path) -> pa.RecordBatch:
    """Return a shard's only record batch, backed by the file.

    Args:
        uri: of the shard, for messages; the file may be its copy.
    Raises:
        ArtifactError: it is no shard.
    """
    try:
        reader = pa.ipc.open_file(pa.memory_map(str(path)))
        batch = reader.get_batch(0) if reader.num_record_batches == 1 else None
    except (pa.ArrowException, OSError) as error:
        raise _damaged(uri, str(error).splitlines()[0]) from error
    if batch is None:
        raise _damaged(uri, f"{reader.num_record_batches} record batches")
    types = {field.name: field.type for field in batch.schema}
    if types.get("tokens") not in (pa.large_list(pa.uint16()), pa.large_list(pa.uint32())) or "doc_id" not in types:
        raise _damaged(uri, f"columns {', '.join(types)}")
    return batch


def count_tokens(batch: pa.RecordBatch) -> int:
    """Return the tokens of a shard's record batch."""
    return len(batch.column("tokens").values)


def read_num_tokens(uri: str, num_bytes: int) -> int:
    """Return how many tokens a shard has from its two ends, without what lies between.

    Arrow says at the end of a file where its record batch begins, and there how long its columns are. A file with holes
    in place of the columns' values is enough for the reader, which maps it.

    Raises:
        ArtifactError: it is no shard.
    """
    system, path = storage.filesystem(uri)
    with storage.failures_named(uri), system.open_input_file(path) as remote, tempfile.NamedTemporaryFile() as ends:
        for start in (0, max(num_bytes - EDGE_BYTES, 0)):
            ends.seek(start)
            ends.write(remote.read_at(min(EDGE_BYTES, num_bytes - start), start))
        ends.flush()
        return count_tokens(map_shard(uri, Path(ends.name)))


def _damaged(uri: str, value: str) -> ArtifactError:
    allowed = "must be one record batch of doc_id and tokens (large_list of uint16 or uint32)"
    return ArtifactError(uri, value, allowed, "restore the file or run the tokenize step again")
