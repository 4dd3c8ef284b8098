"""Small models of every kind for the tests of this folder."""

import dataclasses

import torch

from ray_ds.config.model import ModelConfig
from ray_ds.config.presets import PRESETS
from ray_ds.model.decoder import Decoder
from ray_ds.model.initial import init_weights

LATENT = dataclasses.replace(PRESETS["tiny"], q_lora_rank=24)
DENSE = dataclasses.replace(PRESETS["tiny"], n_routed_experts=0, first_k_dense_replace=2)
V2 = dataclasses.replace(LATENT, scoring_func="softmax", topk_method="greedy", norm_topk_prob=False)
GROUPED = dataclasses.replace(
    DENSE,
    attention="gqa",
    kv_lora_rank=0,
    qk_nope_head_dim=0,
    qk_rope_head_dim=0,
    v_head_dim=0,
    num_attention_heads=6,
    num_key_value_heads=2,
    head_dim=12,
    qkv_bias=True,
    qk_norm=True,
)
AHEAD = dataclasses.replace(LATENT, num_nextn_predict_layers=2)
KINDS = {"latent": LATENT, "dense": DENSE, "v2": V2, "grouped": GROUPED, "ahead": AHEAD}


def new_decoder(config: ModelConfig, *, scale: float = 1.0, **options) -> Decoder:
    """Return a decoder in training mode with first values, its matrices multiplied by `scale`."""
    decoder = Decoder(config, **options)
    init_weights(decoder, seed=0)
    for parameter in decoder.parameters():
        parameter.data.mul_(scale if parameter.dim() > 1 else 1)
    return decoder


def batch(config: ModelConfig, rows: int = 3, length: int = 20) -> tuple[torch.Tensor, torch.Tensor]:
    """Return random tokens and targets, (rows, length) each."""
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(config.vocab_size, (rows, length + 1), generator=generator)
    return tokens[:, :-1].contiguous(), tokens[:, 1:].clone()
