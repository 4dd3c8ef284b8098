"""The keeper of a node: an actor outside the training processes that holds parts of snapshots and sees who is hung."""

import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt
import ray
import xxhash
from pydantic import JsonValue
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from ray_ds.on_ray.hang_watch import Beat
from ray_ds.on_ray.session import NAMESPACE
from ray_ds.train.stacks import ProcessView, kill_process, view_process

F = TypeVar("F", bound=Callable[..., Any])
Bytes = npt.NDArray[np.uint8]
KEPT = 2
"""Complete parts that a keeper holds of a process; the next one may be arriving beside them."""
CONCURRENCY = {"bulk": 4}
"""Threads of a keeper for parts on their way."""
WATCH_THREADS = 8
"""Its other threads: for what must be answered at once meanwhile."""


@dataclass(frozen=True, kw_only=True, slots=True, order=True)
class PartKey:
    """Names a part; in this order, the greater one is newer."""

    attempt: int
    """The worker group that made it; a later group has a greater number."""
    number: int
    """Snapshots of this group up to it; the step alone is no order, for training may roll back."""
    step: int
    world_size: int
    rank: int

    @property
    def whole(self) -> tuple[int, int, int, int]:
        """Return what all parts of one whole have in common, and no other."""
        return self.attempt, self.number, self.step, self.world_size


@dataclass(frozen=True, kw_only=True, slots=True)
class TensorPlace:
    """Where a tensor's bytes lie in a part."""

    dtype: str
    start: int
    stop: int
    xxh3: int
    """xxh3_64 of the bytes."""


@dataclass(frozen=True, kw_only=True, slots=True)
class PartHeader:
    """A part without its bytes."""

    key: PartKey
    index: JsonValue
    places: Mapping[str, TensorPlace]

    @property
    def bytes(self) -> int:
        """Size of the part's tensors together."""
        return max((place.stop for place in self.places.values()), default=0)


@dataclass(frozen=True, kw_only=True, slots=True)
class KeeperMemory:
    """What a keeper's parts take of its node's memory."""

    held_bytes: int
    needed_bytes: int
    """For as many parts of each process as it holds at the most."""
    limit_bytes: int


def is_intact(data: Bytes, place: TensorPlace) -> bool:
    """Tell whether a tensor's bytes are those that were put."""
    return data.nbytes == place.stop - place.start and xxhash.xxh3_64_intdigest(data.data) == place.xxh3


def bulk(method: F) -> F:
    """Have an actor run a method on the threads that are for parts."""
    marked: F = ray.method(concurrency_group="bulk")(method)
    return marked


class SnapshotKeeper:
    """Parts in memory: of each process the newest two that are complete, and one that is arriving.

    It also knows where the training processes of its node are, and sees them from outside. As an actor it lives as long
    as the driver that started it and its node.

    Args:
        limit_bytes: a part that would need more is refused.
    """

    def __init__(self, limit_bytes: int) -> None:
        self._limit_bytes = limit_bytes
        self._complete: dict[PartKey, tuple[PartHeader, Bytes]] = {}
        self._arriving: dict[PartKey, tuple[PartHeader, Bytes]] = {}
        self._spare: dict[int, Bytes] = {}
        """By rank, the memory of a dropped part for the next one: fresh memory costs ten times what filling it does."""
        self._sizes: dict[int, int] = {}
        """By rank, the size of its last part, whether there was room for it or not."""
        self._beats: dict[int, tuple[Beat, float]] = {}
        self._lock = threading.Lock()

    def begin(self, header: PartHeader) -> bool:
        """Make room for a part; an unfinished one of the same process is dropped. Tell whether there was room."""
        with self._lock:
            for torn in [key for key in self._arriving if key.rank == header.key.rank]:
                del self._arriving[torn]
            self._sizes[header.key.rank] = header.bytes
            buffer = self._memory(header.key.rank, header.bytes)
            if buffer is not None:
                self._arriving[header.key] = (header, buffer)
            return buffer is not None

    @bulk
    def add(self, key: PartKey, start: int, pieces: Sequence[Bytes]) -> None:
        """Copy bytes into a part that is arriving, piece after piece; those of a part that was dropped are ignored."""
        with self._lock:
            arriving = self._arriving.get(key)
        if arriving is None:
            return
        buffer = arriving[1]
        for piece in pieces:
            buffer[start : start + piece.nbytes] = piece
            start += piece.nbytes

    @bulk
    def finish(self, key: PartKey) -> bool:
        """Count a part that has arrived in full and undamaged; drop any other. Tell which it was."""
        with self._lock:
            arrived = self._arriving.get(key)
        if arrived is None:
            return False
        header, buffer = arrived
        is_whole = all(is_intact(buffer[place.start : place.stop], place) for place in header.places.values())
        with self._lock:
            if self._arriving.pop(key, None) is None:  # dropped meanwhile
                return False
            if is_whole:
                self._complete[key] = arrived
                for old in sorted(one for one in self._complete if one.rank == key.rank)[:-KEPT]:
                    self._spare[key.rank] = self._complete.pop(old)[1]
        return is_whole

    def drop_before(self, attempt: int, number: int) -> None:
        """Drop all parts of older snapshots than this one."""
        self._drop(lambda key: (key.attempt, key.number) < (attempt, number))

    def drop_torn(self, attempt: int, whole: tuple[int, int, int, int]) -> None:
        """Drop all parts of worker groups before this one but those of a snapshot that it goes on from.

        Nobody completes them any more, and as newer ones they would outlive those of that snapshot.
        """
        self._drop(lambda key: key.attempt < attempt and key.whole != whole)

    def _drop(self, is_dropped: Callable[[PartKey], bool]) -> None:
        with self._lock:
            for held in (self._complete, self._arriving):
                for key in [key for key in held if is_dropped(key)]:
                    _, buffer = held.pop(key)
                    if held is self._complete:  # into a part that was arriving, somebody may still write
                        self._spare[key.rank] = buffer
            ranks = {key.rank for key in self._complete}
            for rank in self._spare.keys() - ranks:
                del self._spare[rank]
            self._sizes = {rank: size for rank, size in self._sizes.items() if rank in ranks}

    def inventory(self) -> list[PartKey]:
        """Return the complete parts."""
        with self._lock:
            return sorted(self._complete)

    def header(self, key: PartKey) -> PartHeader:
        """Return what a part says beside its tensors; KeyError where it is not complete."""
        with self._lock:
            return self._complete[key][0]

    @bulk
    def read(self, key: PartKey, start: int, stop: int) -> Bytes:
        """Return some of a part's bytes; KeyError where it is not complete."""
        with self._lock:
            return self._complete[key][1][start:stop].copy()  # the part may be dropped before this has travelled

    def memory(self) -> KeeperMemory:
        """Return how much memory the parts take, and may."""
        with self._lock:
            needed = (KEPT + 1) * sum(self._sizes.values())
            return KeeperMemory(held_bytes=self._bytes(), needed_bytes=needed, limit_bytes=self._limit_bytes)

    def beat(self, beat: Beat) -> None:
        """Note where a process of this node is; who comes from an older worker group than others is ignored."""
        with self._lock:
            newest = max((known.attempt for known, _ in self._beats.values()), default=beat.attempt)
            if beat.attempt > newest:
                self._beats.clear()
            if beat.attempt >= newest:
                known, since = self._beats.get(beat.rank, (None, 0.0))
                self._beats[beat.rank] = (beat, since if beat == known else time.monotonic())

    def leave(self, attempt: int, rank: int) -> None:
        """Forget a process that has ended well."""
        with self._lock:
            if rank in self._beats and self._beats[rank][0].attempt == attempt:
                del self._beats[rank]

    def beats(self) -> list[Beat]:
        """Return where this node's processes are, and for how long they have been there."""
        now = time.monotonic()
        with self._lock:
            return [replace(beat, silent_s=now - since) for beat, since in self._beats.values()]

    def view(self, pid: int) -> ProcessView:
        """Return what a process of this node is doing."""
        return view_process(pid)

    def kill(self, pid: int, started: int) -> bool:
        """Kill a process of this node; tell whether it was there."""
        return kill_process(pid, started)

    def _memory(self, rank: int, size: int) -> Bytes | None:
        """Return memory for a part, that of a dropped one where it fits; None where the limit is reached."""
        spare = self._spare.pop(rank, None)
        if spare is not None and spare.nbytes == size:
            return spare
        return np.empty(size, np.uint8) if self._bytes() + size <= self._limit_bytes else None

    def _bytes(self) -> int:
        held = [buffer for parts in (self._complete, self._arriving) for _, buffer in parts.values()]
        return sum(buffer.nbytes for buffer in [*held, *self._spare.values()])


def keeper_prefix(run_id: str) -> str:
    """Return how the names of a run's keepers begin."""
    return f"keeper-{run_id}-"


def start_keeper(run_id: str, node_id: str, limit_bytes: int) -> Any:
    """Return the handle of a node's keeper, which starts now or runs already; does not wait for it."""
    actor = ray.remote(concurrency_groups=CONCURRENCY, max_concurrency=WATCH_THREADS)(SnapshotKeeper)
    return actor.options(
        name=keeper_prefix(run_id) + node_id,
        namespace=NAMESPACE,
        get_if_exists=True,
        num_cpus=0,
        scheduling_strategy=NodeAffinitySchedulingStrategy(node_id, soft=False),
    ).remote(limit_bytes)


def keeper_nodes(run_id: str) -> set[str]:
    """Return the ids of the nodes that have a keeper of a run, also of those that died a moment ago."""
    prefix = keeper_prefix(run_id)
    return {
        actor["name"].removeprefix(prefix)
        for actor in ray.util.list_named_actors(all_namespaces=True)
        if actor["namespace"] == NAMESPACE and actor["name"].startswith(prefix)
    }


def find_keepers(run_id: str) -> dict[str, Any]:
    """Return the handles of a run's keepers by node."""
    found = {}
    for node_id in keeper_nodes(run_id):
        try:
            found[node_id] = ray.get_actor(keeper_prefix(run_id) + node_id, namespace=NAMESPACE)
        except ValueError:  # it died in between
            continue
    return found
