"""`config.json` of DeepSeek-V2 (arXiv 2405.04434) and DeepSeek-V3 (arXiv 2412.19437)."""

from typing import Any, Literal

from ray_ds.config.model import ModelConfig
from ray_ds.model.hugging_face.fields import Fields, refused
from ray_ds.model.hugging_face.rope import read_rope, write_rope

Version = Literal["deepseek_v2", "deepseek_v3"]

ARCHITECTURES = {"deepseek_v2": "DeepseekV2ForCausalLM", "deepseek_v3": "DeepseekV3ForCausalLM"}
SIZES = (
    "vocab_size",
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "intermediate_size",
    "kv_lora_rank",
    "qk_nope_head_dim",
    "qk_rope_head_dim",
    "v_head_dim",
)
EXPERT_SIZES = ("n_shared_experts", "num_experts_per_tok", "moe_intermediate_size")


def read_deepseek(fields: Fields, version: Version) -> ModelConfig:
    """Return the model that a DeepSeek folder describes.

    Raises:
        ArtifactError: a field is missing, or asks for what this decoder does not do.
    """
    sizes: dict[str, Any] = {name: fields.get(name, int) for name in SIZES}
    fields.must_be("hidden_act", "silu")
    fields.must_be("attention_bias", False)
    fields.must_be("mlp_bias", False)
    fields.must_be("rope_interleave", True)
    fields.must_be("moe_layer_freq", 1)
    fields.must_be("num_key_value_heads", sizes["num_attention_heads"], why="every head has its own keys and values")
    length = fields.get("max_position_embeddings", int)
    theta, scaling = read_rope(fields, length)
    num_experts = fields.get("n_routed_experts", int, 0)
    experts = _read_experts(fields, version, num_experts) if num_experts else _read_dense(fields, sizes)
    return ModelConfig(
        attention="mla",
        **sizes,
        **experts,
        q_lora_rank=fields.optional("q_lora_rank", int),
        max_position_embeddings=length,
        rms_norm_eps=fields.get("rms_norm_eps", float, 1e-6),
        rope_theta=theta,
        rope_scaling=scaling,
        num_nextn_predict_layers=_read_prediction(fields, version),
        tie_word_embeddings=fields.get("tie_word_embeddings", bool, False),
    )


def _read_prediction(fields: Fields, version: Version) -> int:
    """Return the number of modules of multi-token prediction, which DeepSeek-V2 has none of."""
    count = fields.get("num_nextn_predict_layers", int, 0)
    if count and version == "deepseek_v2":
        raise refused("num_nextn_predict_layers", count, "must be 0 in a DeepSeek-V2 model")
    return count


def _read_experts(fields: Fields, version: Version, num_experts: int) -> dict[str, Any]:
    """Return the fields of a model with experts."""
    experts: dict[str, Any] = {
        "n_routed_experts": num_experts,
        **{name: fields.get(name, int) for name in EXPERT_SIZES},
        "first_k_dense_replace": fields.get("first_k_dense_replace", int),
        "n_group": fields.get("n_group", int, 1),
        "topk_group": fields.get("topk_group", int, 1),
        "routed_scaling_factor": fields.get("routed_scaling_factor", float, 1.0),
    }
    if version == "deepseek_v3":
        fields.must_be("scoring_func", "sigmoid")
        fields.must_be("topk_method", "noaux_tc")
        return experts | {"norm_topk_prob": fields.get("norm_topk_prob", bool, True)}
    fields.must_be("scoring_func", "softmax")
    # DeepSeek's own code leaves out the scaling factor where it norms, transformers does not norm at all.
    fields.must_be("norm_topk_prob", False, why="programs do not agree what it means in a DeepSeek-V2 model")
    method = fields.get("topk_method", str, "greedy")
    if method == "greedy":
        experts |= {"n_group": 1, "topk_group": 1}  # V2-Lite gives groups, but does not choose by them
    elif method != "group_limited_greedy":
        raise refused("topk_method", method, "must be 'greedy' or 'group_limited_greedy' in a DeepSeek-V2 model")
    return experts | {"norm_topk_prob": False, "scoring_func": "softmax", "topk_method": method}


def _read_dense(fields: Fields, sizes: dict[str, int]) -> dict[str, Any]:
    """Return the one field of a model without experts; theirs are there, but without effect."""
    ignored = ("n_group", "topk_group", "routed_scaling_factor", "norm_topk_prob", "scoring_func", "topk_method")
    for name in (*EXPERT_SIZES, "first_k_dense_replace", *ignored):
        fields.raw(name)
    return {"first_k_dense_replace": sizes["num_hidden_layers"]}


def write_deepseek(config: ModelConfig, version: Version) -> dict[str, Any]:
    """Return the `config.json` of a model with latent attention, all but its tokens and type."""
    copied = (
        *SIZES,
        *EXPERT_SIZES,
        "max_position_embeddings",
        "q_lora_rank",
        "n_routed_experts",
        "first_k_dense_replace",
        "n_group",
        "topk_group",
        "norm_topk_prob",
        "routed_scaling_factor",
        "rms_norm_eps",
        "tie_word_embeddings",
        # vLLM builds the routers' correction biases only where it reads these two, which transformers leaves out.
        "scoring_func",
        "topk_method",
    )
    values: dict[str, Any] = {name: getattr(config, name) for name in copied}
    if version == "deepseek_v3":
        values |= {"num_nextn_predict_layers": config.num_nextn_predict_layers, "rope_interleave": True}
    return {
        **values,
        **write_rope(config),
        "architectures": [ARCHITECTURES[version]],
        "model_type": version,
        "num_key_value_heads": config.num_attention_heads,
        "hidden_act": "silu",
        "attention_bias": False,
        "attention_dropout": 0.0,
        "moe_layer_freq": 1,
    }
