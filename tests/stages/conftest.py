"""A small Ray cluster for stages that need one: started once, and each module connects to it anew."""

import os

os.environ["RAY_AUTH_MODE"] = "disabled"  # read when ray is imported

from collections.abc import Iterator

import pytest
import ray
from ray.cluster_utils import Cluster


@pytest.fixture(scope="session")
def cluster_address() -> Iterator[str]:
    """The address of a cluster of one node with two CPUs, which outlives the modules' connections."""
    head = {"num_cpus": 2, "object_store_memory": 80_000_000, "include_dashboard": False, "no_monitor": True}
    cluster = Cluster(initialize_head=True, head_node_args=head)
    yield cluster.address
    cluster.shutdown()


@pytest.fixture(scope="module")
def local_ray(cluster_address: str) -> Iterator[str]:
    """Connect this process to the cluster and return its address; what a module leaves running ends with it."""
    ray.init(cluster_address, log_to_driver=False)
    yield cluster_address
    ray.shutdown()
