"""Multi-head latent attention (arXiv 2405.04434): keys and values are made from one small latent a token."""

import torch
from torch import Tensor, nn

from ray_ds.config.model import Kernels, ModelConfig
from ray_ds.model.attention import Attend, Mask, attend
from ray_ds.model.caches import CacheRows
from ray_ds.model.layers import RMSNorm
from ray_ds.model.rotary import Rotary, rotate, score_scale
from ray_ds.model.row_exact import attend_by_tiles, multiply_heads

LATENT_NORM_EPS = 1e-6
"""Of the norms of latents, whatever `rms_norm_eps`, as in DeepSeek's and Hugging Face's code."""


class LatentAttention(nn.Module):
    """Causal self-attention with `num_attention_heads` heads over one latent of `kv_lora_rank` numbers a token."""

    def __init__(self, config: ModelConfig, layer: int, kernels: Kernels = "auto") -> None:
        super().__init__()
        self.layer = layer
        self.kernels = kernels
        self.attend: Attend = attend
        self.kv_lora_rank = config.kv_lora_rank
        self.qk_nope_head_dim = config.qk_nope_head_dim
        self.qk_rope_head_dim = config.qk_rope_head_dim
        self.qk_head_dim = config.qk_head_dim
        self.v_head_dim = config.v_head_dim
        self.num_heads = config.num_attention_heads
        self.scale = score_scale(config)

        query_dim = config.num_attention_heads * config.qk_head_dim
        if config.q_lora_rank is None:
            self.q_proj = nn.Linear(config.hidden_size, query_dim, bias=False)
        else:
            self.q_a_proj = nn.Linear(config.hidden_size, config.q_lora_rank, bias=False)
            self.q_a_layernorm = RMSNorm(config.q_lora_rank, LATENT_NORM_EPS, kernels)
            self.q_b_proj = nn.Linear(config.q_lora_rank, query_dim, bias=False)
        self.compresses_query = config.q_lora_rank is not None
        self.kv_a_proj_with_mqa = nn.Linear(config.hidden_size, self.kv_lora_rank + self.qk_rope_head_dim, bias=False)
        self.kv_a_layernorm = RMSNorm(self.kv_lora_rank, LATENT_NORM_EPS, kernels)
        expanded_dim = self.num_heads * (self.qk_nope_head_dim + self.v_head_dim)
        self.kv_b_proj = nn.Linear(self.kv_lora_rank, expanded_dim, bias=False)
        self.o_proj = nn.Linear(self.num_heads * self.v_head_dim, config.hidden_size, bias=False)

    def forward(self, x: Tensor, rotary: Rotary, mask: Mask = None, cache: CacheRows | None = None) -> Tensor:
        """Return what every token gathers from itself and the tokens before it.

        Args:
            x: (B, T, D).
            rotary: tables of the tokens' positions, from `rotary_tables`.
            mask: what each token may look at.
            cache: where the rows' earlier tokens lie and the new ones go; None = `x` holds whole sequences.
        """
        q_nope, q_rope = self._queries(x, rotary)
        latents = self._latents(x, rotary)
        if cache is None:
            out = self._attend_expanded(q_nope, q_rope, latents, mask)
        else:
            latents = cache.update(self.layer, latents)  # (B, S, R + qk_rope_head_dim)
            if cache.is_row_exact:
                out = self._attend_row_exact(q_nope, q_rope, latents, cache.mask)
            else:
                gather = self._attend_absorbed if cache.is_decode else self._attend_expanded
                out = gather(q_nope, q_rope, latents, mask)
        projected: Tensor = self.o_proj(out.flatten(-2))  # (B, T, D)
        return projected

    def _queries(self, x: Tensor, rotary: Rotary) -> tuple[Tensor, Tensor]:
        """Return the two parts of the queries, (B, T, H, qk_nope_head_dim) and (B, T, H, qk_rope_head_dim)."""
        q = self.q_b_proj(self.q_a_layernorm(self.q_a_proj(x))) if self.compresses_query else self.q_proj(x)
        q = torch.unflatten(q, -1, (self.num_heads, self.qk_head_dim))  # (B, T, H, qk_head_dim)
        q_nope, q_rope = torch.split(q, [self.qk_nope_head_dim, self.qk_rope_head_dim], dim=-1)
        return q_nope, rotate(q_rope, rotary)

    def _latents(self, x: Tensor, rotary: Rotary) -> Tensor:
        """Return what the cache holds of each token: (B, T, R + qk_rope_head_dim), normed latent and turned key."""
        compressed = self.kv_a_proj_with_mqa(x)  # (B, T, R + qk_rope_head_dim)
        latent, k_rope = torch.split(compressed, [self.kv_lora_rank, self.qk_rope_head_dim], dim=-1)
        k_rope = rotate(k_rope[:, :, None], rotary)[:, :, 0]
        return torch.cat((self.kv_a_layernorm(latent), k_rope), dim=-1)  # (B, T, R + qk_rope_head_dim)

    def _attend_expanded(self, q_nope: Tensor, q_rope: Tensor, latents: Tensor, mask: Mask) -> Tensor:
        """Attend with keys and values written out a head: the cheaper form for many queries.

        Returns:
            (B, T, H, v_head_dim).
        """
        latent, k_rope = torch.split(latents, [self.kv_lora_rank, self.qk_rope_head_dim], dim=-1)
        expanded = torch.unflatten(self.kv_b_proj(latent), -1, (self.num_heads, -1))  # (B, S, H, nope + v)
        k_nope, v = torch.split(expanded, [self.qk_nope_head_dim, self.v_head_dim], dim=-1)
        k_rope = k_rope[:, :, None].expand(-1, -1, self.num_heads, -1)  # (B, S, H, qk_rope_head_dim)
        q = torch.cat((q_nope, q_rope), dim=-1).transpose(1, 2)  # (B, H, T, qk_head_dim)
        k = torch.cat((k_nope, k_rope), dim=-1).transpose(1, 2)  # (B, H, S, qk_head_dim)
        out = self.attend(q, k, v.transpose(1, 2), self.scale, mask, self.kernels)  # (B, H, T, v_head_dim)
        return out.transpose(1, 2)  # (B, T, H, v_head_dim)

    def _attend_absorbed(self, q_nope: Tensor, q_rope: Tensor, latents: Tensor, mask: Mask) -> Tensor:
        """Attend over the latents themselves, `kv_b_proj` moved to the query and the result: cheaper for one query.

        All heads share the latents, so a row's heads are the queries of one attention whose keys and values are the
        cached vectors as they lie.
        """
        w_key, w_value = self._head_weights()
        q_latent = torch.einsum("bthn,hnr->bthr", q_nope, w_key)  # (B, T, H, R)
        q = torch.cat((q_latent, q_rope), dim=-1)  # (B, T=1, H, R + qk_rope_head_dim)
        keys = latents[:, None]  # (B, 1, S, R + qk_rope_head_dim)
        out = attend(q, keys, keys, self.scale, mask, self.kernels)  # (B, 1, H, R + qk_rope_head_dim)
        return torch.einsum("bthr,hvr->bthv", out[..., : self.kv_lora_rank], w_value)  # (B, T, H, v_head_dim)

    def _attend_row_exact(self, q_nope: Tensor, q_rope: Tensor, latents: Tensor, mask: Tensor) -> Tensor:
        """Attend as `_attend_absorbed` does, for any number of queries and with each row's own bits."""
        w_key, w_value = self._head_weights()
        q = torch.cat((multiply_heads(q_nope, w_key), q_rope), dim=-1)  # (B, T, H, R + qk_rope_head_dim)
        keys = latents[:, None]  # (B, 1, S, R + qk_rope_head_dim)
        out = attend_by_tiles(q[:, :, None], keys, keys[..., : self.kv_lora_rank], self.scale, mask)
        return multiply_heads(out[:, :, 0], w_value.transpose(1, 2))  # (B, T, H, v_head_dim)

    def _head_weights(self) -> tuple[Tensor, Tensor]:
        """Return what makes keys and values of latents: (H, qk_nope_head_dim, R) and (H, v_head_dim, R)."""
        weight = torch.unflatten(self.kv_b_proj.weight, 0, (self.num_heads, -1))  # (H, nope + v, R)
        w_key, w_value = torch.split(weight, [self.qk_nope_head_dim, self.v_head_dim], dim=1)
        return w_key, w_value
