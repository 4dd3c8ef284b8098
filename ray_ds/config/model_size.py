"""What a model costs in parameters, arithmetic and cache: exact, from its config alone."""

from ray_ds.config.model import ModelConfig


def num_parameters(config: ModelConfig) -> int:
    """Return the numbers a checkpoint stores: parameters and the routers' correction biases.

    For the preset `v3` these are the 671,026,419,200 that are published without the multi-token prediction layer.
    """
    embeddings = config.vocab_size * config.hidden_size * (1 if config.tie_word_embeddings else 2)
    norms = config.hidden_size * (2 * config.num_hidden_layers + 1)
    attention = config.num_hidden_layers * _attention_parameters(config)
    dense = config.first_k_dense_replace * _mlp_parameters(config, config.intermediate_size)
    router = config.n_routed_experts * (config.hidden_size + 1)
    experts = (config.n_routed_experts + config.n_shared_experts) * _mlp_parameters(
        config, config.moe_intermediate_size
    )
    return embeddings + norms + attention + dense + config.num_moe_layers * (router + experts)


def num_active_parameters(config: ModelConfig) -> int:
    """Return the part of `num_parameters` that one token uses: all but the routed experts that it does not choose."""
    idle_experts = config.n_routed_experts - config.num_experts_per_tok
    idle = config.num_moe_layers * idle_experts * _mlp_parameters(config, config.moe_intermediate_size)
    return num_parameters(config) - idle


def flops_per_token(config: ModelConfig, seq_len: int) -> float:
    """Return the floating-point operations that training spends on a token in rows of `seq_len`, as MFU counts them.

    6 for each active parameter that multiplies, so not for the embedding look-up, and for each layer and head
    6 * (qk_head_dim + v_head_dim) * seq_len / 2: scores and weighted values, forward and twice that backward, halved
    because a token sees half of its row on average. Source: PaLM, arXiv 2204.02311, appendix B, halved for causality.
    """
    lookup = 0 if config.tie_word_embeddings else config.vocab_size * config.hidden_size
    weights = 6 * (num_active_parameters(config) - lookup)
    heads = config.num_hidden_layers * config.num_attention_heads
    return weights + 3 * heads * (config.qk_head_dim + config.v_head_dim) * seq_len


def cache_bytes_per_token(config: ModelConfig, dtype_bytes: int) -> int:
    """Return what one cached token takes: in every layer a latent and a turned key."""
    return config.num_hidden_layers * (config.kv_lora_rank + config.qk_rope_head_dim) * dtype_bytes


def _attention_parameters(config: ModelConfig) -> int:
    """Return the parameters of one layer's attention."""
    query_dim = config.num_attention_heads * config.qk_head_dim
    if config.q_lora_rank is None:
        query = config.hidden_size * query_dim
    else:
        query = config.hidden_size * config.q_lora_rank + config.q_lora_rank + config.q_lora_rank * query_dim
    compress = config.hidden_size * (config.kv_lora_rank + config.qk_rope_head_dim) + config.kv_lora_rank
    expand = config.kv_lora_rank * config.num_attention_heads * (config.qk_nope_head_dim + config.v_head_dim)
    output = config.num_attention_heads * config.v_head_dim * config.hidden_size
    return query + compress + expand + output


def _mlp_parameters(config: ModelConfig, inner: int) -> int:
    """Return the parameters of one gated MLP."""
    return 3 * config.hidden_size * inner
