"""Where smoothing factors can go: pairs of a layer that makes channels and the layers that read them.

What one divides a channel by the others multiply back, so the float function stays what it is, and the model stays one
of its kind. Nothing but a norm or a linear layer may lie between, or what commutes with a factor, as the weighted sum
over values in attention does.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor

from ray_ds.config.model import ModelConfig
from ray_ds.model.hugging_face.shapes import prediction_layers


@dataclass(frozen=True, kw_only=True, slots=True)
class Fold:
    """Channels that can be scaled. The rows of the producers make them, the columns of the readers take them."""

    point: str
    """The module where the channels are seen: a norm by its output, a linear layer by its input."""
    producers: tuple[str, ...]
    """Tensors divided, row by row."""
    readers: tuple[str, ...]
    """Weights multiplied, column by column, that become integers."""
    float_readers: tuple[str, ...] = ()
    """Weights multiplied that stay floats; they have no say in the factors."""
    heads: int = 1
    """Groups that the channels lie in."""
    skipped_rows: int = 0
    """Rows of the producers before those of each head, which make something else."""
    repeats: int = 1
    """How often the readers have each head's columns: query heads that share a value."""

    def to_rows(self, factors: Tensor) -> Tensor:
        """Return the factor of each of the producers' rows, given those of the channels."""
        return F.pad(factors.view(self.heads, -1), (self.skipped_rows, 0), value=1.0).flatten()

    def to_columns(self, factors: Tensor) -> Tensor:
        """Return the factor of each of the readers' columns, given those of the channels."""
        return factors.view(self.heads, 1, -1).expand(-1, self.repeats, -1).flatten()

    def to_channels(self, column_maxima: Tensor) -> Tensor:
        """Return the largest magnitude of each channel, given those of the readers' columns."""
        return column_maxima.view(self.heads, self.repeats, -1).amax(dim=1).flatten()


def plan_folds(config: ModelConfig) -> list[Fold]:
    """Return every fold of a model, by the names on disk.

    Keys and queries have none: rotary embeddings lie between them, and they are no layer's input. Nor has
    `kv_a_layernorm`: `kv_b_proj`, its reader, stays in floats.
    """
    folds: list[Fold] = []
    for layer in [*range(config.num_hidden_layers), *prediction_layers(config)]:
        name = f"model.layers.{layer}"
        attention = _latent_folds if config.attention == "mla" else _grouped_folds
        folds += attention(config, name)
        folds += _mlp_folds(
            config, name, is_sparse=config.n_routed_experts > 0 and layer >= config.first_k_dense_replace
        )
    return folds


def _latent_folds(config: ModelConfig, layer: str) -> Iterator[Fold]:
    """Yield those of multi-head latent attention."""
    attention = f"{layer}.self_attn"
    query = "q_proj" if config.q_lora_rank is None else "q_a_proj"
    yield _after_norm(f"{layer}.input_layernorm", [f"{attention}.{query}", f"{attention}.kv_a_proj_with_mqa"])
    if config.q_lora_rank is not None:
        yield _after_norm(f"{attention}.q_a_layernorm", [f"{attention}.q_b_proj"])
    yield Fold(
        point=f"{attention}.o_proj",
        producers=(f"{attention}.kv_b_proj.weight",),
        readers=(f"{attention}.o_proj.weight",),
        heads=config.num_attention_heads,
        skipped_rows=config.qk_nope_head_dim,
    )


def _grouped_folds(config: ModelConfig, layer: str) -> Iterator[Fold]:
    """Yield those of grouped-query attention."""
    attention = f"{layer}.self_attn"
    yield _after_norm(f"{layer}.input_layernorm", [f"{attention}.{part}_proj" for part in ("q", "k", "v")])
    values = [f"{attention}.v_proj.weight", *([f"{attention}.v_proj.bias"] if config.qkv_bias else [])]
    yield Fold(
        point=f"{attention}.o_proj",
        producers=tuple(values),
        readers=(f"{attention}.o_proj.weight",),
        heads=config.num_key_value_heads,
        repeats=config.num_attention_heads // config.num_key_value_heads,
    )


def _mlp_folds(config: ModelConfig, layer: str, *, is_sparse: bool) -> Iterator[Fold]:
    """Yield those of an MLP, or of a router, its experts and the shared ones."""
    mlps = [f"{layer}.mlp"]
    if is_sparse:
        mlps = [f"{layer}.mlp.experts.{expert}" for expert in range(config.n_routed_experts)]
        mlps += [f"{layer}.mlp.shared_experts"] if config.n_shared_experts else []
    readers = [f"{mlp}.{part}_proj" for mlp in mlps for part in ("gate", "up")]
    router = (f"{layer}.mlp.gate.weight",) if is_sparse else ()
    yield _after_norm(f"{layer}.post_attention_layernorm", readers, float_readers=router)
    for mlp in mlps:  # silu(gate) * up: a channel's factor passes from `up` to the product
        down = f"{mlp}.down_proj"
        yield Fold(point=down, producers=(f"{mlp}.up_proj.weight",), readers=(f"{down}.weight",))


def _after_norm(norm: str, readers: list[str], *, float_readers: tuple[str, ...] = ()) -> Fold:
    """Return the fold of a norm into the linear layers behind it."""
    weights = tuple(f"{reader}.weight" for reader in readers)
    return Fold(point=norm, producers=(f"{norm}.weight",), readers=weights, float_readers=float_readers)
