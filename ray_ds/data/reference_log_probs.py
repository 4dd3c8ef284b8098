"""What a reference says to pairs of answers: the log-probability of each token that is a target, in nats and fp32."""

import numpy as np

from ray_ds.artifacts import ReferenceLogProbs
from ray_ds.data.rows import Rows
from ray_ds.data.shards import Split
from ray_ds.data.stored_rows import Column, StoredRows

LOG_PROBS = "log_probs"


def open_log_probs(artifact: ReferenceLogProbs, split: Split, rows: Rows) -> StoredRows:
    """Return a split's stored log-probabilities, (seq_len,) of each row; 0 where nothing is predicted.

    Raises:
        ArtifactError: they were stored for other rows.
    """
    return StoredRows(artifact, split, rows, {LOG_PROBS: Column((artifact.fact("seq_len"),), np.float32)})
