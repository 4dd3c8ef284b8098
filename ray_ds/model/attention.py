"""Multi-head latent attention (arXiv 2405.04434): keys and values are made from one small latent a token."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ray_ds.config.model import ModelConfig
from ray_ds.model.caches import CacheRows
from ray_ds.model.layers import RMSNorm

MAX_PLAIN_TOKENS = 512
"""Row length up to which three plain steps beat the fused kernel on a CPU: 2 x faster with 256 tokens, forward and
backward, equal at 1,024; above, the T x T scores would also take too much memory."""


def rotary_tables(positions: Tensor, config: ModelConfig) -> tuple[Tensor, Tensor]:
    """Return cosine and sine of every position's angles, in fp32 whatever the model's type.

    Args:
        positions: (B, T) or (1, T), whole numbers.
    Returns:
        Two tensors (B, T, 1, qk_rope_head_dim), each pair's value given twice and the sine's first of a pair negated,
        as `rotate` wants them.
    """
    exponents = torch.arange(0, config.qk_rope_head_dim, 2, device=positions.device, dtype=torch.float32)
    frequencies = 1.0 / config.rope_theta ** (exponents / config.qk_rope_head_dim)
    angles = positions[..., None].float() * frequencies  # (B, T, qk_rope_head_dim / 2)
    cos = torch.stack((angles.cos(), angles.cos()), dim=-1).flatten(-2)  # (B, T, qk_rope_head_dim)
    sin = torch.stack((-angles.sin(), angles.sin()), dim=-1).flatten(-2)  # (B, T, qk_rope_head_dim)
    return cos[:, :, None], sin[:, :, None]  # (B, T, 1, qk_rope_head_dim)


def rotate(x: Tensor, rotary: tuple[Tensor, Tensor]) -> Tensor:
    """Return `x` (B, T, H, qk_rope_head_dim) with its neighbouring pairs (x0, x1), (x2, x3), ... turned by position."""
    cos, sin = rotary
    swapped = torch.unflatten(x, -1, (-1, 2)).flip(-1).flatten(-2)
    turned: Tensor = x * cos + swapped * sin
    return turned.to(x.dtype)


def causal_attention(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    """Return what each of T positions gathers from itself and the earlier ones, (B, H, T, v_head_dim).

    Args:
        q, k: (B, H, T, qk_head_dim).
        v: (B, H, T, v_head_dim).
    """
    num_tokens, key_dim = q.shape[-2:]
    if q.device.type == "cpu" and num_tokens <= MAX_PLAIN_TOKENS:
        later = torch.full((num_tokens, num_tokens), float("-inf"), dtype=q.dtype).triu(1)
        scores = (q * scale) @ k.transpose(-1, -2) + later  # (B, H, T, T)
        return scores.softmax(dim=-1, dtype=torch.float32).to(v.dtype) @ v
    # The fused kernels want values as wide as keys; zeros in keys add nothing to scores, those in values are cut off.
    width = max(key_dim, v.shape[-1])
    q, k, wide_v = (F.pad(tensor, (0, width - tensor.shape[-1])) for tensor in (q, k, v))  # (B, H, T, width)
    return F.scaled_dot_product_attention(q, k, wide_v, is_causal=True, scale=scale)[..., : v.shape[-1]]


class LatentAttention(nn.Module):
    """Causal self-attention with `num_attention_heads` heads over one latent of `kv_lora_rank` numbers a token."""

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        self.layer = layer
        self.kv_lora_rank = config.kv_lora_rank
        self.qk_nope_head_dim = config.qk_nope_head_dim
        self.qk_rope_head_dim = config.qk_rope_head_dim
        self.qk_head_dim = config.qk_head_dim
        self.v_head_dim = config.v_head_dim
        self.num_heads = config.num_attention_heads
        self.scale = config.qk_head_dim**-0.5

        query_dim = config.num_attention_heads * config.qk_head_dim
        if config.q_lora_rank is None:
            self.q_proj = nn.Linear(config.hidden_size, query_dim, bias=False)
        else:
            self.q_a_proj = nn.Linear(config.hidden_size, config.q_lora_rank, bias=False)
            self.q_a_layernorm = RMSNorm(config.q_lora_rank)
            self.q_b_proj = nn.Linear(config.q_lora_rank, query_dim, bias=False)
        self.compresses_query = config.q_lora_rank is not None
        self.kv_a_proj_with_mqa = nn.Linear(config.hidden_size, self.kv_lora_rank + self.qk_rope_head_dim, bias=False)
        self.kv_a_layernorm = RMSNorm(self.kv_lora_rank)
        expanded_dim = self.num_heads * (self.qk_nope_head_dim + self.v_head_dim)
        self.kv_b_proj = nn.Linear(self.kv_lora_rank, expanded_dim, bias=False)
        self.o_proj = nn.Linear(self.num_heads * self.v_head_dim, config.hidden_size, bias=False)

    def forward(
        self, x: Tensor, rotary: tuple[Tensor, Tensor], cache: CacheRows | None, mask: Tensor | None = None
    ) -> Tensor:
        """Return what every token gathers from itself and the tokens before it.

        Args:
            x: (B, T, D).
            rotary: tables of the tokens' positions, from `rotary_tables`.
            cache: where the rows' earlier tokens lie and the new ones go; None = `x` holds whole sequences.
        """
        q_nope, q_rope = self._queries(x, rotary)
        latents = self._latents(x, rotary)
        if cache is None:
            out = self._attend_expanded(q_nope, q_rope, latents, mask=mask)
        else:
            latents = cache.update(self.layer, latents)  # (B, S, R + qk_rope_head_dim)
            attend = self._attend_absorbed if cache.is_decode else self._attend_expanded
            out = attend(q_nope, q_rope, latents, mask=cache.mask)
        projected: Tensor = self.o_proj(out.flatten(-2))  # (B, T, D)
        return projected

    def _queries(self, x: Tensor, rotary: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        """Return the two parts of the queries, (B, T, H, qk_nope_head_dim) and (B, T, H, qk_rope_head_dim)."""
        q = self.q_b_proj(self.q_a_layernorm(self.q_a_proj(x))) if self.compresses_query else self.q_proj(x)
        q = torch.unflatten(q, -1, (self.num_heads, self.qk_head_dim))  # (B, T, H, qk_head_dim)
        q_nope, q_rope = torch.split(q, [self.qk_nope_head_dim, self.qk_rope_head_dim], dim=-1)
        return q_nope, rotate(q_rope, rotary)

    def _latents(self, x: Tensor, rotary: tuple[Tensor, Tensor]) -> Tensor:
        """Return what the cache holds of each token: (B, T, R + qk_rope_head_dim), normed latent and turned key."""
        compressed = self.kv_a_proj_with_mqa(x)  # (B, T, R + qk_rope_head_dim)
        latent, k_rope = torch.split(compressed, [self.kv_lora_rank, self.qk_rope_head_dim], dim=-1)
        k_rope = rotate(k_rope[:, :, None], rotary)[:, :, 0]
        return torch.cat((self.kv_a_layernorm(latent), k_rope), dim=-1)  # (B, T, R + qk_rope_head_dim)

    def _attend_expanded(self, q_nope: Tensor, q_rope: Tensor, latents: Tensor, mask: Tensor | None) -> Tensor:
        """Attend with keys and values written out a head: the cheaper form for many queries.

        Args:
            mask: (B, 1, T, S), True where a query may look; None = causal.
        Returns:
            (B, T, H, v_head_dim).
        """
        latent, k_rope = torch.split(latents, [self.kv_lora_rank, self.qk_rope_head_dim], dim=-1)
        expanded = torch.unflatten(self.kv_b_proj(latent), -1, (self.num_heads, -1))  # (B, S, H, nope + v)
        k_nope, v = torch.split(expanded, [self.qk_nope_head_dim, self.v_head_dim], dim=-1)
        k_rope = k_rope[:, :, None].expand(-1, -1, self.num_heads, -1)  # (B, S, H, qk_rope_head_dim)
        q = torch.cat((q_nope, q_rope), dim=-1).transpose(1, 2)  # (B, H, T, qk_head_dim)
        k = torch.cat((k_nope, k_rope), dim=-1).transpose(1, 2)  # (B, H, S, qk_head_dim)
        v = v.transpose(1, 2)  # (B, H, S, v_head_dim)
        if mask is None:
            out = causal_attention(q, k, v, self.scale)  # (B, H, T, v_head_dim)
        else:
            out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=self.scale)  # (B, H, T, v_head_dim)
        return out.transpose(1, 2)  # (B, T, H, v_head_dim)

    def _attend_absorbed(self, q_nope: Tensor, q_rope: Tensor, latents: Tensor, mask: Tensor | None) -> Tensor:
        """Attend over the latents themselves, `kv_b_proj` moved to the query and the result: cheaper for one query.

        All heads share the latents, so a row's heads are the queries of one attention whose keys and values are the
        cached vectors as they lie.
        """
        weight = torch.unflatten(self.kv_b_proj.weight, 0, (self.num_heads, -1))  # (H, nope + v, R)
        w_key, w_value = torch.split(weight, [self.qk_nope_head_dim, self.v_head_dim], dim=1)
        q_latent = torch.einsum("bthn,hnr->bthr", q_nope, w_key)  # (B, T, H, R)
        q = torch.cat((q_latent, q_rope), dim=-1)  # (B, T=1, H, R + qk_rope_head_dim)
        keys = latents[:, None]  # (B, 1, S, R + qk_rope_head_dim)
        out = F.scaled_dot_product_attention(q, keys, keys, attn_mask=mask, scale=self.scale)
        return torch.einsum("bthr,hvr->bthv", out[..., : self.kv_lora_rank], w_value)  # (B, T, H, v_head_dim)
