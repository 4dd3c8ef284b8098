"""Settings of what training minimises, and of which weights it may move."""

from typing import Annotated, Literal

import pydantic
from pydantic import NonNegativeFloat, PositiveFloat, PositiveInt

from ray_ds.config.settings import settings
from ray_ds.errors import ConfigError

EXPERT_RANK_MULTIPLE = 8
"""bf16 numbers in 16 bytes, on which rows begin in `torch.nn.functional.grouped_mm`."""


@settings
class NextToken:
    """Cross-entropy of each next token; on chat shards of the answers alone, which is supervised fine-tuning."""

    kind: Literal["next_token"]
    """Selects this objective."""


@settings
class Dpo:
    """Direct preference optimisation (arXiv 2305.18290) on pairs of answers; its reference is the first model.

    That is kept in memory beside the one that is trained, unless the step names as its `reference` what a
    `reference_log_probs` step stored of it.
    """

    kind: Literal["dpo"]
    """Selects this objective."""
    beta: PositiveFloat = 0.1
    """How strongly the model is held to the reference: a reward is beta times the gain in log-probability over it."""
    label_smoothing: Annotated[float, pydantic.Field(ge=0, lt=0.5)] = 0.0
    """Share of the pairs that are taken to be labelled the wrong way round."""


@settings
class Distill:
    """Distillation (arXiv 1503.02531) from what the step names as its `teacher`: a checkpoint, or stored logits.

    The loss of a token is temperature^2 * KL(teacher || student), both softened by the temperature, plus
    cross_entropy_weight * cross-entropy. Of a teacher's stored logits, the divergence is over the largest ones and all
    others as one outcome.
    """

    kind: Literal["distill"]
    """Selects this objective."""
    temperature: PositiveFloat = 1.0
    """What both models' logits are divided by before they are compared."""
    cross_entropy_weight: NonNegativeFloat = 0.5
    """Weight of the cross-entropy of the next token beside the teacher's word."""


Objective = Annotated[NextToken | Dpo | Distill, pydantic.Field(discriminator="kind")]


@settings
class Lora:
    """Low-rank adapters (arXiv 2106.09685): the weights stay as they were, and W + alpha / rank * B A is what acts.

    At the end the product is added to the weights, so that the model is a plain one; `adapter/` holds A and B alone.
    """

    rank: PositiveInt = 16
    """Rows of A and columns of B."""
    alpha: PositiveFloat = 32.0
    """The product of B and A is multiplied by alpha / rank."""
    modules: tuple[str, ...] = ("*.self_attn.*_proj*", "*.mlp.*_proj")
    """Linear layers that get an adapter, by patterns of their names in the model, such as `*.q_proj`; routed experts
    and routers are none."""
    routed_experts: bool = False
    """Whether every routed expert gets adapters of its own, too: rank * (inputs + outputs) numbers for each weight."""

    def __post_init__(self) -> None:
        """Want something to adapt, and a rank that grouped products take."""
        if not self.modules and not self.routed_experts:
            raise ConfigError("modules", "empty", "must hold a pattern of names or more", "try *.self_attn.*_proj")
        if self.routed_experts and self.rank % EXPERT_RANK_MULTIPLE:
            allowed = f"must be a multiple of {EXPERT_RANK_MULTIPLE} with routed_experts, for grouped products on GPUs"
            raise ConfigError("rank", self.rank, allowed, "correct one of them")
