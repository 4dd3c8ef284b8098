"""What a model said to rows of tokens: arrays of one shape a row, in Arrow files that are memory-mapped.

A file has consecutive rows of one shard, and a checksum of each, so that nothing is taken for what was said to others.
"""

import zlib
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from io import BufferedReader
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
from numpy.typing import DTypeLike, NDArray

from ray_ds import storage
from ray_ds.artifacts import Artifact
from ray_ds.data.rows import Row, Rows
from ray_ds.data.shard_folder import ShardFile
from ray_ds.data.shards import SHARD_SUFFIX, Split
from ray_ds.errors import ArtifactError

FILE_ROWS = "file_rows"
"""The fact with the rows of each file: `facts["file_rows"]["train"]["00000-00000.arrow"]`."""


@dataclass(frozen=True, kw_only=True, slots=True)
class RowRange:
    """Rows that share a file: `first` to `stop`, as they are numbered through the split's shards."""

    split: Split
    shard: int
    place: int
    """Number of the file among its shard's."""
    first: int
    stop: int

    @property
    def file(self) -> str:
        """Return the file's name in the folder of its split."""
        return f"{self.shard:05d}-{self.place:05d}{SHARD_SUFFIX}"


def plan_ranges(split: Split, shard_rows: Sequence[int], rows_per_file: int) -> list[RowRange]:
    """Return the files of a split: rows of a shard each, `rows_per_file` but for a shard's last."""
    ranges: list[RowRange] = []
    start = 0
    for shard, num_rows in enumerate(shard_rows):
        for place, first in enumerate(range(start, start + num_rows, rows_per_file)):
            stop = min(first + rows_per_file, start + num_rows)
            ranges.append(RowRange(split=split, shard=shard, place=place, first=first, stop=stop))
        start += num_rows
    return ranges


def checksum(row: Row) -> int:
    """Return what tells a row from others, 32 bits."""
    return zlib.crc32(row.targets.tobytes(), zlib.crc32(row.tokens.tobytes()))


def encode_rows(rows: Sequence[Row], arrays: Mapping[str, NDArray[Any]]) -> bytes:
    """Return rows, and what was said to them, (rows, ...) each, as a file."""
    columns = {
        "row": pa.array([checksum(row) for row in rows], pa.uint32()),
        **{name: _lists(values) for name, values in arrays.items()},
    }
    batch = pa.record_batch(list(columns.values()), names=list(columns))
    sink = pa.BufferOutputStream()
    with pa.ipc.new_file(sink, batch.schema) as writer:
        writer.write_batch(batch)
    data: bytes = sink.getvalue().to_pybytes()
    return data


def _lists(values: NDArray[Any]) -> pa.FixedSizeListArray:
    """Return a column with a list for each entry of the first dimension."""
    return pa.FixedSizeListArray.from_arrays(pa.array(values.reshape(-1)), values[0].size)


class Column(NamedTuple):
    """One of the arrays of a row."""

    shape: tuple[int, ...]
    dtype: DTypeLike
    """What it becomes in a batch; files may have a narrower type."""


class StoredRows:
    """What was said to the rows of a split, by the rows' numbers.

    Local files are mapped when they are first used. Those on an object store are fetched with the shards whose rows
    they have, into the same cache, and are let go with them.
    """

    def __init__(self, artifact: Artifact, split: Split, rows: Rows, columns: Mapping[str, Column]) -> None:
        """Take what was stored for rows.

        Raises:
            ArtifactError: it was stored for other rows.
        """
        self._columns = columns
        self._split = split
        self._artifact = artifact
        self._cache = rows.split.cache if storage.is_remote(artifact.uri) else None
        names: dict[str, int] = artifact.fact(FILE_ROWS, split)
        self._shards = [int(name.split("-")[0]) for name in names]
        found = np.zeros(len(rows.shard_rows), np.int64)
        np.add.at(found, self._shards, list(names.values()))
        if found.tolist() != list(rows.shard_rows):
            raise self._of_other_rows(f"{found.sum()} rows", f"must have {sum(rows.shard_rows)}, those of the shards")
        infos = {info.path: info for info in artifact.manifest.files}
        chosen = [infos[f"{split}/{name}"] for name in names]
        self._files = [ShardFile(uri=artifact.path(i.path), bytes=i.bytes, sha256=i.sha256) for i in chosen]
        self._ends = np.cumsum(list(names.values()), dtype=np.int64)
        self._mapped: dict[int, tuple[pa.RecordBatch, BufferedReader | None]] = {}
        if self._cache is not None:
            rows.split.beside = self

    def blank(self, num_rows: int) -> tuple[NDArray[Any], ...]:
        """Return room for what `row` returns, (num_rows, ...) each, for rows that may be padding."""
        return tuple(np.zeros((num_rows, *column.shape), column.dtype) for column in self._columns.values())

    def row(self, index: int, row: Row) -> tuple[NDArray[Any], ...]:
        """Return what was stored for a row, views of the file.

        Raises:
            ArtifactError: it was stored for another row, or the file is damaged.
        """
        file = int(np.searchsorted(self._ends, index, side="right"))
        batch, place = self._open(file), index - (int(self._ends[file - 1]) if file else 0)
        if batch.column("row")[place].as_py() != checksum(row):
            raise self._of_other_rows(f"row {index} of {self._split}", "must have been of the same tokens")
        return tuple(
            _list_at(batch.column(name), place).reshape(column.shape) for name, column in self._columns.items()
        )

    def files_of(self, shard: int) -> list[ShardFile]:
        """Return the files on an object store that go with a shard; none where they are local."""
        if self._cache is None:
            return []
        return [file for file, own in zip(self._files, self._shards, strict=True) if own == shard]

    def keep_mapped(self, shards: Collection[int]) -> None:
        """Let the cache evict the files of all shards but these; local files stay mapped."""
        for file in [file for file in self._mapped if self._shards[file] not in shards]:
            lock = self._mapped[file][1]
            if lock is not None:
                del self._mapped[file]
                lock.close()

    def _open(self, file: int) -> pa.RecordBatch:
        """Return a file's only record batch."""
        if file not in self._mapped:
            lock = None if self._cache is None else self._cache.open(self._files[file])
            uri = self._files[file].uri
            path = storage.local_path(uri) if lock is None else Path(lock.name)
            self._mapped[file] = self._map_batch(uri, path), lock
        return self._mapped[file][0]

    def _map_batch(self, uri: str, path: Path) -> pa.RecordBatch:
        """Return a file's only record batch, backed by the file."""
        try:
            return pa.ipc.open_file(pa.memory_map(str(path))).get_batch(0)
        except (pa.ArrowException, OSError) as error:
            reason = str(error).splitlines()[0]
            allowed = f"must be one record batch of {', '.join(self._columns)}"
            action = f"run step {self._artifact.manifest.step} again"
            raise ArtifactError(uri, reason, allowed, action) from error

    def _of_other_rows(self, value: str, allowed: str) -> ArtifactError:
        action = f"run step {self._artifact.manifest.step} on these shards"
        return ArtifactError(self._artifact.uri, value, allowed, action)


def _list_at(column: pa.FixedSizeListArray, place: int) -> NDArray[Any]:
    """Return the list at a place of a column, a view of it."""
    size = column.type.list_size
    values: NDArray[Any] = column.values.to_numpy(zero_copy_only=True)
    return values[place * size : (place + 1) * size]
