"""What a reference says to rows of answers, as it is stored: the log-probability of each target."""

from typing import Any

import torch
from numpy.typing import NDArray

from ray_ds.data.reference_log_probs import LOG_PROBS
from ray_ds.model.decoder import Decoder
from ray_ds.train.objective import MicroBatch
from ray_ds.train.preference import target_log_probs


@torch.no_grad()
def ask_reference(reference: Decoder, batch: MicroBatch) -> dict[str, NDArray[Any]]:
    """Return the log-probabilities of the targets of rows, (B, T), in nats and fp32; 0 where there is none."""
    found = target_log_probs(reference, batch.tokens, batch.targets, batch.segments)
    return {LOG_PROBS: found.cpu().numpy()}
