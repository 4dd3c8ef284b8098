"""Settings of the optimizers, and of how their rates change."""

from typing import Annotated, Literal

import pydantic
from pydantic import NonNegativeFloat, NonNegativeInt, PositiveFloat

from ray_ds.config.settings import settings

Fraction = Annotated[float, pydantic.Field(ge=0, lt=1)]


@settings
class AdamW:
    """AdamW (arXiv 1711.05101); norms and biases are not decayed."""

    kind: Literal["adamw"]
    """Selects this optimizer."""
    lr: PositiveFloat = 1e-3
    """Peak learning rate."""
    betas: tuple[Fraction, Fraction] = (0.9, 0.95)
    """Decay of the running means of the gradient and of its square."""
    eps: PositiveFloat = 1e-8
    """Added to the root of the second mean."""
    weight_decay: NonNegativeFloat = 0.1
    """Decay of matrices, multiplied by the rate."""


@settings
class Muon:
    """Muon (kellerjordan.github.io/posts/muon) on the layers' matrices; AdamW on embeddings, head, router and norms."""

    kind: Literal["muon"]
    """Selects this optimizer."""
    lr: PositiveFloat = 0.02
    """Peak learning rate of matrices; an update has singular values near 1 before it is multiplied."""
    momentum: Fraction = 0.95
    """Decay of the running mean of the gradient (Nesterov)."""
    weight_decay: NonNegativeFloat = 0.01
    """Decay of matrices and embeddings, multiplied by their rate."""
    adam_lr: PositiveFloat = 3e-3
    """Peak learning rate of what AdamW trains."""
    adam_betas: tuple[Fraction, Fraction] = (0.9, 0.95)
    """Decay of AdamW's two running means."""
    adam_eps: PositiveFloat = 1e-8
    """Added to the root of AdamW's second mean."""


Optimizer = Annotated[AdamW | Muon, pydantic.Field(discriminator="kind")]


@settings
class Schedule:
    """Linear warm-up, then a cosine down to a fraction of the peak at the last step."""

    warmup_steps: NonNegativeInt = 100
    """Steps over which the rate rises from 0."""
    final_lr_fraction: Annotated[float, pydantic.Field(ge=0, le=1)] = 0.1
    """The last step's rate, as a fraction of the peak."""
