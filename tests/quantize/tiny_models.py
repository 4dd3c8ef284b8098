"""Tiny models that have learned something, so that damage to them shows."""

import functools
from collections.abc import Mapping
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from ray_ds.config.model import ModelConfig
from ray_ds.data.shard_file import write_shard
from ray_ds.data.shards import TokenSplit
from ray_ds.evaluate.spans import Span, plan_spans
from ray_ds.model.checkpoint_folder import save_checkpoint_folder
from ray_ds.model.decoder import Decoder
from ray_ds.model.initial import init_weights

Kind = Literal["dense", "moe"]
VOCAB = 61
SEQ_LEN = 32

_SIZES = {
    "vocab_size": VOCAB,
    "max_position_embeddings": SEQ_LEN,
    "hidden_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "kv_lora_rank": 24,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 8,
    "v_head_dim": 24,
    "intermediate_size": 96,
}
_EXPERTS = {
    "q_lora_rank": 32,
    "n_routed_experts": 4,
    "n_shared_experts": 1,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 40,
    "first_k_dense_replace": 1,
}


def config_of(kind: Kind, **other: object) -> ModelConfig:
    sizes = {**_SIZES, **(_EXPERTS if kind == "moe" else {"first_k_dense_replace": 2}), **other}
    return ModelConfig(**sizes)  # type: ignore[arg-type]


def make_tokens(rows: int, length: int, seed: int) -> Tensor:
    """Return rows in which each token follows from the one before by an affine rule, but for one in ten, noise."""
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(0, VOCAB, (rows, length), generator=generator)
    is_noise = torch.rand((rows, length), generator=generator) < 0.1
    for i in range(1, length):
        tokens[:, i] = torch.where(is_noise[:, i], tokens[:, i], (3 * tokens[:, i - 1] + 7) % VOCAB)
    return tokens


@functools.cache
def trained_state(kind: Kind) -> dict[str, Tensor]:
    """Return the weights of a model that has learned the rule of `make_tokens` in a second."""
    torch.set_num_threads(1)  # the model is tiny, and threads that wait for a busy core make it slow
    decoder = Decoder(config_of(kind)).train()
    init_weights(decoder, seed=0)
    generator = torch.Generator().manual_seed(1)
    for table in (decoder.model.embed_tokens, decoder.lm_head):
        # As they are and untrained, so that what is learned is in the layers.
        torch.nn.init.normal_(table.weight, std=0.3, generator=generator).requires_grad_(False)
    optimizer = torch.optim.AdamW(decoder.model.layers.parameters(), lr=5e-3)
    for step in range(50):
        tokens = make_tokens(16, SEQ_LEN + 1, seed=step)
        loss = decoder(tokens[:, :-1], targets=tokens[:, 1:]) / tokens[:, 1:].numel()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss.item() < 1.2, "the tiny model has learned nothing"
    return {name: tensor.detach().clone() for name, tensor in decoder.state_dict().items()}


def write_checkpoint(folder: Path, kind: Kind, state: Mapping[str, Tensor] | None = None) -> Path:
    """Write a trained model, or one with the given weights, as a checkpoint's `model/`."""
    weights = trained_state(kind) if state is None else state
    save_checkpoint_folder(weights, config_of(kind), folder, dtype=torch.float32, max_shard_bytes=1 << 30)
    (folder / "tokenizer.json").write_text("{}")
    return folder


def make_split(folder: Path, num_rows: int, vocab_size: int = VOCAB) -> tuple[TokenSplit, list[Span]]:
    """Write random tokens as shards, and return them with rows of 20 tokens and a shorter one at the end."""
    tokens = torch.randint(0, vocab_size, (num_rows * 20 - 5,), generator=torch.Generator().manual_seed(7))
    write_shard(str(folder / "shards" / "train" / "00000.arrow"), [tokens.numpy().astype(np.uint16)], ["d0"], np.uint16)
    split = TokenSplit.open(str(folder / "shards"), "train")
    return split, plan_spans(split, 20)


def plant_outliers(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return other weights of the same function, in which ten channels behind every norm are 50 times the rest.

    The norms before attention and MLP multiply the channels, and the weights that read them divide by as much.
    """
    channels = slice(1, 41, 4)
    readers = ("q_proj.weight", "q_a_proj.weight", "kv_a_proj_with_mqa.weight", "gate_proj.weight", "up_proj.weight")
    planted = {name: tensor.clone() for name, tensor in state.items()}
    for name, tensor in planted.items():
        if name.endswith("layernorm.weight") and ".self_attn." not in name:
            tensor[channels] *= 50
        elif name.endswith((*readers, "mlp.gate.weight", "experts.gate_up_proj")):
            tensor[..., channels] /= 50
    return planted
