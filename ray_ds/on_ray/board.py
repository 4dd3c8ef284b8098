"""The notice board of a training run: what is asked of its workers, what they say, and what happened when.

It lives on the driver's node, outlives the workers, and ends with the job.
"""

import math
import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import ray
from pydantic import JsonValue
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from ray_ds.on_ray.hang_watch import step_of
from ray_ds.train.host import Request


@dataclass(frozen=True, kw_only=True, slots=True)
class Event:
    """Something that happened to the run."""

    time: float
    """Seconds since 1970."""
    kind: str
    """`workers_started`, `stepping`, `pause_asked`, `leave_asked`, `pause_withdrawn`, `safe`, `resizing`,
    `workers_lost`, `stop_asked`, `waiting_for_nodes`."""
    facts: Mapping[str, JsonValue]
    """What belongs to it: `attempt`, `workers`, `step`, `reason`."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Look:
    """The board at a moment, as the scaling policy needs it."""

    request: Request
    is_safe: bool
    """Whether all workers of the group said that their state is as safe as is asked."""
    any_safe: bool
    """Whether one of them did."""


@dataclass(frozen=True, kw_only=True, slots=True)
class News:
    """What the driver has not seen yet."""

    records: Sequence[Mapping[str, float]]
    events: Sequence[Event]
    nodes: Sequence[str]
    """The nodes of the workers of the newest group that all have joined."""
    silent_s: float
    """Time since a worker was heard of, in seconds; infinite before the first one was."""


@dataclass(kw_only=True, slots=True)
class _Worker:
    """What one worker last said."""

    node_id: str = ""
    step: int = 0
    """The last one that it was in."""
    met: Request = Request.NONE
    """The request that its state was made safe for."""


@dataclass
class Board:
    """The board itself, without Ray; every method returns at once."""

    request: Request = Request.NONE
    attempt: int = 0
    """Number of the worker group, from 1; what an older one says is ignored."""
    num_workers: int = 0
    furthest: int = 0
    """The furthest step that a lost group was at."""
    failures: int = 0
    """Groups lost in a row without a step further than the ones before."""
    _workers: dict[int, _Worker] = field(default_factory=dict)
    _records: list[Mapping[str, float]] = field(default_factory=list)
    _events: list[Event] = field(default_factory=list)
    _nodes: list[str] = field(default_factory=list)
    _is_stepping: bool = False
    _is_lost: bool = False
    _heard_at: float = -math.inf
    """By the monotonic clock."""

    def begin(self, num_workers: int) -> None:
        """Note that a new group starts; what its predecessor was asked is done, unless it was to stop."""
        self.attempt += 1
        self.num_workers = num_workers
        self._workers = {}
        self._is_stepping = self._is_lost = False
        if self.request is not Request.STOP:
            self.request = Request.NONE
        self.note("workers_started", {"attempt": self.attempt, "workers": num_workers})

    def join(self, rank: int, num_workers: int, node_id: str) -> int:
        """Take in one of the new group's workers, on a node; return the group's number.

        Ray Train's own policy announces no group; there, the first worker that comes again begins one.
        """
        if self.attempt == 0 or rank in self._workers:
            self.begin(num_workers)
        self._workers[rank] = _Worker(node_id=node_id)
        if len(self._workers) == self.num_workers:
            self._nodes = [worker.node_id for worker in self._workers.values()]
        self._heard_at = time.monotonic()
        return self.attempt

    def beat(self, attempt: int, rank: int, place: str) -> Request:
        """Note where a worker is; return what is asked of it."""
        self._heard_at = time.monotonic()
        worker = self._worker(attempt, rank)
        if worker is not None:
            worker.step = step_of(place) or worker.step
        return self.request

    def stepping(self, attempt: int, step: int) -> None:
        """Note the first step that a group does; each of its workers says it."""
        if attempt == self.attempt and not self._is_stepping and not self._is_lost:
            self._is_stepping = True
            self.note("stepping", {"attempt": attempt, "workers": self.num_workers, "step": step})

    def safe(self, attempt: int, rank: int, step: int, met: Request) -> None:
        """Note that a worker's state is as safe as a request asked for, and that it does no more."""
        worker = self._worker(attempt, rank)
        if worker is not None:
            worker.met = met
            if self._is_safe():
                self.note("safe", {"attempt": attempt, "step": step})

    def report(self, record: Mapping[str, float]) -> None:
        """Take a step's figures for the driver."""
        self._records.append(record)

    def ask(self, request: Request, reason: str) -> None:
        """Ask the workers for something, unless they were asked for as much; a request to stop stays."""
        if request > self.request:
            self.request = request
            self.note(f"{request.name.lower()}_asked", {"reason": reason})

    def withdraw(self, reason: str) -> None:
        """Ask for no pause any more."""
        if self.request in (Request.PAUSE, Request.LEAVE):
            self.request = Request.NONE
            self.note("pause_withdrawn", {"reason": reason})

    def fail(self, facts: Mapping[str, JsonValue]) -> int:
        """Note that the group is lost; return how many were in a row that came no further than those before.

        A group whose state was safe lost nothing and does not count.
        """
        if self._is_safe():
            return 0
        reached = max((worker.step for worker in self._workers.values()), default=0)
        self.failures = 1 if reached > self.furthest else self.failures + 1
        self.furthest = max(self.furthest, reached)
        self._workers = {}
        self._is_lost = True
        row = {"attempt": self.attempt, "step": reached, "in_a_row": self.failures}
        self.note("workers_lost", {**row, **facts})
        return self.failures

    def note(self, kind: str, facts: Mapping[str, JsonValue]) -> None:
        """Write an event down."""
        self._events.append(Event(time=time.time(), kind=kind, facts=dict(facts)))

    def look(self) -> Look:
        """Return the board for the scaling policy."""
        any_safe = any(worker.met is not Request.NONE for worker in self._workers.values())
        return Look(request=self.request, is_safe=self._is_safe(), any_safe=any_safe)

    def collect(self, num_events: int) -> News:
        """Return the events behind the first `num_events`, and all figures since the last call."""
        records, self._records = self._records, []
        silent_s = time.monotonic() - self._heard_at
        return News(records=records, events=self._events[num_events:], nodes=self._nodes, silent_s=silent_s)

    def _worker(self, attempt: int, rank: int) -> _Worker | None:
        """Return a worker of the present group; None for one of an older group, or of one that is given up."""
        if attempt != self.attempt or self._is_lost:
            return None
        return self._workers.setdefault(rank, _Worker())

    def _is_safe(self) -> bool:
        """Tell whether the whole group is as safe as it was asked to be."""
        needed = max(self.request, Request.PAUSE)
        return 0 < self.num_workers == len(self._workers) and all(
            worker.met >= needed for worker in self._workers.values()
        )


def open_board(name: str) -> Any:
    """Start the board of a run on this process's node and return its handle."""
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    actor = ray.remote(num_cpus=0, max_restarts=0)(Board)
    return actor.options(name=f"{name}-{os.urandom(4).hex()}", scheduling_strategy=here).remote()
