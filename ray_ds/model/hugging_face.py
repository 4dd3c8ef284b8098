"""Names of config fields and tensors in Hugging Face's `DeepseekV3ForCausalLM`; vLLM reads the same.

In memory a layer's routed experts are two stacked tensors; on disk every expert has three of its own.
"""

import dataclasses
import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ray_ds.config.model import GQA_FIELDS, ModelConfig
from ray_ds.errors import ArtifactError

STACKED = re.compile(r"(.+\.mlp\.experts)\.(gate_up_proj|down_proj)")
SINGLE = re.compile(r"(.+\.mlp\.experts)\.(\d+)\.(gate|up|down)_proj\.weight")

FIXED_FIELDS: Mapping[str, Any] = {
    "architectures": ["DeepseekV3ForCausalLM"],
    "model_type": "deepseek_v3",
    "hidden_act": "silu",
    "rope_interleave": True,
    "attention_bias": False,
    "attention_dropout": 0.0,
    "moe_layer_freq": 1,
    "pad_token_id": None,
    "use_cache": True,
}
"""What our decoder always is."""

MUST_MATCH = ("model_type", "hidden_act", "rope_interleave", "attention_bias", "moe_layer_freq")


def to_hf_config(
    config: ModelConfig, *, bos_token_id: int | None = None, eos_token_id: int | None = None
) -> dict[str, Any]:
    """Return `config.json` for the model, all but its `dtype`."""
    values = dataclasses.asdict(config)
    for name in ("attention", "rope_scaling", *GQA_FIELDS):
        values.pop(name)
    theta = values.pop("rope_theta")
    return {
        **FIXED_FIELDS,
        **values,
        "num_key_value_heads": config.num_attention_heads,
        "bos_token_id": bos_token_id,
        "eos_token_id": eos_token_id,
        # transformers 5 and vLLM read the table; earlier ones the single field.
        "rope_parameters": {"rope_theta": theta, "rope_type": "default"},
        "rope_theta": theta,
    }


def from_hf_config(values: Mapping[str, Any]) -> ModelConfig:
    """Return the model that a `config.json` describes.

    Raises:
        ArtifactError: a field is missing, or asks for what this decoder does not do.
    """
    for name in MUST_MATCH:
        if values.get(name, FIXED_FIELDS[name]) != FIXED_FIELDS[name]:
            raise _refused(name, values[name], f"must be {FIXED_FIELDS[name]!r}")
    rope = values.get("rope_parameters") or {"rope_theta": values.get("rope_theta", 10000.0), "rope_type": "default"}
    if rope.get("rope_type", "default") != "default":
        raise _refused("rope_parameters.rope_type", rope["rope_type"], "must be 'default'")
    names = [f.name for f in dataclasses.fields(ModelConfig) if f.name not in ("rope_scaling", *GQA_FIELDS)]
    given = {name: values[name] for name in names if name in values}
    for field in dataclasses.fields(ModelConfig):
        if field.default is dataclasses.MISSING and field.name not in given:
            raise _refused(field.name, "missing", "must be given")
    return ModelConfig(**{**given, "rope_theta": float(rope["rope_theta"])})


def _refused(name: str, value: object, allowed: str) -> ArtifactError:
    """Return the error for a field of `config.json`."""
    return ArtifactError(f"config.json: {name}", value, allowed, "use a checkpoint that this package wrote")


def to_hf_state_dict(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return a decoder's state under the names on disk; tensors are views of the given ones where they can be."""
    out: dict[str, Tensor] = {}
    for name, tensor in state.items():
        match = STACKED.fullmatch(name)
        if match is None:
            out[name] = tensor
            continue
        for expert, weight in enumerate(tensor.unbind()):
            prefix = f"{match[1]}.{expert}"
            if match[2] == "down_proj":
                out[f"{prefix}.down_proj.weight"] = weight
            else:
                out[f"{prefix}.gate_proj.weight"], out[f"{prefix}.up_proj.weight"] = weight.chunk(2)
    return out


def from_hf_state_dict(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the decoder's state from tensors under their names on disk.

    Raises:
        ArtifactError: an expert of a layer is missing or has another shape than the first.
    """
    state: dict[str, Tensor] = {}
    experts: dict[str, dict[tuple[int, str], Tensor]] = {}
    for name, tensor in tensors.items():
        match = SINGLE.fullmatch(name)
        if match is None:
            state[name] = tensor
        else:
            experts.setdefault(match[1], {})[int(match[2]), match[3]] = tensor
    for prefix, weights in experts.items():
        count = 1 + max(expert for expert, _ in weights)
        for kind in ("gate", "up", "down"):
            for expert in range(count):
                _check_expert(prefix, expert, kind, weights)
        pairs = [torch.cat((weights[expert, "gate"], weights[expert, "up"])) for expert in range(count)]
        state[f"{prefix}.gate_up_proj"] = torch.stack(pairs)  # (E, 2 * I, D)
        state[f"{prefix}.down_proj"] = torch.stack([weights[expert, "down"] for expert in range(count)])  # (E, D, I)
    return state


def _check_expert(prefix: str, expert: int, kind: str, weights: Mapping[tuple[int, str], Tensor]) -> None:
    """Refuse a weight that is absent or shaped unlike the other experts'."""
    name = f"{prefix}.{expert}.{kind}_proj.weight"
    if (expert, kind) not in weights:
        raise ArtifactError(name, "missing", "must be in the checkpoint", "write the checkpoint again")
    found, first = tuple(weights[expert, kind].shape), next(iter(weights.values())).shape
    wanted = (first[1], first[0]) if (kind == "down") != (next(iter(weights))[1] == "down") else tuple(first)
    if found != wanted:
        raise ArtifactError(name, found, f"must have the shape {wanted}", "write the checkpoint again")
