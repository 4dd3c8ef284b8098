"""Ways to stretch rotary positions beyond the length that a model was trained at."""

from typing import Annotated, Literal

import pydantic

from ray_ds.config.settings import settings
from ray_ds.errors import ConfigError


@settings
class Yarn:
    """YaRN (arXiv 2309.00071): slow rotations are stretched, fast ones kept, those between blended."""

    kind: Literal["yarn"]
    """Selects this way."""
    factor: float
    """How many times longer texts become."""
    original_max_position_embeddings: int
    """Tokens that the model was trained at before."""
    beta_fast: float = 32.0
    """Turns within the original length from which a rotation is kept as it is."""
    beta_slow: float = 1.0
    """Turns within the original length up to which a rotation is stretched in full."""
    mscale: float | None = None
    """DeepSeek's: with `mscale_all_dim`, the numerator's weight in the factor on rotated queries and keys."""
    mscale_all_dim: float | None = None
    """DeepSeek's: the same factor's denominator, and in latent attention the factor on all scores, squared."""
    attention_factor: float | None = None
    """Factor on rotated queries and keys; absent = follows from `factor`, `mscale` and `mscale_all_dim`."""

    def __post_init__(self) -> None:
        """Refuse values that stretch nothing."""
        _check_stretch(self.factor, self.original_max_position_embeddings)
        if not 0 < self.beta_slow < self.beta_fast:
            allowed = f"must be positive and below beta_fast ({self.beta_fast})"
            raise ConfigError("rope_scaling.beta_slow", self.beta_slow, allowed, "lower it")


@settings
class Llama3Rope:
    """Llama 3.1's way: short wavelengths are kept, long ones stretched, those between blended."""

    kind: Literal["llama3"]
    """Selects this way."""
    factor: float
    """How many times longer texts become."""
    low_freq_factor: float
    """The original length divided by this is the wavelength from which rotations are stretched in full."""
    high_freq_factor: float
    """The original length divided by this is the wavelength up to which rotations are kept."""
    original_max_position_embeddings: int
    """Tokens that the model was trained at before."""

    def __post_init__(self) -> None:
        """Refuse values that stretch nothing."""
        _check_stretch(self.factor, self.original_max_position_embeddings)
        if not 0 < self.low_freq_factor < self.high_freq_factor:
            allowed = f"must be positive and below high_freq_factor ({self.high_freq_factor})"
            raise ConfigError("rope_scaling.low_freq_factor", self.low_freq_factor, allowed, "lower it")


@settings
class LinearRope:
    """Position interpolation (arXiv 2306.15595): every rotation is slowed down alike."""

    kind: Literal["linear"]
    """Selects this way."""
    factor: float
    """How many times longer texts become."""

    def __post_init__(self) -> None:
        """Refuse values that stretch nothing."""
        _check_stretch(self.factor, 1)


RopeScaling = Annotated[Yarn | Llama3Rope | LinearRope, pydantic.Field(discriminator="kind")]


def _check_stretch(factor: float, original_length: int) -> None:
    """Refuse a factor that shortens and a length that is none."""
    if factor < 1:
        raise ConfigError("rope_scaling.factor", factor, "must be 1 or more", "leave rope_scaling out for no stretch")
    if original_length < 1:
        field = "rope_scaling.original_max_position_embeddings"
        raise ConfigError(field, original_length, "must be positive", "give the length that the model was trained at")
