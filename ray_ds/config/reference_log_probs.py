"""Settings of the reference_log_probs stage."""

from typing import Annotated, Literal

import pydantic

from ray_ds.config.settings import OUTPUT_UNCHANGED, settings
from ray_ds.config.train import SHARD_CACHE_BYTES


@settings
class ReferenceLogProbsSettings:
    """Settings of the reference_log_probs stage.

    A DPO step takes the result as its `reference` if it starts from the same model and makes the same rows of the same
    shards: `seq_len` must be its own. A token takes 4 bytes.
    """

    seq_len: pydantic.PositiveInt
    """Tokens in a row, as in the train step."""
    precision: Literal["fp32", "bf16"] = "bf16"
    """Type of the reference's weights and activations: that of the train step, or the first margins are not 0 but what
    the types' rounding makes them."""
    unit_tokens: pydantic.PositiveInt = 1 << 22
    """Tokens in a file, about; the task that makes it loads the reference."""
    micro_batch: Annotated[pydantic.PositiveInt, OUTPUT_UNCHANGED] = 8
    """Rows that a task sends through the reference at once."""
    shard_cache_bytes: Annotated[pydantic.PositiveInt, OUTPUT_UNCHANGED] = SHARD_CACHE_BYTES
    """Bytes that shards from an object store may take on a node's disk, of all runs together."""
    device: Annotated[Literal["auto", "cpu", "cuda"], OUTPUT_UNCHANGED] = "auto"
    """What tasks compute on; auto = cuda where the cluster has GPUs, one for each task."""
    max_running_units: Annotated[pydantic.PositiveInt | None, OUTPUT_UNCHANGED] = None
    """Tasks at a time; without it, as many as the cluster has CPUs or GPUs."""
