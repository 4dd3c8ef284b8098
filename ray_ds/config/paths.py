"""Paths in a recipe: absolute, or below a root that is given with it."""

from ray_ds import storage
from ray_ds.errors import ConfigError


def absolute_path(value: str, root: str | None, *, field: str) -> str:
    """Return `value` as an absolute path or URI; a relative one is below `root`.

    Raises:
        ConfigError: it is relative and there is no absolute root.
    """
    if storage.is_absolute(value):
        return value
    if root is None or not storage.is_absolute(root):
        raise ConfigError(
            field,
            value,
            "must be absolute, because a job's working directory is a copy on each node",
            "write an absolute path or URI, or pass --root with the absolute folder it is below",
        )
    return storage.join(root, value.removeprefix("./"))
