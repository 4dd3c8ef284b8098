"""Bringing a `UserError` that a remote task raised to the driver as it was."""

from collections.abc import Iterator
from contextlib import contextmanager

from ray.exceptions import RayTaskError

from ray_ds.errors import UserError


@contextmanager
def user_errors() -> Iterator[None]:
    """Raise the `UserError` behind a failed task, if there is one, without Ray's traceback around it."""
    try:
        yield
    except RayTaskError as error:
        found = _find_user_error(error)
        if found is None:
            raise
        raise found from error


def _find_user_error(error: BaseException | None) -> UserError | None:
    """Return the first UserError among the causes of an error."""
    while error is not None:
        if isinstance(error, RayTaskError):
            error = error.cause
        elif isinstance(error, UserError):
            return error
        else:
            error = error.__cause__
    return None
