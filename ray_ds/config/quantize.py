"""Settings of the quantize stage."""

from typing import Annotated, Literal

import pydantic

from ray_ds.config.settings import OUTPUT_UNCHANGED, settings


@settings
class QuantizeSettings:
    """Settings of the quantize stage: INT8 weights per output channel, activations per token, scaled as they come."""

    max_perplexity_ratio: pydantic.PositiveFloat = 1.01
    """Fail when the INT8 model's perplexity is more than this times the checkpoint's; 1.01 = 1 % more."""
    gate_tokens: pydantic.PositiveInt = 65_536
    """Tokens of the validation split that both perplexities are measured on, in rows spread evenly over it."""
    max_shard_bytes: pydantic.PositiveInt = 2_000_000_000
    """Size beyond which another file of weights is begun."""
    micro_batch: Annotated[pydantic.PositiveInt, OUTPUT_UNCHANGED] = 8
    """Rows that go through a model at once."""
    device: Annotated[Literal["auto", "cpu", "cuda"], OUTPUT_UNCHANGED] = "auto"
    """What the perplexities are measured on; auto = cuda where the cluster has GPUs."""
    threads: Annotated[pydantic.PositiveInt, OUTPUT_UNCHANGED] = 1
    """Threads computed with on the CPU; Ray reserves as many CPUs."""
