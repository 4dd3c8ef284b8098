"""What is asked of a cluster before a stage starts a worker."""

import os

os.environ["RAY_AUTH_MODE"] = "disabled"

from collections.abc import Iterator
from pathlib import Path

import pytest
import ray
from ray.exceptions import TaskUnschedulableError

from ray_ds.errors import ClusterError, RetryableError, StorageUnavailable
from ray_ds.on_ray import preflight
from ray_ds.on_ray.preflight import check_cluster, check_shared

pytestmark = pytest.mark.ray


@pytest.fixture(scope="module", autouse=True)
def cluster() -> Iterator[None]:
    ray.init("local", num_cpus=2, object_store_memory=80_000_000, include_dashboard=False)
    yield
    ray.shutdown()


def test_a_shared_folder_passes_and_keeps_nothing(tmp_path: Path) -> None:
    check_cluster(str(tmp_path), num_workers=2, cpus_per_worker=1, gpus_per_worker=0, field="train.num_workers")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.shows("A run directory that some node cannot read is refused before a worker starts, by a probe file")
def test_a_folder_of_this_process_alone_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)  # /proc/self/cwd is another folder in a worker, as a local disk is on another node
    with pytest.raises(
        ClusterError, match=r"^run_dir \(/proc/self/cwd/runs\) must be readable on node .* was not\); use"
    ):
        check_shared("/proc/self/cwd/runs")


def test_a_node_that_died_a_moment_ago_is_not_asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def gone(*_: object, **__: object) -> str:
        raise TaskUnschedulableError("The node specified via NodeAffinitySchedulingStrategy doesn't exist any more")

    monkeypatch.setattr(preflight.ray, "get", gone)
    check_shared(str(tmp_path))


def test_a_folder_that_cannot_be_written_is_refused() -> None:
    with pytest.raises(ClusterError, match=r"^run_dir \(/proc/nothing\) must be writable from this node \(.*\); use a"):
        check_shared("/proc/nothing")


@pytest.mark.parametrize(
    ("workers", "cpus", "gpus", "message"),
    [
        (3, 1, 0, r"^train.num_workers \(3\) must be at most 2, what the cluster's nodes hold at 1 CPU a worker; ask"),
        (1, 3, 0, r"^train.num_workers \(1\) must be at most 0, .* at 3 CPU a worker; ask for fewer workers or add"),
        (1, 1, 1, r"^train.num_workers \(1\) must be at most 0, .* at 1 CPU and 1 GPU a worker; ask for fewer"),
    ],
)
def test_more_workers_than_the_nodes_hold(tmp_path: Path, workers: int, cpus: int, gpus: int, message: str) -> None:
    with pytest.raises(ClusterError, match=message):
        check_cluster(
            str(tmp_path),
            num_workers=workers,
            cpus_per_worker=cpus,
            gpus_per_worker=gpus,
            field="train.num_workers",
        )


def test_a_worker_never_spans_nodes(monkeypatch: pytest.MonkeyPatch) -> None:
    nodes = [{"Alive": True, "Resources": {"CPU": 3.0}}, {"Alive": True, "Resources": {"CPU": 3.0}}]
    monkeypatch.setattr(preflight.ray, "nodes", lambda: [*nodes, {"Alive": False, "Resources": {"CPU": 99.0}}])
    monkeypatch.setattr(preflight, "nodes_may_come", lambda: False)
    with pytest.raises(ClusterError, match=r"must be at most 2"):
        check_cluster("/unused", num_workers=3, cpus_per_worker=2, gpus_per_worker=0, field="f")


@pytest.mark.shows("A job that lacks nodes waits for them where an autoscaler is at work or the run has begun")
@pytest.mark.parametrize(("has_begun", "has_autoscaler"), [(True, False), (False, True)])
def test_nodes_that_may_come_are_waited_for(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    has_begun: bool,
    has_autoscaler: bool,
) -> None:
    monkeypatch.setattr(preflight, "nodes_may_come", lambda: has_autoscaler)
    with caplog.at_level("INFO", logger="ray_ds"):
        check_cluster(
            str(tmp_path), num_workers=3, cpus_per_worker=1, gpus_per_worker=0, field="f", has_begun=has_begun
        )
    assert "nodes_missing" in caplog.text and "wanted=3" in caplog.text and "fitting=2" in caplog.text


def test_a_store_that_does_not_answer_may_be_tried_again(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(uri: str, data: bytes) -> None:
        raise StorageUnavailable(uri, "timed out", "submit again")

    monkeypatch.setattr(preflight.storage, "write_bytes", fail)
    with pytest.raises(RetryableError):
        check_shared("s3://bucket/runs")
