"""Direct preference optimisation (arXiv 2305.18290), measured by a reference in memory or by what one once said."""

import torch
import torch.nn.functional as F
from torch import Tensor

from ray_ds.config.objective import Dpo
from ray_ds.model.decoder import Decoder
from ray_ds.model.loss import IGNORED_TARGET
from ray_ds.train.objective import Objective, token_logits

FIGURES = ("reward_margin", "reward_accuracy", "reward_chosen", "reward_rejected")


class DpoObjective(Objective):
    """Makes the better of two answers more likely than the worse, measured by a reference that stays as it is.

    Segments 0 and 1, 2 and 3, ... of a row are a better and a worse answer to one prompt; the loss is summed over
    pairs. The reference is whole on every process.
    """

    figures = FIGURES

    def __init__(self, decoder: Decoder, settings: Dpo, reference: Decoder) -> None:
        super().__init__(decoder)
        self._settings = settings
        self._asked = (reference,)

    def forward(self, tokens: Tensor, targets: Tensor, segments: Tensor | None) -> Tensor:
        """Return loss and figures, summed over pairs, (5,)."""
        with torch.no_grad():
            before = target_log_probs(self._asked[0], tokens, targets, segments)
        after = target_log_probs(self.decoder, tokens, targets, segments)
        return summed_dpo(after, before, targets, segments, self._settings)


class StoredDpoObjective(Objective):
    """What `DpoObjective` minimises, without a reference: its log-probabilities of the targets come with the rows."""

    figures = FIGURES

    def __init__(self, decoder: Decoder, settings: Dpo) -> None:
        super().__init__(decoder)
        self._settings = settings

    def forward(self, tokens: Tensor, targets: Tensor, segments: Tensor | None, before: Tensor) -> Tensor:
        """Return loss and figures, summed over pairs, (5,); `before` is (B, T)."""
        after = target_log_probs(self.decoder, tokens, targets, segments)
        return summed_dpo(after, before, targets, segments, self._settings)


def summed_dpo(after: Tensor, before: Tensor, targets: Tensor, segments: Tensor | None, settings: Dpo) -> Tensor:
    """Return loss and figures, summed over pairs, (5,).

    With r = beta * (log p(answer) - log p_reference(answer)) and m = r_better - r_worse the loss of a pair is
    -(1 - s) log sigmoid(m) - s log sigmoid(-m), where s is the label smoothing (arXiv 2305.18290, equation 7; the
    smoothed form is "conservative DPO", E. Mitchell 2023).

    Args:
        after, before: log-probabilities of the targets by the model and by its reference, (B, T).
    """
    assert segments is not None, "answers are told apart by their segments"
    gains = settings.beta * (_sum_answers(after, segments) - _sum_answers(before, segments))  # (B, A)
    chosen, rejected = gains[:, 0::2], gains[:, 1::2]  # (B, A / 2) each
    is_pair = _sum_answers((targets != IGNORED_TARGET).long(), segments)[:, 1::2] > 0  # (B, A / 2)
    margin = chosen - rejected
    smoothing = settings.label_smoothing
    losses = -(1 - smoothing) * F.logsigmoid(margin) - smoothing * F.logsigmoid(-margin)
    figures = (margin, (margin > 0).float(), chosen, rejected)
    return torch.stack([torch.where(is_pair, values, 0.0).sum() for values in (losses, *figures)])


def target_log_probs(decoder: Decoder, tokens: Tensor, targets: Tensor, segments: Tensor | None) -> Tensor:
    """Return the log-probability of each target, in nats and fp32, (B, T); 0 where there is none."""
    logits = token_logits(decoder, tokens, segments)  # (B * T, V)
    costs = F.cross_entropy(logits.float(), targets.flatten(), ignore_index=IGNORED_TARGET, reduction="none")
    return -costs.view_as(tokens)


def _sum_answers(values: Tensor, segments: Tensor) -> Tensor:
    """Return the sum over each segment, (B, A), with an even A that no row exceeds, known without looking at rows."""
    num_answers = segments.shape[1] + 2 - segments.shape[1] % 2
    sums = torch.zeros(len(values), num_answers, dtype=values.dtype, device=values.device)
    return sums.scatter_add(1, segments, values)
