"""Two nodes to kill, in a small Ray cluster of this process, and what work units on them left behind.

Ray's `Cluster` notes its address for whoever calls `ray.init()` without one: tests give an address, or "local".
"""

import json
import os
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, TypeVar

os.environ["RAY_AUTH_MODE"] = "disabled"  # loopback only; ray.init of a new cluster would ask for a token

import ray
from ray.cluster_utils import Cluster

T = TypeVar("T")

STORE_BYTES = 80_000_000
SYSTEM_CONFIG = {
    # A dead raylet refuses its health checks at once, so 2 s find it; a busy one keeps the usual 10 s to answer.
    "health_check_initial_delay_ms": 500,
    "health_check_period_ms": 500,
    "health_check_failure_threshold": 3,
    "object_manager_pull_timeout_ms": 1000,  # until a task's input is asked from another node than the dead one
    "num_workers_soft_limit": 3,  # idle workers a node keeps, so that they need not be started again
}


def add_node(cluster: Cluster, *, wait: bool = True) -> None:
    """Start a node that does one task at a time, and wait for it unless told not to."""
    cluster.add_node(wait=wait, num_cpus=1, object_store_memory=STORE_BYTES)


@contextmanager
def start_cluster() -> Iterator[Cluster]:
    """Start a head without CPUs and two worker nodes, connect to them, and end exactly those."""
    head = {"num_cpus": 0, "object_store_memory": STORE_BYTES, "include_dashboard": False, "no_monitor": True}
    cluster = Cluster(initialize_head=True, head_node_args={**head, "_system_config": SYSTEM_CONFIG})
    try:
        # While it is the only node, the head is the one that this process attaches to; the others can be killed.
        ray.init(address=cluster.address, log_to_driver=False)
        for _ in range(2):
            add_node(cluster, wait=False)
        cluster.wait_for_nodes()
        yield cluster
    finally:
        ray.shutdown()
        cluster.shutdown()


def raylet_pid(cluster: Cluster, node_id: str) -> int:
    """Return the process id of a worker node's raylet."""
    (node,) = [node for node in cluster.worker_nodes if node.node_id == node_id]
    pid: int = node.all_processes["raylet"][0].process.pid
    return pid


def wait_for(find: Callable[[], T | None], *, timeout_s: float = 60) -> T:
    """Wait until something is found and return it; fail when it takes too long."""
    deadline = time.monotonic() + timeout_s
    while not (found := find()):
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.01)
    return found


def read_attempts(work: Path) -> list[dict[str, Any]]:
    """Return the notes of all units that were begun, a note for each time."""
    return [json.loads(path.read_text()) for path in work.glob("attempts/*.json")]


def committed_units(work: Path) -> set[str]:
    """Return the names of the units that are done."""
    return {path.name.split("-")[0] for path in work.glob("commits/*.json")}


@contextmanager
def stopped_in_a_unit(work: Path) -> Iterator[dict[str, Any]]:
    """Stop a worker in the middle of a unit and yield the note of its attempt; what is left of it goes on at the end.

    The other workers go on meanwhile, so the run comes to the point where all but this unit are done, and stays there.
    """
    attempt = wait_for(lambda: _stop_a_worker(work))
    try:
        yield attempt
    finally:
        with suppress(ProcessLookupError):
            os.kill(attempt["pid"], signal.SIGCONT)


def _stop_a_worker(work: Path) -> dict[str, Any] | None:
    """Return the attempt of a worker that was stopped before it committed; None when none was caught."""
    for attempt in read_attempts(work):
        if attempt["unit"] not in committed_units(work):
            os.kill(attempt["pid"], signal.SIGSTOP)
            time.sleep(0.05)  # a file that was being renamed is there by now
            if attempt["unit"] not in committed_units(work):
                return attempt
            os.kill(attempt["pid"], signal.SIGCONT)
    return None
