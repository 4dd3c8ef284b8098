"""Direct preference optimisation (arXiv 2305.18290)."""

import torch
import torch.nn.functional as F
from torch import Tensor

from ray_ds.config.objective import Dpo
from ray_ds.model.decoder import Decoder
from ray_ds.model.loss import IGNORED_TARGET
from ray_ds.train.objective import Objective, token_logits


class DpoObjective(Objective):
    """Makes the better of two answers more likely than the worse, measured by a reference that stays as it is.

    Segments 0 and 1, 2 and 3, ... of a row are a better and a worse answer to one prompt; the loss is summed over
    pairs. With r = beta * (log p(answer) - log p_reference(answer)) and m = r_better - r_worse it is
    -(1 - s) log sigmoid(m) - s log sigmoid(-m), where s is the label smoothing (arXiv 2305.18290, equation 7; the
    smoothed form is "conservative DPO", E. Mitchell 2023).
    """

    figures = ("reward_margin", "reward_accuracy", "reward_chosen", "reward_rejected")

    def __init__(self, decoder: Decoder, settings: Dpo, reference: Decoder) -> None:
        super().__init__(decoder)
        self._settings = settings
        self._asked = (reference,)

    def forward(self, tokens: Tensor, targets: Tensor, segments: Tensor | None) -> Tensor:
        """Return loss and figures, summed over pairs, (5,)."""
        assert segments is not None, "answers are told apart by their segments"
        with torch.no_grad():
            before = answer_log_probs(self._asked[0], tokens, targets, segments)  # (B, A)
        gains = self._settings.beta * (answer_log_probs(self.decoder, tokens, targets, segments) - before)  # (B, A)
        chosen, rejected = gains[:, 0::2], gains[:, 1::2]  # (B, A / 2) each
        is_pair = count_targets(targets, segments)[:, 1::2] > 0  # (B, A / 2)
        margin = chosen - rejected
        smoothing = self._settings.label_smoothing
        losses = -(1 - smoothing) * F.logsigmoid(margin) - smoothing * F.logsigmoid(-margin)
        figures = (margin, (margin > 0).float(), chosen, rejected)
        return torch.stack([torch.where(is_pair, values, 0.0).sum() for values in (losses, *figures)])


def _num_answers(segments: Tensor) -> int:
    """Return an even number of segments that no row exceeds, known without looking at the rows."""
    return segments.shape[1] + 2 - segments.shape[1] % 2


def answer_log_probs(decoder: Decoder, tokens: Tensor, targets: Tensor, segments: Tensor) -> Tensor:
    """Return the log-probability of the targets of each segment, in nats and fp32, (B, A); 0 where it has none."""
    logits = token_logits(decoder, tokens, segments)  # (B * T, V)
    costs = F.cross_entropy(logits.float(), targets.flatten(), ignore_index=IGNORED_TARGET, reduction="none")
    sums = torch.zeros(len(tokens), _num_answers(segments), device=costs.device)  # (B, A)
    return sums.scatter_add(1, segments, -costs.view_as(tokens))


def count_targets(targets: Tensor, segments: Tensor) -> Tensor:
    """Return how many targets each segment has, (B, A)."""
    sums = torch.zeros(len(targets), _num_answers(segments), dtype=torch.int64, device=targets.device)
    return sums.scatter_add(1, segments, (targets != IGNORED_TARGET).long())
