"""Nodes join when work waits for them and leave when they are idle: Ray's autoscaler v2 over its local provider.

Ray's own `AutoscalingCluster` is not used: it begins and ends with `ray stop --force`, which ends every Ray process of
the machine, and the provider is named by its class because its short name needs a file that Ray's wheel does not carry.
"""

import json
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

os.environ["RAY_AUTH_MODE"] = "disabled"

import pytest
import ray
from ray.autoscaler._private.fake_multi_node.node_provider import FAKE_HEAD_NODE_ID, FakeMultiNodeProvider
from ray.util.placement_group import PlacementGroup

from tests.cluster.ray_processes import STORE_BYTES, RayProcesses, eventually

MAX_WORKERS = 2
IDLE_S = 3.0


def autoscaling_config(address: str) -> dict[str, Any]:
    """Return a cluster of a head without CPUs and up to two workers of one CPU, which run on this machine."""
    worker = {"CPU": 1, "object_store_memory": STORE_BYTES}
    nothing: list[str] = []
    return {
        "cluster_name": "test",
        "max_workers": MAX_WORKERS,
        "upscaling_speed": 100.0,
        "idle_timeout_minutes": IDLE_S / 60,
        "provider": {
            "type": "external",
            "module": f"{FakeMultiNodeProvider.__module__}.{FakeMultiNodeProvider.__name__}",
            "head_node_id": FAKE_HEAD_NODE_ID,
            "gcs_address": address,
            "launch_multiple": True,
        },
        "available_node_types": {
            "ray.head.default": {"resources": {"CPU": 0}, "node_config": {}, "max_workers": 0},
            "worker": {"resources": worker, "node_config": {}, "min_workers": 0, "max_workers": MAX_WORKERS},
        },
        "head_node_type": "ray.head.default",
        "auth": {},
        "docker": {},
        "file_mounts": {},
        "cluster_synced_files": nothing,
        "initialization_commands": nothing,
        "setup_commands": nothing,
        "head_setup_commands": nothing,
        "worker_setup_commands": nothing,
        "head_start_ray_commands": nothing,
        "worker_start_ray_commands": nothing,
    }


@pytest.fixture
def cluster() -> Iterator[RayProcesses]:
    with tempfile.TemporaryDirectory(prefix="scale") as folder:
        nodes = RayProcesses(
            Path(folder),
            {
                "RAY_AUTH_MODE": "disabled",
                "RAY_FAKE_CLUSTER": "1",
                "RAY_enable_autoscaler_v2": "1",
                "RAY_CLOUD_INSTANCE_ID": FAKE_HEAD_NODE_ID,
                "RAY_OVERRIDE_NODE_ID_FOR_TESTING": FAKE_HEAD_NODE_ID,
                "AUTOSCALER_UPDATE_INTERVAL_S": "1",
            },
        )
        config = Path(folder) / "autoscaling.json"
        config.write_text(json.dumps(autoscaling_config(nodes.address)))
        try:
            nodes.start_head("--include-dashboard=false", f"--autoscaling-config={config}", num_cpus=0)
            ray.init(nodes.address, log_to_driver=False)
            yield nodes
        finally:
            ray.shutdown()
            nodes.stop()


def num_workers() -> int:
    """Return how many living nodes have a CPU."""
    return sum(node["Alive"] and node["Resources"].get("CPU", 0) > 0 for node in ray.nodes())


@ray.remote(num_cpus=1)
def where() -> str:
    """Return the node this ran on."""
    return ray.get_runtime_context().get_node_id()


def on_each(group: PlacementGroup) -> set[str]:
    """Run a task in every bundle of a placement group, and return the nodes they ran on."""
    tasks = [
        where.options(placement_group=group, placement_group_bundle_index=index).remote()
        for index in range(group.bundle_count)
    ]
    return set(ray.get(tasks, timeout=60))


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.shows("Nodes join while a training's workers wait for a place, and idle ones leave")
def test_waiting_workers_bring_nodes_and_idle_nodes_leave(cluster: RayProcesses) -> None:
    assert num_workers() == 0
    group = ray.util.placement_group([{"CPU": 1}] * MAX_WORKERS, strategy="STRICT_SPREAD")
    eventually("a node a worker joins", lambda: num_workers() == MAX_WORKERS, timeout_s=90)
    ray.get(group.ready(), timeout=60)
    assert len(on_each(group)) == MAX_WORKERS
    ray.util.remove_placement_group(group)
    eventually("idle nodes leave", lambda: num_workers() == 0, timeout_s=60)
