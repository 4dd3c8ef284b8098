"""The shards of a split as one stream of tokens: memory-mapped, and from an object store through the node's cache."""

import itertools
from collections.abc import Collection, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np
from numpy.typing import NDArray

from ray_ds import storage
from ray_ds.artifacts import TokenShards, open_artifact
from ray_ds.data.shard_cache import ShardCache
from ray_ds.data.shard_file import MappedShard, count_tokens, map_shard, read_num_tokens
from ray_ds.data.shard_folder import ShardFile
from ray_ds.errors import ArtifactError

Split = Literal["train", "validation"]
SPLITS: tuple[Split, ...] = ("train", "validation")

SHARD_SUFFIX = ".arrow"
SHARD_TOKENS = "shard_tokens"
"""The fact of TokenShards with the tokens of each shard: `facts["shard_tokens"]["train"]["00000.arrow"]`."""
READERS = 16


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
        mapped = [MappedShard(map_shard(uri, storage.local_path(uri)), None) for uri in uris]
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
            batch = map_shard(file.uri, Path(lock.name))
            found, expected = count_tokens(batch), self.tokens_per_shard[shard]
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


def _check_any(folder: str, shards: Sequence[object]) -> None:
    if not shards:
        raise ArtifactError(folder, "no shards", "must hold Arrow files of token ids", "run the tokenize step")
