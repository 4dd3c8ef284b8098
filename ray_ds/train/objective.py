"""What training minimises: a module around the decoder, which the loop and DeepSpeed know as nothing else."""

from typing import NamedTuple

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
    stored: tuple[Tensor, ...] = ()
    """What another model said to the rows, where that was stored: a teacher's `TopLogits`, (B, T, k), (B, T, k) and
    (B, T), or a reference's log-probabilities of the targets, (B, T)."""

    @property
    def inputs(self) -> tuple[Tensor | None, ...]:
        """What an objective is called with."""
        return (self.tokens, self.targets, self.segments, *self.stored)


class Objective(nn.Module):
    """Turns rows into a summed loss and summed figures; parameters and buffers are those of `decoder` alone.

    Called with the `inputs` of a micro-batch, it returns the summed loss, which has a gradient, and the figures:
    (1 + len(figures),), fp32. Rows without targets add exactly nothing, to the sums and to the gradient. A model that
    is only asked (a reference, a teacher) is no submodule, so that it is neither trained nor partitioned.
    """

    figures: tuple[str, ...] = ()
    """Names of what `forward` returns behind the loss; each becomes a figure of the step, divided as the loss is. One
    called `loss` is shown in place of what is minimised."""

    def __init__(self, decoder: Decoder) -> None:
        super().__init__()
        self.decoder = decoder


class NextTokenObjective(Objective):
    """Cross-entropy in nats, summed over the targets; in training also what the decoder's weights add to it."""

    def __init__(self, decoder: Decoder) -> None:
        super().__init__(decoder)
        weights = {"prediction_loss": decoder.weights.prediction, "balance_loss": decoder.weights.balance}
        self._weights = weights
        others = [name for name, weight in weights.items() if weight]
        self.figures = ("loss", *others) if others else ()

    def forward(self, tokens: Tensor, targets: Tensor, segments: Tensor | None) -> Tensor:
        """Return what is minimised, and where more than the cross-entropy is, that and the raw other losses."""
        total: Tensor = self.decoder(tokens, targets, segments=segments)
        if not self.figures:
            return total.float().reshape(1)
        extra = self.decoder.extra_losses if self.training else None  # (2,)
        raw = dict(zip(self._weights, total.new_zeros(2) if extra is None else extra, strict=True))
        plain = total.detach() - sum(weight * raw[name] for name, weight in self._weights.items())
        return torch.stack((total, plain, *(raw[name] for name in self.figures[1:])))


def token_logits(decoder: Decoder, tokens: Tensor, segments: Tensor | None) -> Tensor:
    """Return logits of whole rows, (B * T, V), in the decoder's type."""
    hidden, _ = decoder.model(tokens, *decoder.model.surroundings(tokens, segments))  # (B, T, D)
    logits: Tensor = decoder.lm_head(hidden)  # (B, T, V)
    return torch.flatten(logits, 0, 1)
