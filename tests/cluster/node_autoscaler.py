"""A cluster whose nodes come with demand and go when idle: Ray's autoscaler v2 with its local provider.

Ray's own `AutoscalingCluster` is not used: it begins and ends with `ray stop --force`, which ends every Ray process of
the machine, and the provider is named by its class because its short name needs a file that Ray's wheel does not carry.
"""

import json
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import ray
from ray.autoscaler._private.fake_multi_node.node_provider import FAKE_HEAD_NODE_ID, FakeMultiNodeProvider

from tests.cluster.ray_processes import STORE_BYTES, RayProcesses

MIN_NODES, MAX_NODES = 1, 2
IDLE_S = 3.0


def autoscaling_config(address: str) -> dict[str, Any]:
    """Return a cluster of a head without CPUs and one or two workers of one CPU, which run on this machine."""
    worker = {"CPU": 1, "object_store_memory": STORE_BYTES}
    nothing: list[str] = []
    return {
        "cluster_name": "test",
        "max_workers": MAX_NODES,
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
            "worker": {
                "resources": worker,
                "node_config": {},
                "min_workers": MIN_NODES,
                "max_workers": MAX_NODES,
            },
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


@contextmanager
def autoscaling_cluster(**environment: str) -> Iterator[RayProcesses]:
    """Start a head without CPUs, connect to it, and end it with all nodes."""
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
                **environment,
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
