"""The tensors that a model's folder holds, by name: exact, from its config alone."""

from collections.abc import Iterator

from ray_ds.config.model import ModelConfig

Shape = tuple[int, ...]

BIAS_SUFFIX = "e_score_correction_bias"
"""The routers' correction biases stay in fp32 in every folder."""
EMBEDDING = "model.embed_tokens.weight"
HEAD = "lm_head.weight"


def shapes_on_disk(config: ModelConfig) -> dict[str, Shape]:
    """Return the shape of every tensor of a folder; copies of others, as `copies_on_disk` names them, included."""
    shapes: dict[str, Shape] = {EMBEDDING: (config.vocab_size, config.hidden_size)}
    for layer in range(config.num_hidden_layers):
        shapes |= dict(_layer(config, layer))
    shapes["model.norm.weight"] = (config.hidden_size,)
    if not config.tie_word_embeddings:
        shapes[HEAD] = (config.vocab_size, config.hidden_size)
    for layer in prediction_layers(config):
        shapes |= dict(_layer(config, layer)) | dict(_prediction(config, layer))
    return shapes


def copies_on_disk(config: ModelConfig) -> dict[str, str]:
    """Return the names that only repeat another tensor, and that one's name.

    Every module of multi-token prediction has the model's embedding and head (arXiv 2412.19437, section 2.2), and
    DeepSeek's files, which vLLM reads, hold them once more for each.
    """
    head = EMBEDDING if config.tie_word_embeddings else HEAD
    copies: dict[str, str] = {}
    for layer in prediction_layers(config):
        copies[f"model.layers.{layer}.embed_tokens.weight"] = EMBEDDING
        copies[f"model.layers.{layer}.shared_head.head.weight"] = head
    return copies


def prediction_layers(config: ModelConfig) -> range:
    """Return the numbers that the modules of multi-token prediction have as layers: they follow the last one."""
    return range(config.num_hidden_layers, config.num_hidden_layers + config.num_nextn_predict_layers)


def _prediction(config: ModelConfig, layer: int) -> Iterator[tuple[str, Shape]]:
    """Yield what a module of multi-token prediction has besides a layer."""
    name, width = f"model.layers.{layer}", config.hidden_size
    yield f"{name}.embed_tokens.weight", (config.vocab_size, width)
    yield f"{name}.enorm.weight", (width,)
    yield f"{name}.hnorm.weight", (width,)
    yield f"{name}.eh_proj.weight", (width, 2 * width)
    yield f"{name}.shared_head.norm.weight", (width,)
    yield f"{name}.shared_head.head.weight", (config.vocab_size, width)


def _layer(config: ModelConfig, layer: int) -> Iterator[tuple[str, Shape]]:
    """Yield the tensors of one layer."""
    name = f"model.layers.{layer}"
    yield f"{name}.input_layernorm.weight", (config.hidden_size,)
    yield f"{name}.post_attention_layernorm.weight", (config.hidden_size,)
    attention = _latent_attention if config.attention == "mla" else _grouped_attention
    yield from attention(config, f"{name}.self_attn")
    if not config.n_routed_experts or layer < config.first_k_dense_replace:
        yield from _mlp(f"{name}.mlp", config.hidden_size, config.intermediate_size)
        return
    yield f"{name}.mlp.gate.weight", (config.n_routed_experts, config.hidden_size)
    if config.has_router_bias:
        yield f"{name}.mlp.gate.{BIAS_SUFFIX}", (config.n_routed_experts,)
    for expert in range(config.n_routed_experts):
        yield from _mlp(f"{name}.mlp.experts.{expert}", config.hidden_size, config.moe_intermediate_size)
    if config.n_shared_experts:
        inner = config.n_shared_experts * config.moe_intermediate_size
        yield from _mlp(f"{name}.mlp.shared_experts", config.hidden_size, inner)


def _latent_attention(config: ModelConfig, name: str) -> Iterator[tuple[str, Shape]]:
    """Yield the tensors of multi-head latent attention."""
    width, latent = config.hidden_size, config.kv_lora_rank
    query = config.num_attention_heads * config.qk_head_dim
    if config.q_lora_rank is None:
        yield f"{name}.q_proj.weight", (query, width)
    else:
        yield f"{name}.q_a_proj.weight", (config.q_lora_rank, width)
        yield f"{name}.q_a_layernorm.weight", (config.q_lora_rank,)
        yield f"{name}.q_b_proj.weight", (query, config.q_lora_rank)
    yield f"{name}.kv_a_proj_with_mqa.weight", (latent + config.qk_rope_head_dim, width)
    yield f"{name}.kv_a_layernorm.weight", (latent,)
    expanded = config.num_attention_heads * (config.qk_nope_head_dim + config.v_head_dim)
    yield f"{name}.kv_b_proj.weight", (expanded, latent)
    yield f"{name}.o_proj.weight", (width, config.num_attention_heads * config.v_head_dim)


def _grouped_attention(config: ModelConfig, name: str) -> Iterator[tuple[str, Shape]]:
    """Yield the tensors of grouped-query attention."""
    heads = {"q": config.num_attention_heads, "k": config.num_key_value_heads, "v": config.num_key_value_heads}
    for part, count in heads.items():
        yield f"{name}.{part}_proj.weight", (count * config.head_dim, config.hidden_size)
        if config.qkv_bias:
            yield f"{name}.{part}_proj.bias", (count * config.head_dim,)
    for part in ("q", "k") if config.qk_norm else ():
        yield f"{name}.{part}_norm.weight", (config.head_dim,)
    yield f"{name}.o_proj.weight", (config.hidden_size, config.num_attention_heads * config.head_dim)


def _mlp(name: str, width: int, inner: int) -> Iterator[tuple[str, Shape]]:
    """Yield the tensors of a gated MLP."""
    yield f"{name}.gate_proj.weight", (inner, width)
    yield f"{name}.up_proj.weight", (inner, width)
    yield f"{name}.down_proj.weight", (width, inner)
