import os
from typing import Any

os.environ["RAY_AUTH_MODE"] = "disabled"  # read when ray is imported

import pytest
import ray

from ray_ds.errors import ClusterError
from ray_ds.on_ray import devices
from ray_ds.on_ray.devices import cluster_fleet, gpu_fleet, known_gpu_fleet
from tests.train.runs import make_settings


def node(*, gpus: int, kind: str | None, alive: bool = True) -> dict[str, Any]:
    """Return a node as `ray.nodes()` tells of it."""
    resources: dict[str, float] = {"CPU": 16.0, "GPU": float(gpus)}
    if kind is not None:
        resources[f"accelerator_type:{kind}"] = 1.0
    return {"Alive": alive, "NodeManagerAddress": "10.0.0.7", "Resources": resources}


def test_gpus_of_one_kind() -> None:
    fleet = gpu_fleet([node(gpus=8, kind="H100"), node(gpus=4, kind="H100")])
    assert (fleet.kind.name, fleet.num_devices, fleet.devices_per_node) == ("h100", 12, 8)


def test_of_several_kinds_the_smallest_memory_counts() -> None:
    assert gpu_fleet([node(gpus=8, kind="H200"), node(gpus=8, kind="A100")]).kind.name == "a100-40gb"


def test_a_name_that_leaves_the_memory_open(monkeypatch: pytest.MonkeyPatch) -> None:
    nodes = [node(gpus=8, kind="A100")]
    monkeypatch.setattr(devices.ray, "nodes", lambda: nodes)
    fleet = known_gpu_fleet()
    assert fleet is not None and fleet.kind.name == "a100-80gb"  # refuse only what surely does not fit
    assert gpu_fleet(nodes).kind.name == "a100-40gb"  # and plan for what surely does


@pytest.mark.parametrize("kind", ["V100", None])
def test_gpus_that_the_plan_does_not_know(kind: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    nodes = [node(gpus=8, kind=kind)]
    with pytest.raises(ClusterError, match=r"GPUs of node 10\.0\.0\.7 .*; name a kind with --gpu"):
        gpu_fleet(nodes)
    monkeypatch.setattr(devices.ray, "nodes", lambda: nodes)
    assert known_gpu_fleet() is None


def test_dead_nodes_do_not_count(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(devices.ray, "nodes", lambda: [node(gpus=8, kind="H100", alive=False)])
    assert known_gpu_fleet() is None


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.shows("`ray-ds plan` measures CPU nodes, whose speed no data sheet tells")
def test_cpus_are_measured() -> None:
    ray.init("local", num_cpus=4, object_store_memory=80_000_000, include_dashboard=False, log_to_driver=False)
    try:
        fleet = cluster_fleet(make_settings(num_workers=2, cpus_per_worker=2.0))
    finally:
        ray.shutdown()
    assert (fleet.num_devices, fleet.devices_per_node) == (2, 2)
    assert fleet.kind.fp32_flops > 1e9 and fleet.kind.bandwidth > 1e8 and fleet.kind.memory_bytes > 1 << 30
