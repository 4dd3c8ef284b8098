"""What a report says of ratings, worked out by hand."""

from typing import Any

import pytest

from ray_ds.errors import InputError
from ray_ds.evaluate.rating_scores import summarise_ratings
from ray_ds.evaluate.rating_tables import rating_rows
from ray_ds.evaluate.ratings import Rating
from tests.evaluate.rated import answer, rating


def made(**changes: Any) -> Rating:
    return Rating.model_validate(rating(**changes), strict=False)


def ratings() -> list[Rating]:
    """Of a against b by two raters, who see them on different sides, and of a against c; b against c is no matter."""
    return [
        made(prompt="p", left=answer("a", fluency=5), right=answer("b", fluency=2), preferred="left"),
        made(prompt="q", left=answer("b", fluency=4), right=answer("a", fluency=3), preferred="neither"),
        made(
            rater="bert", prompt="p", left=answer("b", fluency=2), right=answer("a", fluency=5), preferred="right"
        ),
        made(rater="bert", prompt="q", left=answer("a", fluency=3), right=answer("b", fluency=5), preferred="right"),
        made(prompt="r", left=answer("c"), right=answer("a", fluency=1), preferred="left"),
        made(prompt="p", left=answer("c", fluency=1), right=answer("b", fluency=1)),
    ]  # fmt: skip


def test_scores_come_from_the_model_and_not_from_its_side() -> None:
    found = summarise_ratings(ratings(), "digest-a", "e.ratings")
    assert (found["ratings"], found["prompts"], found["raters"]) == (5, 3, ["anna", "bert"])
    fluency = found["scores"]["fluency"]
    assert fluency["score"] == pytest.approx((5 + 3 + 5 + 3 + 1) / 5)
    assert 1 <= fluency["low"] < fluency["score"] < fluency["high"] <= 5
    assert found["scores"]["accuracy"] == {"score": 2.0, "low": 2.0, "high": 2.0}


def test_how_the_model_stands_against_each_other() -> None:
    against = summarise_ratings(ratings(), "digest-a", "e.ratings")["against"]
    assert set(against) == {"digest-b", "digest-c"}
    b, c = against["digest-b"], against["digest-c"]
    assert b["preferred"]["score"] == pytest.approx((1 + 0.5 + 1 + 0) / 4)
    assert b["differences"]["fluency"]["score"] == pytest.approx((3 - 1 + 3 - 2) / 4)
    assert c["preferred"] == {"score": 0.0, "low": None, "high": None}
    mirrored = summarise_ratings(ratings(), "digest-b", "e.ratings")["against"]["digest-a"]
    assert mirrored["preferred"]["score"] == pytest.approx(1 - b["preferred"]["score"])


def test_raters_agree_on_what_both_have_rated() -> None:
    (found,) = summarise_ratings(ratings(), "digest-a", "e.ratings")["agreement"]
    assert (found["raters"], found["pairs"]) == (["anna", "bert"], 2)
    # Fluency of p's and q's answers: anna 5 2 3 4, bert 5 2 3 5. Squares by chance: the mean over all 16 combinations.
    chance = sum((x - y) ** 2 for x in (5, 2, 3, 4) for y in (5, 2, 3, 5)) / 16
    assert found["kappas"]["fluency"]["score"] == pytest.approx(1 - (1 / 4) / chance)
    # Preferred: anna a, neither; bert a, b: half is the same, and a quarter would be by chance.
    assert found["kappas"]["preferred"]["score"] == pytest.approx((0.5 - 0.25) / (1 - 0.25))
    assert found["kappas"]["accuracy"]["score"] is None


def test_ratings_of_other_models_are_refused() -> None:
    message = r"e\.ratings \(digests digest-a, digest-b, digest-c\) must hold ratings of the model .* digest digest-z"
    with pytest.raises(InputError, match=message):
        summarise_ratings(ratings(), "digest-z", "e.ratings")


def test_the_rows_of_the_table() -> None:
    rows = list(rating_rows(summarise_ratings(ratings(), "digest-a", "e.ratings")))
    assert rows[0][:3] == ("ratings", "fluency", "3.40")
    assert rows[0][4:] == ("3 prompts", "1 to 5; rated by anna, bert")
    note = "model digest-b; neither counts half"
    preferred = next(row for row in rows if row[1] == "preferred")
    assert preferred[:3] == ("ratings against team/b", "preferred", "62.50%") and preferred[5] == note
    assert ("agreement of anna and bert", "accuracy", "-", "-", "2 pairs", "Cohen's kappa, quadratic weights") in rows
