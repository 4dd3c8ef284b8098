"""What a teacher says to rows, as it is stored: its largest logits."""

from typing import Any

import torch
from numpy.typing import NDArray

from ray_ds.config.teacher_logits import TeacherLogitsSettings
from ray_ds.data.shard_file import token_dtype
from ray_ds.data.teacher_logits import LogitArrays
from ray_ds.model.decoder import Decoder
from ray_ds.model.documents import number_documents
from ray_ds.train.objective import MicroBatch, token_logits
from ray_ds.train.stored_distillation import find_top_logits


@torch.no_grad()
def ask_teacher(
    teacher: Decoder, batch: MicroBatch, *, settings: TeacherLogitsSettings, vocab_size: int, bos_token_id: int
) -> dict[str, NDArray[Any]]:
    """Return what the teacher says to rows, `LogitArrays` of (B, T, k) and (B, T).

    Args:
        vocab_size: tokens of the shards; what the model has beyond them never is one.
    """
    segments = number_documents(batch.tokens, bos_token_id) if settings.document_mask else batch.segments
    logits = token_logits(teacher, batch.tokens, segments)[:, :vocab_size]  # (B * T, V)
    ids, top, log_rest = find_top_logits(logits, settings.top_k, settings.temperature)
    shape = batch.tokens.shape
    return LogitArrays(
        ids.view(*shape, -1).cpu().numpy().astype(token_dtype(vocab_size)),
        top.view(*shape, -1).cpu().numpy(),
        log_rest.view(shape).cpu().numpy(),
    )._asdict()
