"""Training asks for nodes, grows onto those that are added, and leaves them idle: Ray's autoscaler v2, local provider.

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

from tests.cluster.ray_processes import STORE_BYTES, RayProcesses, eventually
from tests.on_ray.elastic_runs import Run, worker_node_ids

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


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.shows("Training asks the node autoscaler for nodes and grows onto those that come; idle ones leave")
def test_training_brings_a_node_and_grows_onto_it(cluster: RayProcesses, tmp_path: Path) -> None:
    eventually("the first node joins", lambda: len(worker_node_ids()) == MIN_NODES, timeout_s=90)
    run = Run(tmp_path, num_workers=[MIN_NODES, MAX_NODES])
    try:
        run.wait_until(lambda run: run.workers == MAX_NODES)
    finally:
        run.end()
    assert [event.facts["workers"] for event in run.events if event.kind == "workers_started"] == [MIN_NODES, MAX_NODES]
    assert run.steps == list(range(1, len(run.steps) + 1)), "a step was lost or done twice"
    eventually("the idle node leaves", lambda: len(worker_node_ids()) == MIN_NODES, timeout_s=90)
