"""The rows of a batch as a rank's micro-batches, read ahead of use."""

import os
import tempfile
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ray_ds import storage
from ray_ds.artifacts import ReferenceLogProbs, TeacherLogits, open_artifact
from ray_ds.config.train import TrainSettings
from ray_ds.data.reference_log_probs import open_log_probs
from ray_ds.data.rows import NO_TARGET, Rows, open_rows
from ray_ds.data.sampler import Sampler
from ray_ds.data.shard_cache import ShardCache
from ray_ds.data.shards import Split, TokenSplit
from ray_ds.data.stored_rows import StoredRows
from ray_ds.data.teacher_logits import open_logits
from ray_ds.errors import ConfigError
from ray_ds.model.loss import IGNORED_TARGET
from ray_ds.train.objective import MicroBatch
from ray_ds.train.task import TrainTask

READ_AHEAD = 2
"""Micro-batches that are ready before they are asked for."""
WINDOWS_AHEAD = 2
"""Windows of shards that are fetched from an object store behind the one in use."""


def open_split(shards: str, split: Split, cache_bytes: int) -> TokenSplit:
    """Open a split of token shards; those on an object store go through a folder that all runs on this node share."""
    if not storage.is_remote(shards):
        return TokenSplit.open(shards, split)
    folder = Path(tempfile.gettempdir()) / f"ray_ds-shards-{os.getuid()}"
    return TokenSplit.open(shards, split, ShardCache(folder, cache_bytes))


def open_task_rows(task: TrainTask, name: Split) -> tuple[Rows, StoredRows | None]:
    """Return the rows of a split that a task trains on, and what another model said to them where that was stored.

    Raises:
        ArtifactError: it was said to other rows.
    """
    split = open_split(task.shards, name, task.settings.shard_cache_bytes)
    rows = open_rows(split, task.rows, task.settings.seq_len)
    if task.teacher_logits is not None:
        return rows, open_logits(open_artifact(task.teacher_logits, [TeacherLogits]), name, rows)
    if task.reference_log_probs is not None:
        return rows, open_log_probs(open_artifact(task.reference_log_probs, [ReferenceLogProbs]), name, rows)
    return rows, None


def check_cache(split: TokenSplit, settings: TrainSettings, *, field: str) -> None:
    """Refuse a cache too small for the two windows that a step may read, the end of one and the start of the next.

    Raises:
        ConfigError: the cache may hold less than that.
    """
    if split.cache is None or split.cache.budget_bytes is None:
        return
    needed = sum(sorted(split.bytes_in_cache())[-2 * settings.window_shards :])
    if split.cache.budget_bytes < needed:
        allowed = f"must be at least {needed}, the size of two windows of {settings.window_shards} shards"
        raise ConfigError(field, split.cache.budget_bytes, allowed, "raise it or lower window_shards")


def share_of(num_micro_batches: int, *, rank: int, world_size: int) -> list[int | None]:
    """Return which micro-batches of a grid a rank computes: neighbours, then None as padding.

    All ranks get as many entries, `ceil(num_micro_batches / world_size)`, as collectives demand; of real ones they get
    as many or one fewer.
    """
    least, extra = divmod(num_micro_batches, world_size)
    start = rank * least + min(rank, extra)
    mine = range(start, start + least + (rank < extra))
    padding = -(-num_micro_batches // world_size) - len(mine)
    return [*mine, *[None] * padding]


class Grid:
    """A batch's rows as micro-batches: a pure function of the batch's number, so that there is no state to save."""

    def __init__(self, sampler: Sampler, micro_batch: int) -> None:
        self.sampler = sampler
        self._micro_batch = micro_batch
        self._batch: tuple[int, NDArray[np.int64]] | None = None

    def rows(self, cursor: int, index: int | None) -> NDArray[np.int64]:
        """Return the row indices of a micro-batch, (micro_batch,); -1 in padding, which has no index."""
        if index is None:
            return np.full(self._micro_batch, -1, np.int64)
        if self._batch is None or self._batch[0] != cursor:
            self._batch = (cursor, self.sampler.rows(cursor).reshape(-1, self._micro_batch))
        rows: NDArray[np.int64] = self._batch[1][index]
        return rows

    def batch(self, cursor: int) -> NDArray[np.int64]:
        """Return the row indices of a whole batch, (batch_rows,)."""
        return self.sampler.rows(cursor)

    def shards(self, cursor: int, index: int) -> list[int]:
        """Return the shards of the windows that a micro-batch's rows are in."""
        start = self.start(cursor, index)
        return self.sampler.shards(start, start + self._micro_batch)

    def start(self, cursor: int, index: int) -> int:
        """Return where in the sampler's stream a micro-batch begins."""
        return cursor * self.sampler.batch_rows + index * self._micro_batch


class Batches:
    """Deals a batch's rows out as a fixed grid of micro-batches, of which a rank takes neighbours.

    The grid depends on the batch's number alone; more ranks only take fewer micro-batches each. What a batch's loss is
    divided by, `terms`, follows from its rows, so it too is the same for any world size: padding has none. A thread
    prepares the next micro-batches, so that training waits for rows only where they cannot be read as fast as they are
    trained on; shards on an object store are fetched windows ahead.

    Raises:
        ConfigError: the node's cache of shards is too small.
    """

    def __init__(
        self,
        rows: Rows,
        settings: TrainSettings,
        *,
        rank: int,
        world_size: int,
        device: torch.device,
        stored: StoredRows | None = None,
    ) -> None:
        check_cache(rows.split, settings, field="shard_cache_bytes")
        self._rows, self._stored = rows, stored
        self._split = rows.split
        self._settings = settings
        self._device = device
        self._share = share_of(settings.num_micro_batches, rank=rank, world_size=world_size)
        sampler = Sampler(
            rows.shard_rows,
            seed=settings.seed,
            window_shards=settings.window_shards,
            batch_rows=settings.batch_rows,
        )
        self._grid = Grid(sampler, settings.micro_batch)
        self._reader = ThreadPoolExecutor(1, thread_name_prefix="read-ahead")
        self._ahead: deque[tuple[tuple[int, int], Future[MicroBatch]]] = deque()
        self._needed: list[int] = []
        """Shards of the window or windows in use."""

    def terms(self, cursor: int) -> int:
        """Return what the loss of a batch is divided by: its targets, or its pairs, on all ranks."""
        return sum(self._rows.terms(int(row)) for row in self._grid.batch(cursor))

    def of_batch(self, cursor: int) -> Iterator[MicroBatch]:
        """Yield this rank's micro-batches of a batch, on the device.

        Args:
            cursor: number of the batch, from 0; ahead of the optimizer's steps by the batches that were passed over.
        Raises:
            ArtifactError: a shard is damaged.
            ClusterError: the node's disk has no room for a shard.
        """
        for place in range(len(self._share)):
            self._prepare_from(cursor, place)
            batch = on_device(self._ahead.popleft()[1].result(), self._device)
            batches_on, next_place = divmod(place + 1, len(self._share))
            self._prepare_from(cursor + batches_on, next_place)  # after the copy, which the reader would only hold up
            yield batch

    def read_ahead(self, cursor: int) -> None:
        """Start to prepare a batch, while there is something else to do before it is asked for."""
        self._prepare_from(cursor, 0)

    def close(self) -> None:
        """End the threads that read ahead; nothing can be read afterwards."""
        self._forget()
        self._reader.submit(self._split.release)  # where the split is used, after what it is at
        self._reader.shutdown(wait=False)

    def _prepare_from(self, cursor: int, place: int) -> None:
        """Have a micro-batch and those after it prepared."""
        if self._ahead and self._ahead[0][0] != (cursor, place):  # a batch is passed over, or trained on again
            self._forget()
        while len(self._ahead) < READ_AHEAD:
            batches_on, next_place = divmod(place + len(self._ahead), len(self._share))
            key = (cursor + batches_on, next_place)
            self._ahead.append((key, self._reader.submit(self._read, *key)))

    def _forget(self) -> None:
        """Drop what is prepared."""
        for _, future in self._ahead:
            future.cancel()
        self._ahead.clear()

    def _read(self, cursor: int, place: int) -> MicroBatch:
        """Return a micro-batch in host memory, from which the device copies while it computes."""
        index = self._share[place]
        if index is not None and self._split.cache is not None:
            self._have_shards(cursor, index)
        batch = read_rows(self._rows, self._grid.rows(cursor, index), self._settings.seq_len, index, self._stored)
        return _with_tensors(batch, Tensor.pin_memory) if self._device.type == "cuda" else batch

    def _have_shards(self, cursor: int, index: int) -> None:
        """Have the node's cache keep what a micro-batch needs, let go what is done with, and fetch what comes next."""
        needed = self._grid.shards(cursor, index)
        if needed != self._needed:
            self._needed = needed
            self._split.keep_mapped(needed)
            order = self._grid.sampler.shards_by_next_use(self._grid.start(cursor, index))
            self._split.read_ahead(order, (1 + WINDOWS_AHEAD) * self._settings.window_shards)


def validation_batches(
    rows: Rows,
    settings: TrainSettings,
    *,
    rank: int,
    world_size: int,
    device: torch.device,
    stored: StoredRows | None = None,
) -> Iterator[MicroBatch]:
    """Yield a rank's part of a fixed grid of evenly spaced rows, filled up with rows without targets.

    All ranks get as many micro-batches. In the end the split's shards are released.
    """
    assert settings.validation_tokens is not None, "settings fill it in where there is validation"
    split, last = rows.split, sum(rows.shard_rows) - 1
    num_rows = min(last + 1, -(-settings.validation_tokens // settings.seq_len))
    indices = np.linspace(0, last, num_rows).astype(np.int64)
    padding = np.full(-num_rows % settings.micro_batch, -1, np.int64)
    grid = np.concatenate([indices, padding]).reshape(-1, settings.micro_batch)
    share = share_of(len(grid), rank=rank, world_size=world_size)
    chosen = [grid[index] if index is not None else np.full(settings.micro_batch, -1, np.int64) for index in share]
    ends = np.cumsum(rows.shard_rows)
    shards = [np.unique(np.searchsorted(ends, part[part >= 0], side="right")).tolist() for part in chosen]
    order = list(dict.fromkeys(shard for of_one in shards for shard in of_one))
    split.read_ahead(order, len(order))
    for index, part, needed in zip(share, chosen, shards, strict=True):
        split.keep_mapped(needed)
        yield on_device(read_rows(rows, part, settings.seq_len, index, stored), device)
    split.release()


def read_rows(
    rows: Rows, indices: NDArray[np.int64], seq_len: int, index: int | None, stored: StoredRows | None = None
) -> MicroBatch:
    """Return rows as a micro-batch with a number in the grid; index -1 gives a row without targets."""
    tokens = np.zeros((len(indices), seq_len), np.int64)
    targets = np.full((len(indices), seq_len), IGNORED_TARGET, np.int64)
    segments = np.zeros((len(indices), seq_len), np.int64)
    terms = 0
    said = () if stored is None else stored.blank(len(indices))
    for place in np.flatnonzero(indices >= 0):
        row = rows.row(int(indices[place]))
        tokens[place] = row.tokens
        targets[place] = row.targets if row.segments is None else _ignoring(row.targets)
        if row.segments is not None:
            segments[place] = row.segments
        terms += rows.terms(int(indices[place]))
        if stored is not None:
            for array, own in zip(said, stored.row(int(indices[place]), row), strict=True):
                array[place] = own
    held = torch.from_numpy(segments) if rows.is_packed else None
    tensors = tuple(map(torch.from_numpy, said))
    return MicroBatch(torch.from_numpy(tokens), torch.from_numpy(targets), held, terms, index, tensors)


def _ignoring(targets: NDArray[np.int64]) -> NDArray[np.int64]:
    """Return targets in the words of the loss."""
    return np.where(targets == NO_TARGET, IGNORED_TARGET, targets)


def _with_tensors(batch: MicroBatch, change: Callable[[Tensor], Tensor]) -> MicroBatch:
    """Return a micro-batch with all its tensors changed."""
    return batch._replace(
        tokens=change(batch.tokens),
        targets=change(batch.targets),
        segments=None if batch.segments is None else change(batch.segments),
        stored=tuple(map(change, batch.stored)),
    )


def on_device(batch: MicroBatch, device: torch.device) -> MicroBatch:
    """Return a micro-batch on the device; from pinned memory the copy is made while the device still computes."""
    return _with_tensors(batch, lambda tensor: tensor.to(device, non_blocking=True))
