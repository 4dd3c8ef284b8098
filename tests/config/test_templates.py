"""Templates take texts and numbers from items, also from lists and tables inside them, and say what is missing."""

import pytest

from ray_ds.config.templates import MissingValueError, check_template, fill_template

ITEM = {"q": "Why?", "n": 3, "x": 0.5, "options": ["a", "b"], "answers": {"text": ["c"]}, "none": None, "flag": True}


@pytest.mark.parametrize(
    ("template", "expected"),
    [
        ("{q} {n} {x}", "Why? 3 0.5"),
        ("A. {options[0]}\nB. {options[1]}", "A. a\nB. b"),
        ("{answers[text][0]}", "c"),
        ("{{q}} = {q}", "{q} = Why?"),
        ("plain", "plain"),
    ],
)
def test_places_are_filled(template: str, expected: str) -> None:
    check_template("prompt", template)
    assert fill_template(template, ITEM) == expected


@pytest.mark.parametrize(
    ("template", "place", "found", "allowed"),
    [
        ("{gone}", "gone", "missing", "must be one of the item's columns: q, n"),
        ("{none}", "none", "null", "must be text or a number"),
        ("{flag}", "flag", "bool", "must be text or a number"),
        ("{options}", "options", "list", "must be text or a number"),
        ("{options[2]}", "options[2]", "2 values", "must have a part 2"),
        ("{answers[label]}", "answers[label]", "dict", "must have a part label"),
    ],
)
def test_what_is_missing_is_named(template: str, place: str, found: str, allowed: str) -> None:
    with pytest.raises(MissingValueError) as caught:
        fill_template(template, ITEM)
    assert (caught.value.place, caught.value.found) == (place, found)
    assert caught.value.allowed.startswith(allowed)
