"""A small Ray cluster inside the test's process: a head without CPUs, and worker nodes that can be killed."""

import os
from collections.abc import Iterator
from contextlib import contextmanager

os.environ["RAY_AUTH_MODE"] = "disabled"  # loopback only; ray.init of a new cluster would ask for a token

import ray
from ray.cluster_utils import Cluster

STORE_BYTES = 80_000_000


def add_node(cluster: Cluster, num_cpus: int = 2) -> None:
    """Start a node and wait for it."""
    cluster.add_node(num_cpus=num_cpus, object_store_memory=STORE_BYTES)


@contextmanager
def start_cluster() -> Iterator[Cluster]:
    """Start a head and two worker nodes, connect to them, and end exactly those."""
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "object_store_memory": STORE_BYTES})
    try:
        # While it is the only node, the head is the one that this process attaches to; the others can be killed.
        ray.init(address=cluster.address, log_to_driver=False)
        add_node(cluster)
        add_node(cluster)
        yield cluster
    finally:
        ray.shutdown()
        cluster.shutdown()


def raylet_pid(cluster: Cluster, node_id: str) -> int:
    """Return the process id of a worker node's raylet."""
    (node,) = [node for node in cluster.worker_nodes if node.node_id == node_id]
    pid: int = node.all_processes["raylet"][0].process.pid
    return pid
