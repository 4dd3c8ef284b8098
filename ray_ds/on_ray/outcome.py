"""How training on Ray ends: what the workers gave, or an error that tells whether another try goes on.

It leans on Ray Train's public errors alone, so that `scaling = "stock"` needs no more of Ray.
"""

from collections.abc import Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from typing import Any

from ray.exceptions import RayError, RayTaskError
from ray.train import ControllerError, PreemptionError, Result, WorkerGroupError

from ray_ds.errors import RetryableError, UserError
from ray_ds.train.task import TrainResult

LASTING = (UserError, FloatingPointError)
"""What another try would meet again: a mistake of the user, or a loss that is no number."""
LOST = (RayError, OSError)
"""What a worker meets when it, a node or the network is lost."""


class TrainingStopped(RetryableError):
    """Training was told to stop, and did; submitting it again goes on.

    Args:
        step: after which all state is safe; None where no workers ran, so that the newest checkpoint is what there is.
    """

    def __init__(self, step: int | None) -> None:
        where = "before any worker ran" if step is None else f"after step {step}, which is safe"
        super().__init__(f"training was told to stop and did, {where}; submit it again to go on")
        self.step = step


class StoppedWithoutWorkers(Exception):
    """The run was told to stop while no workers ran; Ray Train tries nothing again after it."""


class LostTooOften(RetryableError):
    """Workers were lost, or did not start, more often in a row than `max_failures` allows."""

    def __init__(self, error: Exception) -> None:
        text = "workers were lost too often without a step done in between; submit it again to go on"
        super().__init__(f"{text}: {headline(error)}")


def headline(error: BaseException) -> str:
    """Return an error in one line."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[-1] if lines else ''}"[:300]


@contextmanager
def losses_are_retryable() -> Iterator[None]:
    """Raise a `RetryableError` where Ray says that something of it is lost: the controller, the board, the head.

    What code of ours raised in one of Ray's processes passes as it is.
    """
    try:
        yield
    except RayError as error:
        if not is_loss(error):
            raise
        raise RetryableError(f"a part of the run was lost ({headline(error)}); submit it again to go on") from error


def read_outcome(outcome: "Future[Result]") -> TrainResult:
    """Return what training gave, or raise what it raised.

    Raises:
        TrainingStopped: it was told to stop, and did.
        LostTooOften: so were its workers.
        RayError: Ray lost the controller.
    """
    try:
        value: int | dict[str, Any] = outcome.result().return_value
    except ControllerError as error:
        cause = error.controller_failure
        if isinstance(cause, StoppedWithoutWorkers):
            raise TrainingStopped(None) from None
        if isinstance(cause, (*LASTING, RayError)):
            raise cause from error
        raise
    except PreemptionError as error:
        raise LostTooOften(error) from error
    except WorkerGroupError as error:
        if any(is_loss(failure) for failure in error.worker_failures.values()):
            raise LostTooOften(error) from error
        raise
    if isinstance(value, int):
        raise TrainingStopped(value)
    return TrainResult(**value)


def is_loss(failure: BaseException) -> bool:
    """Tell whether a worker failed because something was lost: itself, a process it spoke to, or the network."""
    # Ray Train wraps what it met when it asked a worker how it is, and Ray what a task raised.
    met = getattr(failure, "health_check_failure", failure)
    return isinstance(met.cause if isinstance(met, RayTaskError) else met, LOST)
