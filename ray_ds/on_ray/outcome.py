"""How training on Ray ends: what the workers gave, or an error that tells whether another try goes on.

It leans on Ray Train's public errors alone, so that `scaling = "stock"` needs no private part of Ray Train.
"""

import errno
import socket
from collections.abc import Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from typing import Any

import torch.distributed as dist
from ray.exceptions import RayError, RayTaskError
from ray.train import ControllerError, PreemptionError, Result, WorkerGroupError

from ray_ds.errors import RetryableError, UserError
from ray_ds.train.task import TrainResult

LASTING = (UserError, FloatingPointError)
"""What another try would meet again: a mistake of the user, or a loss that is no number."""
LOST = (RayError, RetryableError, ConnectionError, TimeoutError, socket.gaierror)
"""What a worker meets when it, a node, the network or a store is lost."""
NETWORK_ERRNOS = frozenset(
    {
        errno.ECONNABORTED,
        errno.ECONNREFUSED,
        errno.ECONNRESET,
        errno.EHOSTDOWN,
        errno.EHOSTUNREACH,
        errno.ENETDOWN,
        errno.ENETRESET,
        errno.ENETUNREACH,
        errno.ENOTCONN,
        errno.EPIPE,
        errno.ESTALE,
        errno.ETIMEDOUT,
    }
)
"""What an `OSError` says where the network, or a file system behind it, is the reason; a full disk says another."""
GLOO = "gloo/transport/"
"""What is in gloo's errors of connections: a plain `RuntimeError` that begins with the place in its source."""


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
        failures = error.worker_failures.values()
        if any(is_loss(failure) for failure in failures) or all(is_cut_off(failure) for failure in failures):
            raise LostTooOften(error) from error
        raise
    if isinstance(value, int):
        raise TrainingStopped(value)
    return TrainResult(**value)


def is_loss(failure: BaseException) -> bool:
    """Tell whether a worker failed because something was lost: itself, a process it spoke to, or the network."""
    # Ray Train wraps what it met when it asked a worker how it is, and Ray what a task raised.
    met = getattr(failure, "health_check_failure", failure)
    cause = met.cause if isinstance(met, RayTaskError) else met
    return isinstance(cause, LOST) or (isinstance(cause, OSError) and cause.errno in NETWORK_ERRNOS)


def is_cut_off(failure: BaseException) -> bool:
    """Tell whether a worker failed in a collective, because others did not answer there.

    Where another worker reports a fault of its own, that is the reason, and this is what followed from it. Where all
    report nothing else, the network between them was lost.
    """
    return isinstance(failure, dist.DistError) or (isinstance(failure, RuntimeError) and GLOO in str(failure))
