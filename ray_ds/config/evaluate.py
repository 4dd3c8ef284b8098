"""Settings of the evaluate stage."""

from typing import Annotated, Literal

import pydantic

from ray_ds.config.settings import OUTPUT_UNCHANGED, settings


@settings
class EvaluateSettings:
    """Settings of the evaluate stage."""

    seq_len: pydantic.PositiveInt
    """Tokens that the model sees at most before what it predicts; as in training."""
    precision: Literal["fp32", "bf16"] = "bf16"
    """Type of activations, and of the weights that are not INT8."""
    max_tokens: pydantic.PositiveInt | None = None
    """Tokens of the validation split to predict, in rows spread evenly over it; without it, all of them."""
    baseline_tokens: pydantic.NonNegativeInt = 20_000_000
    """Tokens of the training split, at most, that unigram, bigram and xz learn from; 0 = no baselines. Twenty million
    take xz some three minutes and 1 GB of memory for each of its two runs."""
    micro_batch: Annotated[pydantic.PositiveInt, OUTPUT_UNCHANGED] = 8
    """Rows that a worker sends through the model at once."""
    device: Annotated[Literal["auto", "cpu", "cuda"], OUTPUT_UNCHANGED] = "auto"
    """What workers compute on; auto = cuda where the cluster has GPUs."""
    num_workers: Annotated[pydantic.PositiveInt, OUTPUT_UNCHANGED] = 1
    """Processes that share the rows; on cuda each has one GPU."""
    cpus_per_worker: Annotated[pydantic.PositiveFloat, OUTPUT_UNCHANGED] = 1.0
    """CPUs that Ray reserves for a worker."""
    threads_per_worker: Annotated[pydantic.PositiveInt, OUTPUT_UNCHANGED] = 1
    """Threads a worker computes with on the CPU."""
