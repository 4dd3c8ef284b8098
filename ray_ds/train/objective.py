"""What training minimises: a module around the decoder, which the loop and DeepSpeed know as nothing else."""

from typing import ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from ray_ds.model.decoder import Decoder


class MicroBatch(NamedTuple):
    """Rows that go through the model at once, (micro_batch, seq_len) each, int64."""

    tokens: Tensor
    targets: Tensor
    """`IGNORED_TARGET` where nothing is predicted."""
    segments: Tensor | None = None
    """Which document of its row a token is of, from 0 and without gaps; None = attention runs through the row."""
    terms: int = 0
    """What its rows add to what the batch's loss is divided by: targets, or pairs of answers."""
    index: int | None = None  # type: ignore[assignment]  # hides `tuple.index`, which nobody calls
    """Its number in the batch's grid, the same for any world size; None for padding, in which no target counts."""


class Objective(nn.Module):
    """Turns rows into a summed loss and summed figures; parameters and buffers are those of `decoder` alone.

    A model that is only asked (a reference, a teacher) is no submodule, so that it is neither trained nor partitioned.
    """

    figures: ClassVar[tuple[str, ...]] = ()
    """Names of what `forward` returns behind the loss; each becomes a figure of the step, divided as the loss is."""

    def __init__(self, decoder: Decoder) -> None:
        super().__init__()
        self.decoder = decoder

    def forward(self, tokens: Tensor, targets: Tensor, segments: Tensor | None) -> Tensor:
        """Return the summed loss, which has a gradient, and the figures: (1 + len(figures),), fp32.

        Rows without targets add exactly nothing, to the sums and to the gradient.
        """
        raise NotImplementedError


class NextTokenObjective(Objective):
    """Cross-entropy in nats, summed over the targets."""

    def forward(self, tokens: Tensor, targets: Tensor, segments: Tensor | None) -> Tensor:
        """Return the sum, (1,)."""
        loss: Tensor = self.decoder(tokens, targets, segments=segments)
        return loss.float().reshape(1)


def token_logits(decoder: Decoder, tokens: Tensor, segments: Tensor | None) -> Tensor:
    """Return logits of whole rows, (B * T, V), in the decoder's type."""
    hidden = decoder.model(tokens, None, segments)  # (B, T, D)
    logits: Tensor = decoder.lm_head(hidden)  # (B, T, V)
    return torch.flatten(logits, 0, 1)
