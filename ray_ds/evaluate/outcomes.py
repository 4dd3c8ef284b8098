"""What came of each item: kept beside the report, so that two models are compared without a second run."""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass

import pyarrow as pa
from pyarrow import parquet

from ray_ds import storage
from ray_ds.artifacts import EvalReport
from ray_ds.errors import ArtifactError

OUTCOMES_FILE = "items.parquet"

_SCHEMA = pa.schema(
    {
        "task": pa.string(),
        "item": pa.string(),
        "asked": pa.string(),
        "right": pa.string(),
        "answer": pa.string(),
        "is_right": pa.bool_(),
        "is_cut": pa.bool_(),
        "is_finished": pa.bool_(),
        "nats": pa.list_(pa.float64()),
        "counts": pa.list_(pa.float64()),
    }
)


@dataclass(frozen=True, kw_only=True, slots=True)
class Outcome:
    """What came of one item."""

    task: str
    item: str
    """File and row."""
    asked: str
    """A hash of all that the model was asked and of what is right; equal in two reports where they can be compared."""
    right: str
    """The right choice, label or first right answer."""
    answer: str
    """What the model chose, or wrote."""
    is_right: bool | None
    """Whether it chose rightly, or wrote an exact match; None where neither is measured."""
    is_cut: bool
    """Whether the prompt lost its beginning."""
    is_finished: bool = True
    """Whether a written answer ended by itself rather than at `max_new_tokens`."""
    nats: tuple[float, ...] = ()
    """The log-probability of each choice, before length normalisation."""
    counts: tuple[float, ...] = ()
    """What a written answer adds to BLEU's sums."""


def write_outcomes(uri: str, outcomes: Sequence[Outcome]) -> None:
    """Write outcomes in order; equal ones give equal bytes."""
    rows = [dataclasses.asdict(outcome) for outcome in outcomes]
    sink = pa.BufferOutputStream()
    parquet.write_table(pa.Table.from_pylist(rows, schema=_SCHEMA), sink, compression="zstd")
    storage.write_bytes(uri, sink.getvalue())


def read_outcomes(report: EvalReport) -> dict[str, list[Outcome]]:
    """Return the outcomes of a report by task, in order.

    Raises:
        ArtifactError: the report has no tasks, or its file is damaged.
    """
    uri = report.path(OUTCOMES_FILE)
    if not storage.exists(uri):
        raise ArtifactError(
            report.uri, "no tasks", "must be a report of tasks", "evaluate with `tasks` in the settings"
        )
    try:
        table = parquet.read_table(pa.BufferReader(storage.read_bytes(uri)), schema=_SCHEMA)
    except (pa.ArrowException, OSError) as error:
        allowed = f"must hold the outcomes of items ({error})"
        raise ArtifactError(uri, "damaged", allowed, "restore it or evaluate again") from error
    by_task: dict[str, list[Outcome]] = {}
    for row in table.to_pylist():
        outcome = Outcome(**{**row, "nats": tuple(row["nats"]), "counts": tuple(row["counts"])})
        by_task.setdefault(outcome.task, []).append(outcome)
    return by_task
