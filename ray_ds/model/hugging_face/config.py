"""From a `config.json` to a `ModelConfig` and back, by the family that `model_type` names."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

from ray_ds.config.model import ModelConfig
from ray_ds.config.settings import as_json, decode_settings
from ray_ds.errors import ArtifactError, ConfigError
from ray_ds.logs import log_event
from ray_ds.model.hugging_face.deepseek import read_deepseek, write_deepseek
from ray_ds.model.hugging_face.fields import CONFIG_FILE, Fields, refused
from ray_ds.model.hugging_face.llama import read_llama, write_llama

OWN_KIND = "ray_ds"
"""The `model_type` of a model that no family of transformers computes; its other fields are `ModelConfig`'s."""

READERS: Mapping[str, Callable[[Fields], ModelConfig]] = {
    "deepseek_v2": lambda fields: read_deepseek(fields, "deepseek_v2"),
    "deepseek_v3": lambda fields: read_deepseek(fields, "deepseek_v3"),
    "llama": lambda fields: read_llama(fields, "llama"),
    "qwen2": lambda fields: read_llama(fields, "qwen2"),
    "qwen3": lambda fields: read_llama(fields, "qwen3"),
}


def from_hf_config(values: Mapping[str, Any]) -> ModelConfig:
    """Return the model that a `config.json` describes.

    Fields that this package does not know are logged; those that it knows it cannot follow are refused.

    Raises:
        ArtifactError: a field is missing, or asks for what this decoder does not do.
    """
    kind = str(values.get("model_type"))
    if kind == OWN_KIND:
        return _read_own(values)
    if kind not in READERS:
        raise refused("model_type", kind, f"must be one of {', '.join(READERS)}")
    architecture = (values.get("architectures") or ["ForCausalLM"])[0]
    if not architecture.endswith("ForCausalLM"):
        raise refused("architectures", architecture, "must be a causal language model (...ForCausalLM)")
    fields = Fields(values)
    try:
        config = READERS[kind](fields)
    except ConfigError as error:
        raise refused(error.field, error.value, error.allowed) from error
    for name, value in fields.unasked().items():
        log_event("config_field_unknown", field=name, value=value)
    return config


def to_hf_config(
    config: ModelConfig, *, bos_token_id: int | None = None, eos_token_id: int | list[int] | None = None
) -> dict[str, Any]:
    """Return `config.json` for the model, all but its `dtype`."""
    tokens = {"bos_token_id": bos_token_id, "eos_token_id": eos_token_id, "pad_token_id": None, "use_cache": True}
    if _inexpressible(config) is not None:
        own: Any = as_json(config)
        return {**own, **tokens, "model_type": OWN_KIND, "architectures": ["RayDsForCausalLM"]}
    if config.attention == "gqa":
        return {**write_llama(config), **tokens}
    return {
        **write_deepseek(
            config, "deepseek_v2" if config.n_routed_experts and config.scoring_func == "softmax" else "deepseek_v3"
        ),
        **tokens,
    }


def check_expressible(config: ModelConfig) -> None:
    """Refuse a model that no family of transformers computes.

    Raises:
        ArtifactError: the first field that none has.
    """
    problem = _inexpressible(config)
    if problem is not None:
        field, allowed = problem
        action = "serve and evaluate it here, or train a model without this"
        raise ArtifactError(f"{CONFIG_FILE}: {field}", getattr(config, field), allowed, action)


def _inexpressible(config: ModelConfig) -> tuple[str, str] | None:
    """Return a field that keeps a model from being one of transformers', and what it would have to be."""
    is_v2 = config.n_routed_experts > 0 and config.scoring_func == "softmax"
    if config.attention == "gqa":
        is_llama = not (config.qk_norm or config.qkv_bias)
        checks = [
            *([_whole_heads(config)] if is_llama else []),
            ("n_routed_experts", config.n_routed_experts == 0, "must be 0 beside grouped-query attention"),
            ("qk_norm", not (config.qk_norm and config.qkv_bias), "must be false beside qkv_bias"),
            ("num_nextn_predict_layers", config.num_nextn_predict_layers == 0, "must be 0 in a Llama or Qwen model"),
        ]
    elif not config.n_routed_experts:
        checks = []
    else:
        wanted = ("greedy", "group_limited_greedy") if is_v2 else ("noaux_tc",)
        allowed = f"must be {' or '.join(wanted)} where scoring_func is {config.scoring_func}"
        checks = [
            *([_whole_heads(config)] if is_v2 else []),
            ("n_shared_experts", config.n_shared_experts > 0, "must be 1 or more"),
            ("topk_method", config.topk_method in wanted, allowed),
            ("norm_topk_prob", not (is_v2 and config.norm_topk_prob), "must be false where scoring_func is softmax"),
            (
                "num_nextn_predict_layers",
                not (is_v2 and config.num_nextn_predict_layers),
                "must be 0 where scoring_func is softmax",
            ),
        ]
    return next(((field, allowed) for field, is_fine, allowed in checks if not is_fine), None)


def _whole_heads(config: ModelConfig) -> tuple[str, bool, str]:
    """Return what transformers checks in Llama and DeepSeek-V2 configs, though nothing depends on it."""
    heads = config.num_attention_heads
    allowed = f"must be a multiple of num_attention_heads ({heads}) in this kind of model"
    return "hidden_size", config.hidden_size % heads == 0, allowed


def _read_own(values: Mapping[str, Any]) -> ModelConfig:
    """Return a model that this package wrote and nobody else knows."""
    names = {field.name for field in dataclasses.fields(ModelConfig)}
    given = {name: value for name, value in values.items() if name in names}
    try:
        return decode_settings(ModelConfig, given, where=CONFIG_FILE)
    except ConfigError as error:
        action = "use a folder that this package wrote"
        raise ArtifactError(error.field, error.value, error.allowed, action) from error
