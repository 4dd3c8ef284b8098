"""Scores and comparisons as rows of tables for people."""

from collections.abc import Iterator, Mapping, Sequence
from statistics import NormalDist
from typing import Any

from ray_ds.artifacts import EvalReport, open_artifact
from ray_ds.errors import ConfigError
from ray_ds.evaluate.comparison import Difference, compare_reports
from ray_ds.evaluate.intervals import CONFIDENCE
from ray_ds.evaluate.rating_tables import rating_rows
from ray_ds.logs import table_lines

SIGNIFICANCE = 0.05
"""A p-value below it says which model is better."""
Z = NormalDist().inv_cdf(0.5 + CONFIDENCE / 2)
"""Standard errors from a score to either end of its interval."""


def scores_lines(uris: Sequence[str]) -> list[str]:
    """Return what one EvalReport found, or how a second differs from a first on the same items.

    Raises:
        ConfigError: there are more than two.
        ArtifactError: one is no finished report, or they cannot be compared.
    """
    if len(uris) > 2:
        raise ConfigError("reports", f"{len(uris)} of them", "must be one or two", "name two to compare them")
    reports = [open_artifact(uri.rstrip("/"), [EvalReport]) for uri in uris]
    if len(reports) == 1:
        return table_lines(report_rows(reports[0].manifest.facts))
    named = [(name, report.uri) for name, report in zip(("first", "second"), reports, strict=True)]
    return [*table_lines(named), "", *table_lines(difference_rows(compare_reports(*reports)))]


def report_rows(facts: Mapping[str, Any]) -> list[tuple[str, ...]]:
    """Return the figures of an EvalReport's facts: a row a metric, the first with the columns' names."""
    rows: list[tuple[str, ...]] = [("task", "metric", "score", "95 % interval", "items", "note")]
    for name in ("perplexity", "bits_per_byte"):
        rows.append(("validation", name, f"{facts[name]:.4g}", "-", f"{facts['tokens']:,} tokens", ""))
    for task, found in facts.get("tasks", {}).items():
        for metric, own in found["scores"].items():
            interval = f"{_figure(own['low'], metric)} to {_figure(own['high'], metric)}"
            notes = [own["how"], _count(found["shots"], "shot"), "chat" * found.get("chat", False), *_warnings(found)]
            if metric == "accuracy":
                notes.append(f"guessing {_figure(found['guessing_accuracy'], metric)}")
            note = "; ".join(filter(None, notes))
            rows.append((task, metric, _figure(own["score"], metric), interval, f"{found['items']:,}", note))
    if "lm_eval" in facts:
        rows += _lm_eval_rows(facts["lm_eval"])
    if "ratings" in facts:
        rows += rating_rows(facts["ratings"])
    return rows


def _lm_eval_rows(found: Mapping[str, Any]) -> Iterator[tuple[str, ...]]:
    """Yield the scores of lm-evaluation-harness as it gives them; intervals follow from its standard errors.

    How many prompts lost their beginning is known only of all its tasks together.
    """
    cut = _count(found["cut"], "prompt")
    for task, own in found["tasks"].items():
        for metric, score in own["scores"].items():
            value, stderr = score["score"], score["stderr"]
            interval = "-" if stderr is None else f"{value - Z * stderr:.4g} to {value + Z * stderr:.4g}"
            items = "-" if own["items"] is None else f"{own['items']:,}"
            shots, chat = _count(own["shots"] or 0, "shot"), "chat" * found.get("chat", False)
            notes = [f"lm_eval {found['version']}", shots, chat, cut and f"{cut} cut in all"]
            note = "; ".join(filter(None, notes))
            yield task, metric, f"{value:.4g}", interval, items, note


def _warnings(found: Mapping[str, Any]) -> list[str]:
    """Return what makes a task's scores less than they seem."""
    cut, unfinished = _count(found["cut"], "prompt"), _count(found.get("unfinished", 0), "answer")
    return [
        *([f"{cut} cut on the left"] if cut else []),
        *([f"{unfinished} broken off at max_new_tokens"] if unfinished else []),
    ]


def _count(number: int, name: str) -> str:
    """Return `3 shots`, `1 shot`, or nothing for 0."""
    return f"{number:,} {name}{'s' if number > 1 else ''}" if number else ""


def difference_rows(differences: Sequence[Difference]) -> list[tuple[str, ...]]:
    """Return a comparison: a row a metric, the first with the columns' names.

    Shares differ by percentage points. Who is better is said where chance alone would show as large a difference in
    less than 5 % of comparisons; of many rows, one in twenty says so by chance.
    """
    rows: list[tuple[str, ...]] = [
        ("task", "metric", "items", "first", "second", "second - first", "95 % interval", "p", "better", "test")
    ]
    for own in differences:
        scale, unit = (1, "") if own.metric == "bleu" else (100, " points")
        change, low, high = (f"{scale * value:+.2f}" for value in (own.second - own.first, own.low, own.high))
        better = "not clear"
        if own.p_value < SIGNIFICANCE:
            better = "second" if own.second > own.first else "first"
        rows.append(
            (
                own.task,
                own.metric,
                f"{own.items:,}",
                _figure(own.first, own.metric),
                _figure(own.second, own.metric),
                change + unit,
                f"{low} to {high}",
                f"{own.p_value:.2g}",
                better,
                own.test,
            )
        )
    return rows


def _figure(value: float, metric: str) -> str:
    """Return a score; shares as percentages, BLEU as it is."""
    return f"{value:.2f}" if metric == "bleu" else f"{value:.2%}"
