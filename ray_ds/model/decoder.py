"""The DeepSeek-V3 decoder (arXiv 2412.19437); module names are Hugging Face's, so that parameters carry theirs."""

from collections.abc import Iterable
from typing import cast

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ray_ds.config.model import ModelConfig
from ray_ds.model.attention import LatentAttention, rotary_tables
from ray_ds.model.caches import CacheRows
from ray_ds.model.experts import MoE
from ray_ds.model.layers import MLP, RMSNorm
from ray_ds.model.loss import summed_cross_entropy


class Block(nn.Module):
    """One layer: attention, then an MLP or experts, each on a normed copy and added to the stream."""

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        self.is_sparse = layer >= config.first_k_dense_replace
        self.input_layernorm = RMSNorm(config.hidden_size)
        self.self_attn = LatentAttention(config, layer)
        self.post_attention_layernorm = RMSNorm(config.hidden_size)
        self.mlp = MoE(config) if self.is_sparse else MLP(config.hidden_size, config.intermediate_size)

    def forward(
        self, x: Tensor, rotary: tuple[Tensor, Tensor], cache: CacheRows | None, mask: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        """Return the stream (B, T, D) after this layer, and tokens by expert, (E,), where it has experts."""
        x = x + self.self_attn(self.input_layernorm(x), rotary, cache, mask)
        normed = self.post_attention_layernorm(x)
        if not self.is_sparse:
            return x + self.mlp(normed), None
        out, load = self.mlp(normed)
        return x + out, load


class Backbone(nn.Module):
    """Everything below the output projection."""

    def __init__(self, config: ModelConfig, *, recompute_activations: bool) -> None:
        super().__init__()
        self.config = config
        self.recompute_activations = recompute_activations
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Block(config, layer) for layer in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size)

    def forward(self, tokens: Tensor, cache: CacheRows | None, segments: Tensor | None = None) -> Tensor:
        """Return the normed last layer's output (B, T, D) for `tokens` (B, T)."""
        positions = torch.arange(tokens.shape[1], device=tokens.device)[None] if cache is None else cache.positions
        mask = None
        if segments is not None:
            same = segments[:, :, None] == segments[:, None, :]  # (B, T, T)
            mask = (same & (positions[:, :, None] >= positions[:, None, :]))[:, None]  # (B, 1, T, T)
            positions = positions - same.int().argmax(dim=-1)  # (B, T)
        rotary = rotary_tables(positions, self.config)
        x = self.embed_tokens(tokens)  # (B, T, D)
        for layer in cast(Iterable[Block], self.layers):
            if self.recompute_activations and self.training:
                x, load = checkpoint(layer, x, rotary, cache, mask, use_reentrant=False)
            else:
                x, load = layer(x, rotary, cache, mask)
            # Counted here and not inside the layer, which may run a second time to recompute its activations.
            if load is not None and self.training:
                cast(MoE, layer.mlp).gate.expert_load += load
        if cache is not None:
            cache.finish()
        normed: Tensor = self.norm(x)
        return normed


class Decoder(nn.Module):
    """A causal language model."""

    def __init__(self, config: ModelConfig, *, recompute_activations: bool = False) -> None:
        """Build the modules, their values unset: `init_weights` or a checkpoint gives them.

        Args:
            recompute_activations: keep only each layer's input for the backward pass, for less memory and about a
                third more work.
        """
        super().__init__()
        self.config = config
        self.model = Backbone(config, recompute_activations=recompute_activations)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.tie_embeddings()

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
        """Return the summed cross-entropy where there are targets, otherwise logits.

        Args:
            tokens: (B, T) int64.
            targets: (B, T) int64, `IGNORED_TARGET` where nothing is predicted.
            segments: (B, T) int64, which document of its row a token is of; attention stays within it.
            cache: the rows' earlier tokens; `tokens` go on from there and are stored.
            logit_positions: (B,), the one token of each row whose logits are wanted; None = all.
        Returns:
            With targets the sum over them in nats, a scalar; without, logits (B, T, V) or (B, V). All in fp32.
        """
        hidden = self.model(tokens, cache, segments)  # (B, T, D)
        if logit_positions is not None:
            hidden = hidden[torch.arange(len(hidden), device=hidden.device), logit_positions]  # (B, D)
        logits: Tensor = self.lm_head(hidden)  # (B, T, V) or (B, V)
        if targets is None:
            return logits.float()
        return summed_cross_entropy(logits.flatten(0, -2), targets.flatten())
