"""Asking a `config.json` field by field, so that what it asks of a decoder is either understood or refused."""

from collections.abc import Mapping
from typing import Any, TypeVar, cast

from ray_ds.errors import ArtifactError

T = TypeVar("T", bool, int, float, str)

CONFIG_FILE = "config.json"
WITHOUT_EFFECT = frozenset(
    {
        "_name_or_path",
        "architectures",
        "attention_dropout",
        "auto_map",
        "aux_loss_alpha",
        "bos_token_id",
        "chunk_size_feed_forward",
        "dtype",
        "eos_token_id",
        "ep_size",
        "head_dim",
        "id2label",
        "initializer_range",
        "is_decoder",
        "is_encoder_decoder",
        "label2id",
        "max_window_layers",
        "model_type",
        "output_attentions",
        "output_hidden_states",
        "output_router_logits",
        "pad_token_id",
        "pretraining_tp",
        "problem_type",
        "qk_head_dim",
        "quantization_config",
        "return_dict",
        "rope_parameters",
        "rope_scaling",
        "rope_theta",
        "router_aux_loss_coef",
        "seq_aux",
        "sliding_window",
        "tokenizer_class",
        "torch_dtype",
        "transformers_version",
        "use_cache",
    }
)
"""Fields that say nothing about what a decoder computes, or that are read elsewhere than by a family."""


class Fields:
    """The fields of a `config.json`."""

    def __init__(self, values: Mapping[str, Any]) -> None:
        self._values = values
        self._asked: set[str] = set(WITHOUT_EFFECT)

    def get(self, name: str, kind: type[T], default: T | None = None) -> T:
        """Return a field; null counts as absent.

        Args:
            kind: what it must be; a whole number is a float too.
            default: what an absent one means to transformers; None = it must be given.
        Raises:
            ArtifactError: it is absent without a default, or of another type.
        """
        value = self.optional(name, kind)
        if value is None and default is None:
            raise refused(name, "missing", "must be given")
        return cast(T, default if value is None else value)

    def optional(self, name: str, kind: type[T]) -> T | None:
        """Return a field, or None where it is absent or null.

        Raises:
            ArtifactError: it is of another type.
        """
        self._asked.add(name)
        value = self._values.get(name)
        if kind is float and isinstance(value, int) and not isinstance(value, bool):
            value = float(value)
        if value is not None and (not isinstance(value, kind) or (kind is not bool and isinstance(value, bool))):
            raise refused(name, value, f"must be of type {kind.__name__}")
        return value

    def must_be(self, name: str, *allowed: object, why: str = "") -> None:
        """Refuse a field that has another value than these; an absent one has the first.

        Raises:
            ArtifactError: it has.
        """
        self._asked.add(name)
        value = self._values.get(name)
        if value is not None and value not in allowed:
            choices = " or ".join(repr(choice) for choice in allowed)
            raise refused(name, value, f"must be {choices}" + (f": {why}" if why else ""))

    def raw(self, name: str) -> Any:
        """Return a field as it is, or None."""
        self._asked.add(name)
        return self._values.get(name)

    def unasked(self) -> dict[str, Any]:
        """Return the fields that nobody asked for and that say something: neither null nor false."""
        return {name: value for name, value in self._values.items() if name not in self._asked and value}


def refused(name: str, value: object, allowed: str) -> ArtifactError:
    """Return the error for a field of `config.json`."""
    action = "use a folder of a DeepSeek-V2, DeepSeek-V3, Llama, Qwen2 or Qwen3 model without this"
    return ArtifactError(f"{CONFIG_FILE}: {name}", value, allowed, action)
