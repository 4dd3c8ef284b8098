"""Texts with `{column}` in them, which the columns of a data set's items fill in."""

import re
from collections.abc import Mapping
from string import Formatter
from typing import Any

from ray_ds.errors import ConfigError

_PLACE = re.compile(r"([^\[\]{}.]+)((?:\[[^\[\]{}]+\])*)")
"""A column, and where it holds a list or a table, what to take of it: `options[0]`, `answers[text][0]`."""


class MissingValueError(Exception):
    """An item does not hold what a template asks for.

    Args:
        place: the column, as the template names it.
        found: what is there instead.
        allowed: a clause that starts with a verb.
    """

    def __init__(self, place: str, found: str, allowed: str) -> None:
        super().__init__(place, found, allowed)
        self.place = place
        self.found = found
        self.allowed = allowed


def check_template(field: str, template: str) -> None:
    """Refuse a template that no item could fill in; `{{` and `}}` stand for braces.

    Raises:
        ConfigError: a brace stands alone, or holds something else than a place in an item.
    """
    try:
        parts = list(Formatter().parse(template))
    except ValueError as error:
        allowed = f"must hold columns in braces, as in {{question}} ({error})"
        raise ConfigError(field, template, allowed, "write {{ and }} for braces that are text") from error
    for _, place, spec, conversion in parts:
        if place is None:
            continue
        if spec or conversion:
            raise ConfigError(field, template, "must not format what it holds", f"write {{{place}}}")
        check_place(field, place)


def check_place(field: str, place: str) -> None:
    """Refuse what is no place in an item, such as `answer` or `options[0]`.

    Raises:
        ConfigError: it is none.
    """
    if _PLACE.fullmatch(place) is None:
        allowed = "must name columns, with [n] or [name] for a part of one, as in options[0]"
        raise ConfigError(field, place or "{}", allowed, "name a column of the files")


def fill_template(template: str, item: Mapping[str, Any]) -> str:
    """Return a checked template with an item's values in it.

    Raises:
        MissingValueError: a place is absent, or holds neither text nor a number.
    """
    filled: list[str] = []
    for text, place, _, _ in Formatter().parse(template):
        filled.append(text)
        if place is not None:
            filled.append(text_at(item, place))
    return "".join(filled)


def text_at(item: Mapping[str, Any], place: str) -> str:
    """Return the text or number at a place.

    Raises:
        MissingValueError: there is none.
    """
    return as_text(value_at(item, place), place)


def as_text(value: object, place: str) -> str:
    """Return a text as it is and a number as JSON writes it.

    Raises:
        MissingValueError: it is neither.
    """
    if isinstance(value, str):
        return value
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        return str(value)
    raise MissingValueError(place, "null" if value is None else type(value).__name__, "must be text or a number")


def value_at(item: Mapping[str, Any], place: str) -> Any:
    """Return what is at a place.

    Raises:
        MissingValueError: the column or the part is absent.
    """
    found = _PLACE.fullmatch(place)
    assert found is not None, f"{place} was not checked"
    column, parts = found[1], re.findall(r"\[([^\[\]]+)\]", found[2])
    if column not in item:
        raise MissingValueError(place, "missing", f"must be one of the item's columns: {', '.join(item) or 'none'}")
    value: Any = item[column]
    for part in parts:
        if isinstance(value, list) and part.isdigit() and int(part) < len(value):
            value = value[int(part)]
        elif isinstance(value, dict) and part in value:
            value = value[part]
        else:
            held = f"{len(value)} values" if isinstance(value, list) else type(value).__name__
            raise MissingValueError(place, held, f"must have a part {part}")
    return value
