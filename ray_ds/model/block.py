"""A layer of the decoder, and its kin that predicts further ahead; module names are Hugging Face's."""

import torch
from torch import Tensor, nn

from ray_ds.config.model import Kernels, ModelConfig
from ray_ds.model.attention import Mask
from ray_ds.model.caches import CacheRows
from ray_ds.model.experts import MoE
from ray_ds.model.grouped_attention import GroupedAttention
from ray_ds.model.latent_attention import LatentAttention
from ray_ds.model.layers import MLP, RMSNorm
from ray_ds.model.rotary import Rotary


class Block(nn.Module):
    """One layer: attention, then an MLP or experts, each on a normed copy and added to the stream."""

    def __init__(
        self, config: ModelConfig, layer: int, kernels: Kernels = "auto", *, measures_balance: bool = False
    ) -> None:
        super().__init__()
        attention = LatentAttention if config.attention == "mla" else GroupedAttention
        self.is_sparse = config.n_routed_experts > 0 and layer >= config.first_k_dense_replace
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps, kernels)
        self.self_attn = attention(config, layer, kernels)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps, kernels)
        self.mlp = (
            MoE(config, kernels, measures_balance=measures_balance)
            if self.is_sparse
            else MLP(config.hidden_size, config.intermediate_size)
        )

    def forward(
        self, x: Tensor, rotary: Rotary, mask: Mask = None, cache: CacheRows | None = None
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """Return the stream (B, T, D) after this layer, and of its experts the load, (E,), and balance, (B,)."""
        x = x + self.self_attn(self.input_layernorm(x), rotary, mask, cache)
        normed = self.post_attention_layernorm(x)
        if not self.is_sparse:
            return x + self.mlp(normed), None, None
        out, load, balance = self.mlp(normed)
        return x + out, load, balance


class PredictionBlock(Block):
    """A module of multi-token prediction (arXiv 2412.19437, section 2.2): a layer over joined states and embeddings.

    Embedding and output projection are the decoder's; on disk it stands behind the last layer.
    """

    def __init__(
        self, config: ModelConfig, layer: int, kernels: Kernels = "auto", *, measures_balance: bool = False
    ) -> None:
        super().__init__(config, layer, kernels, measures_balance=measures_balance)
        width, eps = config.hidden_size, config.rms_norm_eps
        self.enorm = RMSNorm(width, eps, kernels)
        self.hnorm = RMSNorm(width, eps, kernels)
        self.eh_proj = nn.Linear(2 * width, width, bias=False)
        self.shared_head = nn.ModuleDict({"norm": RMSNorm(width, eps, kernels)})

    def join(self, hidden: Tensor, embedded: Tensor) -> Tensor:
        """Return the layer's input, (B, T, D), of the states one token back and the embeddings of the next tokens.

        The published weights want the embedding first, the paper writes it second.
        """
        joined: Tensor = self.eh_proj(torch.cat((self.enorm(embedded), self.hnorm(hidden)), dim=-1))
        return joined
