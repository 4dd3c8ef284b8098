"""Ratings are read exactly as the page writes them; what is wrong is named by file, line and field."""

from pathlib import Path
from typing import Any

import pytest

from ray_ds.config.evaluate import EvaluateSettings
from ray_ds.errors import ConfigError, InputError
from ray_ds.evaluate.ratings import read_ratings
from ray_ds.evaluate.task_files import fingerprint_tasks
from tests.evaluate.rated import answer, rating, write_ratings


def test_files_are_read_in_order_whichever_side_an_answer_was_on(tmp_path: Path) -> None:
    swapped = rating(rater="bert", left=answer("b"), right=answer("a", fluency=5), preferred="right")
    write_ratings(tmp_path / "1.jsonl", rating())
    write_ratings(tmp_path / "2.jsonl", swapped)
    first, second = read_ratings(f"{tmp_path}/*.jsonl", "e.ratings")
    assert (first.rater, second.rater) == ("anna", "bert")
    assert first.pair == second.pair
    assert [own.model_digest for own in second.answers] == ["digest-a", "digest-b"]
    assert first.preferred_answer is first.left and second.preferred_answer is second.right
    assert second.right.fluency == 5


def changed(side: str, **fields: Any) -> dict[str, Any]:
    return rating(**{side: {**rating()[side], **fields}})


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (changed("left", logic=6), "2.left.logic (6) must be part of a rating as the page writes it: Input should be"),
        (changed("left", logic="4"), "2.left.logic (4) must be part"),
        (changed("right", accuracy=None), "2.right.accuracy (None) must be part"),
        (changed("right", more=1), "2.right.more (1) must be part of a rating as the page writes it: Extra inputs"),
        ({k: v for k, v in rating().items() if k != "seed"}, "2.seed (missing) must be part"),
        (rating(rater=" "), "2.rater ( ) must be part"),
        (rating(preferred="both"), "2.preferred (both) must be part"),
        (rating(prompt="a\ud800"), "must be part of a rating"),
        (
            rating(right=answer("a", text="other")),
            "right.model_digest (digest-a) must be another model's than the left",
        ),
        (
            rating(left=answer("b"), right=answer("a"), preferred="right"),
            "r.jsonl line 2 (rater anna) must rate these answers once, as in",
        ),
    ],
)
def test_a_wrong_line_is_named(tmp_path: Path, line: dict[str, Any], message: str) -> None:
    file = write_ratings(tmp_path / "r.jsonl", rating(), line)
    with pytest.raises(InputError) as caught:
        read_ratings(file, "e.ratings")
    assert message in str(caught.value)
    assert f"{file} line 2" in str(caught.value)


def test_files_without_ratings(tmp_path: Path) -> None:
    (tmp_path / "r.jsonl").write_text("\n")
    with pytest.raises(InputError, match=r"e\.ratings .* must hold a rating or more; it holds none"):
        read_ratings(str(tmp_path / "r.jsonl"), "e.ratings")
    with pytest.raises(InputError, match="matches none"):
        read_ratings(f"{tmp_path}/*.ndjson", "e.ratings")
    with pytest.raises(ConfigError, match="must be absolute"):
        read_ratings("r.jsonl", "e.ratings")


def test_ratings_are_a_source_of_the_report(tmp_path: Path) -> None:
    write_ratings(tmp_path / "r.jsonl", rating())
    settings = EvaluateSettings(seq_len=8, ratings="r.jsonl").with_root(str(tmp_path), where="e")
    (source,) = fingerprint_tasks(settings)
    assert (source.uri, source.source) == (str(tmp_path / "r.jsonl"), "ratings")
