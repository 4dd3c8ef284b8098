"""A training process's word of where it is, to the keeper of its node."""

import os
import threading
from contextlib import suppress
from typing import Any

import ray
from ray.exceptions import RayError

from ray_ds.on_ray.hang_watch import Beat, step_of
from ray_ds.on_ray.keeper import keeper_prefix
from ray_ds.on_ray.session import NAMESPACE
from ray_ds.train.stacks import offer_stacks, start_time

PULSE_S = 1.0
"""Time between two words to the keeper."""
CLOSE_TIMEOUT_S = 2.0


class Pulse:
    """Says every second where this process is, from a thread of its own, until it is closed.

    Args:
        run_id: as the driver's `KeeperFleet` has it.
        rank: number of this process.
        world_size: processes of its worker group.
        attempt: number of the worker group; greater than those of earlier groups of the run.
    """

    def __init__(self, run_id: str, *, rank: int, world_size: int, attempt: int) -> None:
        offer_stacks()
        self._node_id: str = ray.get_runtime_context().get_node_id()
        self._keeper_name = keeper_prefix(run_id) + self._node_id
        self._rank, self._world_size, self._attempt = rank, world_size, attempt
        self._pid = os.getpid()
        self._started = start_time(self._pid) or 0
        self._is_warm = False
        self._beat = self._make_beat("start", step=None, within=0)
        self._keeper: Any = None
        self._heard: Any = None
        self._is_closed = threading.Event()
        self._thread = threading.Thread(target=self._say, daemon=True)
        self._thread.start()

    def beat(self, place: str) -> None:
        """Note that this process came to a place; takes some microseconds."""
        step = step_of(place)
        last = self._beat
        if step is None or step == last.step:
            self._beat = self._make_beat(place, step=last.step, within=last.within + 1)
            return
        self._is_warm = last.step is not None
        self._beat = self._make_beat(place, step=step, within=0)

    def close(self) -> None:
        """Say no more: this process has ended well."""
        self._is_closed.set()
        self._thread.join()
        if self._keeper is not None:
            # The keeper may take what comes at once in any order, and this process may end when this returns.
            ray.wait([self._heard], timeout=CLOSE_TIMEOUT_S)
            ray.wait([self._keeper.leave.remote(self._attempt, self._rank)], timeout=CLOSE_TIMEOUT_S)

    def _make_beat(self, place: str, *, step: int | None, within: int) -> Beat:
        return Beat(
            attempt=self._attempt,
            rank=self._rank,
            world_size=self._world_size,
            node_id=self._node_id,
            pid=self._pid,
            started=self._started,
            place=place,
            step=step,
            within=within,
            is_warm=self._is_warm,
        )

    def _say(self) -> None:
        while True:
            with suppress(ValueError):  # no keeper yet; the next second may have one
                self._say_once()
            if self._is_closed.wait(PULSE_S):
                return

    def _say_once(self) -> None:
        """Say it to the keeper, or to its successor where the last word found it dead."""
        if self._heard is not None and ray.wait([self._heard], timeout=0)[0]:
            try:
                ray.get(self._heard)
            except RayError:
                self._keeper = None
        if self._keeper is None:
            self._heard = None
            self._keeper = ray.get_actor(self._keeper_name, namespace=NAMESPACE)
        self._heard = self._keeper.beat.remote(self._beat)
