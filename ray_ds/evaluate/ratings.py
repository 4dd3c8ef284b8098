"""Ratings by people, as the page's blind comparison writes them: a line of JSONL for each pair of answers rated."""

import json
from collections.abc import Sequence
from typing import Annotated, Literal

import pydantic
from pydantic import BaseModel, ConfigDict, Field

from ray_ds.errors import InputError
from ray_ds.evaluate.task_files import Item, find_task_files, read_file

SCALES = ("fluency", "logic", "accuracy")
MAX_SCORE = 5

Side = Literal["left", "right"]
Score = Annotated[int, Field(ge=1, le=MAX_SCORE)]


class _Record(BaseModel):
    """A JSON object with exactly these fields, of exactly these types."""

    model_config = ConfigDict(strict=True, frozen=True, extra="forbid", allow_inf_nan=False)


class RatedAnswer(_Record):
    """An answer, where it came from, which the rater was not told, and its scores from 1 (bad) to 5 (good)."""

    model_id: str
    model_digest: Annotated[str, Field(min_length=1)]
    """Of the artefact that holds the model: the checkpoint, or what was quantized from it."""
    endpoint_digest: str
    """Of the model together with the settings it was served with."""
    is_chat: bool
    """Whether the prompt was a user's message; else the answer goes on with it as a text."""
    text: str
    fluency: Score
    logic: Score
    accuracy: Score

    @property
    def identity(self) -> tuple[str, str]:
        """Return what is equal where two raters saw the same answer."""
        return self.model_digest, self.text


class Rating(_Record):
    """What one rater thought of two models' answers to a prompt."""

    rater: Annotated[str, Field(pattern=r"\S")]
    prompt: Annotated[str, Field(min_length=1)]
    seed: int
    temperature: Annotated[float, Field(ge=0)]
    max_tokens: Annotated[int, Field(ge=1)]
    left: RatedAnswer
    """Sides are drawn by lot for every rating."""
    right: RatedAnswer
    preferred: Literal["left", "right", "neither"]

    @property
    def answers(self) -> tuple[RatedAnswer, RatedAnswer]:
        """Return the two answers in an order that does not depend on the side they were shown on."""
        first, second = sorted((self.left, self.right), key=lambda answer: answer.identity)
        return first, second

    @property
    def pair(self) -> tuple[str, tuple[str, str], tuple[str, str]]:
        """Return what is equal where two raters rated the same: the prompt and the answers."""
        first, second = self.answers
        return self.prompt, first.identity, second.identity

    @property
    def preferred_answer(self) -> RatedAnswer | None:
        """Return the better answer; None where neither is."""
        return {"left": self.left, "right": self.right, "neither": None}[self.preferred]


def read_ratings(pattern: str, field: str) -> list[Rating]:
    """Return the ratings in the files that a pattern matches, in order of file and line.

    Args:
        field: the setting that holds the pattern, for messages.
    Raises:
        ConfigError: the pattern is relative.
        InputError: it matches no file, a line is no rating, compares a model with itself, or repeats what its rater
            has rated.
    """
    items = [item for uri in find_task_files(pattern, field) for item in read_file(uri)]
    if not items:
        raise InputError(field, pattern, "must hold a rating or more; it holds none", "check the files")
    ratings = [_parse(item) for item in items]
    _refuse_repeats(items, ratings)
    return ratings


def _parse(item: Item) -> Rating:
    try:
        rating = Rating.model_validate_json(json.dumps(item.values, default=str))
    except pydantic.ValidationError as error:
        first = error.errors(include_url=False)[0]
        place = ".".join((item.place, *map(str, first["loc"])))
        value = "missing" if first["type"] == "missing" else first["input"]
        allowed = f"must be part of a rating as the page writes it: {first['msg']}"
        raise InputError(place, value, allowed, "mend or remove the line") from error
    if rating.left.model_digest == rating.right.model_digest:
        allowed = "must be another model's than the left answer's"
        raise InputError(f"{item.place}.right.model_digest", rating.right.model_digest, allowed, "remove the line")
    return rating


def _refuse_repeats(items: Sequence[Item], ratings: Sequence[Rating]) -> None:
    """Refuse the same answers rated twice by one rater, as by a file that was given twice under two names."""
    seen: dict[tuple[object, ...], str] = {}
    for item, rating in zip(items, ratings, strict=True):
        earlier = seen.setdefault((rating.rater, *rating.pair), item.place)
        if earlier != item.place:
            allowed = f"must rate these answers once, as in {earlier}"
            raise InputError(item.place, f"rater {rating.rater}", allowed, "remove one of the two lines")
