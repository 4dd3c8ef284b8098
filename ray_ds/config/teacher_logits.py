"""Settings of the teacher_logits stage."""

from typing import Annotated, Literal

import pydantic

from ray_ds.config.settings import OUTPUT_UNCHANGED, settings
from ray_ds.config.train import SHARD_CACHE_BYTES


@settings
class TeacherLogitsSettings:
    """Settings of the teacher_logits stage.

    A train step takes the result in place of the teacher if it makes the same rows of the same shards: `seq_len` and
    `document_mask` must be its own. A token takes 4 bytes, and for each of the `top_k` 2 for the logit and 2 or 4 for
    the id: 260 bytes with 64 of a vocabulary of at most 65,536.
    """

    seq_len: pydantic.PositiveInt
    """Tokens in a row, as in the train step."""
    document_mask: bool = False
    """Whether a document in a row sees itself alone, as in the train step."""
    top_k: pydantic.PositiveInt = 64
    """Logits kept of each token, the largest ones; of the others their common probability."""
    temperature: pydantic.PositiveFloat = 1.0
    """What logits are divided by before that probability is taken: the `objective.temperature` of the train step."""
    precision: Literal["fp32", "bf16"] = "bf16"
    """Type of the teacher's weights and activations."""
    unit_tokens: pydantic.PositiveInt = 1 << 20
    """Tokens in a file, about; the task that makes it loads the teacher, and needs three times the file's size."""
    micro_batch: Annotated[pydantic.PositiveInt, OUTPUT_UNCHANGED] = 8
    """Rows that a task sends through the teacher at once."""
    shard_cache_bytes: Annotated[pydantic.PositiveInt, OUTPUT_UNCHANGED] = SHARD_CACHE_BYTES
    """Bytes that shards from an object store may take on a node's disk, of all runs together."""
    device: Annotated[Literal["auto", "cpu", "cuda"], OUTPUT_UNCHANGED] = "auto"
    """What tasks compute on; auto = cuda where the cluster has GPUs, one for each task."""
    max_running_units: Annotated[pydantic.PositiveInt | None, OUTPUT_UNCHANGED] = None
    """Tasks at a time; without it, as many as the cluster has CPUs or GPUs."""
