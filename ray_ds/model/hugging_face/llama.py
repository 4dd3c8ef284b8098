"""`config.json` of Llama (arXiv 2407.21783), Qwen2 (arXiv 2407.10671) and Qwen3 (arXiv 2505.09388), the dense ones.

They differ in small things: Qwen2 has biases on query, key and value; Qwen3 norms every head's query and key.
"""

from typing import Any, Literal

from ray_ds.config.model import ModelConfig
from ray_ds.model.hugging_face.fields import Fields, refused
from ray_ds.model.hugging_face.rope import read_rope, write_rope

Kind = Literal["llama", "qwen2", "qwen3"]

ARCHITECTURES = {"llama": "LlamaForCausalLM", "qwen2": "Qwen2ForCausalLM", "qwen3": "Qwen3ForCausalLM"}
SIZES = ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size")
QWEN3_HEAD_DIM = 128
"""What transformers takes where a Qwen3 config gives none; for the others it follows from the width."""


def read_llama(fields: Fields, kind: Kind) -> ModelConfig:
    """Return the model that a Llama, Qwen2 or Qwen3 folder describes.

    Raises:
        ArtifactError: a field is missing, or asks for what this decoder does not do.
    """
    sizes: dict[str, Any] = {name: fields.get(name, int) for name in SIZES}
    fields.must_be("hidden_act", "silu")
    # In Llama and Qwen3 this field gives a bias to the output too, which this decoder does not have.
    fields.must_be("attention_bias", False)
    fields.must_be("mlp_bias", False)
    fields.must_be("use_sliding_window", False)
    layer_types = set(fields.raw("layer_types") or ())
    if layer_types - {"full_attention"}:
        raise refused("layer_types", sorted(layer_types), "must be 'full_attention' in every layer")
    length = fields.get("max_position_embeddings", int)
    theta, scaling = read_rope(fields, length)
    heads = sizes["num_attention_heads"]
    return ModelConfig(
        attention="gqa",
        **sizes,
        num_key_value_heads=fields.get("num_key_value_heads", int, heads if kind == "llama" else None),
        head_dim=_head_dim(fields, kind, sizes["hidden_size"], heads),
        qkv_bias=kind == "qwen2",
        qk_norm=kind == "qwen3",
        first_k_dense_replace=sizes["num_hidden_layers"],
        max_position_embeddings=length,
        rms_norm_eps=fields.get("rms_norm_eps", float, 1e-6),
        rope_theta=theta,
        rope_scaling=scaling,
        tie_word_embeddings=fields.get("tie_word_embeddings", bool, False),
    )


def _head_dim(fields: Fields, kind: Kind, hidden_size: int, heads: int) -> int:
    """Return the width of a head, given or as transformers derives it."""
    given = fields.optional("head_dim", int)
    if given is None and kind != "qwen3" and hidden_size % heads:
        raise refused("head_dim", "missing", f"must be given where hidden_size ({hidden_size}) is no multiple of heads")
    return given or (QWEN3_HEAD_DIM if kind == "qwen3" else hidden_size // heads)


def kind_of(config: ModelConfig) -> Kind:
    """Return the family that a dense model with grouped-query attention belongs to."""
    if config.qk_norm:
        return "qwen3"
    return "qwen2" if config.qkv_bias else "llama"


def write_llama(config: ModelConfig) -> dict[str, Any]:
    """Return the `config.json` of a dense model with grouped-query attention, all but its tokens and type."""
    kind = kind_of(config)
    copied = (
        *SIZES,
        "num_key_value_heads",
        "head_dim",
        "max_position_embeddings",
        "rms_norm_eps",
        "tie_word_embeddings",
    )
    values: dict[str, Any] = {name: getattr(config, name) for name in copied}
    if kind != "qwen2":
        values["attention_bias"] = False
    if kind == "llama":
        values["mlp_bias"] = False
    else:
        values["use_sliding_window"] = False
    return {
        **values,
        **write_rope(config),
        "architectures": [ARCHITECTURES[kind]],
        "model_type": kind,
        "hidden_act": "silu",
        "attention_dropout": 0.0,
    }
