import dataclasses

import pytest
import torch

from ray_ds.config.model import ModelConfig
from ray_ds.config.presets import PRESETS
from ray_ds.model import attention
from ray_ds.model.latent_attention import LatentAttention
from ray_ds.model.rotary import rotary_tables

TINY = PRESETS["tiny"]


def reference(layer: LatentAttention, config: ModelConfig, x: torch.Tensor) -> torch.Tensor:
    """Return the attention of one sequence (T, D), head by head and query by query, rotating by complex numbers."""

    def turn(vector: torch.Tensor, position: int) -> torch.Tensor:
        pairs = torch.view_as_complex(vector.view(-1, 2).double().contiguous())
        exponents = torch.arange(len(pairs), dtype=torch.float64) / len(pairs)
        turned = pairs * torch.exp(1j * position * config.rope_theta**-exponents)
        return torch.view_as_real(turned).flatten().float()

    nope, rope, rank = config.qk_nope_head_dim, config.qk_rope_head_dim, config.kv_lora_rank
    compresses = config.q_lora_rank is not None
    queries = layer.q_b_proj(layer.q_a_layernorm(layer.q_a_proj(x))) if compresses else layer.q_proj(x)
    compressed = layer.kv_a_proj_with_mqa(x)
    expanded = layer.kv_b_proj(layer.kv_a_layernorm(compressed[:, :rank]))
    out = torch.empty(len(x), config.num_attention_heads, config.v_head_dim)
    for head in range(config.num_attention_heads):
        q = queries.view(len(x), config.num_attention_heads, -1)[:, head]
        kv = expanded.view(len(x), config.num_attention_heads, -1)[:, head]
        for t in range(len(x)):
            q_t = torch.cat((q[t, :nope], turn(q[t, nope:], t)))
            keys = [torch.cat((kv[s, :nope], turn(compressed[s, rank:], s))) for s in range(t + 1)]
            scores = torch.stack([q_t @ key for key in keys]) / (nope + rope) ** 0.5
            out[t, head] = scores.softmax(0) @ kv[: t + 1, nope:]
    return out.flatten(1) @ layer.o_proj.weight.T


@pytest.mark.parametrize("plain_tokens", [0, 512], ids=["fused", "plain"])
@pytest.mark.parametrize("q_lora_rank", [None, 24])
@pytest.mark.parametrize("v_head_dim", [16, 24, 32])
@torch.no_grad()
def test_latent_attention_is_its_definition(plain_tokens, q_lora_rank, v_head_dim, monkeypatch):
    monkeypatch.setattr(attention, "MAX_PLAIN_TOKENS", plain_tokens)
    config = dataclasses.replace(TINY, q_lora_rank=q_lora_rank, v_head_dim=v_head_dim)
    layer = LatentAttention(config, layer=0)
    x = torch.randn(2, 11, config.hidden_size)
    out = layer(x, rotary_tables(torch.arange(11)[None], config))
    wanted = torch.stack([reference(layer, config, row) for row in x])
    torch.testing.assert_close(out, wanted, rtol=1e-4, atol=1e-5)
