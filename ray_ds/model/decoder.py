"""The decoder: DeepSeek's (arXiv 2405.04434, 2412.19437) or Llama's; module names are Hugging Face's."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ray_ds.config.model import Kernels, ModelConfig
from ray_ds.model.attention import Mask
from ray_ds.model.backbone import Backbone
from ray_ds.model.caches import CacheRows
from ray_ds.model.loss import IGNORED_TARGET, OutputHead
from ray_ds.model.prediction import look_ahead
from ray_ds.model.rotary import Rotary


@dataclass(frozen=True, kw_only=True, slots=True)
class LossWeights:
    """What is added to the loss in training, as multiples of the raw terms."""

    prediction: float = 0.0
    """Of the mean over the modules of multi-token prediction; lambda in DeepSeek-V3."""
    balance: float = 0.0
    """Of the sequence-wise balance of experts; alpha in DeepSeek-V3."""


class Decoder(nn.Module):
    """A causal language model."""

    def __init__(
        self,
        config: ModelConfig,
        *,
        recompute_activations: bool = False,
        kernels: Kernels = "auto",
        weights: LossWeights | None = None,
    ) -> None:
        """Build the modules, their values unset: `init_weights` or a checkpoint gives them.

        Args:
            recompute_activations: keep only each layer's input for the backward pass, for less memory and about a
                third more work.
            weights: of the losses beside the cross-entropy; None = there are none.
        """
        super().__init__()
        self.config = config
        self.weights = weights or LossWeights()
        self.model = Backbone(
            config,
            recompute_activations=recompute_activations,
            kernels=kernels,
            measures_balance=self.weights.balance > 0,
        )
        self.lm_head = OutputHead(config.hidden_size, config.vocab_size, kernels)
        self.tie_embeddings()
        self.extra_losses: Tensor | None = None
        """Of the last pass in training, detached: what `weights.prediction` and `weights.balance` multiplied, (2,)
        fp32, summed over targets like the loss itself; None where there are no such losses."""

    def tie_embeddings(self) -> None:
        """Make the output projection the embedding table, if the config says so; `to_empty` parts them."""
        if self.config.tie_word_embeddings:
            self.lm_head.weight = self.model.embed_tokens.weight

    def forward(
        self,
        tokens: Tensor,
        targets: Tensor | None = None,
        *,
        segments: Tensor | None = None,
        cache: CacheRows | None = None,
        logit_positions: Tensor | None = None,
    ) -> Tensor:
        """Return the summed loss where there are targets, otherwise logits.

        Args:
            tokens: (B, T) int64.
            targets: (B, T) int64, `IGNORED_TARGET` where nothing is predicted.
            segments: (B, T) int64, the number of the document that each token belongs to: attention stays within a
                document and positions start at 0 in each; None = a row is one document.
            cache: the rows' earlier tokens; `tokens` go on from there and are stored.
            logit_positions: (B,) or (B, P), the token or tokens of each row whose logits are wanted; None = all.
        Returns:
            With targets the cross-entropy summed over them in nats, in training plus the weighted extra losses, a
            scalar; without, logits (B, T, V), (B, V) or (B, P, V). All in fp32.
        """
        rotary, mask = self.model.surroundings(tokens, segments, cache)
        hidden, balances = self.model(tokens, rotary, mask, cache)  # (B, T, D)
        if targets is None:
            if logit_positions is not None:
                rows = torch.arange(len(hidden), device=hidden.device)
                rows = rows.view(-1, *[1] * (logit_positions.dim() - 1))
                hidden = hidden[rows, logit_positions]  # (B, D) or (B, P, D)
            logits: Tensor = self.lm_head(hidden)  # (B, T, V), (B, V) or (B, P, V)
            return logits.float()
        loss: Tensor = self.lm_head(hidden, targets)
        if not self.training:
            return loss
        return loss + self._extra_loss(hidden, balances, tokens, targets, segments, rotary, mask)

    def _extra_loss(
        self,
        hidden: Tensor,
        balances: list[Tensor],
        tokens: Tensor,
        targets: Tensor,
        segments: Tensor | None,
        rotary: Rotary,
        mask: Mask,
    ) -> Tensor:
        """Return the weighted losses beside the cross-entropy, and keep their raw values in `extra_losses`."""
        prediction = hidden.new_zeros((), dtype=torch.float32)
        if self.weights.prediction:
            for depth in range(1, 1 + self.config.num_nextn_predict_layers):
                ahead, goals = look_ahead(tokens, targets, segments, depth)
                hidden, more = self.model.predict(hidden, ahead, depth, rotary, mask)
                prediction = prediction + self.lm_head(hidden, goals) / self.config.num_nextn_predict_layers
                balances = balances + more
        balance = hidden.new_zeros((), dtype=torch.float32)
        if balances:
            # Each row as often as it has targets, so that the step's mean is over tokens like that of the loss.
            num_targets = (targets != IGNORED_TARGET).sum(dim=1)  # (B,)
            balance = (torch.stack(balances).sum(dim=0) * num_targets).sum()
        if self.weights != LossWeights():
            self.extra_losses = torch.stack((prediction.detach(), balance.detach()))
        return self.weights.prediction * prediction + self.weights.balance * balance

    def hidden(self, tokens: Tensor, *, cache: CacheRows | None = None) -> Tensor:
        """Return what `lm_head` makes logits of, (B, T, D), and `draft` its guesses."""
        hidden: Tensor = self.model(tokens, *self.model.surroundings(tokens, None, cache), cache)[0]
        return hidden

    def draft(
        self, hidden: Tensor, ahead: Tensor, *, depth: int = 1, cache: CacheRows | None = None
    ) -> tuple[Tensor, Tensor]:
        """Guess the token behind the next one by a module of multi-token prediction, for speculative decoding.

        Args:
            hidden: (B, T, D), from `hidden`, or from the `draft` one shallower.
            ahead: (B, T), the token `depth` places behind each of those that `hidden` is of.
            depth: number of the module, from 1.
            cache: the rows that `hidden` was computed with, of a cache that `drafts`; None = whole sequences.
        Returns:
            Logits (B, T, V) in fp32 of the tokens behind `ahead`, and the states for the next module, (B, T, D).
        """
        rotary, mask = self.model.surroundings(ahead, None, cache)
        states, _ = self.model.predict(hidden, ahead, depth, rotary, mask, cache)
        logits: Tensor = self.lm_head(states)
        return logits.float(), states
