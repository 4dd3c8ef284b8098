"""Bringing a `UserError` that a remote task raised to the driver as it was."""

from collections.abc import Iterator
from contextlib import contextmanager

from ray.exceptions import RayTaskError

from ray_ds.errors import UserError


@contextmanager
def user_errors() -> Iterator[None]:
    """Raise the `UserError` behind a failed task, if there is one, without Ray's traceback around it.

    Ray Data keeps the cause only with `DataContext.raise_original_map_exception`.
    """
    try:
        yield
    except RayTaskError as error:
        cause = error.cause
        while isinstance(cause, RayTaskError):
            cause = cause.cause
        if isinstance(cause, UserError):
            raise cause from error
        raise
