"""What ratings say of a model: its scores, how it stands against others, and whether the raters agree."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations

import numpy as np
from pydantic import JsonValue

from ray_ds.errors import InputError
from ray_ds.evaluate.agreement import kappa_metric
from ray_ds.evaluate.clusters import mean_metric, score_of
from ray_ds.evaluate.ratings import MAX_SCORE, SCALES, RatedAnswer, Rating

SEED = 0
"""Of resampling."""


@dataclass(frozen=True, slots=True)
class _Duel:
    """A rating seen from one of its models."""

    rating: Rating
    own: RatedAnswer
    other: RatedAnswer

    @property
    def points(self) -> float:
        """Return 1 for a preferred answer, a half where neither is."""
        preferred = self.rating.preferred_answer
        return 0.5 if preferred is None else float(preferred is self.own)


def summarise_ratings(ratings: Sequence[Rating], model_digest: str, field: str) -> dict[str, JsonValue]:
    """Return what a report says of a model's ratings. Prompts are what is resampled for intervals.

    Args:
        model_digest: of the artefact that holds the model; ratings of other models are left out.
        field: the setting that names the ratings, for messages.
    Raises:
        InputError: none is of this model.
    """
    duels = [duel for rating in ratings for duel in _duels(rating) if duel.own.model_digest == model_digest]
    if not duels:
        found = sorted({answer.model_digest for rating in ratings for answer in rating.answers})
        allowed = f"must hold ratings of the model that is evaluated, digest {model_digest}"
        raise InputError(field, f"digests {', '.join(found)}", allowed, "rate this model's answers, or leave it out")
    prompts = [duel.rating.prompt for duel in duels]
    opponents = dict.fromkeys(duel.other.model_digest for duel in duels)
    return {
        "ratings": len(duels),
        "prompts": len(set(prompts)),
        "raters": [*sorted({duel.rating.rater for duel in duels})],
        "seed": SEED,
        "scores": {
            scale: score_of(mean_metric([getattr(duel.own, scale) for duel in duels], prompts), SEED)
            for scale in SCALES
        },
        "against": {
            digest: _compare([duel for duel in duels if duel.other.model_digest == digest]) for digest in opponents
        },
        "agreement": _agreements([duel.rating for duel in duels]),
    }


def _duels(rating: Rating) -> tuple[_Duel, _Duel]:
    return _Duel(rating, rating.left, rating.right), _Duel(rating, rating.right, rating.left)


def _compare(duels: Sequence[_Duel]) -> dict[str, JsonValue]:
    """Return how a model stands against one other: how often it is preferred, and its scores less the other's."""
    prompts = [duel.rating.prompt for duel in duels]
    differences = {
        scale: [float(getattr(duel.own, scale) - getattr(duel.other, scale)) for duel in duels] for scale in SCALES
    }
    return {
        "model_id": duels[0].other.model_id,
        "ratings": len(duels),
        "prompts": len(set(prompts)),
        "preferred": score_of(mean_metric([duel.points for duel in duels], prompts), SEED),
        "differences": {scale: score_of(mean_metric(values, prompts), SEED) for scale, values in differences.items()},
    }


def _agreements(ratings: Sequence[Rating]) -> list[JsonValue]:
    """Return the agreement of each two raters who rated some of the same answers."""
    by_rater: dict[str, dict[object, Rating]] = {}
    for rating in ratings:
        by_rater.setdefault(rating.rater, {})[rating.pair] = rating
    found: list[JsonValue] = []
    for first, second in combinations(sorted(by_rater), 2):
        both = [(own, by_rater[second][pair]) for pair, own in by_rater[first].items() if pair in by_rater[second]]
        if both:
            kappas: Mapping[str, JsonValue] = {scale: _scale_kappa(both, scale) for scale in SCALES}
            agreement = {**kappas, "preferred": _preference_kappa(both)}
            found.append({"raters": [first, second], "pairs": len(both), "kappas": agreement})
    return found


def _scale_kappa(both: Sequence[tuple[Rating, Rating]], scale: str) -> dict[str, JsonValue]:
    """Return the kappa, with quadratic weights, of two raters' scores of both answers of each pair."""
    first, second = (
        np.array([getattr(answer, scale) - 1 for pair in both for answer in pair[rater].answers]) for rater in (0, 1)
    )
    prompts = [own.prompt for own, _ in both for _ in own.answers]
    return score_of(kappa_metric(first, second, prompts, num_values=MAX_SCORE, is_scale=True), SEED)


def _preference_kappa(both: Sequence[tuple[Rating, Rating]]) -> dict[str, JsonValue]:
    """Return the plain kappa of which answer two raters preferred: the first, the second or neither."""
    first, second = (np.array([_preference(pair[rater]) for pair in both]) for rater in (0, 1))
    prompts = [own.prompt for own, _ in both]
    return score_of(kappa_metric(first, second, prompts, num_values=3, is_scale=False), SEED)


def _preference(rating: Rating) -> int:
    preferred = rating.preferred_answer
    return 2 if preferred is None else [answer is preferred for answer in rating.answers].index(True)
