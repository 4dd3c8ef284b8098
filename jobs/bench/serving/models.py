"""The models that are measured: weights that were never trained, as all systems need them."""

import dataclasses
from collections.abc import Mapping
from pathlib import Path

import torch

from ray_ds.config.model import ModelConfig
from ray_ds.config.presets import PRESETS
from ray_ds.model.checkpoint_folder import save_checkpoint_folder
from ray_ds.model.decoder import Decoder
from ray_ds.model.initial import init_weights
from ray_ds.quantize import quantize_folder

SHARD_BYTES = 1 << 40
"""One file for each model."""

MODELS: Mapping[str, ModelConfig] = {
    # Q8_0 has blocks of 32 along each row, which the preset's inner width of 2736 does not fill.
    "dense": dataclasses.replace(PRESETS["llama_369m"], intermediate_size=2752),
    # DeepSeek-V3's kind of attention and experts, with the heads of 576 that vLLM wants.
    "deepseek": dataclasses.replace(PRESETS["flash_mla_1b"], num_hidden_layers=5),
    "moe_1b": PRESETS["moe_1b"],
    # Llama 2 7B (arXiv 2307.09288) with this house's vocabulary.
    "dense_7b": dataclasses.replace(
        PRESETS["llama_1b"],
        hidden_size=4096,
        num_hidden_layers=32,
        num_attention_heads=32,
        num_key_value_heads=32,
        intermediate_size=11008,
        first_k_dense_replace=32,
    ),
    "tiny_dense": dataclasses.replace(
        PRESETS["llama_369m"],
        vocab_size=320,
        max_position_embeddings=128,
        hidden_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        intermediate_size=96,
        first_k_dense_replace=2,
    ),
    "tiny_deepseek": PRESETS["tiny"],
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelFolders:
    """A model on disk."""

    floats: Path
    """Its weights in bf16."""
    int8: Path
    """The same, quantized to W8A8."""


def write_model(config: ModelConfig, folder: Path, *, seed: int = 0) -> ModelFolders:
    """Write a model with random weights, in bf16 and quantized."""
    folders = ModelFolders(floats=folder / "floats", int8=folder / "int8")
    decoder = Decoder(config)
    init_weights(decoder, seed=seed)
    state = decoder.state_dict()
    save_checkpoint_folder(state, config, folders.floats, dtype=torch.bfloat16, max_shard_bytes=SHARD_BYTES)
    (folders.floats / "tokenizer.json").write_text("{}")
    quantize_folder(folders.floats, folders.int8, max_shard_bytes=SHARD_BYTES)
    return folders
