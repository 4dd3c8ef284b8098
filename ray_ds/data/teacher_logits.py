"""What a teacher says to rows of tokens: the largest logits behind each token.

Of each token the k largest logits less the largest one are kept in fp16: so the error, some 5e-4 of the difference, is
least where the probability is. What the others have in common is one number.
"""

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from ray_ds.artifacts import TeacherLogits
from ray_ds.data.rows import Rows
from ray_ds.data.shards import Split
from ray_ds.data.stored_rows import Column, StoredRows


class LogitArrays(NamedTuple):
    """The k largest logits behind each token."""

    ids: NDArray[Any]
    """Whose logits they are, (..., k), the largest one's first."""
    logits: NDArray[np.float16]
    """Less the largest one, (..., k)."""
    log_rest: NDArray[np.float32]
    """Log of the sum of exp((logit - largest) / temperature) over all others, (...); -inf where there are none."""


def open_logits(artifact: TeacherLogits, split: Split, rows: Rows) -> StoredRows:
    """Return a split's stored logits: of each row the `LogitArrays`, (seq_len, k) and (seq_len,).

    Raises:
        ArtifactError: they were stored for other rows.
    """
    seq_len, top_k = artifact.fact("seq_len"), artifact.fact("top_k")
    columns = {
        "ids": Column((seq_len, top_k), np.int64),
        "logits": Column((seq_len, top_k), np.float16),
        "log_rest": Column((seq_len,), np.float32),
    }
    return StoredRows(artifact, split, rows, columns)
