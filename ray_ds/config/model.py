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


PRESETS: Mapping[str, ModelConfig] = MappingProxyType(
    {
        "tiny": ModelConfig(
            vocab_size=512,
            max_position_embeddings=128,
            hidden_size=64,
            num_hidden_layers=2,
            num_attention_heads=2,
            kv_lora_rank=16,
            qk_nope_head_dim=16,
            qk_rope_head_dim=8,
            v_head_dim=16,
            intermediate_size=128,
            n_routed_experts=4,
            n_shared_experts=1,
            num_experts_per_tok=2,
            moe_intermediate_size=32,
            first_k_dense_replace=1,
        ),
        "demo": ModelConfig(
            vocab_size=4096,
            max_position_embeddings=256,
            hidden_size=256,
            num_hidden_layers=4,
            num_attention_heads=4,
            kv_lora_rank=64,
            qk_nope_head_dim=32,
            qk_rope_head_dim=32,
            v_head_dim=64,
            intermediate_size=640,
            n_routed_experts=8,
            n_shared_experts=1,
            num_experts_per_tok=2,
            moe_intermediate_size=128,
            first_k_dense_replace=1,
        ),
        "demo_dense": ModelConfig(
            vocab_size=4096,
            max_position_embeddings=256,
            hidden_size=256,
            num_hidden_layers=4,
            num_attention_heads=4,
            kv_lora_rank=64,
            qk_nope_head_dim=32,
            qk_rope_head_dim=32,
            v_head_dim=64,
            intermediate_size=640,
            first_k_dense_replace=4,
        ),
        "dense_350m": ModelConfig(
            vocab_size=32768,
            max_position_embeddings=2048,
            hidden_size=1024,
            num_hidden_layers=24,
            num_attention_heads=8,
            kv_lora_rank=256,
            qk_nope_head_dim=64,
            qk_rope_head_dim=64,
            v_head_dim=128,
            intermediate_size=3200,
            first_k_dense_replace=24,
        ),
        # DeepSeek-V2-Lite (arXiv 2405.04434, appendix B) with V3's sigmoid router.
        "lite": ModelConfig(
            vocab_size=102400,
            max_position_embeddings=4096,
            hidden_size=2048,
            num_hidden_layers=27,
            num_attention_heads=16,
            kv_lora_rank=512,
            qk_nope_head_dim=128,
            qk_rope_head_dim=64,
            v_head_dim=128,
            intermediate_size=10944,
            n_routed_experts=64,
            n_shared_experts=2,
            num_experts_per_tok=6,
            moe_intermediate_size=1408,
            first_k_dense_replace=1,
        ),
        # DeepSeek-V3 (arXiv 2412.19437, section 4.2) without its multi-token prediction layer.
        "v3": ModelConfig(
            vocab_size=129280,
            max_position_embeddings=4096,
            hidden_size=7168,
            num_hidden_layers=61,
            num_attention_heads=128,
            q_lora_rank=1536,
            kv_lora_rank=512,
            qk_nope_head_dim=128,
            qk_rope_head_dim=64,
            v_head_dim=128,
            intermediate_size=18432,
            n_routed_experts=256,
            n_shared_experts=1,
            num_experts_per_tok=8,
            moe_intermediate_size=2048,
            n_group=8,
            topk_group=4,
            routed_scaling_factor=2.5,
            first_k_dense_replace=3,
        ),
    }
)
"""Whole models by name; `ModelSettings.resolve` replaces their `vocab_size` and `max_position_embeddings`."""


@settings
class ModelSettings:
    """A preset, and what is to differ from it."""

    preset: str
    """Name of the model to start from: tiny, demo, demo_dense, dense_350m, lite or v3."""
    hidden_size: int | None = None
    """Width of the residual stream; absent = the preset's, as for every field below."""
    num_hidden_layers: int | None = None
    """Decoder layers."""
    num_attention_heads: int | None = None
    """Attention heads."""
    q_lora_rank: int | None = None
    """Width of the compressed query; 0 = no compression."""
    kv_lora_rank: int | None = None
    """Width of the compressed key and value, which is what the cache holds."""
    qk_nope_head_dim: int | None = None
    """Width of a head's query and key that carries no position."""
    qk_rope_head_dim: int | None = None
    """Width of a head's query and key that carries the position; even."""
    v_head_dim: int | None = None
    """Width of a head's value; the same as query and key is fastest."""
    intermediate_size: int | None = None
    """Inner width of a dense layer's MLP."""
    n_routed_experts: int | None = None
    """Experts a layer's router chooses from; 0 = every layer is dense."""
    n_shared_experts: int | None = None
    """Experts that see every token."""
    num_experts_per_tok: int | None = None
    """Routed experts that see a token."""
    moe_intermediate_size: int | None = None
    """Inner width of one expert."""
    n_group: int | None = None
    """Groups that the routed experts are divided into."""
    topk_group: int | None = None
    """Groups whose experts a token may choose from."""
    norm_topk_prob: bool | None = None
    """Whether the weights of a token's experts are made to sum to 1."""
    routed_scaling_factor: float | None = None
    """Factor on what the routed experts give."""
    first_k_dense_replace: int | None = None
    """Layers, counted from the first, that are dense."""
    rope_theta: float | None = None
    """Base of the rotary frequencies."""
    tie_word_embeddings: bool | None = None
    """Whether the output projection is the embedding table."""

    def __post_init__(self) -> None:
        """Refuse settings that make no model, whatever the tokenizer."""
        self.resolve(vocab_size=1, max_position_embeddings=1)

    def resolve(self, vocab_size: int, max_position_embeddings: int) -> ModelConfig:
        """Return the whole model.

        Raises:
            ConfigError: the preset is unknown, or a field has no effect or a value that makes no model.
        """
        if self.preset not in PRESETS:
            raise ConfigError("preset", self.preset, f"must be one of {', '.join(PRESETS)}", "choose one of them")
        preset = PRESETS[self.preset]
        given = {name: value for name, value in dataclasses.asdict(self).items() if value is not None}
        del given["preset"]
        changes = dict(given, vocab_size=vocab_size, max_position_embeddings=max_position_embeddings)
        if given.get("q_lora_rank") == 0:
            changes["q_lora_rank"] = None
        if given.get("n_routed_experts", preset.n_routed_experts) == 0:
            for name in EXPERT_FIELDS:
                if name in given:
                    raise ConfigError(name, given[name], "has no effect in a dense model", "remove it, or add experts")
            # A preset with experts gives up their fields' values too.
            changes |= {f.name: f.default for f in dataclasses.fields(ModelConfig) if f.name in EXPERT_FIELDS}
            changes["first_k_dense_replace"] = given.get("num_hidden_layers", preset.num_hidden_layers)
        config = dataclasses.replace(preset, **changes)
        if config.first_k_dense_replace == 0 and self.intermediate_size is not None:
            allowed = "has no effect while first_k_dense_replace is 0"
            raise ConfigError("intermediate_size", self.intermediate_size, allowed, "remove it")
        return config
