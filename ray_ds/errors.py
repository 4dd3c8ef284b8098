"""The project's exceptions. A user's mistake always says field, value, what was allowed and what to do."""

USER_ERROR_EXIT_CODE = 2
"""Exit status of `ray-ds` and of every job for a `UserError`: it must be mended before another try."""
RETRYABLE_EXIT_CODE = 75
"""Exit status for a `RetryableError`, EX_TEMPFAIL of sysexits.h: submitting again goes on. Any other failure is 1."""


class RayDsError(Exception):
    """The root of everything this package raises on purpose."""


class RetryableError(RayDsError):
    """Work broke off through no fault of the recipe: nodes were lost, or the job was told to stop.

    What is finished is kept; submitting the same again goes on from there.
    """


class UserError(RayDsError):
    """A mistake the user can mend, found before work starts or where the damage lies.

    Args:
        field: what is wrong: a dotted setting (`pretrain.batch_tokens`), a file, a command-line option.
        value: what it holds.
        allowed: a clause that starts with a verb: "must be a multiple of 8192".
        action: what to do, in the imperative: "try 507904".
    """

    def __init__(self, field: str, value: object, allowed: str, action: str) -> None:
        super().__init__(field, value, allowed, action)
        self.field = field
        self.value = value
        self.allowed = allowed
        self.action = action

    def __str__(self) -> str:
        value = self.value if isinstance(self.value, str) else repr(self.value)
        return f"{self.field} ({value}) {self.allowed}; {self.action}."


class ConfigError(UserError, ValueError):
    """A setting, an option or the recipe itself is wrong. A `ValueError`, so that pydantic adds the field's path."""


class ArtifactError(UserError):
    """An artefact is missing, unfinished, damaged or made from something else."""


class InputError(UserError):
    """The user's raw data is missing, empty or damaged."""


class ClusterError(UserError):
    """The Ray cluster cannot run what the recipe asks for."""


class TakenOverError(ClusterError):
    """Another job has taken over a step's folder: this one must write, and delete, nothing there any more."""


class StorageRefused(UserError, OSError):
    """A disk or an object store will not do what is asked until somebody mends it: it is full, a key is wrong."""

    def __init__(self, uri: str, reason: str, allowed: str, action: str, errno: int | None = None) -> None:
        super().__init__(uri, reason, allowed, action)
        self.errno = errno

    def __reduce__(self) -> tuple[type["StorageRefused"], tuple[object, ...]]:
        return type(self), (self.field, self.value, self.allowed, self.action, self.errno)


class StorageUnavailable(RetryableError, OSError):
    """An object store does not answer, or asks for patience, after all tries: later it may."""

    def __init__(self, uri: str, reason: str, action: str) -> None:
        super().__init__(f"{uri} (no answer: {reason}) must be reachable; {action}.")
        self.uri = uri
        self.reason = reason
        self.action = action

    def __reduce__(self) -> tuple[type["StorageUnavailable"], tuple[str, str, str]]:
        return type(self), (self.uri, self.reason, self.action)
