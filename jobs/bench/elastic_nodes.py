"""A cluster of raylets on this host whose nodes join, drain, stall and die, for measuring."""

import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

import psutil
import ray
from ray.cluster_utils import Cluster

from ray_ds.verify.node_settings import HEALTH_GOOD

STORE_BYTES = 100_000_000
NODE_MEMORY = 2_000_000_000
STALL_S = 1.0
WAIT_S = 300.0


class Nodes:
    """The cluster's worker nodes, each of which holds one worker."""

    def __init__(self, cluster: Cluster, num_gpus: int = 0, store_bytes: int = STORE_BYTES) -> None:
        self._cluster = cluster
        self._options = {"num_gpus": num_gpus, "object_store_memory": store_bytes}

    def add(self) -> None:
        """Start a node without waiting for it."""
        self._cluster.add_node(wait=False, num_cpus=1, memory=NODE_MEMORY, **self._options)

    def alive(self) -> list[str]:
        """Return the ids of living nodes that hold a worker."""
        return [node["NodeID"] for node in ray.nodes() if node["Alive"] and node["Resources"].get("CPU")]

    def kill(self, node_id: str) -> None:
        """Kill a node's raylet and its workers at once; the host still refuses whoever asks for them."""
        raylet = self._raylet(node_id)
        for process in [raylet, *raylet.children(recursive=True)]:
            with suppress(psutil.NoSuchProcess):
                process.kill()

    def drain(self, node_id: str, deadline_s: int) -> None:
        """Tell a node to leave, as a spot notice does."""
        command = [sys.executable, "-m", "ray.scripts.scripts", "drain-node", "--address", self._cluster.address]
        reason = ["--reason", "DRAIN_NODE_REASON_PREEMPTION", "--reason-message", "spot notice"]
        deadline = ["--deadline-remaining-seconds", str(deadline_s)]
        subprocess.run([*command, "--node-id", node_id, *reason, *deadline], check=True, capture_output=True)

    def _raylet(self, node_id: str) -> psutil.Process:
        (node,) = [node for node in self._cluster.worker_nodes if node.node_id == node_id]
        return psutil.Process(node.all_processes["raylet"][0].process.pid)

    def daemons(self) -> list[int]:
        """Return the process ids of the head's control store and of all raylets."""
        head = self._cluster.head_node.all_processes
        own = [head[name][0].process.pid for name in ("gcs_server", "raylet")]
        return [*own, *(self._raylet(node_id).pid for node_id in self.alive())]


@contextmanager
def start_nodes(count: int, *, num_gpus: int = 0, store_bytes: int = STORE_BYTES) -> Iterator[Nodes]:
    """Start a head without CPUs and worker nodes, connect to them, and end exactly those.

    Args:
        num_gpus: of each node, as it says; nodes of one host have the same ones.
    """
    head = {"num_cpus": 0, "object_store_memory": STORE_BYTES, "include_dashboard": False, "no_monitor": True}
    cluster = Cluster(initialize_head=True, head_node_args={**head, "_system_config": HEALTH_GOOD})
    nodes = Nodes(cluster, num_gpus, store_bytes)
    try:
        ray.init(address=cluster.address, log_to_driver=False, namespace="ray_ds")
        for _ in range(count):
            nodes.add()
        wait_for(lambda: len(nodes.alive()) == count, "the nodes did not start")
        yield nodes
    finally:
        ray.shutdown()
        cluster.shutdown()


def wait_for(holds: Callable[[], bool], message: str, timeout_s: float = WAIT_S) -> None:
    """Wait until something holds.

    Raises:
        TimeoutError: it did not in time.
    """
    deadline = time.monotonic() + timeout_s
    while not holds():
        if time.monotonic() > deadline:
            raise TimeoutError(message)
        time.sleep(0.05)


def count_false_deaths(nodes: Nodes, minutes: float, seed: int) -> int:
    """Keep all CPUs busy and stop daemons for a second at random; return how many nodes were declared dead."""
    rng = random.Random(seed)
    before = set(nodes.alive())
    burn = [sys.executable, "-c", "while True: pass"]
    burners = [subprocess.Popen(burn) for _ in range(os.cpu_count() or 1)]
    deadline = time.monotonic() + minutes * 60
    dead: set[str] = set()
    try:
        while time.monotonic() < deadline:
            pid = rng.choice(nodes.daemons())
            os.kill(pid, signal.SIGSTOP)
            time.sleep(STALL_S)
            os.kill(pid, signal.SIGCONT)
            time.sleep(rng.uniform(0.5, 4.0))
            dead |= before - set(nodes.alive())
    finally:
        for burner in burners:
            burner.kill()
            burner.wait()
    return len(dead)
