"""What a teacher says to rows of tokens: the largest logits behind each token, in Arrow files that are memory-mapped.

A file has consecutive rows of one shard. Of each token it keeps the k largest logits less the largest one, in fp16: so
the error, some 5e-4 of the difference, is least where the probability is. What the others have in common is one number.
"""

import zlib
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from io import BufferedReader
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from ray_ds import storage
from ray_ds.artifacts import TeacherLogits
from ray_ds.data.rows import Row, Rows
from ray_ds.data.shard_folder import ShardFile
from ray_ds.data.shards import SHARD_SUFFIX, Split
from ray_ds.errors import ArtifactError

FILE_ROWS = "file_rows"
"""The fact of TeacherLogits with the rows of each file: `facts["file_rows"]["train"]["00000-00000.arrow"]`."""


class LogitArrays(NamedTuple):
    """The k largest logits behind each token."""

    ids: NDArray[Any]
    """Whose logits they are, (..., k), the largest one's first."""
    logits: NDArray[np.float16]
    """Less the largest one, (..., k)."""
    log_rest: NDArray[np.float32]
    """Log of the sum of exp((logit - largest) / temperature) over all others, (...); -inf where there are none."""

    def fill(self, place: int, row: "LogitArrays") -> None:
        """Take over what was said to one row."""
        self.ids[place], self.logits[place], self.log_rest[place] = row


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


def encode_logits(rows: Sequence[Row], top: LogitArrays) -> bytes:
    """Return rows, and what a teacher says to them, (rows, seq_len, k) and (rows, seq_len), as a file."""
    columns = {
        "row": pa.array([checksum(row) for row in rows], pa.uint32()),
        **{name: _lists(values) for name, values in top._asdict().items()},
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


class StoredLogits:
    """A split's stored logits, by the numbers of its rows.

    Local files are mapped when they are first used. Those on an object store are fetched with the shards whose rows
    they have, into the same cache, and are let go with them.
    """

    def __init__(self, artifact: TeacherLogits, split: Split, rows: Rows) -> None:
        """Take what was stored for rows.

        Raises:
            ArtifactError: it was stored for other rows.
        """
        self.vocab_size: int = artifact.fact("vocab_size")
        self._top_k: int = artifact.fact("top_k")
        self._split = split
        self._uri = artifact.uri
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

    def blank(self, num_rows: int, seq_len: int) -> LogitArrays:
        """Return room for what `row` returns, for rows that may be padding."""
        shape = (num_rows, seq_len, self._top_k)
        return LogitArrays(np.zeros(shape, np.int64), np.zeros(shape, np.float16), np.zeros(shape[:2], np.float32))

    def row(self, index: int, row: Row) -> LogitArrays:
        """Return what was stored for a row, (seq_len, k) and (seq_len,), views of the file.

        Raises:
            ArtifactError: it was stored for another row, or the file is damaged.
        """
        file = int(np.searchsorted(self._ends, index, side="right"))
        batch, place = self._open(file), index - (int(self._ends[file - 1]) if file else 0)
        if batch.column("row")[place].as_py() != checksum(row):
            raise self._of_other_rows(f"row {index} of {self._split}", "must have been of the same tokens")
        ids, logits, log_rest = (_list_at(batch.column(name), place) for name in LogitArrays._fields)
        return LogitArrays(ids.reshape(-1, self._top_k), logits.reshape(-1, self._top_k), log_rest)

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
            self._mapped[file] = _map_batch(uri, path), lock
        return self._mapped[file][0]

    def _of_other_rows(self, value: str, allowed: str) -> ArtifactError:
        return ArtifactError(self._uri, value, allowed, "run the teacher_logits step on these shards")


def _map_batch(uri: str, path: Path) -> pa.RecordBatch:
    """Return a file's only record batch, backed by the file."""
    try:
        return pa.ipc.open_file(pa.memory_map(str(path))).get_batch(0)
    except (pa.ArrowException, OSError) as error:
        reason = str(error).splitlines()[0]
        allowed = f"must be one record batch of {', '.join(LogitArrays._fields)}"
        raise ArtifactError(uri, reason, allowed, "run the teacher_logits step again") from error


def _list_at(column: pa.FixedSizeListArray, place: int) -> NDArray[Any]:
    """Return the list at a place of a column, a view of it."""
    size = column.type.list_size
    values: NDArray[Any] = column.values.to_numpy(zero_copy_only=True)
    return values[place * size : (place + 1) * size]
