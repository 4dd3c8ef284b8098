"""Asking a teacher what it says to the rows of token shards, to store it."""

from dataclasses import dataclass

import numpy as np
import torch
from pydantic import JsonValue

from ray_ds.config.teacher_logits import TeacherLogitsSettings
from ray_ds.data.clean_text import Publish
from ray_ds.data.rows import RowKind, open_rows
from ray_ds.data.shard_file import token_dtype
from ray_ds.data.teacher_logits import LogitArrays, RowRange, encode_logits
from ray_ds.model.decoder import Decoder
from ray_ds.model.documents import number_documents
from ray_ds.train.batches import open_split, read_rows
from ray_ds.train.objective import MicroBatch, token_logits
from ray_ds.train.start import DTYPES, load_checkpoint
from ray_ds.train.stored_distillation import find_top_logits


@dataclass(frozen=True, kw_only=True)
class TeacherJob:
    """What all rows have in common."""

    settings: TeacherLogitsSettings
    checkpoint: str
    """Folder of the Checkpoint that is asked."""
    shards: str
    """Folder of the TokenShards."""
    rows: RowKind
    """How the documents of the shards become rows."""
    vocab_size: int
    """Tokens of the shards; what the model has beyond them never is one."""
    bos_token_id: int
    device: str
    """`cpu` or `cuda`."""


def store_range(part: RowRange, publish: Publish, job: TeacherJob) -> dict[str, JsonValue]:
    """Publish what the teacher says to a range of rows, `<split>/<file>`; return how many there are.

    Raises:
        ArtifactError: the checkpoint or a shard is damaged.
    """
    settings, device = job.settings, torch.device(job.device)
    teacher = load_checkpoint(job.checkpoint, DTYPES[settings.precision], device)
    split = open_split(job.shards, part.split, settings.shard_cache_bytes)
    rows = open_rows(split, job.rows, settings.seq_len)
    found = []
    for first in range(part.first, part.stop, settings.micro_batch):
        numbers = np.arange(first, min(first + settings.micro_batch, part.stop))
        found.append(ask(teacher, read_rows(rows, numbers, settings.seq_len, None), job))
    top = LogitArrays(*(np.concatenate(each) for each in zip(*found, strict=True)))
    said_to = [rows.row(number) for number in range(part.first, part.stop)]
    publish(f"{part.split}/{part.file}", encode_logits(said_to, top))
    return {"rows": part.stop - part.first}


@torch.no_grad()
def ask(teacher: Decoder, batch: MicroBatch, job: TeacherJob) -> LogitArrays:
    """Return what the teacher says to rows, (B, T, k) and (B, T)."""
    device, settings = torch.device(job.device), job.settings
    tokens = batch.tokens.to(device)
    segments = None if batch.segments is None else batch.segments.to(device)
    if settings.document_mask:
        segments = number_documents(tokens, job.bos_token_id)
    logits = token_logits(teacher, tokens, segments)[:, : job.vocab_size]  # (B * T, V)
    ids, top, log_rest = find_top_logits(logits, settings.top_k, settings.temperature)
    return LogitArrays(
        ids.view(*tokens.shape, -1).cpu().numpy().astype(token_dtype(job.vocab_size)),
        top.view(*tokens.shape, -1).cpu().numpy(),
        log_rest.view(tokens.shape).cpu().numpy(),
    )
