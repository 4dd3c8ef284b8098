"""Two models on the same items, from the outcomes that their reports keep."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from ray_ds.artifacts import EvalReport
from ray_ds.errors import ArtifactError
from ray_ds.evaluate.intervals import bootstrap, mcnemar, permutation_test
from ray_ds.evaluate.metrics import PROPORTIONS, make_metric
from ray_ds.evaluate.outcomes import Outcome, read_outcomes


@dataclass(frozen=True, kw_only=True, slots=True)
class Difference:
    """How a metric of the second report differs from the first's."""

    task: str
    metric: str
    items: int
    first: float
    second: float
    low: float
    """Of the 95 % interval of second - first, by paired bootstrap."""
    high: float
    p_value: float
    """How likely a difference as large would be if the models were equally good."""
    test: str
    """`mcnemar` (exact) for shares of right answers, `permutation` for the other metrics."""


def compare_reports(first: EvalReport, second: EvalReport) -> list[Difference]:
    """Return the differences in every metric of the tasks that both reports have.

    Raises:
        ArtifactError: a report has no tasks, they share none, or a task was asked otherwise or with other items.
    """
    outcomes = read_outcomes(first), read_outcomes(second)
    shared = [task for task in outcomes[0] if task in outcomes[1]]
    if not shared:
        allowed = f"must share a task with {first.uri}: {', '.join(outcomes[0])}"
        raise ArtifactError(second.uri, ", ".join(outcomes[1]), allowed, "evaluate both with the same tasks")
    found: list[Difference] = []
    for task in shared:
        pair = outcomes[0][task], outcomes[1][task]
        _check_same_items(task, pair, second.uri)
        seed = int(second.fact("tasks", task, "seed"))
        both = [name for name in first.fact("tasks", task, "scores") if name in second.fact("tasks", task, "scores")]
        found += [compare_outcomes(name, *pair, seed=seed) for name in both]
    return found


def compare_outcomes(metric: str, first: Sequence[Outcome], second: Sequence[Outcome], *, seed: int) -> Difference:
    """Return the difference in one metric between outcomes of the same items in the same order."""
    measured = make_metric(metric, first, second)
    scores = [float(measured.formula(statistics.sum(axis=0)[None])[0]) for statistics in measured.statistics]
    low, high = bootstrap(measured, seed)
    if metric in PROPORTIONS:
        right = [np.array([own.is_right for own in outcomes]) for outcomes in (first, second)]
        test, p_value = "mcnemar", mcnemar(*right)
    else:
        test, p_value = "permutation", permutation_test(measured, seed)
    return Difference(
        task=first[0].task,
        metric=metric,
        items=len(first),
        first=scores[0],
        second=scores[1],
        low=low,
        high=high,
        p_value=p_value,
        test=test,
    )


def _check_same_items(task: str, pair: tuple[Sequence[Outcome], Sequence[Outcome]], uri: str) -> None:
    """Refuse outcomes of other items, or of items asked otherwise."""
    first, second = pair
    action = "evaluate both models with the same tasks and files"
    if len(first) != len(second):
        field = f"{uri}: task {task}"
        raise ArtifactError(field, f"{len(second)} items", f"must have the {len(first)} of the first report", action)
    for one, other in zip(first, second, strict=True):
        if one.asked != other.asked:
            field = f"{uri}: task {task}, item {other.item}"
            raise ArtifactError(field, other.asked, f"must be asked as in the first report ({one.asked})", action)
