"""Time a snapshot's way into the memory of two nodes and back.

ray job submit --working-dir . -- python -m jobs.bench.snapshots --megabytes 10 100 1000
"""

import argparse
import json
import os
import statistics
import time
from collections.abc import Sequence
from typing import Any

import ray
import torch
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from ray_ds.on_ray.keeper import find_keepers
from ray_ds.on_ray.keepers import KeeperFleet, Keepers
from ray_ds.on_ray.session import connect
from ray_ds.train.host import Part

WARM_UP, ROUNDS = 2, 3
"""Snapshots of a size until keepers use their memory again, and those whose medians count."""
TENSORS = 4
"""Tensors of a part."""


@ray.remote(num_cpus=0)  # type: ignore[untyped-decorator, unused-ignore]
class _Process:
    """One of two training processes; it works on a small matrix while its snapshots travel."""

    def __init__(self, run_id: str, rank: int, nodes: Sequence[str]) -> None:
        torch.set_num_threads(1)
        self._rank, self._world_size = rank, len(nodes)
        self._keepers = Keepers(run_id, rank=rank, nodes=nodes, attempt=1)
        self._matrix = torch.randn(256, 256)

    def put(self, step: int, size: int) -> dict[str, float]:
        """Put a part of `size` bytes; return seconds, and how much slower the process worked meanwhile."""
        tensors = {f"t{i}": torch.randn(size // 4 // TENSORS) for i in range(TENSORS)}
        part = Part(step=step, rank=self._rank, world_size=self._world_size, index=None, tensors=tensors)
        quiet_s = self._work(lambda seconds: seconds < 0.5)
        started = time.perf_counter()
        self._keepers.put(part)
        stall_s = time.perf_counter() - started
        busy_s = self._work(lambda _: self._keepers.is_sending)
        self._keepers.wait()
        transfer_s = time.perf_counter() - started
        cost_s = stall_s + transfer_s * max(0.0, 1 - quiet_s / busy_s)
        return {"put_stall_s": stall_s, "transfer_s": transfer_s, "cost_s": cost_s}

    def fetch(self, step: int) -> float:
        """Return the seconds in which this process had the parts of all."""
        started = time.perf_counter()
        for part in self._keepers.fetch(step):
            for name in part.tensors:
                part.tensors[name]
        return time.perf_counter() - started

    def _work(self, goes_on: Any) -> float:
        """Work as long as wanted, at least once; return the seconds of a piece of work."""
        count, started = 0, time.perf_counter()
        while not count or goes_on(time.perf_counter() - started):
            self._matrix @ self._matrix
            count += 1
        return (time.perf_counter() - started) / count


def measure(sizes: Sequence[int]) -> list[dict[str, float]]:
    """Return a row of figures for each size in bytes; the cluster needs two nodes that can have workers."""
    run_id = f"bench-{os.urandom(4).hex()}"
    fleet = KeeperFleet(run_id)
    nodes = sorted(node["NodeID"] for node in ray.nodes() if node["Alive"] and node["Resources"].get("CPU"))[:2]
    fleet.refresh(nodes)
    ray.get([keeper.inventory.remote() for keeper in find_keepers(run_id).values()])
    places = [NodeAffinitySchedulingStrategy(node, soft=False) for node in nodes]
    processes = [
        _Process.options(scheduling_strategy=place).remote(run_id, rank, nodes) for rank, place in enumerate(places)
    ]
    try:
        return [{"megabytes": size / 1e6, **_measure(fleet, nodes, processes, size)} for size in sizes]
    finally:
        fleet.shutdown()


def _measure(fleet: KeeperFleet, nodes: Sequence[str], processes: Sequence[Any], size: int) -> dict[str, float]:
    """Return the figures of a snapshot of two parts of a size, of the slower process."""
    rows = []
    for _ in range(WARM_UP + ROUNDS):
        step = time.time_ns()
        both = ray.get([process.put.remote(step, size) for process in processes])
        worst = {name: max(row[name] for row in both) for name in both[0]}
        rows.append({**worst, "fetch_s": ray.get(processes[0].fetch.remote(step))})
        fleet.refresh(nodes)
    return {name: statistics.median(row[name] for row in rows[WARM_UP:]) for name in rows[0]}


def main() -> None:
    """Print a table in Markdown and the same as one line of JSON."""
    parser = argparse.ArgumentParser(description="Time snapshots.")
    parser.add_argument("--megabytes", type=int, nargs="+", default=[10, 100, 1000])
    options = parser.parse_args()
    connect()
    rows = measure([megabytes * 10**6 for megabytes in options.megabytes])
    print("| " + " | ".join(rows[0]) + " |\n" + "|---" * len(rows[0]) + "|")
    for row in rows:
        print("| " + " | ".join(f"{value:.4g}" for value in row.values()) + " |")
    figures = {
        f"{name}_{row['megabytes']:g}mb": value for row in rows for name, value in row.items() if name != "megabytes"
    }
    inputs = {"megabytes": options.megabytes, "nodes": len(ray.nodes()), "copies": 2}
    print(json.dumps({"name": "snapshots", "inputs": inputs, "figures": figures, "peers": {}}))


if __name__ == "__main__":
    main()
