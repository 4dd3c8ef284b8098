"""What a model is made of, in the words of Hugging Face's configurations."""

from typing import Literal

from ray_ds.config.rope import RopeScaling
from ray_ds.config.settings import settings
from ray_ds.errors import ConfigError

Kernels = Literal["auto", "plain", "fast"]
"""How a decoder computes: `plain` by obvious steps, `fast` by fused kernels that never wait for the device, `auto` by
what is faster on the device it is on."""

MLA_FIELDS = ("q_lora_rank", "kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim")
"""Fields of multi-head latent attention alone."""

GQA_FIELDS = ("num_key_value_heads", "head_dim", "qkv_bias", "qk_norm")
"""Fields of grouped-query attention alone."""

EXPERT_FIELDS = (
    "n_shared_experts",
    "num_experts_per_tok",
    "moe_intermediate_size",
    "n_group",
    "topk_group",
    "norm_topk_prob",
    "routed_scaling_factor",
    "first_k_dense_replace",
    "scoring_func",
    "topk_method",
)
"""Fields that mean nothing while `n_routed_experts` is 0."""

SIZES = (
    "vocab_size",
    "max_position_embeddings",
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "intermediate_size",
    "rms_norm_eps",
    "rope_theta",
)
"""Fields that are positive in every model; `NEEDED` are in a model with their attention."""
NEEDED = {
    "mla": ("kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim"),
    "gqa": ("num_key_value_heads", "head_dim"),
}


@settings
class ModelConfig:
    """A whole decoder. It is dense where `n_routed_experts` is 0."""

    attention: Literal["mla", "gqa"] = "mla"
    """Multi-head latent attention, as DeepSeek has it, or grouped-query attention, as Llama and Qwen have it."""
    vocab_size: int
    """Token ids; given by the tokenizer."""
    max_position_embeddings: int
    """Longest sequence the model was made for, in tokens."""
    hidden_size: int
    """Width of the residual stream."""
    num_hidden_layers: int
    """Decoder layers, not counting those of multi-token prediction."""
    num_attention_heads: int
    """Attention heads."""
    q_lora_rank: int | None = None
    """Width of the compressed query; None (in a recipe 0) = queries are projected in one step. Latent attention."""
    kv_lora_rank: int = 0
    """Width of the compressed key and value, which is what the cache holds. Latent attention."""
    qk_nope_head_dim: int = 0
    """Width of a head's query and key that carries no position. Latent attention."""
    qk_rope_head_dim: int = 0
    """Width of a head's query and key that carries the position; even. Latent attention."""
    v_head_dim: int = 0
    """Width of a head's value; the same as query and key is fastest. Latent attention."""
    num_key_value_heads: int = 0
    """Heads of keys and values, each for as many query heads. Grouped-query attention."""
    head_dim: int = 0
    """Width of a head; even. Grouped-query attention."""
    qkv_bias: bool = False
    """Whether query, key and value have a bias, as in Qwen2. Grouped-query attention."""
    qk_norm: bool = False
    """Whether every head's query and key are normed, as in Qwen3. Grouped-query attention."""
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
    scoring_func: Literal["sigmoid", "softmax"] = "sigmoid"
    """What makes a router's scores: sigmoid in DeepSeek-V3, softmax in V2."""
    topk_method: Literal["noaux_tc", "group_limited_greedy", "greedy"] = "noaux_tc"
    """How experts are chosen: `noaux_tc` by scores plus a bias that balances them, groups by their best two (V3);
    `group_limited_greedy` by scores, groups by their best (V2); `greedy` by scores, without groups."""
    num_nextn_predict_layers: int = 0
    """Modules that predict tokens beyond the next one in training (DeepSeek-V3); 0 = none."""
    rms_norm_eps: float = 1e-6
    """Added to the mean square in norms, but for those of latents, where it is 1e-6 in every DeepSeek model."""
    rope_theta: float = 10000.0
    """Base of the rotary frequencies."""
    rope_scaling: RopeScaling | None = None
    """How positions are stretched beyond the length of training; absent = they are not."""
    tie_word_embeddings: bool = False
    """Whether the output projection is the embedding table."""

    def __post_init__(self) -> None:
        """Refuse sizes that make no model."""
        for name in (*SIZES, *NEEDED[self.attention]):
            if getattr(self, name) <= 0:
                raise ConfigError(name, getattr(self, name), "must be positive", "raise it")
        self._check_attention()
        if self.n_routed_experts < 0:
            raise ConfigError("n_routed_experts", self.n_routed_experts, "must be 0 or more", "use 0 for a dense model")
        if self.n_routed_experts:
            self._check_experts()
            self._check_groups()
        elif self.first_k_dense_replace != self.num_hidden_layers:
            allowed = f"must be num_hidden_layers ({self.num_hidden_layers}) in a dense model"
            raise ConfigError("first_k_dense_replace", self.first_k_dense_replace, allowed, "set it so")
        if self.num_nextn_predict_layers < 0:
            raise ConfigError("num_nextn_predict_layers", self.num_nextn_predict_layers, "must be 0 or more", "use 0")

    def _check_attention(self) -> None:
        """Refuse head sizes that do not fit, and fields of the other kind of attention."""
        for name in GQA_FIELDS if self.attention == "mla" else MLA_FIELDS:
            if getattr(self, name):
                allowed = f"has no effect where attention is {self.attention}"
                raise ConfigError(name, getattr(self, name), allowed, "remove it")
        if self.q_lora_rank is not None and self.q_lora_rank <= 0:
            raise ConfigError("q_lora_rank", self.q_lora_rank, "must be positive", "raise it")
        turned = "qk_rope_head_dim" if self.attention == "mla" else "head_dim"
        if getattr(self, turned) % 2:
            raise ConfigError(turned, getattr(self, turned), "must be even", "add 1")
        if self.attention == "gqa" and self.num_attention_heads % self.num_key_value_heads:
            allowed = f"must divide num_attention_heads ({self.num_attention_heads})"
            raise ConfigError("num_key_value_heads", self.num_key_value_heads, allowed, "correct one of them")

    def _check_experts(self) -> None:
        """Refuse expert sizes that make no layer."""
        for name in ("num_experts_per_tok", "moe_intermediate_size", "n_group", "topk_group"):
            if getattr(self, name) < 1:
                raise ConfigError(name, getattr(self, name), "must be 1 or more in a model with experts", "raise it")
        if self.n_shared_experts < 0:
            raise ConfigError("n_shared_experts", self.n_shared_experts, "must be 0 or more", "use 0 for none")
        if self.routed_scaling_factor <= 0:
            raise ConfigError("routed_scaling_factor", self.routed_scaling_factor, "must be positive", "raise it")
        if not 0 <= self.first_k_dense_replace < self.num_hidden_layers:
            allowed = f"must be at least 0 and below num_hidden_layers ({self.num_hidden_layers})"
            action = "lower it, or set n_routed_experts to 0 for a dense model"
            raise ConfigError("first_k_dense_replace", self.first_k_dense_replace, allowed, action)

    def _check_groups(self) -> None:
        """Refuse groups that the router cannot choose from."""
        least = 2 if self.topk_method == "noaux_tc" else 1
        if self.n_routed_experts % self.n_group or self.n_routed_experts < least * self.n_group:
            allowed = f"must divide n_routed_experts ({self.n_routed_experts}) into groups of {least} or more"
            raise ConfigError("n_group", self.n_group, allowed, "use 1 for no groups")
        if self.topk_method == "greedy" and self.n_group > 1:
            raise ConfigError("n_group", self.n_group, "has no effect where topk_method is greedy", "use 1")
        if self.topk_group > self.n_group:
            raise ConfigError("topk_group", self.topk_group, f"must be at most n_group ({self.n_group})", "lower it")
        reachable = self.topk_group * self.n_routed_experts // self.n_group
        if self.num_experts_per_tok > reachable:
            allowed = f"must be at most the {reachable} experts that topk_group and n_group leave"
            raise ConfigError("num_experts_per_tok", self.num_experts_per_tok, allowed, "lower it")

    @property
    def qk_head_dim(self) -> int:
        """Width of a head's query and key."""
        return self.head_dim if self.attention == "gqa" else self.qk_nope_head_dim + self.qk_rope_head_dim

    @property
    def value_head_dim(self) -> int:
        """Width of a head's value."""
        return self.head_dim if self.attention == "gqa" else self.v_head_dim

    @property
    def rope_dim(self) -> int:
        """Width of the part of a head's query and key that is turned by position."""
        return self.head_dim if self.attention == "gqa" else self.qk_rope_head_dim

    @property
    def cache_width(self) -> int:
        """Numbers that the cache holds of a token in a layer: a latent and a turned key, or all keys and values."""
        if self.attention == "gqa":
            return 2 * self.num_key_value_heads * self.head_dim
        return self.kv_lora_rank + self.qk_rope_head_dim

    @property
    def num_moe_layers(self) -> int:
        """Layers with routed experts, those of multi-token prediction included."""
        if not self.n_routed_experts:
            return 0
        return self.num_hidden_layers - self.first_k_dense_replace + self.num_nextn_predict_layers

    @property
    def has_router_bias(self) -> bool:
        """Whether routers have a bias that is moved to keep the experts equally busy."""
        return self.n_routed_experts > 0 and self.topk_method == "noaux_tc"
