"""What the outcomes of a task's items add up to: accuracy, macro-F1, exact match and BLEU.

Every metric is a function of sums over items, so that one way of resampling serves them all: an item adds a row of
statistics, a resample adds up some rows, and the metric's formula turns sums into a score.
"""

import re
import string
import unicodedata
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ray_ds.config.tasks import TextStep
from ray_ds.evaluate.bleu import bleu_of_counts
from ray_ds.evaluate.outcomes import Outcome

Numbers = NDArray[np.float64]

PROPORTIONS = ("accuracy", "exact_match")
"""Metrics that are the share of items answered rightly."""


@dataclass(frozen=True, kw_only=True)
class Metric:
    """A metric over the items of one report, or of several."""

    statistics: tuple[Numbers, ...]
    """For each report (n, K): what its items add to the sums."""
    formula: Callable[[Numbers], Numbers]
    """From sums (R, K) to scores (R,)."""


def make_metric(name: str, *reports: Sequence[Outcome]) -> Metric:
    """Return a metric of the outcomes of the same items in one report or in several.

    Args:
        name: accuracy, macro_f1, exact_match or bleu.
    """
    if name in PROPORTIONS:
        shares = tuple(np.array([[own.is_right, 1.0] for own in report], np.float64) for report in reports)
        return Metric(statistics=shares, formula=lambda sums: np.asarray(sums[:, 0] / sums[:, 1]))
    if name == "bleu":
        return Metric(
            statistics=tuple(np.array([own.counts for own in report], np.float64) for report in reports),
            formula=lambda sums: np.array([bleu_of_counts(row) for row in sums]),
        )
    labels = sorted({label for report in reports for own in report for label in (own.right, own.answer)})
    return Metric(statistics=tuple(_label_counts(report, labels) for report in reports), formula=_macro_f1)


def _label_counts(report: Sequence[Outcome], labels: Sequence[str]) -> Numbers:
    """Return for each item (n, 3 * labels): where it is right, what is right, what was answered."""
    place = {label: i for i, label in enumerate(labels)}
    counts = np.zeros((len(report), 3, len(labels)))
    for i, own in enumerate(report):
        counts[i, 0, place[own.right]] = own.right == own.answer
        counts[i, 1, place[own.right]] = 1
        counts[i, 2, place[own.answer]] = 1
    return counts.reshape(len(report), -1)


def _macro_f1(sums: Numbers) -> Numbers:
    """Return the plain mean of F1 = 2 TP / (right + answered) over the labels that are right or answered somewhere.

    As scikit-learn's `f1_score(average="macro")`, which also leaves out labels that do not occur.
    """
    hits, right, answered = np.split(sums, 3, axis=1)
    total = right + answered
    occurs = total > 0
    f1 = np.divide(2 * hits, total, out=np.zeros_like(total), where=occurs)
    return np.asarray(f1.sum(axis=1) / occurs.sum(axis=1))


def guessing_accuracy(right: Sequence[str], num_choices: Sequence[int], *, same_labels: bool) -> float:
    """Return the accuracy of who knows nothing: always the commonest label, or any of an item's choices."""
    if same_labels:
        return max(right.count(label) for label in set(right)) / len(right)
    return float(np.mean([1 / count for count in num_choices]))


def matches(answer: str, references: Sequence[str], *, extract: str | None, normalise: Sequence[TextStep]) -> bool:
    """Tell whether an answer, or what `extract` last matches in it, is one of the right ones."""
    if extract is not None:
        found = list(re.finditer(extract, answer))
        if not found:
            return False
        answer = (found[-1][1] if found[-1].re.groups else found[-1][0]) or ""
    return normalise_text(answer, normalise) in {normalise_text(reference, normalise) for reference in references}


def normalise_text(text: str, steps: Sequence[TextStep]) -> str:
    """Return a text after some steps, in order.

    Source: the four are those of SQuAD's `normalize_answer` (arXiv 1606.05250), with all of Unicode's punctuation.
    """
    for step in steps:
        if step == "lower":
            text = text.lower()
        elif step == "punctuation":
            text = "".join(c for c in text if c not in string.punctuation and unicodedata.category(c)[0] != "P")
        elif step == "articles":
            text = re.sub(r"\b(a|an|the)\b", " ", text, flags=re.IGNORECASE)
        else:
            text = " ".join(text.split())
    return text
