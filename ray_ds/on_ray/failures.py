"""What lost workers cost: they are replaced a bounded number of times, on Ray Train's hook for that (Ray 2.60)."""

import logging
from typing import Any

import ray
from pydantic import JsonValue
from ray.exceptions import RayError
from ray.train import ControllerError, FailureConfig, WorkerGroupError
from ray.train.v2._internal.exceptions import (
    WorkerGroupStartupFailedError,
    WorkerGroupStartupTimeoutError,
    WorkerHealthCheckTimeoutError,
)
from ray.train.v2._internal.execution.failure_handling import FailureDecision
from ray.train.v2._internal.execution.failure_handling.default import DefaultFailurePolicy

from ray_ds.on_ray.outcome import headline

NOT_STARTED = (WorkerGroupStartupFailedError, WorkerGroupStartupTimeoutError)
"""What Ray Train raises where a worker died as its group started, or the group's resources did not come in time."""
BOARD_TIMEOUT_S = 30.0

logger = logging.getLogger("ray.train")


class BoundedFailurePolicy(DefaultFailurePolicy):  # type: ignore[misc, unused-ignore]
    """Replaces lost workers at most `max_failures` times without a step further in between.

    So it is whatever the loss was: workers that failed, a node that a cloud took back, a group that did not start. A
    run gets over any number of them as long as it gets on.

    Args:
        board: the run's notice board, which counts.
    """

    def __init__(self, max_failures: int, board: Any) -> None:
        super().__init__(FailureConfig(max_failures=-1))
        self._max_failures = max_failures
        self._board = board

    def make_decision(self, training_failed_error: Any) -> FailureDecision:
        """Note what was lost on the board; end the run at what is tried in vain, or was tried too often."""
        decision = super().make_decision(training_failed_error)
        if decision is not FailureDecision.RETRY:
            return decision
        try:
            answer = self._board.fail.remote({"errors": what_failed(training_failed_error)})
            in_a_row: int = ray.get(answer, timeout=BOARD_TIMEOUT_S)
        except RayError as error:
            logger.warning("a loss of workers is not counted: %s", headline(error))
            return decision
        return FailureDecision.RAISE if in_a_row > self._max_failures else decision


def what_failed(error: Any) -> dict[str, JsonValue]:
    """Return an error of Ray Train in lines: by rank where workers failed."""
    if isinstance(error, WorkerGroupError):
        return {str(rank): headline(failure) for rank, failure in error.worker_failures.items()}
    if isinstance(error, ControllerError):
        return {"start": headline(error.controller_failure)}
    return {"group": headline(error)}


def is_lost_group(error: Exception | None) -> bool:
    """Tell whether a run ended because its last group did not start or fell silent, by Ray's private errors."""
    if isinstance(error, WorkerGroupError):
        return any(isinstance(failure, WorkerHealthCheckTimeoutError) for failure in error.worker_failures.values())
    return isinstance(error, ControllerError) and isinstance(error.controller_failure, NOT_STARTED)
