"""Replicas that find no room bring a node, run there, and leave it when the load is over."""

import asyncio
import os
from collections.abc import Iterator
from pathlib import Path

os.environ["RAY_AUTH_MODE"] = "disabled"

import pytest
from ray import serve

from jobs.bench.autoscaling.live import PLACES, Traffic, clients, make_model, make_settings, num_running, put_up
from ray_ds.config.serve import AutoscalingSettings
from tests.cluster.cluster_files import PROJECT
from tests.cluster.node_autoscaler import MIN_NODES, autoscaling_cluster
from tests.cluster.ray_processes import RayProcesses, eventually, free_port
from tests.on_ray.elastic_runs import worker_node_ids


@pytest.fixture
def cluster() -> Iterator[RayProcesses]:
    with autoscaling_cluster(PYTHONPATH=str(PROJECT)) as nodes:
        yield nodes


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.shows("Load brings a node and a replica on it; both go when the load is over, and no request fails")
def test_a_replica_runs_on_a_node_that_joins(cluster: RayProcesses, tmp_path: Path) -> None:
    eventually("the first node joins", lambda: len(worker_node_ids()) == MIN_NODES, timeout_s=90)
    settings = make_settings(free_port(), AutoscalingSettings(max_replicas=2, downscale_delay_s=5.0))
    url = put_up(make_model(tmp_path), settings)
    first = set(worker_node_ids())

    async def drive() -> Traffic:
        traffic = Traffic()
        async with clients(url, PLACES * 2, traffic):
            await asyncio.to_thread(eventually, "a second replica", lambda: num_running(settings) == 2, timeout_s=90)
            await asyncio.sleep(2.0)
        return traffic

    traffic = asyncio.run(drive())
    assert traffic.errors == [] and traffic.answers > 0
    joined = set(worker_node_ids()) - first
    assert len(joined) == 1, "the second replica needs a CPU that only a new node has"
    eventually("one replica", lambda: num_running(settings) == 1, timeout_s=60)
    eventually("the idle node leaves", lambda: len(worker_node_ids()) == MIN_NODES, timeout_s=90)
    serve.shutdown()
