"""What workers of a check run: the real training loop, slowed down or killed at a set moment."""

import json
import os
import signal
import time
from collections.abc import Callable, Mapping

import torch

from ray_ds import storage
from ray_ds.train.host import Host, Request, SnapshotStore
from ray_ds.train.task import Stopped, TrainResult, TrainTask


class WatchedHost:
    """A host that does something after each step that is reported; otherwise the host that it is made of.

    Args:
        after_step: called with the step's record on every process.
    """

    def __init__(self, host: Host, after_step: Callable[[Mapping[str, float]], None]) -> None:
        self.rank: int = host.rank
        self.world_size: int = host.world_size
        self.device: torch.device = host.device
        self.snapshots: SnapshotStore | None = host.snapshots
        self._host = host
        self._after_step = after_step

    def report(self, record: Mapping[str, float]) -> None:
        """Report, then do it."""
        self._host.report(record)
        self._after_step(record)

    def request(self) -> Request:
        """Return what this process was asked for."""
        return self._host.request()

    def beat(self, place: str) -> None:
        """Say where this process is."""
        self._host.beat(place)

    def decline(self, reason: str) -> None:
        """Pass it on."""
        self._host.decline(reason)

    def check_alone(self) -> None:
        """Make sure that no other job has taken over the run."""
        self._host.check_alone()

    def safe(self, step: int, met: Request) -> Request:
        """Say that the state is safe."""
        return self._host.safe(step, met)


def train_paced(task: TrainTask, host: Host, *, pace_s: float, below: int | None = None) -> TrainResult | Stopped:
    """Train with a pause after each step.

    Args:
        below: pause only while there are fewer workers than this.
    """
    from ray_ds.train.loop import train  # brings DeepSpeed, which reads DS_ACCELERATOR when it is imported

    if below is not None and host.world_size >= below:
        return train(task, host)
    return train(task, WatchedHost(host, lambda record: time.sleep(pace_s)))


def train_and_die(task: TrainTask, host: Host, *, marker: str, after_s: float, pace_s: float) -> TrainResult | Stopped:
    """Train; once, the last worker ends by SIGKILL, `after_s` after its first step.

    Args:
        marker: URI of a file that says when that was; while it is not there, each step takes `pace_s` more.
    """
    from ray_ds.train.loop import train

    if storage.exists(marker):
        return train(task, host)
    begun = time.monotonic()

    def after_step(record: Mapping[str, float]) -> None:
        time.sleep(pace_s)
        if host.rank == host.world_size - 1 and time.monotonic() > begun + after_s:
            note = {"time": time.time(), "step": record["step"], "workers": host.world_size}
            storage.write_bytes(marker, json.dumps(note).encode())
            os.kill(os.getpid(), signal.SIGKILL)

    return train(task, WatchedHost(host, after_step))
