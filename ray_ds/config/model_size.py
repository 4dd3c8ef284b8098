"""What a model costs in parameters, arithmetic and cache: exact, from its config alone."""

from ray_ds.config.model import ModelConfig


def num_parameters(config: ModelConfig) -> int:
    """Return the numbers a checkpoint stores: parameters and the routers' correction biases.

    For `deepseek_v3` these are 671,026,419,200 and the module of multi-token prediction; what shares its values, as
    that module's embedding and output projection, counts once.
    """
    embeddings = config.vocab_size * config.hidden_size * (1 if config.tie_word_embeddings else 2)
    layers = sum(_layer_parameters(config, layer) for layer in range(config.num_hidden_layers))
    return embeddings + layers + config.hidden_size + num_prediction_parameters(config)


def num_prediction_parameters(config: ModelConfig) -> int:
    """Return the part of `num_parameters` that belongs to the modules of multi-token prediction alone."""
    join = 2 * config.hidden_size * config.hidden_size
    module = join + 3 * config.hidden_size + _layer_parameters(config, config.num_hidden_layers)
    return config.num_nextn_predict_layers * module


def num_active_parameters(config: ModelConfig) -> int:
    """Return the parameters that one token uses when it is predicted.

    All but the routed experts that it does not choose and the modules of multi-token prediction.
    """
    layers = config.num_hidden_layers - config.first_k_dense_replace if config.n_routed_experts else 0
    return num_parameters(config) - num_prediction_parameters(config) - layers * _idle_parameters(config)


def flops_per_token(config: ModelConfig, seq_len: int) -> float:
    """Return the floating-point operations that training spends on a token in rows of `seq_len`, as MFU counts them.

    6 for each active parameter that multiplies, so not for the embedding look-up, and for each layer and head
    6 * (qk_head_dim + value_head_dim) * seq_len / 2: scores and weighted values, forward and twice that backward,
    halved because a token sees half of its row on average. A module of multi-token prediction adds its layer and once
    more the output projection. Source: PaLM, arXiv 2204.02311, appendix B, halved for causality.
    """
    head = config.vocab_size * config.hidden_size
    lookup = 0 if config.tie_word_embeddings else head
    ahead = num_prediction_parameters(config) + config.num_nextn_predict_layers * (head - _idle_parameters(config))
    weights = 6 * (num_active_parameters(config) - lookup + ahead)
    heads = (config.num_hidden_layers + config.num_nextn_predict_layers) * config.num_attention_heads
    return weights + 3 * heads * (config.qk_head_dim + config.value_head_dim) * seq_len


def cache_bytes_per_token(config: ModelConfig, dtype_bytes: int) -> int:
    """Return what one cached token takes: in every layer a latent and a turned key, or all keys and values."""
    return config.num_hidden_layers * config.cache_width * dtype_bytes


def _layer_parameters(config: ModelConfig, layer: int) -> int:
    """Return the parameters of a layer and its router's correction biases."""
    attention = _latent_parameters(config) if config.attention == "mla" else _grouped_parameters(config)
    norms = 2 * config.hidden_size
    if not config.n_routed_experts or layer < config.first_k_dense_replace:
        return attention + norms + _mlp_parameters(config, config.intermediate_size)
    router = config.n_routed_experts * (config.hidden_size + config.has_router_bias)
    num_experts = config.n_routed_experts + config.n_shared_experts
    return attention + norms + router + num_experts * _mlp_parameters(config, config.moe_intermediate_size)


def _idle_parameters(config: ModelConfig) -> int:
    """Return the parameters of a layer's experts that a token does not choose; 0 in a dense model."""
    idle = config.n_routed_experts - config.num_experts_per_tok
    return idle * _mlp_parameters(config, config.moe_intermediate_size)


def _latent_parameters(config: ModelConfig) -> int:
    """Return the parameters of one layer's latent attention."""
    query_dim = config.num_attention_heads * config.qk_head_dim
    if config.q_lora_rank is None:
        query = config.hidden_size * query_dim
    else:
        query = config.hidden_size * config.q_lora_rank + config.q_lora_rank + config.q_lora_rank * query_dim
    compress = config.hidden_size * (config.kv_lora_rank + config.qk_rope_head_dim) + config.kv_lora_rank
    expand = config.kv_lora_rank * config.num_attention_heads * (config.qk_nope_head_dim + config.v_head_dim)
    output = config.num_attention_heads * config.v_head_dim * config.hidden_size
    return query + compress + expand + output


def _grouped_parameters(config: ModelConfig) -> int:
    """Return the parameters of one layer's grouped-query attention."""
    query_dim = config.num_attention_heads * config.head_dim
    key_dim = config.num_key_value_heads * config.head_dim
    products = 2 * config.hidden_size * (query_dim + key_dim)
    biases = query_dim + 2 * key_dim if config.qkv_bias else 0
    return products + biases + (2 * config.head_dim if config.qk_norm else 0)


def _mlp_parameters(config: ModelConfig, inner: int) -> int:
    """Return the parameters of one gated MLP."""
    return 3 * config.hidden_size * inner
