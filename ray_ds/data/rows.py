"""How the documents of token shards become rows of one length."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from ray_ds.data.packing import best_fit
from ray_ds.data.shards import TokenSplit
from ray_ds.errors import InputError

RowKind = Literal["stream", "chat", "preference"]
"""`stream`: documents follow each other and rows cut through them; `chat`: whole documents share a row and only masked
tokens are targets; `preference`: the same, but two documents that follow each other are an answer and a worse one."""
ROW_KIND = "rows"
"""The fact of TokenShards that is their `RowKind`; absent in a stream."""
NO_TARGET = -1


class Row(NamedTuple):
    """What the model sees and is to say in one row, (seq_len,) each, int64."""

    tokens: NDArray[np.int64]
    targets: NDArray[np.int64]
    """`NO_TARGET` where nothing is predicted."""
    segments: NDArray[np.int64] | None
    """Which document of the row a token is of, from 0; what fills the row up is the last. None = a stream."""


class Rows(Protocol):
    """All rows of a split."""

    split: TokenSplit
    is_packed: bool
    """Whether rows have segments."""

    @property
    def shard_rows(self) -> Sequence[int]:
        """Rows of each shard; rows are numbered through the shards."""

    def row(self, index: int) -> Row:
        """Return a row."""

    def terms(self, index: int) -> int:
        """Return how much a row adds to what a batch's loss is divided by: its targets, or its pairs."""


def open_rows(split: TokenSplit, kind: RowKind, seq_len: int) -> Rows:
    """Return the rows of a split; a plan of packed rows is made here, and is the same whoever makes it."""
    if kind == "stream":
        return StreamRows(split, seq_len)
    return PackedRows(split, seq_len, documents_per_item=2 if kind == "preference" else 1)


class StreamRows:
    """Rows that run through a shard's documents as they follow each other; every token but a shard's first is a target
    once."""

    is_packed = False

    def __init__(self, split: TokenSplit, seq_len: int) -> None:
        self.split = split
        self._seq_len = seq_len
        self.shard_rows: Sequence[int] = split.shard_rows(seq_len)

    def row(self, index: int) -> Row:
        """Return a row."""
        whole = self.split.row(index, self._seq_len)
        return Row(whole[:-1], whole[1:], None)

    def terms(self, index: int) -> int:
        """Return the row's targets: all of it."""
        return self._seq_len


@dataclass(frozen=True, slots=True)
class _Plan:
    """A shard's packed rows."""

    documents: NDArray[np.int64]
    """The documents of all rows, one row after the other."""
    ends: NDArray[np.int64]
    """Where each row ends in `documents`."""
    terms: NDArray[np.int64]
    """Of each row."""
    num_dropped: int
    """Items that are longer than a row."""

    def documents_of(self, row: int) -> list[int]:
        """Return a row's documents in order."""
        return [int(document) for document in self.documents[self.ends[row - 1] if row else 0 : self.ends[row]]]


class PackedRows:
    """Rows of whole documents, best fit within each shard; an item longer than a row is left out.

    The last token of a document is only a target, so that a document of n tokens takes n - 1 places.

    Args:
        documents_per_item: documents that follow each other and stay together in a row.
    """

    is_packed = True

    def __init__(self, split: TokenSplit, seq_len: int, *, documents_per_item: int) -> None:
        self.split = split
        self._seq_len = seq_len
        self._plans: list[_Plan] = []
        for shard in range(split.num_shards):
            self._plans.append(self._plan(shard, documents_per_item))
            split.keep_mapped(())
        self.shard_rows: Sequence[int] = [len(plan.ends) for plan in self._plans]
        self._ends = np.cumsum(self.shard_rows, dtype=np.int64)

    @property
    def num_dropped(self) -> int:
        """Return how many items are longer than a row, and in none."""
        return sum(plan.num_dropped for plan in self._plans)

    def row(self, index: int) -> Row:
        """Return a row; its segments count its documents in order."""
        shard, place = self._find(index)
        mapped = self.split.shard(shard)
        tokens = np.zeros(self._seq_len, np.int64)
        targets = np.full(self._seq_len, NO_TARGET, np.int64)
        documents = self._plans[shard].documents_of(place)
        segments = np.full(self._seq_len, len(documents), np.int64)
        at = 0
        for number, document in enumerate(documents):
            start, stop = (int(offset) for offset in mapped.offsets[document : document + 2])
            ids: NDArray[Any] = mapped.tokens[start:stop]
            end = at + len(ids) - 1
            tokens[at:end] = ids[:-1]
            targets[at:end] = np.where(mapped.loss_mask[start + 1 : stop], ids[1:].astype(np.int64), NO_TARGET)
            segments[at:end] = number
            at = end
        return Row(tokens, targets, segments)

    def terms(self, index: int) -> int:
        """Return the row's targets, or pairs."""
        shard, place = self._find(index)
        return int(self._plans[shard].terms[place])

    def _find(self, index: int) -> tuple[int, int]:
        """Return the shard of a row, and its number there."""
        if not 0 <= index < self._ends[-1]:
            raise IndexError(f"row {index} of {self._ends[-1]}")
        shard = int(np.searchsorted(self._ends, index, side="right"))
        return shard, index - (int(self._ends[shard - 1]) if shard else 0)

    def _plan(self, shard: int, per_item: int) -> _Plan:
        """Return which documents of a shard share a row."""
        mapped = self.split.shard(shard)
        lengths = np.diff(mapped.offsets) - 1  # (documents,)
        assert len(lengths) % per_item == 0, "items are written whole"
        item_lengths = lengths.reshape(-1, per_item).sum(axis=1)
        rows = best_fit(item_lengths, self._seq_len)
        item_terms = mapped.num_targets if per_item == 1 else np.ones(len(item_lengths), np.int64)
        items = np.array([item for row in rows for item in row], np.int64)
        documents = (items[:, None] * per_item + np.arange(per_item)).ravel()
        ends = np.cumsum([len(row) * per_item for row in rows], dtype=np.int64)
        terms = np.array([int(item_terms[row].sum()) for row in rows], np.int64)
        return _Plan(documents, ends, terms, len(item_lengths) - len(items))


def check_any_row(rows: Rows, folder_uri: str, seq_len: int) -> None:
    """Make sure that a split has at least one row.

    Raises:
        InputError: all its shards, or all its documents, are too long or too short for one.
    """
    if sum(rows.shard_rows):
        return
    if isinstance(rows, PackedRows):
        value = f"all {rows.num_dropped} of its conversations are longer"
        raise InputError(folder_uri, value, f"must have one of at most seq_len + 1 = {seq_len + 1} tokens", "raise it")
    longest = max(rows.split.tokens_per_shard)
    raise InputError(
        folder_uri,
        f"its longest shard has {longest} tokens",
        f"must have a shard of at least seq_len + 1 = {seq_len + 1} tokens",
        "give more text or shorten seq_len",
    )
