"""Settings of the stage `quantize`."""

from typing import Annotated, Literal

from ray_ds.config.settings import OUTPUT_UNCHANGED, settings
from ray_ds.errors import ConfigError


@settings
class QuantizeSettings:
    """How a checkpoint becomes an INT8 model: weights per output channel, activations per token, found as they come."""

    max_perplexity_ratio: float = 1.01
    """Fail when the INT8 model's perplexity is more than this times the checkpoint's; 1.01 = 1 % worse."""
    gate_tokens: int = 65_536
    """Tokens of the validation split that both perplexities are measured on, rounded up to whole rows."""
    gate_seq_len: int | None = None
    """Tokens of a row that is measured; without it, the length the model was made for."""
    max_shard_bytes: int = 2_000_000_000
    """Size beyond which another file of weights is begun."""
    device: Annotated[Literal["auto", "cpu", "cuda"], OUTPUT_UNCHANGED] = "auto"
    """What the perplexities are measured on; auto = cuda where the cluster has GPUs."""
    threads: Annotated[int, OUTPUT_UNCHANGED] = 1
    """Threads, and CPUs that Ray reserves."""
    batch_rows: Annotated[int, OUTPUT_UNCHANGED] = 8
    """Rows that go through a model at once."""

    def __post_init__(self) -> None:
        """Refuse settings that measure nothing."""
        if self.max_perplexity_ratio <= 0:
            raise ConfigError("max_perplexity_ratio", self.max_perplexity_ratio, "must be positive", "use 1.01")
        for name in ("gate_tokens", "gate_seq_len", "max_shard_bytes", "threads", "batch_rows"):
            value = getattr(self, name)
            if value is not None and value <= 0:
                raise ConfigError(name, value, "must be positive", "raise it")
