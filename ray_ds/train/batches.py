"""The rows of a batch as a rank's micro-batches, read ahead of use."""

import tempfile
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ray_ds.config.train import TrainSettings
from ray_ds.data.sampler import Sampler
from ray_ds.data.shards import Split, TokenSplit
from ray_ds.model.loss import IGNORED_TARGET

READ_AHEAD = 2
"""Micro-batches that are ready before they are asked for."""


class MicroBatch(NamedTuple):
    """Rows that go through the model at once, (micro_batch, seq_len) each, int64."""

    tokens: Tensor
    targets: Tensor
    """`IGNORED_TARGET` where nothing is predicted."""
    index: int | None  # type: ignore[assignment]  # hides `tuple.index`, which nobody calls
    """Its number in the batch's grid, the same for any world size; None for padding, in which no target counts."""


def open_split(shards: str, split: Split) -> TokenSplit:
    """Open a split of token shards; those on an object store are copied to this node once."""
    return TokenSplit.open(shards, split, Path(tempfile.gettempdir()) / "ray_ds-shards")


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


class Batches:
    """Deals a batch's rows out as a fixed grid of micro-batches, of which a rank takes neighbours.

    The grid depends on the batch's number alone; more ranks only take fewer micro-batches each. Every row is full, so
    that the targets of a batch, by which its loss is normalised, are `settings.batch_tokens` for any world size:
    padding has none. A thread prepares the next micro-batches, so that training waits for rows only where they
    cannot be read as fast as they are trained on.
    """

    def __init__(
        self, split: TokenSplit, settings: TrainSettings, *, rank: int, world_size: int, device: torch.device
    ) -> None:
        self._split = split
        self._settings = settings
        self._device = device
        self._share = share_of(settings.num_micro_batches, rank=rank, world_size=world_size)
        self._sampler = Sampler(
            split.shard_rows(settings.seq_len),
            seed=settings.seed,
            window_shards=settings.window_shards,
            batch_rows=settings.batch_rows,
        )
        self._reader = ThreadPoolExecutor(1, thread_name_prefix="read-ahead")
        self._ahead: deque[tuple[tuple[int, int], Future[MicroBatch]]] = deque()

    def of_batch(self, cursor: int) -> Iterator[MicroBatch]:
        """Yield this rank's micro-batches of a batch, on the device.

        Args:
            cursor: number of the batch, from 0; ahead of the optimizer's steps by the batches that were passed over.
        Raises:
            ArtifactError: a shard is damaged.
        """
        for place in range(len(self._share)):
            yield _to_device(self._take(cursor, place), self._device)

    def close(self) -> None:
        """End the thread that reads ahead; nothing can be read afterwards."""
        self._reader.shutdown(wait=False, cancel_futures=True)

    def _take(self, cursor: int, place: int) -> MicroBatch:
        """Return a micro-batch of this rank's share, and have those after it prepared."""
        if self._ahead and self._ahead[0][0] != (cursor, place):  # a batch is passed over, or trained on again
            for _, future in self._ahead:
                future.cancel()
            self._ahead.clear()
        while len(self._ahead) <= READ_AHEAD:
            batches_on, next_place = divmod(place + len(self._ahead), len(self._share))
            key = (cursor + batches_on, next_place)
            self._ahead.append((key, self._reader.submit(self._read, *key)))
        return self._ahead.popleft()[1].result()

    def _read(self, cursor: int, place: int) -> MicroBatch:
        """Return a micro-batch in host memory, from which the device copies while it computes."""
        index = self._share[place]
        settings = self._settings
        if index is None:
            indices = np.full(settings.micro_batch, -1, np.int64)
        else:
            indices = self._sampler.rows(cursor).reshape(-1, settings.micro_batch)[index]
        tokens, targets = read_rows(self._split, indices, settings.seq_len)
        if self._device.type == "cuda":
            tokens, targets = tokens.pin_memory(), targets.pin_memory()
        return MicroBatch(tokens, targets, index)


def validation_batches(
    split: TokenSplit, settings: TrainSettings, *, rank: int, world_size: int, device: torch.device
) -> Iterator[MicroBatch]:
    """Yield a rank's part of a fixed grid of evenly spaced rows, filled up with rows without targets.

    All ranks get as many micro-batches.
    """
    assert settings.validation_tokens is not None, "settings fill it in where there is validation"
    num_rows = min(split.num_rows(settings.seq_len), -(-settings.validation_tokens // settings.seq_len))
    indices = np.linspace(0, split.num_rows(settings.seq_len) - 1, num_rows).astype(np.int64)
    padding = np.full(-num_rows % settings.micro_batch, -1, np.int64)
    grid = np.concatenate([indices, padding]).reshape(-1, settings.micro_batch)
    nothing = np.full(settings.micro_batch, -1, np.int64)
    for index in share_of(len(grid), rank=rank, world_size=world_size):
        tokens, targets = read_rows(split, nothing if index is None else grid[index], settings.seq_len)
        yield _to_device(MicroBatch(tokens, targets, index), device)


def read_rows(split: TokenSplit, indices: NDArray[np.int64], seq_len: int) -> tuple[Tensor, Tensor]:
    """Return rows as tokens and targets; index -1 gives a row without targets."""
    rows = np.zeros((len(indices), seq_len + 1), np.int64)
    is_row = indices >= 0
    for place in np.flatnonzero(is_row):
        rows[place] = split.row(int(indices[place]), seq_len)
    whole = torch.from_numpy(rows)
    targets = whole[:, 1:].masked_fill(~torch.from_numpy(is_row)[:, None], IGNORED_TARGET)
    return whole[:, :-1].contiguous(), targets


def _to_device(batch: MicroBatch, device: torch.device) -> MicroBatch:
    """Return a micro-batch on the device; from pinned memory the copy is made while the device still computes."""
    tokens, targets = (part.to(device, non_blocking=True) for part in (batch.tokens, batch.targets))
    return MicroBatch(tokens, targets, batch.index)
