"""Rotary scaling in a `config.json`: `rope_parameters` since transformers 5, `rope_scaling` before."""

import dataclasses
from typing import Any

from ray_ds.config.model import ModelConfig
from ray_ds.config.rope import LinearRope, Llama3Rope, RopeScaling, Yarn
from ray_ds.errors import ConfigError
from ray_ds.model.hugging_face.fields import Fields, refused

DEFAULT_THETA = 10000.0
"""What transformers takes where a config gives no base."""
KINDS: dict[str, type[Yarn] | type[Llama3Rope] | type[LinearRope]] = {
    "yarn": Yarn,
    "llama3": Llama3Rope,
    "linear": LinearRope,
}
SHARED_KEYS = ("type", "rope_type", "rope_theta", "partial_rotary_factor", "truncate")


def read_rope(fields: Fields, max_position_embeddings: int) -> tuple[float, RopeScaling | None]:
    """Return the base of the rotary frequencies and how they are stretched.

    Raises:
        ArtifactError: it is a kind or a field that this decoder does not have.
    """
    fields.must_be("partial_rotary_factor", 1.0)
    name = "rope_scaling" if fields.raw("rope_scaling") else "rope_parameters"
    table: dict[str, Any] = dict(fields.raw(name) or {})
    theta = table.get("rope_theta") or fields.get("rope_theta", float, DEFAULT_THETA)
    kind = table.get("rope_type") or table.get("type") or "default"
    for key, only in (("partial_rotary_factor", 1.0), ("truncate", True)):
        if table.get(key, only) != only:
            raise refused(f"{name}.{key}", table[key], f"must be {only}")
    given = {key: value for key, value in table.items() if key not in SHARED_KEYS and value is not None}
    if kind not in ("default", *KINDS):
        raise refused(f"{name}.rope_type", kind, f"must be one of default, {', '.join(KINDS)}")
    known = [field.name for field in dataclasses.fields(KINDS[kind])] if kind != "default" else []
    for key, value in given.items():
        if key not in known:
            raise refused(f"{name}.{key}", value, f"must not be given for rope_type {kind}")
    if kind == "default":
        return float(theta), None
    if "original_max_position_embeddings" in known:
        given.setdefault("original_max_position_embeddings", max_position_embeddings)
    if kind == "yarn":
        given.setdefault("factor", max_position_embeddings / given["original_max_position_embeddings"])
    return float(theta), _build(KINDS[kind], kind, given, name)


def _build(cls: Any, kind: str, given: dict[str, Any], name: str) -> RopeScaling:
    """Return the settings of one kind; numbers are floats but for lengths."""
    for field in dataclasses.fields(cls):
        if field.name not in given and field.default is dataclasses.MISSING and field.name != "kind":
            raise refused(f"{name}.{field.name}", "missing", f"must be given for rope_type {kind}")
    for key, value in given.items():
        if not isinstance(value, (int, float)) or isinstance(value, bool):
            raise refused(f"{name}.{key}", value, "must be a number")
    lengths = ("original_max_position_embeddings",)
    values = {key: int(value) if key in lengths else float(value) for key, value in given.items()}
    try:
        scaling: RopeScaling = cls(kind=kind, **values)
    except ConfigError as error:
        raise refused(error.field, error.value, error.allowed) from error
    return scaling


def write_rope(config: ModelConfig) -> dict[str, Any]:
    """Return the rotary fields of a `config.json`, for transformers 5 and for programs that know the older fields."""
    table: dict[str, Any] = {"rope_theta": config.rope_theta, "rope_type": "default"}
    fields: dict[str, Any] = {"rope_theta": config.rope_theta, "rope_parameters": table}
    if config.rope_scaling is not None:
        values = dataclasses.asdict(config.rope_scaling)
        kind = values.pop("kind")
        table |= {key: value for key, value in values.items() if value is not None} | {"rope_type": kind}
        # DeepSeek's own code reads `type`, Llama's `rope_type`.
        fields["rope_scaling"] = {**table, "type": kind}
        del fields["rope_scaling"]["rope_theta"]
    return fields
