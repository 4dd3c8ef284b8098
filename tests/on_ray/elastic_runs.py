"""Elastic runs for tests: a loop that counts steps instead of training, and a run of it to watch and disturb."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import psutil
import ray
import torch
import torch.distributed
from ray.cluster_utils import Cluster

from ray_ds.on_ray.board import Event
from ray_ds.on_ray.trainer import TrainLoop, train_on_ray
from ray_ds.train.host import Host, Request
from ray_ds.train.task import Stopped, TrainResult, TrainTask
from tests.on_ray.two_nodes import add_node, raylet_pid, wait_for
from tests.train.runs import make_settings, make_task

STEP_S = 0.05


def count_steps(task: TrainTask, host: Host) -> TrainResult | Stopped:
    """Count to the last step as the training loop trains: it goes on from a file and is safe once that is written."""
    state = Path(task.checkpoints) / "step.json"
    state.parent.mkdir(parents=True, exist_ok=True)
    step: int = json.loads(state.read_text()) if state.exists() else 0
    while step < task.settings.num_steps:
        host.beat(f"step {step + 1}")
        request = torch.tensor(int(host.request()))
        torch.distributed.all_reduce(request, op=torch.distributed.ReduceOp.MAX)
        asked = Request(int(request))
        if asked is not Request.NONE:
            save(state, step, host)
            torch.distributed.barrier()
            while asked is not Request.STOP:
                asked = host.safe(step, asked)
            return Stopped(step=step)
        time.sleep(STEP_S)
        step += 1
        host.report({"step": step, "workers": host.world_size, "time": time.time()})
        if step % task.settings.checkpoint_every == 0:
            save(state, step, host)
    return TrainResult(
        step=step,
        model_step=step,
        tokens=0,
        train_loss=0.0,
        validation_loss=None,
        tokens_per_s=0.0,
        mfu=None,
        goodput=1.0,
        lost_s=0.0,
        restarts=0,
    )


def save(state: Path, step: int, host: Host) -> None:
    """Write the state, from one process and at once."""
    if host.rank == 0:
        part = state.with_suffix(".part")
        part.write_text(str(step))
        part.rename(state)


class Run:
    """A run in a thread, with what it said so far."""

    def __init__(self, folder: Path, *, loop: TrainLoop = count_steps, **settings: Any) -> None:
        options = {
            "steps": 100_000,
            "checkpoint_every": 10,
            "num_workers": [1, 2],
            "max_failures": 2,
            "snapshot_every": 0,
            **settings,
        }
        if isinstance(options["num_workers"], list) and options.get("scaling") != "stock":
            options.setdefault("grow_pause_s", 1.0)
        self.task = make_task(folder, make_settings(**options))
        self.records: list[Mapping[str, float]] = []
        self.events: list[Event] = []
        self.result: TrainResult | None = None
        self.error: BaseException | None = None
        self.work = folder / "ray_train"
        self.stop = threading.Event()
        self.thread = threading.Thread(target=self._run, args=(loop,))
        self.thread.start()

    def _run(self, loop: TrainLoop) -> None:
        try:
            self.result = train_on_ray(
                self.task,
                work=str(self.work),
                on_report=self.records.append,
                on_event=self.events.append,
                stop=self.stop,
                loop=loop,
            )
        except BaseException as error:
            self.error = error

    @property
    def workers(self) -> int:
        """Return how many workers did the last step; 0 before the first."""
        return int(self.records[-1]["workers"]) if self.records else 0

    @property
    def steps(self) -> list[int]:
        """Return the steps that were done, in order."""
        return [int(record["step"]) for record in self.records]

    def wait_until(self, holds: Callable[["Run"], bool]) -> None:
        """Wait until something holds, or fail with why the run ended."""
        wait_for(lambda: holds(self) or not self.thread.is_alive())
        assert holds(self), f"the run ended: {self.error or self.result}"

    def end(self) -> None:
        """Stop the run and wait for its end."""
        self.stop.set()
        self.thread.join(60)
        assert not self.thread.is_alive()

    def kinds(self) -> list[str]:
        """Return what happened, in order."""
        return [event.kind for event in self.events]


def worker_node_ids() -> list[str]:
    """Return the living nodes that have CPUs."""
    return [node["NodeID"] for node in ray.nodes() if node["Alive"] and node["Resources"].get("CPU")]


def kill_node(cluster: Cluster, node_id: str) -> None:
    """Kill a node's raylet and all its workers at once."""
    raylet = psutil.Process(raylet_pid(cluster, node_id))
    for process in [raylet, *raylet.children(recursive=True)]:
        os.kill(process.pid, signal.SIGKILL)


def drain_node(cluster: Cluster, node_id: str, deadline_s: int) -> None:
    """Tell a node to leave, as a spot notice does."""
    command = ["drain-node", "--address", cluster.address, "--node-id", node_id]
    reason = ["--reason", "DRAIN_NODE_REASON_PREEMPTION", "--reason-message", "spot notice"]
    deadline = ["--deadline-remaining-seconds", str(deadline_s)]
    subprocess.run([sys.executable, "-m", "ray.scripts.scripts", *command, *reason, *deadline], check=True)


def bring_to(cluster: Cluster, count: int) -> None:
    """Bring the cluster to `count` worker nodes that live and stay."""
    ids = [node_id for node_id in worker_node_ids() if node_id not in ray._private.state.state.get_draining_nodes()]
    for node_id in ids[count:]:
        kill_node(cluster, node_id)
    for _ in range(count - len(ids)):
        add_node(cluster, wait=False)
    wait_for(lambda: len(worker_node_ids()) == count)
