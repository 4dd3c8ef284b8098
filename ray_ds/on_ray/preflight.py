"""What a stage asks of the cluster before it starts a worker."""

import secrets
from typing import Any

import ray
from ray.exceptions import GetTimeoutError, NodeDiedError, RayError, TaskUnschedulableError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from ray_ds import storage
from ray_ds.errors import ClusterError, StorageUnavailable
from ray_ds.logs import log_event
from ray_ds.on_ray.autoscaler import nodes_may_come

PROBE_TIMEOUT_S = 60.0


def check_cluster(
    run_dir: str,
    *,
    num_workers: int,
    cpus_per_worker: float,
    gpus_per_worker: float,
    field: str,
    has_begun: bool = False,
) -> None:
    """Check that the cluster holds the workers and that each of its nodes reads what another writes in `run_dir`.

    Nodes that are missing are waited for later where they may come: with a node autoscaler, or where they were lost.

    Args:
        field: the setting that asks for the workers, such as `pretrain.num_workers`.
        has_begun: whether the cluster held the workers before.
    Raises:
        ClusterError: it does not.
        StorageUnavailable: the object store of `run_dir` does not answer.
    """
    fitting = _workers_that_fit(cpus_per_worker, gpus_per_worker)
    if fitting < num_workers and (has_begun or nodes_may_come()):
        log_event("nodes_missing", field=field, wanted=num_workers, fitting=fitting, action="wait for more nodes")
    elif fitting < num_workers:
        need = f"{cpus_per_worker:g} CPU" + (f" and {gpus_per_worker:g} GPU" if gpus_per_worker else "")
        raise ClusterError(
            field,
            num_workers,
            f"must be at most {fitting}, what the cluster's nodes hold at {need} a worker",
            "ask for fewer workers or add nodes",
        )
    check_shared(run_dir)


def _workers_that_fit(cpus: float, gpus: float) -> int:
    """Count the workers that the nodes' total resources hold; a worker never spans nodes."""
    total = 0
    for node in ray.nodes():
        if node["Alive"]:
            resources = node["Resources"]
            by_cpu = int(resources.get("CPU", 0.0) / cpus) if cpus else 10**9
            by_gpu = int(resources.get("GPU", 0.0) / gpus) if gpus else 10**9
            total += min(by_cpu, by_gpu)
    return total


def check_shared(run_dir: str) -> None:
    """Check, with a probe file, that every node reads what this process writes in `run_dir`.

    Raises:
        ClusterError: a node does not, or this process cannot write there.
        StorageUnavailable: the object store does not answer.
    """
    content = secrets.token_hex(16)
    probe = storage.join(run_dir, f".probe-{content}")
    advice = "use a folder that every node mounts, or an object store (s3://, gs://)"
    try:
        storage.write_bytes(probe, content.encode())
    except StorageUnavailable:
        raise
    except OSError as error:
        raise ClusterError("run_dir", run_dir, f"must be writable from this node ({error})", advice) from error
    try:
        for node, found in _read_on_each_node(probe).items():
            if found is not None and found != content:
                raise ClusterError(
                    "run_dir", run_dir, f"must be readable on node {node} (a probe file was not)", advice
                )
    finally:
        system, path = storage.filesystem(probe)
        system.delete_file(path)


def _read_on_each_node(uri: str) -> dict[str, str | None]:
    """Return the text of a file as each living node sees it, by the node's address; empty where it is absent."""
    pending = {}
    for node in ray.nodes():
        if node["Alive"]:
            place = NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)
            reader = _read_text.options(scheduling_strategy=place, num_cpus=0)
            pending[f"{node['NodeManagerAddress']} ({node['NodeID'][:8]})"] = reader.remote(uri)
    return {name: _answer(result) for name, result in pending.items()}


def _answer(result: Any) -> str | None:
    """Return what a node read: nothing when it is silent, None when it is gone, which Ray notices seconds late."""
    try:
        text: str = ray.get(result, timeout=PROBE_TIMEOUT_S)
    except (TaskUnschedulableError, NodeDiedError):
        return None
    except (GetTimeoutError, RayError) as error:
        log_event("probe_failed", error=str(error).splitlines()[0])
        return ""
    return text


@ray.remote(max_retries=1)  # type: ignore[untyped-decorator, unused-ignore]
def _read_text(uri: str) -> str:
    try:
        return storage.read_bytes(uri).decode()
    except OSError:
        return ""
