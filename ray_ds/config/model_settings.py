"""The model of a recipe: a preset, and what is to differ from it."""

import dataclasses
from typing import Any

from ray_ds.config.model import EXPERT_FIELDS, GQA_FIELDS, MLA_FIELDS, ModelConfig
from ray_ds.config.presets import PRESETS
from ray_ds.config.settings import settings, with_optional_fields_of
from ray_ds.errors import ConfigError

DEFAULTS = {field.name: field.default for field in dataclasses.fields(ModelConfig)}


@settings
@with_optional_fields_of(ModelConfig, without=("vocab_size", "max_position_embeddings"))
class ModelSettings:
    """A preset, and what is to differ from it: any field of `ModelConfig`, absent where it is the preset's.

    The vocabulary is the tokenizer's and the length that of training.
    """

    preset: str
    """Name of the model to start from, one of `ray_ds/config/presets.py`; every other field is absent, or replaces the
    preset's."""

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
        given = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        given = {name: value for name, value in given.items() if value is not None and name != "preset"}
        changes = {**_left_behind(preset, given), **given}
        changes |= {"vocab_size": vocab_size, "max_position_embeddings": max_position_embeddings}
        if given.get("q_lora_rank") == 0:
            changes["q_lora_rank"] = None
        config = dataclasses.replace(preset, **changes)
        if config.first_k_dense_replace == 0 and "intermediate_size" in given:
            allowed = "has no effect while first_k_dense_replace is 0"
            raise ConfigError("intermediate_size", given["intermediate_size"], allowed, "remove it")
        return config


def _left_behind(preset: ModelConfig, given: dict[str, Any]) -> dict[str, Any]:
    """Return the values of fields that a preset loses with its experts or its kind of attention.

    Raises:
        ConfigError: a field of an expert is given for a dense model.
    """
    changes: dict[str, Any] = {}
    if given.get("n_routed_experts", preset.n_routed_experts) == 0:
        for name in EXPERT_FIELDS:
            if name in given:
                raise ConfigError(name, given[name], "has no effect in a dense model", "remove it, or add experts")
            changes[name] = DEFAULTS[name]
        changes["first_k_dense_replace"] = given.get("num_hidden_layers", preset.num_hidden_layers)
    attention = given.get("attention", preset.attention)
    if attention != preset.attention:
        lost = MLA_FIELDS if attention == "gqa" else GQA_FIELDS
        changes |= {name: DEFAULTS[name] for name in lost}
    return changes
