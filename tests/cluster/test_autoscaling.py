"""Training asks for nodes, grows onto those that are added, and leaves them idle."""

import os
from collections.abc import Iterator
from pathlib import Path

os.environ["RAY_AUTH_MODE"] = "disabled"

import pytest

from tests.cluster.node_autoscaler import MAX_NODES, MIN_NODES, autoscaling_cluster
from tests.cluster.ray_processes import RayProcesses, eventually
from tests.on_ray.elastic_runs import Run, worker_node_ids


@pytest.fixture
def cluster() -> Iterator[RayProcesses]:
    with autoscaling_cluster() as nodes:
        yield nodes


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
