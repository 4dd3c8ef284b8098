"""What the nodes of the cluster compute with, for a plan: GPUs by their kind, CPUs by a short measurement."""

import os
import time
from collections.abc import Mapping
from typing import Any

import ray

from ray_ds.config.train import TrainSettings
from ray_ds.errors import ClusterError, ConfigError
from ray_ds.logs import log_event
from ray_ds.plan.devices import DeviceKind, Fleet, find_kind
from ray_ds.plan.speed import COPY_FRACTION, PRODUCT_FRACTION

KIND_RESOURCE = "accelerator_type:"
"""What Ray puts before a GPU's name in a node's resources."""
SMALLEST = {"A100": "a100-40gb"}
LARGEST = {"A100": "a100-80gb"}
"""Ray's names that leave the size open: the smallest is planned for, and what fits the largest is not refused."""
PRODUCT_SIZE = 1024
COPY_BYTES = 1 << 27
LOOPBACK_BYTES_PER_S = 1e9
"""Assumed between CPU workers, over gloo."""
MEASURE_TIMEOUT_S = 60.0


def cluster_fleet(settings: TrainSettings) -> Fleet:
    """Return the machines that a train step's workers would get on the cluster this process is connected to.

    Raises:
        ClusterError: its GPUs are of kinds that the plan does not know.
    """
    nodes = [node for node in ray.nodes() if node["Alive"]]
    gpus = [node for node in nodes if node["Resources"].get("GPU", 0) >= 1]
    if gpus and settings.device != "cpu":
        return gpu_fleet(gpus)
    return _cpu_fleet(nodes, settings)


def known_gpu_fleet() -> Fleet | None:
    """Return the GPUs of the cluster, or None where there are none or the plan does not know them all."""
    gpus = [node for node in ray.nodes() if node["Alive"] and node["Resources"].get("GPU", 0) >= 1]
    try:
        return gpu_fleet(gpus, open_names=LARGEST) if gpus else None
    except ClusterError as error:
        log_event("memory_not_checked", reason=str(error))
        return None


def gpu_fleet(nodes: list[dict[str, Any]], open_names: Mapping[str, str] = SMALLEST) -> Fleet:
    """Return the GPUs of some nodes, taken for as many of the kind with the least memory.

    Args:
        open_names: the kinds that Ray's names mean which leave the size open.
    Raises:
        ClusterError: a node does not say what its GPUs are, or the plan does not know them.
    """
    kinds = [_gpu_kind(node, open_names) for node in nodes]
    counts = [int(node["Resources"]["GPU"]) for node in nodes]
    return Fleet(
        kind=min(kinds, key=lambda kind: kind.memory_bytes), num_devices=sum(counts), devices_per_node=max(counts)
    )


def _gpu_kind(node: dict[str, Any], open_names: Mapping[str, str]) -> DeviceKind:
    names = [key.removeprefix(KIND_RESOURCE) for key in node["Resources"] if key.startswith(KIND_RESOURCE)]
    name = open_names.get(names[0], names[0]) if names else "unknown"
    try:
        return find_kind(name)
    except ConfigError as error:
        where = f"GPUs of node {node['NodeManagerAddress']}"
        raise ClusterError(where, name, error.allowed, "name a kind with --gpu") from error


def _cpu_fleet(nodes: list[dict[str, Any]], settings: TrainSettings) -> Fleet:
    """Return the nodes' CPUs, as fast as the first free one is found to be."""
    per_node = max(1, max(int(node["Resources"].get("CPU", 0) / settings.cpus_per_worker) for node in nodes))
    flops, fp32_flops, bandwidth, memory = ray.get(
        _measure.remote(settings.threads_per_worker), timeout=MEASURE_TIMEOUT_S
    )
    workers_here = min(per_node, settings.max_workers)
    kind = DeviceKind(
        name="CPU worker",
        memory_bytes=int(memory / workers_here),
        peak_flops=flops / PRODUCT_FRACTION,
        fp32_flops=fp32_flops / PRODUCT_FRACTION,
        bandwidth=bandwidth / COPY_FRACTION,
        link_bandwidth=LOOPBACK_BYTES_PER_S,
        source=f"measured with {settings.threads_per_worker} threads; memory of a node shared by {workers_here}",
    )
    return Fleet(
        kind=kind,
        num_devices=per_node * len(nodes),
        devices_per_node=per_node,
        network_gbit_per_s=8 * LOOPBACK_BYTES_PER_S / 1e9,
    )


@ray.remote(max_retries=1)  # type: ignore[untyped-decorator, unused-ignore]
def _measure(threads: int) -> tuple[float, float, float, int]:
    """Return a node's bf16 and fp32 products per second, bytes copied per second, and bytes of memory."""
    import torch

    torch.set_num_threads(threads)
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    rates = []
    for dtype in (torch.bfloat16, torch.float32):
        left = torch.ones(PRODUCT_SIZE, PRODUCT_SIZE, dtype=dtype)
        rates.append(2 * PRODUCT_SIZE**3 / _best_seconds(lambda left=left: left @ left))
    block = torch.ones(COPY_BYTES, dtype=torch.uint8)
    place = torch.empty_like(block)
    return rates[0], rates[1], 2 * COPY_BYTES / _best_seconds(lambda: place.copy_(block)), memory


def _best_seconds(work: Any) -> float:
    seconds = []
    for _ in range(5):
        started = time.perf_counter()
        work()
        seconds.append(time.perf_counter() - started)
    return min(seconds)
