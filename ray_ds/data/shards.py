"""Token shards: Arrow IPC files, uncompressed and memory-mapped, a row a document."""

import itertools
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa
from numpy.typing import DTypeLike, NDArray

from ray_ds import storage
from ray_ds.errors import ArtifactError, InputError

Split = Literal["train", "validation"]
SPLITS: tuple[Split, ...] = ("train", "validation")

SHARD_SUFFIX = ".arrow"
MAX_UINT16_VOCAB = 1 << 16


def token_dtype(vocab_size: int) -> type[np.uint16] | type[np.uint32]:
    """Return the narrowest type that shards use for ids below `vocab_size`."""
    return np.uint16 if vocab_size <= MAX_UINT16_VOCAB else np.uint32


def write_shard(uri: str, documents: Sequence[NDArray[Any]], doc_ids: Sequence[str], dtype: DTypeLike) -> None:
    """Write documents (1-D arrays of ids) as one shard, atomically."""
    storage.write_bytes(uri, encode_shard(documents, doc_ids, dtype))


def encode_shard(documents: Sequence[NDArray[Any]], doc_ids: Sequence[str], dtype: DTypeLike) -> bytes:
    """Return documents (1-D arrays of ids) as one shard; the same documents give the same bytes.

    All documents are one record batch, so that the flat values of `tokens` are the shard's token stream.
    """
    assert len(documents) == len(doc_ids)
    offsets = np.zeros(len(documents) + 1, np.int64)
    np.cumsum([len(document) for document in documents], out=offsets[1:])
    flat = np.concatenate([np.zeros(0, dtype), *documents]).astype(dtype, casting="same_kind")
    tokens = pa.LargeListArray.from_arrays(pa.array(offsets), pa.array(flat))
    batch = pa.record_batch([pa.array(doc_ids, pa.string()), tokens], names=["doc_id", "tokens"])
    sink = pa.BufferOutputStream()
    with pa.ipc.new_file(sink, batch.schema) as writer:
        writer.write_batch(batch)
    data: bytes = sink.getvalue().to_pybytes()
    return data


class TokenSplit:
    """The shards of one split, memory-mapped: nothing is read before it is used, and nothing is copied."""

    def __init__(self, shards: Sequence[pa.RecordBatch]) -> None:
        self._batches = shards
        columns = [batch.column("tokens") for batch in shards]
        self._tokens: list[NDArray[Any]] = [column.values.to_numpy(zero_copy_only=True) for column in columns]
        self._offsets: list[NDArray[np.int64]] = [column.offsets.to_numpy(zero_copy_only=True) for column in columns]
        self._row_ends: dict[int, NDArray[np.int64]] = {}

    @classmethod
    def open(cls, folder_uri: str, split: Split, cache: Path | None = None) -> "TokenSplit":
        """Open the split of a TokenShards folder.

        Args:
            cache: local folder for copies of shards on an object store; not needed for local shards.
        Raises:
            ArtifactError: there are no shards, or one is damaged.
        """
        folder = storage.join(folder_uri, split)
        names = [entry.path for entry in storage.list_files(folder) if entry.path.endswith(SHARD_SUFFIX)]
        if not names:
            raise ArtifactError(folder, "no shards", "must hold Arrow files of token ids", "run the tokenize step")
        assert cache is not None or not storage.is_remote(folder), "shards on an object store need a cache folder"
        uris = [storage.join(folder, name) for name in names]
        return cls([_map_shard(uri, storage.download(uri, cache or Path())) for uri in uris])

    @property
    def num_shards(self) -> int:
        """Return the number of shards."""
        return len(self._tokens)

    @property
    def num_tokens(self) -> int:
        """Return the number of tokens, BOS of each document included."""
        return sum(map(len, self._tokens))

    @property
    def num_documents(self) -> int:
        """Return the number of documents."""
        return sum(len(offsets) - 1 for offsets in self._offsets)

    def shard_tokens(self, shard: int) -> NDArray[Any]:
        """Return a shard's token stream (uint16 or uint32), a view of the file: its documents one after another."""
        return self._tokens[shard]

    def shard_rows(self, seq_len: int) -> list[int]:
        """Return how many whole rows each shard has."""
        return [max(len(tokens) - 1, 0) // seq_len for tokens in self._tokens]

    def num_rows(self, seq_len: int) -> int:
        """Return how many whole rows the split has; what is left at a shard's end is in none."""
        return int(self._ends(seq_len)[-1])

    def row(self, index: int, seq_len: int) -> NDArray[np.int64]:
        """Return row `index`, (seq_len + 1,): inputs and, shifted by one, targets.

        Rows run through a shard's documents as they follow each other, and overlap by one token, so that every token
        of a shard but its first is a target once. They never run from one shard into the next.
        """
        ends = self._ends(seq_len)
        if not 0 <= index < ends[-1]:
            raise IndexError(f"row {index} of {ends[-1]}")
        shard = int(np.searchsorted(ends, index, side="right"))
        start = (index - (int(ends[shard - 1]) if shard else 0)) * seq_len
        return self._tokens[shard][start : start + seq_len + 1].astype(np.int64)

    def documents(self) -> Iterator[NDArray[Any]]:
        """Yield each document's ids, BOS first, as views of the files."""
        for tokens, offsets in zip(self._tokens, self._offsets, strict=True):
            for start, stop in itertools.pairwise(offsets):
                yield tokens[start:stop]

    def doc_ids(self) -> Iterator[str]:
        """Yield the document ids, in the order of `documents`."""
        for batch in self._batches:
            yield from batch.column("doc_id").to_pylist()

    def _ends(self, seq_len: int) -> NDArray[np.int64]:
        """Return the running sum of `shard_rows`."""
        if seq_len not in self._row_ends:
            assert seq_len > 0
            self._row_ends[seq_len] = np.cumsum(self.shard_rows(seq_len), dtype=np.int64)
        return self._row_ends[seq_len]


def _map_shard(uri: str, path: Path) -> pa.RecordBatch:
    """Return a shard's only record batch, backed by the file."""
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


def _damaged(uri: str, value: str) -> ArtifactError:
    allowed = "must be one record batch of doc_id and tokens (large_list of uint16 or uint32)"
    return ArtifactError(uri, value, allowed, "restore the file or run the tokenize step again")


def check_rows(split: TokenSplit, folder_uri: str, seq_len: int) -> None:
    """Make sure that a split has at least one row.

    Raises:
        InputError: every shard is shorter than `seq_len + 1` tokens.
    """
    if not split.num_rows(seq_len):
        longest = max(len(split.shard_tokens(shard)) for shard in range(split.num_shards))
        raise InputError(
            folder_uri,
            f"its longest shard has {longest} tokens",
            f"must have a shard of at least seq_len + 1 = {seq_len + 1} tokens",
            "give more text or shorten seq_len",
        )
