"""Finding a process that training waits for in vain, and what it was doing."""

import math
import re
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from ray_ds import storage
from ray_ds.logs import log_event
from ray_ds.train.stacks import ProcessView

SLOW_S = 1800.0
"""Least patience outside of steps, and in the first step after a start, which may compile kernels for many minutes; the
docstring of `hang_timeout_s` in the settings says so too."""
SAFE = "safe"
"""Where a process is that is done and waits to be ended."""
KILL_ALL_S = 30.0
"""Time after which the others are killed too, where a hung process's end did not end them."""
LOOKS = 20
"""Looks at the processes within `timeout_s`, at most `MAX_LOOK_S` apart."""
MAX_LOOK_S = 5.0
_STEP = re.compile(r"\bstep (\d+)")


@dataclass(frozen=True, kw_only=True, slots=True)
class Beat:
    """Where a training process is."""

    attempt: int
    """Number of its worker group."""
    rank: int
    world_size: int
    node_id: str
    pid: int
    started: int
    """The process's start time in the kernel's ticks; with `pid` it names one process for good."""
    place: str
    """Such as `step 12 micro-batch 3`. All processes pass through the same places in the same order."""
    step: int | None
    """The last step that was named; None before the first."""
    within: int
    """Places since that step began."""
    is_warm: bool
    """Whether the process has left its first step behind."""
    silent_s: float = 0.0
    """Time since it came to a new place."""


def step_of(place: str) -> int | None:
    """Return the step that a place names."""
    found = _STEP.search(place)
    return int(found[1]) if found else None


def patience_s(beat: Beat, timeout_s: float) -> float:
    """Return how long a process may stay where it is.

    That is `timeout_s` in a step; `SLOW_S` at least in the first step after a start, which may compile, and in all that
    is no step: the start, validation, keeping the state, writing the model. A process that is `safe` may stay for ever.
    """
    if beat.place.startswith(SAFE):
        return math.inf
    in_step = beat.is_warm and step_of(beat.place) is not None
    return timeout_s if in_step else max(timeout_s, SLOW_S)


def find_hung(beats: Sequence[Beat], timeout_s: float) -> Beat | None:
    """Return the process that the others wait for, if nobody gets on.

    Processes of one step depend on each other, so a hung one soon keeps all of them: nothing is hung while one still
    gets on. The one that is furthest behind is the one the others wait for. Those that are `safe` do not count, and
    while the state of one is unknown, because its node is silent or it has yet to start, nothing is said.
    """
    if not beats or {beat.rank for beat in beats} != set(range(beats[0].world_size)):
        return None
    waiting = [beat for beat in beats if not beat.place.startswith(SAFE)]
    if not waiting or any(beat.silent_s <= patience_s(beat, timeout_s) for beat in waiting):
        return None
    return min(waiting, key=lambda beat: (-1 if beat.step is None else beat.step, beat.within, -beat.silent_s))


class NodeWatchers(Protocol):
    """Who sees the training processes on each node, such as `KeeperFleet`."""

    def beats(self) -> Sequence[Beat]:
        """Return where the processes are; those of silent nodes are left out. Returns within a second or so."""

    def view(self, beats: Sequence[Beat]) -> Mapping[int, ProcessView]:
        """Return what processes are doing, by rank; those of silent nodes are left out."""

    def kill(self, beat: Beat) -> bool:
        """Kill a process; tell whether it was there and is dead now."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Hang:
    """A process that was hung, and is killed now."""

    beat: Beat
    traces: str
    """The file with the stack traces of all processes."""


class HangWatch:
    """Looks for a hung process, keeps the stack traces of all, and kills it, so that Ray replaces the workers.

    Args:
        timeout_s: patience with a step, as `hang_timeout_s` in the settings.
        watchers: who sees the processes.
        traces_uri: folder on shared storage for the stack traces.
    """

    def __init__(self, timeout_s: float, watchers: NodeWatchers, traces_uri: str) -> None:
        self._timeout_s, self._watchers, self._traces_uri = timeout_s, watchers, traces_uri
        self._next_look = -math.inf
        self._killed: tuple[int, float] | None = None
        """The worker group of which one process was killed, and when."""

    def look(self, now: float) -> Hang | None:
        """Look, if it is time to; return the process that was hung.

        Args:
            now: of a clock that never jumps. Call it every second or so; taking the traces takes some seconds.
        """
        if now < self._next_look:
            return None
        self._next_look = now + min(MAX_LOOK_S, self._timeout_s / LOOKS)
        beats = self._watchers.beats()
        newest = max((beat.attempt for beat in beats), default=0)
        beats = [beat for beat in beats if beat.attempt == newest]
        if self._killed is not None and self._killed[0] == newest:
            self._kill_rest(beats, now)
            return None
        suspect = find_hung(beats, self._timeout_s)
        return self._end(suspect, beats, now) if suspect is not None else None

    def _end(self, suspect: Beat, beats: Sequence[Beat], now: float) -> Hang:
        """Keep the traces, tell of the hung process and kill it."""
        views = self._watchers.view(beats)
        # What the kernel has stopped is at fault, whoever seems to be behind.
        stopped = [beat for beat in beats if beat.rank in views and views[beat.rank].is_stopped]
        hung = suspect if suspect in stopped or not stopped else stopped[0]
        traces = self._write(hung, beats, views)
        log_event("hung", rank=hung.rank, node=hung.node_id, place=hung.place, seconds=hung.silent_s, traces=traces)
        self._killed = (hung.attempt, now)
        self._watchers.kill(hung)
        return Hang(beat=hung, traces=traces)

    def _write(self, hung: Beat, beats: Sequence[Beat], views: Mapping[int, ProcessView]) -> str:
        """Write the traces and return where they are; training goes on even where they cannot be written."""
        stamp = time.strftime("%Y%m%dT%H%M%SZ", time.gmtime())
        uri = storage.join(self._traces_uri, f"{stamp}-rank-{hung.rank}.txt")
        try:
            storage.write_bytes(uri, describe(hung, beats, views).encode())
        except OSError as error:
            return f"could not be written to {uri}: {error}"
        return uri

    def _kill_rest(self, beats: Sequence[Beat], now: float) -> None:
        """Kill what is left of a group some time after its hung process was killed: it should have ended by itself."""
        assert self._killed is not None
        attempt, since = self._killed
        if now < since + KILL_ALL_S:
            return
        killed = [beat.rank for beat in beats if self._watchers.kill(beat)]
        if killed:
            log_event("hung_rest_killed", ranks=killed, seconds=now - since)
        self._killed = (attempt, now)


def describe(hung: Beat, beats: Sequence[Beat], views: Mapping[int, ProcessView]) -> str:
    """Return a report of a hang: who is where, the hung process first, then what each was doing."""
    order = sorted(beats, key=lambda beat: (beat.rank != hung.rank, beat.rank))
    lines = [f"rank {hung.rank} is hung: the others wait for it", ""]
    lines += [
        f"rank {beat.rank}: {beat.place!r} for {beat.silent_s:.0f} s, pid {beat.pid} on node {beat.node_id}"
        for beat in order
    ]
    for beat in order:
        view = views.get(beat.rank)
        lines += ["", f"===== rank {beat.rank} =====", view.text if view is not None else "its node did not answer\n"]
    return "\n".join(lines)
