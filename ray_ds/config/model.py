"""What a model is made of, in the words of Hugging Face's `DeepseekV3Config`."""

import dataclasses
from collections.abc import Mapping
from types import MappingProxyType

from ray_ds.config.settings import settings
from ray_ds.errors import ConfigError

EXPERT_FIELDS = (
    "n_shared_experts",
    "num_experts_per_tok",
    "moe_intermediate_size",
    "n_group",
    "topk_group",
    "norm_topk_prob",
    "routed_scaling_factor",
    "first_k_dense_replace",
)
"""Fields that mean nothing while `n_routed_experts` is 0."""


@settings
class ModelConfig:
    """A whole decoder. It is dense where `n_routed_experts` is 0."""

    vocab_size: int
    """Token ids; given by the tokenizer."""
    max_position_embeddings: int
    """Longest sequence the model was made for, in tokens."""
    hidden_size: int
    """Width of the residual stream."""
    num_hidden_layers: int
    """Decoder layers."""
    num_attention_heads: int
    """Attention heads; every head has its own keys and values."""
    q_lora_rank: int | None = None
    """Width of the compressed query; None = queries are projected in one step."""
    kv_lora_rank: int
    """Width of the compressed key and value, which is what the cache holds."""
    qk_nope_head_dim: int
    """Width of a head's query and key that carries no position."""
    qk_rope_head_dim: int
    """Width of a head's query and key that carries the position."""
    v_head_dim: int
    """Width of a head's value."""
    intermediate_size: int
    """Inner width of a dense layer's MLP."""
    n_routed_experts: int = 0
    """Experts a layer's router chooses from; 0 = every layer is dense."""
    n_shared_experts: int = 0
    """Experts that see every token."""
    num_experts_per_tok: int = 0
    """Routed experts that see a token."""
    moe_intermediate_size: int = 0
    """Inner width of one expert."""
    n_group: int = 1
    """Groups that the routed experts are divided into."""
    topk_group: int = 1
    """Groups whose experts a token may choose from."""
    norm_topk_prob: bool = True
    """Whether the weights of a token's experts are made to sum to 1."""
    routed_scaling_factor: float = 1.0
    """Factor on what the routed experts give."""
    first_k_dense_replace: int
    """Layers, counted from the first, that are dense; all of them in a dense model."""
    rope_theta: float = 10000.0
    """Base of the rotary frequencies."""
    tie_word_embeddings: bool = False
    """Whether the output projection is the embedding table."""

    def __post_init__(self) -> None:
        """Refuse sizes that make no model."""
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            optional = field.name in ("n_routed_experts", *EXPERT_FIELDS)
            if isinstance(value, (int, float)) and not isinstance(value, bool) and not optional and value <= 0:
                raise ConfigError(field.name, value, "must be positive", "raise it")
        if self.qk_rope_head_dim % 2:
            raise ConfigError("qk_rope_head_dim", self.qk_rope_head_dim, "must be even", "add 1")
        if self.n_routed_experts < 0:
            raise ConfigError("n_routed_experts", self.n_routed_experts, "must be 0 or more", "use 0 for a dense model")
        if self.n_routed_experts:
            self._check_experts()
        elif self.first_k_dense_replace != self.num_hidden_layers:
            allowed = f"must be num_hidden_layers ({self.num_hidden_layers}) in a dense model"
            raise ConfigError("first_k_dense_replace", self.first_k_dense_replace, allowed, "set it so")

    def _check_experts(self) -> None:
        """Refuse expert sizes that the router cannot serve."""
        for name in ("n_shared_experts", "num_experts_per_tok", "moe_intermediate_size", "n_group", "topk_group"):
            if getattr(self, name) < 1:
                raise ConfigError(name, getattr(self, name), "must be 1 or more in a model with experts", "raise it")
        if self.routed_scaling_factor <= 0:
            raise ConfigError("routed_scaling_factor", self.routed_scaling_factor, "must be positive", "raise it")
        if not 0 <= self.first_k_dense_replace < self.num_hidden_layers:
            allowed = f"must be at least 0 and below num_hidden_layers ({self.num_hidden_layers})"
            action = "lower it, or set n_routed_experts to 0 for a dense model"
            raise ConfigError("first_k_dense_replace", self.first_k_dense_replace, allowed, action)
        if self.n_routed_experts % self.n_group or self.n_routed_experts < 2 * self.n_group:
            allowed = f"must divide n_routed_experts ({self.n_routed_experts}) into groups of 2 or more"
            raise ConfigError("n_group", self.n_group, allowed, "use 1 for no groups")
        if self.topk_group > self.n_group:
            raise ConfigError("topk_group", self.topk_group, f"must be at most n_group ({self.n_group})", "lower it")
        reachable = self.topk_group * self.n_routed_experts // self.n_group
        if self.num_experts_per_tok > reachable:
            allowed = f"must be at most the {reachable} experts that topk_group and n_group leave"
            raise ConfigError("num_experts_per_tok", self.num_experts_per_tok, allowed, "lower it")

    @property
    def qk_head_dim(self) -> int:
        """Width of a head's query and key."""
        return self.qk_nope_head_dim + self.qk_rope_head_dim

    @property
    def num_moe_layers(self) -> int:
        """Layers with routed experts."""
        return self.num_hidden_layers - self.first_k_dense_replace


def _preset(hidden_size: int, num_hidden_layers: int, num_attention_heads: int, **sizes: float | None) -> ModelConfig:
    """Return a model whose vocabulary and length `ModelSettings.resolve` will replace; dense unless `sizes` differ."""
    own = {"first_k_dense_replace": num_hidden_layers, "vocab_size": 4096, "max_position_embeddings": 4096, **sizes}
    shape = {"hidden_size": hidden_size, "num_hidden_layers": num_hidden_layers}
    return ModelConfig(**shape, num_attention_heads=num_attention_heads, **own)  # type: ignore[arg-type]


PRESETS: Mapping[str, ModelConfig] = MappingProxyType({})


@settings
class ModelSettings:
    """A preset, and what is to differ from it."""

    preset: str
