"""Settings of the quantize stage."""

from typing import Annotated, Literal

import pydantic

from ray_ds.config.settings import OUTPUT_UNCHANGED, settings
from ray_ds.errors import ConfigError

Scheme = Literal["w8a8", "w8a16", "fp8"]
"""How the linear layers are quantized, all with one scale an output channel:
`w8a8` INT8 weights, INT8 activations with a scale a token; `w8a16` INT8 weights, activations stay floats;
`fp8` weights and activations in FP8 (E4M3), with a scale a token."""


@settings
class QuantizeSettings:
    """Settings of the quantize stage."""

    scheme: Scheme = "w8a8"
    """`w8a8`: INT8 weights and activations; `w8a16`: INT8 weights alone, for activations that bear no rounding; `fp8`:
    both in FP8 (E4M3), for Hopper GPUs and later, elsewhere slow."""
    smoothing: Annotated[float, pydantic.Field(ge=0, le=1)] = 0.0
    """How much of the activations' outliers moves into the weights (SmoothQuant's alpha): 0 = nothing, and nothing is
    calibrated; 1 = all; 0.5 is usual where outliers fail a gate. A model without outliers is better left without."""
    calibration_tokens: pydantic.PositiveInt = 32_768
    """Tokens of the train split on which the activations' largest magnitudes are measured, in rows spread evenly over
    it; only where there is smoothing."""
    max_perplexity_ratio: pydantic.PositiveFloat = 1.005
    """Fail when the quantized model's perplexity is more than this times the checkpoint's; 1.005 = 0.5 % more."""
    max_kl: pydantic.PositiveFloat = 0.01
    """Fail when the divergence KL(checkpoint || quantized model) is more than this, in nats a token."""
    min_top1_agreement: Annotated[float, pydantic.Field(ge=0, le=1)] = 0.98
    """Fail when the two models' likeliest next tokens are the same for less than this share of tokens."""
    gate_tokens: pydantic.PositiveInt = 65_536
    """Tokens of the validation split that the two models are compared on, in rows spread evenly over it."""
    seq_len: pydantic.PositiveInt = 2048
    """Longest row of tokens in calibration and comparison; at most what the model was made for."""
    max_shard_bytes: pydantic.PositiveInt = 2_000_000_000
    """Size beyond which another file of weights is begun."""
    num_workers: Annotated[pydantic.PositiveInt, OUTPUT_UNCHANGED] = 1
    """Tasks that calibrate at the same time, each with the model in memory."""
    micro_batch: Annotated[pydantic.PositiveInt, OUTPUT_UNCHANGED] = 8
    """Rows that go through a model at once."""
    device: Annotated[Literal["auto", "cpu", "cuda"], OUTPUT_UNCHANGED] = "auto"
    """What models run on; auto = cuda where the cluster has GPUs."""
    threads: Annotated[pydantic.PositiveInt, OUTPUT_UNCHANGED] = 1
    """Threads that a task computes with on the CPU; Ray reserves as many CPUs."""

    def __post_init__(self) -> None:
        """Refuse what would have no effect."""
        if self.scheme == "w8a16" and self.smoothing:
            allowed = "has no effect where scheme is w8a16: only activations are smoothed"
            raise ConfigError("smoothing", self.smoothing, allowed, "remove it, or use scheme w8a8")
        if self.num_workers > 1 and not self.smoothing:
            allowed = "has no effect without smoothing: one task compares the models"
            raise ConfigError("num_workers", self.num_workers, allowed, "use 1, or set smoothing")
