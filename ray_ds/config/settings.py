"""How settings are declared, decoded from a recipe and digested."""

import dataclasses
import json
import typing
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Annotated, Any, TypeVar, dataclass_transform

import pydantic
from pydantic import ConfigDict, JsonValue, TypeAdapter

from ray_ds.errors import ConfigError

T = TypeVar("T")


class _OutputUnchanged:
    """The type of `OUTPUT_UNCHANGED`."""

    def __repr__(self) -> str:
        return "OUTPUT_UNCHANGED"


OUTPUT_UNCHANGED = _OutputUnchanged()
"""Marks a field that cannot change what a stage writes: `num_workers: Annotated[int, OUTPUT_UNCHANGED] = 2`."""


@dataclasses.dataclass(frozen=True)
class OutputUnchangedUnless:
    """Marks a field that can change what a stage writes only where another one of its class has a certain value.

    Of several such marks on a field, one that applies is enough.
    """

    field: str
    value: JsonValue


@dataclass_transform(frozen_default=True, kw_only_default=True)
def settings(cls: type[T]) -> type[T]:
    """Make `cls` a frozen, keyword-only dataclass that refuses unknown fields and knows its fields' docstrings."""
    cls.__pydantic_config__ = ConfigDict(extra="forbid", use_attribute_docstrings=True)  # type: ignore[attr-defined]
    return dataclasses.dataclass(frozen=True, kw_only=True)(cls)


def with_optional_fields_of(source: type[Any], *, without: Sequence[str]) -> Callable[[type[T]], type[T]]:
    """Return a decorator, to stand below `settings`, that gives a class another's fields, absent (None) by default.

    Args:
        source: a settings class; types and docstrings are its fields'.
        without: fields that are left out.
    """

    def add_fields(cls: type[T]) -> type[T]:
        hints, docs = typing.get_type_hints(source, include_extras=True), field_docs(source)
        for field in dataclasses.fields(source):
            if field.name not in without:
                parts = (hints[field.name] | None, pydantic.Field(description=docs[field.name]))
                cls.__annotations__[field.name] = Annotated.__class_getitem__(parts)  # type: ignore[attr-defined]
                setattr(cls, field.name, None)
        return cls

    return add_fields


def _adapter(cls: type[Any]) -> TypeAdapter[Any]:
    return TypeAdapter(cls)


def decode_settings(cls: type[T], raw: Mapping[str, Any], *, where: str) -> T:
    """Return `raw` (TOML or JSON values) as an instance of the settings class `cls`.

    Args:
        where: prefix of field names in errors, such as `demo.toml: pretrain`.
    Raises:
        ConfigError: a field is unknown, mistyped or breaks a rule between fields.
    """
    try:
        encoded = json.dumps(raw)
    except TypeError as error:
        raise ConfigError(where, raw, "must hold strings, numbers, booleans, lists and tables", str(error)) from error
    try:
        decoded: T = _adapter(cls).validate_json(encoded, strict=True)
    except pydantic.ValidationError as error:
        raise _config_error(cls, error, where) from error
    return decoded


def _config_error(cls: type[Any], error: pydantic.ValidationError, where: str) -> ConfigError:
    """Turn pydantic's first complaint into ours."""
    first = error.errors()[0]
    cause = first.get("ctx", {}).get("error")
    path = ".".join(str(part) for part in first["loc"])
    field = f"{where}.{path}" if path else where
    if isinstance(cause, ConfigError):
        return ConfigError(f"{field}.{cause.field}", cause.value, cause.allowed, cause.action)
    if first["type"] in ("unexpected_keyword_argument", "extra_forbidden"):
        known = _known_fields(cls, first["loc"])
        return ConfigError(field, first["input"], f"must be one of the known settings: {known}", "correct or remove it")
    if first["type"] in ("missing", "missing_argument", "missing_keyword_only_argument"):
        return ConfigError(field, "missing", "must be given", "add it to the recipe")
    allowed = first["msg"].removeprefix("Input should be ").removeprefix("Value error, ")
    return ConfigError(field, first["input"], f"must be {allowed}", "correct it in the recipe or on the command line")


def _known_fields(cls: type[Any], loc: tuple[int | str, ...]) -> str:
    """Name the fields of the dataclass in which `loc`'s last part was looked for."""
    here: Any = cls
    for part in loc[:-1]:
        hints = typing.get_type_hints(here) if dataclasses.is_dataclass(here) else {}
        here = next((t for t in _leaf_types(hints.get(str(part), here)) if dataclasses.is_dataclass(t)), here)
    if not dataclasses.is_dataclass(here):
        return "none"
    return ", ".join(field.name for field in dataclasses.fields(here))


def _leaf_types(hint: Any) -> Iterator[Any]:
    """Yield the classes a type hint is built from."""
    arguments = typing.get_args(hint)
    if not arguments:
        yield hint
    for argument in arguments:
        yield from _leaf_types(argument)


def as_json(value: Any) -> JsonValue:
    """Return settings (nested dataclasses, tuples) as JSON values."""
    encoded: JsonValue = json.loads(_adapter(type(value)).dump_json(value))
    return encoded


def digest_settings(value: Any) -> JsonValue:
    """Return the part of settings that can change a stage's output, as JSON values."""
    if dataclasses.is_dataclass(value):
        hints = typing.get_type_hints(type(value), include_extras=True)
        return {
            field.name: digest_settings(getattr(value, field.name))
            for field in dataclasses.fields(value)
            if not _is_left_out(getattr(hints[field.name], "__metadata__", ()), value)
        }
    if isinstance(value, (list, tuple)):
        return [digest_settings(item) for item in value]
    if isinstance(value, Mapping):
        return {str(key): digest_settings(item) for key, item in value.items()}
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    raise TypeError(f"settings hold {type(value).__name__}, which has no digest")


def _is_left_out(marks: Sequence[object], owner: Any) -> bool:
    """Tell whether a field's marks say that it cannot change the output of a stage with these settings."""
    conditions = [mark for mark in marks if isinstance(mark, OutputUnchangedUnless)]
    if conditions:
        return all(getattr(owner, condition.field) != condition.value for condition in conditions)
    return OUTPUT_UNCHANGED in marks


def fill_or_refuse(value: object, name: str, default: Any, *, unused: str | None) -> None:
    """Give a field that was left out (None) its default, or refuse one that was given to no effect.

    For `__post_init__`, which alone may change a frozen dataclass.

    Args:
        unused: why the field has no effect, such as "has no effect in a dense model"; None = it has one.
    Raises:
        ConfigError: it was given and has none.
    """
    given = getattr(value, name)
    if unused is None:
        object.__setattr__(value, name, default if given is None else given)
    elif given is not None:
        raise ConfigError(name, given, unused, "remove it")


def field_docs(cls: type[Any]) -> dict[str, str]:
    """Return the docstring under each field of a settings class, by field name."""
    schema = _adapter(cls).json_schema()
    properties: Mapping[str, Mapping[str, Any]] = schema.get("properties", {})
    return {name: " ".join(str(entry.get("description", "")).split()) for name, entry in properties.items()}
