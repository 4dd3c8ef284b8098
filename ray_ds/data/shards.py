"""Token shards: Arrow IPC files, uncompressed and memory-mapped, a row a document."""

import itertools
import tempfile
from collections.abc import Collection, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from io import BufferedReader
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np
import pyarrow as pa
from numpy.typing import DTypeLike, NDArray

from ray_ds import storage
from ray_ds.artifacts import TokenShards, open_artifact
from ray_ds.data.shard_cache import ShardCache
from ray_ds.data.shard_folder import ShardFile
from ray_ds.errors import ArtifactError

Split = Literal["train", "validation"]
SPLITS: tuple[Split, ...] = ("train", "validation")

SHARD_SUFFIX = ".arrow"
MAX_UINT16_VOCAB = 1 << 16
SHARD_TOKENS = "shard_tokens"
"""The fact of TokenShards with the tokens of each shard: `facts["shard_tokens"]["train"]["00000.arrow"]`."""
EDGE_BYTES = 1 << 16
"""What is read of a shard's head and tail to learn how many tokens it has; both descriptions are far smaller."""
READERS = 16


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


class Beside(Protocol):
    """Files on an object store that are fetched, and kept, with the shards they belong to."""

    def files_of(self, shard: int) -> list[ShardFile]:
        """Return those that go with a shard."""

    def keep_mapped(self, shards: Collection[int]) -> None:
        """Let the cache evict those of all shards but these."""


class TokenSplit:
    """The shards of one split, memory-mapped: nothing is read before it is used, and nothing is copied.

    Local shards are all mapped at once. Those on an object store are fetched into the node's cache when they are first
    used, or ahead of it (`read_ahead`), and stay mapped until `keep_mapped` or `release` lets them go.
    """

    def __init__(
        self,
        num_tokens: Sequence[int],
        *,
        mapped: Mapping[int, MappedShard] | None = None,
        files: Sequence[ShardFile] = (),
        cache: ShardCache | None = None,
    ) -> None:
        self.tokens_per_shard = tuple(num_tokens)
        self._mapped = dict(mapped or {})
        self._streams = {shard: found.tokens for shard, found in self._mapped.items()}
        self._files = files
        self._cache = cache
        self._row_ends: dict[int, NDArray[np.int64]] = {}
        self.beside: Beside | None = None
        """What else is to be at hand where a shard is; only for shards on an object store."""

    @classmethod
    def open(cls, folder_uri: str, split: Split, cache: Path | ShardCache | None = None) -> "TokenSplit":
        """Open the split of a TokenShards folder.

        Args:
            cache: local folder for copies of shards on an object store, or their cache; not needed for local shards.
        Raises:
            ArtifactError: there are no shards, or one is damaged, or those on an object store have no manifest.
        """
        folder = storage.join(folder_uri, split)
        if storage.is_remote(folder):
            assert cache is not None, "shards on an object store need a cache"
            files, num_tokens = _list_remote(folder_uri, split)
            _check_any(folder, files)
            return cls(num_tokens, files=files, cache=ShardCache(cache) if isinstance(cache, Path) else cache)
        uris = [storage.join(folder, e.path) for e in storage.list_files(folder) if e.path.endswith(SHARD_SUFFIX)]
        _check_any(folder, uris)
        mapped = [MappedShard(_map_shard(uri, storage.local_path(uri)), None) for uri in uris]
        return cls([len(shard.tokens) for shard in mapped], mapped=dict(enumerate(mapped)))

    @property
    def num_shards(self) -> int:
        """Return the number of shards."""
        return len(self.tokens_per_shard)

    @property
    def num_tokens(self) -> int:
        """Return the number of tokens, BOS of each document included."""
        return sum(self.tokens_per_shard)

    @property
    def num_documents(self) -> int:
        """Return the number of documents; every shard is opened for it."""
        return sum(len(self.shard(shard).offsets) - 1 for shard in range(self.num_shards))

    @property
    def cache(self) -> ShardCache | None:
        """Return the node's cache; None for local shards."""
        return self._cache

    def bytes_in_cache(self) -> list[int]:
        """Return what each shard takes in the node's cache, with what is beside it; empty for local shards."""
        return [sum(file.bytes for file in self._with_beside(shard)) for shard in range(len(self._files))]

    def shard_tokens(self, shard: int) -> NDArray[Any]:
        """Return a shard's token stream (uint16 or uint32), a view of the file: its documents one after another.

        Raises:
            ArtifactError: it comes from an object store and is damaged there.
            ClusterError: the node's disk has no room for it.
        """
        if shard not in self._streams:
            self._streams[shard] = self.shard(shard).tokens
        return self._streams[shard]

    def read_ahead(self, order: Sequence[int], count: int) -> None:
        """Fetch the first `count` shards of an order in the background, and evict what is late in it first."""
        if self._cache is not None:
            files = [self._with_beside(shard) for shard in order]
            self._cache.read_ahead([file for each in files for file in each], sum(map(len, files[:count])))

    def _with_beside(self, shard: int) -> list[ShardFile]:
        """Return a shard's file and those that go with it."""
        return [self._files[shard], *([] if self.beside is None else self.beside.files_of(shard))]

    def keep_mapped(self, shards: Collection[int]) -> None:
        """Let the cache evict all shards but these; local shards stay mapped."""
        if self._cache is not None:
            for shard in [shard for shard in self._mapped if shard not in shards]:
                self._streams.pop(shard, None)
                lock = self._mapped.pop(shard).lock
                assert lock is not None, "a cached file is locked"
                lock.close()
            if self.beside is not None:
                self.beside.keep_mapped(shards)

    def release(self) -> None:
        """Stop reading ahead, and let the cache evict all shards; those used later are mapped again."""
        self.keep_mapped(())
        if self._cache is not None:
            self._cache.stop_reading()

    def shards_of(self, indices: NDArray[np.int64], seq_len: int) -> list[int]:
        """Return the shards that rows are in, in order."""
        return [int(shard) for shard in np.unique(np.searchsorted(self._ends(seq_len), indices, side="right"))]

    def shard_rows(self, seq_len: int) -> list[int]:
        """Return how many whole rows each shard has."""
        return [max(tokens - 1, 0) // seq_len for tokens in self.tokens_per_shard]

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
        return self.shard_tokens(shard)[start : start + seq_len + 1].astype(np.int64)

    def documents(self) -> Iterator[NDArray[Any]]:
        """Yield each document's ids, BOS first, as views of the files."""
        for shard in range(self.num_shards):
            tokens = self.shard_tokens(shard)
            for start, stop in itertools.pairwise(self.shard(shard).offsets):
                yield tokens[start:stop]

    def doc_ids(self) -> Iterator[str]:
        """Yield the document ids, in the order of `documents`."""
        for shard in range(self.num_shards):
            yield from self.shard(shard).batch.column("doc_id").to_pylist()

    def shard(self, shard: int) -> MappedShard:
        """Return a shard, mapped now if it was not."""
        if shard not in self._mapped:
            assert self._cache is not None, "local shards are all mapped"
            file = self._files[shard]
            lock = self._cache.open(file)
            batch = _map_shard(file.uri, Path(lock.name))
            found, expected = _count_tokens(batch), self.tokens_per_shard[shard]
            if found != expected:
                allowed = f"must have {expected} tokens, as its manifest says"
                raise ArtifactError(file.uri, f"{found} tokens", allowed, "run the tokenize step again")
            self._mapped[shard] = MappedShard(batch, lock)
        return self._mapped[shard]

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


def _count_tokens(batch: pa.RecordBatch) -> int:
    return len(batch.column("tokens").values)


def _list_remote(folder_uri: str, split: Split) -> tuple[list[ShardFile], list[int]]:
    """Return the shards of a split on an object store, by what the manifest says, and the tokens of each."""
    manifest = open_artifact(folder_uri, [TokenShards]).manifest
    names = [info for info in manifest.files if info.path.startswith(f"{split}/") and info.path.endswith(SHARD_SUFFIX)]
    files = [ShardFile(uri=storage.join(folder_uri, info.path), bytes=info.bytes, sha256=info.sha256) for info in names]
    facts: Any = manifest.facts
    if SHARD_TOKENS in facts:
        return files, [facts[SHARD_TOKENS][split][info.path.removeprefix(f"{split}/")] for info in names]
    with ThreadPoolExecutor(READERS) as readers:  # made before the manifest had them
        return files, list(readers.map(lambda file: read_num_tokens(file.uri, file.bytes), files))


def read_num_tokens(uri: str, num_bytes: int) -> int:
    """Return how many tokens a shard has from its two ends, without what lies between.

    Arrow says at the end of a file where its record batch begins, and there how long its columns are. A file with holes
    in place of the columns' values is enough for the reader, which maps it.

    Raises:
        ArtifactError: it is no shard.
    """
    system, path = storage.filesystem(uri)
    with system.open_input_file(path) as remote, tempfile.NamedTemporaryFile() as ends:
        for start in (0, max(num_bytes - EDGE_BYTES, 0)):
            ends.seek(start)
            ends.write(remote.read_at(min(EDGE_BYTES, num_bytes - start), start))
        ends.flush()
        return _count_tokens(_map_shard(uri, Path(ends.name)))


def _check_any(folder: str, shards: Sequence[object]) -> None:
    if not shards:
        raise ArtifactError(folder, "no shards", "must hold Arrow files of token ids", "run the tokenize step")


def _damaged(uri: str, value: str) -> ArtifactError:
    allowed = "must be one record batch of doc_id and tokens (large_list of uint16 or uint32)"
    return ArtifactError(uri, value, allowed, "restore the file or run the tokenize step again")
