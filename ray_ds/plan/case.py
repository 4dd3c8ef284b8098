"""What a plan is about: one way of training one model."""

from dataclasses import dataclass, field, replace

from ray_ds.config.model import ModelConfig
from ray_ds.config.model_size import num_parameters
from ray_ds.config.parallel import AXES, Choice, Offload, Parallel, Rule, refusal
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
    offload: Offload = "none"
    """What lies in the host's memory: `optimizer` = masters and running means, `all` = weights too."""
    parallel: Parallel = field(default_factory=Parallel)
    """What a group of workers divides."""
    precision: Precision
    uses_muon: bool = False
    recompute: bool
    compile: bool

    @property
    def micro_tokens(self) -> int:
        """Tokens that a worker sends through the model at once."""
        return self.micro_batch * self.seq_len // self.parallel.sequence

    @property
    def num_readers(self) -> int:
        """Workers, or groups of them, that train on different rows."""
        return self.world_size // self.parallel.rows_shared_by

    @property
    def num_copies(self) -> int:
        """Workers that hold the same weights, over which ZeRO divides what it divides."""
        return self.world_size // self.parallel.held_by

    @property
    def micro_batches(self) -> int:
        """Micro-batches that the busiest worker has in a step."""
        return -(-self.batch_tokens // (self.micro_batch * self.seq_len * self.num_readers))

    @property
    def dtype_bytes(self) -> int:
        """Bytes of a weight, an activation or a gradient in the type trained in."""
        return 4 if self.precision == "fp32" else 2

    @property
    def num_parameters(self) -> int:
        """Numbers that are trained, and the few of the routers' biases."""
        return num_parameters(self.config)

    @property
    def part(self) -> ModelConfig:
        """The layers that a worker computes: with `tensor` a part of the heads and of the MLP's inner width."""
        size = self.parallel.tensor
        return replace(
            self.config,
            num_attention_heads=self.config.num_attention_heads // size,
            num_key_value_heads=self.config.num_key_value_heads // size,
            intermediate_size=self.config.intermediate_size // size,
        )

    @property
    def num_held_experts(self) -> int:
        """Routed experts of a layer that a worker holds."""
        return self.config.n_routed_experts // self.parallel.expert

    @property
    def num_held_expert_parameters(self) -> int:
        """Numbers of the routed experts that a worker holds, before ZeRO divides them further."""
        expert = 3 * self.config.hidden_size * self.config.moe_intermediate_size
        return self.config.num_moe_layers * self.num_held_experts * expert

    @property
    def num_held_parameters(self) -> int:
        """Numbers that a worker's part of the model has, before ZeRO divides it further."""
        return num_parameters(self.part) - (self.parallel.expert - 1) * self.num_held_expert_parameters

    def refusal(self) -> Rule | None:
        """Return why training refuses these settings together; None where it does not."""
        choice = Choice(
            axes=tuple(axis for axis in AXES if getattr(self.parallel, axis) > 1),
            zero_stage=self.zero_stage,
            offload=self.offload,
            precision=self.precision,
            optimizer="muon" if self.uses_muon else "adamw",
            attention=self.config.attention,
            has_experts=self.config.num_moe_layers > 0,
            is_compiled=self.compile,
        )
        return refusal(choice)

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
        offload=settings.offload,
        parallel=settings.parallel,
        precision=settings.precision,
        uses_muon=settings.optimizer.kind == "muon",
        recompute=settings.recompute_activations,
        compile=settings.compile,
    )
