"""What checks are given: the cluster's nodes, a folder to work in, and a list of what must be undone."""

import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import ray

from ray_ds import storage
from ray_ds.artifacts import Checkpoint
from ray_ds.on_ray.endpoint import HEAD_RESOURCE


@dataclass(frozen=True, kw_only=True, slots=True)
class ClusterNode:
    """A living node."""

    node_id: str
    address: str
    cpus: float = 0.0
    gpus: float = 0.0
    is_head: bool = False

    @property
    def name(self) -> str:
        """The name that a person finds it by."""
        return f"{self.address} ({self.node_id[:8]})"


class CleanUp:
    """What a check leaves behind, undone in reverse order when it has ended, whatever way."""

    def __init__(self) -> None:
        self._actions: list[Callable[[], object]] = []
        self._is_closed = False
        self._lock = threading.Lock()

    def add(self, action: Callable[[], object]) -> None:
        """Have something undone at the end; at once where the end was before."""
        with self._lock:
            if not self._is_closed:
                self._actions.append(action)
                return
        action()

    def close(self) -> list[str]:
        """Undo everything; return the errors that came up."""
        with self._lock:
            self._is_closed = True
            actions, self._actions = self._actions, []
        errors = []
        for action in reversed(actions):
            try:
                action()
            except Exception as error:  # the others must still be undone
                errors.append(f"{type(error).__name__}: {str(error).splitlines()[-1] if str(error) else ''}")
        return errors


@dataclass(kw_only=True)
class Made:
    """What one check made that a later one uses."""

    model: Checkpoint | None = None


@dataclass(frozen=True, kw_only=True)
class Context:
    """What a check is given."""

    run_dir: str
    """The user's run directory, an absolute path or URI."""
    folder: str
    """Folder of this verification below it; the report is written here and `work/` is deleted at the end."""
    nodes: tuple[ClusterNode, ...]
    gpus: int
    """GPUs that checks use; 0 = they use none."""
    ends_at: float
    """When all checks must have ended, by `time.monotonic`."""
    clean_up: CleanUp = field(default_factory=CleanUp)
    made: Made = field(default_factory=Made)

    def work(self, *parts: str) -> str:
        """Return the URI of something in the folder that is deleted at the end."""
        return storage.join(self.folder, "work", *parts)

    def left_s(self) -> float:
        """Return the seconds that are left for all checks."""
        return self.ends_at - time.monotonic()


def living_nodes() -> tuple[ClusterNode, ...]:
    """Return the cluster's nodes, the head first."""
    found = [_node(node) for node in ray.nodes() if node["Alive"]]
    return tuple(sorted(found, key=lambda node: (not node.is_head, node.address, node.node_id)))


def _node(record: Mapping[str, Any]) -> ClusterNode:
    """Return Ray's record of a node as ours."""
    resources: Mapping[str, float] = record["Resources"]
    return ClusterNode(
        node_id=record["NodeID"],
        address=record["NodeManagerAddress"],
        cpus=resources.get("CPU", 0.0),
        gpus=resources.get("GPU", 0.0),
        is_head=HEAD_RESOURCE in resources,
    )
