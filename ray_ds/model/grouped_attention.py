"""Grouped-query attention (arXiv 2305.13245), as Llama, Qwen2 and Qwen3 have it."""

import torch
from torch import Tensor, nn

from ray_ds.config.model import Kernels, ModelConfig
from ray_ds.model.attention import Attend, Mask, attend
from ray_ds.model.caches import CacheRows
from ray_ds.model.layers import RMSNorm
from ray_ds.model.rotary import Rotary, rotate_halves, score_scale
from ray_ds.model.row_exact import attend_by_tiles


class GroupedAttention(nn.Module):
    """Causal self-attention in which `num_attention_heads / num_key_value_heads` query heads share a key and value."""

    def __init__(self, config: ModelConfig, layer: int, kernels: Kernels = "auto") -> None:
        super().__init__()
        self.layer = layer
        self.kernels = kernels
        self.attend: Attend = attend
        self.head_dim = config.head_dim
        self.scale = score_scale(config)
        query_dim, key_dim = (n * config.head_dim for n in (config.num_attention_heads, config.num_key_value_heads))
        self.q_proj = nn.Linear(config.hidden_size, query_dim, bias=config.qkv_bias)
        self.k_proj = nn.Linear(config.hidden_size, key_dim, bias=config.qkv_bias)
        self.v_proj = nn.Linear(config.hidden_size, key_dim, bias=config.qkv_bias)
        self.o_proj = nn.Linear(query_dim, config.hidden_size, bias=False)
        self.norms_heads = config.qk_norm
        if config.qk_norm:
            self.q_norm = RMSNorm(config.head_dim, config.rms_norm_eps, kernels)
            self.k_norm = RMSNorm(config.head_dim, config.rms_norm_eps, kernels)

    def forward(self, x: Tensor, rotary: Rotary, mask: Mask = None, cache: CacheRows | None = None) -> Tensor:
        """Return what every token gathers from itself and the tokens before it.

        Args:
            x: (B, T, D).
            rotary: tables of the tokens' positions, from `rotary_tables`.
            mask: what each token may look at.
            cache: where the rows' earlier tokens lie and the new ones go; None = `x` holds whole sequences.
        """
        q, k, v = (self._heads(project(x)) for project in (self.q_proj, self.k_proj, self.v_proj))
        if self.norms_heads:
            q, k = self.q_norm(q), self.k_norm(k)
        q, k = rotate_halves(q, rotary), rotate_halves(k, rotary)
        if cache is not None:
            held = cache.update(self.layer, torch.cat((k, v), dim=-2).flatten(-2))  # (B, S, 2 * G * head_dim)
            k, v = self._heads(held).chunk(2, dim=-2)  # (B, S, G, head_dim) each
            if cache.is_row_exact:
                return self._attend_row_exact(q, k, v, cache.mask)
        q, k, v = (tensor.transpose(1, 2) for tensor in (q, k, v))  # (B, H, T, head_dim), (B, G, S, head_dim)
        out = self.attend(q, k, v, self.scale, mask, self.kernels)  # (B, H, T, head_dim)
        projected: Tensor = self.o_proj(out.transpose(1, 2).flatten(-2))  # (B, T, D)
        return projected

    def _attend_row_exact(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
        """Return `forward`'s result with each row's own bits, from (B, T, H, head_dim) and (B, S, G, head_dim)."""
        k, v = k.transpose(1, 2), v.transpose(1, 2)  # (B, G, S, head_dim)
        q = torch.unflatten(q, 2, (k.shape[1], -1))  # (B, T, G, H / G, head_dim)
        out = attend_by_tiles(q, k, v, self.scale, mask)  # (B, T, G, H / G, head_dim)
        projected: Tensor = self.o_proj(out.flatten(2))  # (B, T, D)
        return projected

    def _heads(self, x: Tensor) -> Tensor:
        """Return vectors side by side, (B, T, H * head_dim), as (B, T, H, head_dim)."""
        return torch.unflatten(x, -1, (-1, self.head_dim))
