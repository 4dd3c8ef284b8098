"""People's ratings of a model as rows of a report's table."""

from collections.abc import Iterator, Mapping
from typing import Any


def rating_rows(found: Mapping[str, Any]) -> Iterator[tuple[str, ...]]:
    """Yield a model's scores, how it stands against others, and how far each two raters agree."""
    raters = f"1 to 5; rated by {', '.join(found['raters'])}"
    for scale, own in found["scores"].items():
        yield "ratings", scale, *_figures(own, ".2f"), f"{found['prompts']:,} prompts", raters
    for digest, other in found["against"].items():
        task, prompts = f"ratings against {other['model_id']}", f"{other['prompts']:,} prompts"
        note = f"model {digest}; neither counts half"
        yield task, "preferred", *_figures(other["preferred"], ".2%"), prompts, note
        for scale, own in other["differences"].items():
            yield task, scale, *_figures(own, "+.2f"), prompts, "difference of scores"
    for agreement in found["agreement"]:
        task = f"agreement of {' and '.join(agreement['raters'])}"
        for name, own in agreement["kappas"].items():
            note = "Cohen's kappa" if name == "preferred" else "Cohen's kappa, quadratic weights"
            yield task, name, *_figures(own, ".2f"), f"{agreement['pairs']:,} pairs", note


def _figures(own: Mapping[str, float | None], form: str) -> tuple[str, str]:
    """Return a score and its interval; `-` where one is not known."""
    score, low, high = own["score"], own["low"], own["high"]
    interval = "-" if low is None or high is None else f"{low:{form}} to {high:{form}}"
    return "-" if score is None else f"{score:{form}}", interval
