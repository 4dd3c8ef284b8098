"""Asking a model what it says to the rows of token shards, to store it for a training without that model."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import JsonValue

from ray_ds import storage
from ray_ds.artifacts import TokenShards
from ray_ds.data.clean_text import Publish
from ray_ds.data.rows import RowKind, check_any_row, open_rows
from ray_ds.data.shards import SPLITS
from ray_ds.data.stored_rows import FILE_ROWS, RowRange, encode_rows, plan_ranges
from ray_ds.model.decoder import Decoder
from ray_ds.train.batches import on_device, open_split, read_rows
from ray_ds.train.objective import MicroBatch
from ray_ds.train.start import DTYPES, load_checkpoint

Ask = Callable[[Decoder, MicroBatch], dict[str, NDArray[Any]]]
"""Returns what a model says to rows on its device, (B, ...) each; it reaches other processes."""


class RowSettings(Protocol):
    """What the settings of all stages that ask a model about rows have."""

    @property
    def seq_len(self) -> int:
        """Tokens in a row."""

    @property
    def precision(self) -> Literal["fp32", "bf16"]:
        """Type of the model's weights and activations."""

    @property
    def unit_tokens(self) -> int:
        """Tokens in a file, about."""

    @property
    def micro_batch(self) -> int:
        """Rows that are sent through the model at once."""

    @property
    def shard_cache_bytes(self) -> int:
        """Bytes that shards from an object store may take on a node's disk."""


@dataclass(frozen=True, kw_only=True)
class RowJob:
    """What all rows have in common."""

    settings: RowSettings
    ask: Ask
    checkpoint: str
    """Folder of the Checkpoint that is asked."""
    shards: str
    """Folder of the TokenShards."""
    rows: RowKind
    """How the documents of the shards become rows."""
    device: Literal["cpu", "cuda"]


def plan_files(job: RowJob) -> list[RowRange]:
    """Return the files to make, all splits' one after the other.

    Raises:
        InputError: a split has no row.
    """
    seq_len = job.settings.seq_len
    ranges: list[RowRange] = []
    for split in SPLITS:
        rows = open_rows(open_split(job.shards, split, job.settings.shard_cache_bytes), job.rows, seq_len)
        check_any_row(rows, storage.join(job.shards, split), seq_len)
        ranges += plan_ranges(split, rows.shard_rows, max(1, job.settings.unit_tokens // seq_len))
    return ranges


def store_range(part: RowRange, publish: Publish, job: RowJob) -> dict[str, JsonValue]:
    """Publish what the model says to a range of rows, `<split>/<file>`; return how many there are.

    Raises:
        ArtifactError: the checkpoint or a shard is damaged.
    """
    settings, device = job.settings, torch.device(job.device)
    model = load_checkpoint(job.checkpoint, DTYPES[settings.precision], device)
    rows = open_rows(open_split(job.shards, part.split, settings.shard_cache_bytes), job.rows, settings.seq_len)
    said = []
    for first in range(part.first, part.stop, settings.micro_batch):
        numbers = np.arange(first, min(first + settings.micro_batch, part.stop))
        batch = on_device(read_rows(rows, numbers, settings.seq_len, None), device)
        said.append(job.ask(model, batch))
    arrays = {name: np.concatenate([each[name] for each in said]) for name in said[0]}
    said_to = [rows.row(number) for number in range(part.first, part.stop)]
    publish(f"{part.split}/{part.file}", encode_rows(said_to, arrays))
    return {"rows": part.stop - part.first}


def row_facts(job: RowJob, shards: TokenShards, ranges: list[RowRange]) -> dict[str, JsonValue]:
    """Return what a train step has to know of the rows that were asked about."""
    file_rows: dict[str, JsonValue] = {
        split: {part.file: part.stop - part.first for part in ranges if part.split == split} for split in SPLITS
    }
    return {
        "tokenizer_digest": shards.fact("tokenizer_digest"),
        "seq_len": job.settings.seq_len,
        FILE_ROWS: file_rows,
    }
