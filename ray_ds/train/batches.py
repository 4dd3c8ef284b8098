"""The rows of a step as a rank's micro-batches."""

import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ray_ds.config.train import TrainSettings
from ray_ds.data.sampler import Sampler
from ray_ds.data.shards import Split, TokenSplit
from ray_ds.model.loss import IGNORED_TARGET

MicroBatch = tuple[Tensor, Tensor]
"""Tokens and targets, (micro_batch, seq_len) each, int64."""


def open_split(shards: str, split: Split) -> TokenSplit:
    """Open a split of token shards; those on an object store are copied to this node once."""
    return TokenSplit.open(shards, split, Path(tempfile.gettempdir()) / "ray_ds-shards")


class Batches:
    """Deals a step's rows out as a fixed grid of micro-batches, of which a rank takes neighbours.

    The grid depends on the step alone; more ranks only take fewer micro-batches each.
    """

    def __init__(self, split: TokenSplit, settings: TrainSettings, *, rank: int, world_size: int) -> None:
        self._split = split
        self._settings = settings
        self._rank = rank
        self._world_size = world_size
        self._sampler = Sampler(
            split.shard_rows(settings.seq_len),
            seed=settings.seed,
            window_shards=settings.window_shards,
            batch_rows=settings.batch_rows,
        )

    def of_step(self, step: int, device: torch.device) -> Iterator[MicroBatch]:
        """Yield this rank's micro-batches of a step, counted from 0."""
        grid = self._sampler.rows(step).reshape(self._settings.num_micro_batches, -1)
        for indices in np.split(grid, self._world_size)[self._rank]:
            yield read_rows(self._split, indices, self._settings.seq_len, device)


def validation_batches(
    split: TokenSplit, settings: TrainSettings, *, rank: int, world_size: int, device: torch.device
) -> Iterator[MicroBatch]:
    """Yield a rank's part of evenly spaced rows.

    All ranks get as many micro-batches, filled up with rows without targets.
    """
    assert settings.validation_tokens is not None, "settings fill it in where there is validation"
    num_rows = min(split.num_rows(settings.seq_len), -(-settings.validation_tokens // settings.seq_len))
    indices = np.linspace(0, split.num_rows(settings.seq_len) - 1, num_rows).astype(np.int64)
    unit = settings.micro_batch * world_size
    padded = np.concatenate([indices, np.full(-num_rows % unit, -1, np.int64)])
    for chosen in padded.reshape(-1, world_size, settings.micro_batch)[:, rank]:
        yield read_rows(split, chosen, settings.seq_len, device)


def read_rows(split: TokenSplit, indices: NDArray[np.int64], seq_len: int, device: torch.device) -> MicroBatch:
    """Return rows as tokens and targets; index -1 gives a row without targets."""
    rows = np.zeros((len(indices), seq_len + 1), np.int64)
    is_row = indices >= 0
    for place in np.flatnonzero(is_row):
        rows[place] = split.row(int(indices[place]), seq_len)
    whole = torch.from_numpy(rows)
    targets = whole[:, 1:].masked_fill(~torch.from_numpy(is_row)[:, None], IGNORED_TARGET)
    return whole[:, :-1].contiguous().to(device), targets.to(device)
