"""Everything below the output projection."""

from typing import cast

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ray_ds.config.model import Kernels, ModelConfig
from ray_ds.model.attention import Mask
from ray_ds.model.block import Block, PredictionBlock
from ray_ds.model.caches import CacheRows
from ray_ds.model.documents import document_block_mask, document_mask, document_positions
from ray_ds.model.experts import MoE
from ray_ds.model.kernels import is_fast
from ray_ds.model.layers import Embedding, RMSNorm
from ray_ds.model.rotary import Rotary, rotary_tables


class Backbone(nn.Module):
    """The embedding, the layers and, behind the last of them, the modules of multi-token prediction."""

    def __init__(
        self, config: ModelConfig, *, recompute_activations: bool, kernels: Kernels, measures_balance: bool
    ) -> None:
        super().__init__()
        self.config = config
        self.recompute_activations = recompute_activations
        self.kernels = kernels
        self.embed_tokens = Embedding(config.vocab_size, config.hidden_size)
        count = config.num_hidden_layers
        kinds = [Block] * count + [PredictionBlock] * config.num_nextn_predict_layers
        blocks = (kind(config, i, kernels, measures_balance=measures_balance) for i, kind in enumerate(kinds))
        self.layers = nn.ModuleList(blocks)
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps, kernels)

    def surroundings(
        self, tokens: Tensor, segments: Tensor | None = None, cache: CacheRows | None = None
    ) -> tuple[Rotary, Mask]:
        """Return rotary tables and mask for `tokens` (B, T), which all layers share."""
        if cache is not None:
            return rotary_tables(cache.positions, self.config), cache.mask
        if segments is None:
            return rotary_tables(torch.arange(tokens.shape[1], device=tokens.device)[None], self.config), None
        is_by_block = is_fast(self.kernels, tokens)
        mask = document_block_mask(segments) if is_by_block else document_mask(segments)
        return rotary_tables(document_positions(segments), self.config), mask

    def forward(
        self, tokens: Tensor, rotary: Rotary, mask: Mask, cache: CacheRows | None = None
    ) -> tuple[Tensor, list[Tensor]]:
        """Return the normed last layer's output (B, T, D) for `tokens` (B, T), and each measured balance, (B,)."""
        x = self.embed_tokens(tokens)  # (B, T, D)
        balances: list[Tensor] = []
        for layer in self.layers[: self.config.num_hidden_layers]:
            x = self._run(cast(Block, layer), x, rotary, mask, cache, balances)
        if cache is not None:
            cache.finish()
        normed: Tensor = self.norm(x)
        return normed, balances

    def predict(
        self,
        hidden: Tensor,
        ahead: Tensor,
        depth: int,
        rotary: Rotary,
        mask: Mask,
        cache: CacheRows | None = None,
    ) -> tuple[Tensor, list[Tensor]]:
        """Run one module of multi-token prediction.

        Args:
            hidden: (B, T, D), this backbone's output or that of the module before; both come normed, as in
                transformers' `MtpModel`. From depth 2 on vLLM hands on what is not; no DeepSeek has that depth.
            ahead: (B, T), the token `depth` places behind each, of which the module predicts the successor.
            depth: number of the module, from 1.
        Returns:
            What the output projection and the next module take, (B, T, D); measured balances.
        """
        layer = cast(PredictionBlock, self.layers[self.config.num_hidden_layers + depth - 1])
        balances: list[Tensor] = []
        x = self._run(layer, layer.join(hidden, self.embed_tokens(ahead)), rotary, mask, cache, balances)
        return layer.shared_head["norm"](x), balances

    def _run(
        self, layer: Block, x: Tensor, rotary: Rotary, mask: Mask, cache: CacheRows | None, balances: list[Tensor]
    ) -> Tensor:
        """Return the stream after a layer; count its experts' load and add its balance to the others'."""
        if self.recompute_activations and self.training:
            x, load, balance = checkpoint(layer, x, rotary, mask, cache, use_reentrant=False)
        else:
            x, load, balance = layer(x, rotary, mask, cache)
        # Counted here and not inside the layer, which may run a second time to recompute its activations.
        if load is not None and self.training:
            cast(MoE, layer.mlp).gate.expert_load += load
        if balance is not None:
            balances.append(balance)
        return x
