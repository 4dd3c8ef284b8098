"""What a plan is about: one way of training one model."""

from dataclasses import dataclass, replace

from ray_ds.config.model import ModelConfig
from ray_ds.config.model_size import num_parameters
from ray_ds.config.train import Precision, TrainSettings


@dataclass(frozen=True, kw_only=True, slots=True)
class Case:
    """A model and the settings that memory and speed depend on."""

    config: ModelConfig
    seq_len: int
    batch_tokens: int
    """Tokens of a step, over all workers."""
    micro_batch: int
    world_size: int
    zero_stage: int
    offload: bool = False
    """Whether masters and optimizer states lie in the host's memory, DeepSpeed's `offload_optimizer`."""
    precision: Precision
    uses_muon: bool = False
    recompute: bool
    compile: bool

    @property
    def micro_tokens(self) -> int:
        """Tokens that a worker sends through the model at once."""
        return self.micro_batch * self.seq_len

    @property
    def micro_batches(self) -> int:
        """Micro-batches that the busiest worker has in a step."""
        return -(-self.batch_tokens // (self.micro_tokens * self.world_size))

    @property
    def dtype_bytes(self) -> int:
        """Bytes of a weight, an activation or a gradient in the type trained in."""
        return 4 if self.precision == "fp32" else 2

    @property
    def num_parameters(self) -> int:
        """Numbers that are trained, and the few of the routers' biases."""
        return num_parameters(self.config)

    def with_micro_batch(self, micro_batch: int) -> "Case":
        """Return the same case at another micro-batch."""
        return replace(self, micro_batch=micro_batch)


def case_of(settings: TrainSettings, config: ModelConfig, world_size: int) -> Case:
    """Return the case that a train step's settings make on so many workers."""
    return Case(
        config=config,
        seq_len=settings.seq_len,
        batch_tokens=settings.batch_tokens,
        micro_batch=settings.micro_batch,
        world_size=world_size,
        zero_stage=settings.zero_stage,
        precision=settings.precision,
        uses_muon=settings.optimizer.kind == "muon",
        recompute=settings.recompute_activations,
        compile=settings.compile,
    )
