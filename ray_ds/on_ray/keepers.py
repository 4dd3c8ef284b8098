"""Snapshots in the memory of two nodes each: the driver's side, which starts keepers, and a training process's side."""

import threading
import time
from collections.abc import Collection, Iterable, Mapping, Sequence
from concurrent.futures import Future
from typing import Any, TypeVar

import ray
from ray.exceptions import RayError

from ray_ds.logs import log_event
from ray_ds.on_ray.hang_watch import Beat
from ray_ds.on_ray.keeper import PartKey, find_keepers, keeper_nodes, start_keeper
from ray_ds.on_ray.nodes import draining_nodes, which_answer
from ray_ds.on_ray.part_transfer import open_part, send_part
from ray_ds.train.host import Part
from ray_ds.train.stacks import ProcessView

K = TypeVar("K")

COPIES = 2
"""Nodes that hold a part, where there are as many."""
MEMORY_SHARE = 0.5
"""Of the memory that Ray counts on a node, what its keeper may hold."""
ASK_TIMEOUT_S = 1.0
"""Patience with a keeper that is asked what it has: its node may be dead before Ray knows."""
LATE_TIMEOUT_S = 10.0
"""More of it where the node answers: the keeper shares CPUs with workers that start."""
REFRESH_TIMEOUT_S = 0.1
"""The same where the question comes again in a second."""
VIEW_TIMEOUT_S = 30.0
"""The same for stack traces of many processes of a node."""
KILL_TIMEOUT_S = 5.0
START_TIMEOUT_S = 5.0
"""Patience with a keeper that is to take a part and has yet to start."""


class KeeperFleet:
    """The keepers of a run; they end with this process, or by `shutdown`."""

    def __init__(self, run_id: str) -> None:
        self._run_id = run_id
        self._keepers: dict[str, Any] = {}
        self._told: set[str] = set()
        """What was said of nodes, so that it is said once."""

    def refresh(self, homes: Collection[str]) -> None:
        """Start keepers where they are needed, end those that hold nothing elsewhere, drop outdated parts.

        An actor keeps its node from being idle, so that no autoscaler would take it away: other nodes get none. Waits
        for nobody; meant to be called every second or so.

        Args:
            homes: nodes of the workers, in any order; they may be dead.
        """
        limits = {
            node["NodeID"]: int(node["Resources"].get("memory", 0.0) * MEMORY_SHARE)
            for node in ray.nodes()
            if node["Alive"] and (node["Resources"].get("CPU") or node["Resources"].get("GPU"))
        }
        for node_id in self._keepers.keys() - limits.keys():
            del self._keepers[node_id]
        needed = _needed(homes, limits, self._keepers.keys())
        for node_id in needed - keeper_nodes(self._run_id):
            self._keepers[node_id] = start_keeper(self._run_id, node_id, limits[node_id])
        inventories = _inventories(self._keepers, REFRESH_TIMEOUT_S)
        newest = _newest_whole(inventories.values())
        if newest is not None:
            for keeper in self._keepers.values():
                keeper.drop_before.remote(newest[0].attempt, newest[0].number)
        self._tell_limits(needed)
        for node_id in inventories.keys() - needed:
            if not inventories[node_id]:
                ray.kill(self._keepers.pop(node_id))

    def _tell_limits(self, needed: Collection[str]) -> None:
        """Say where snapshots are not safe from a node's death, or find no room."""
        answers = _ask(
            {node_id: keeper.memory.remote() for node_id, keeper in self._keepers.items()}, REFRESH_TIMEOUT_S
        )
        for node_id, memory in answers.items():
            if memory.needed_bytes > memory.limit_bytes:
                facts = {"needed_bytes": memory.needed_bytes, "limit_bytes": memory.limit_bytes}
                self._tell_once("snapshots_need_memory", node_id, **facts, reason="parts beyond the limit are refused")
            if memory.held_bytes and needed == {node_id}:
                self._tell_once("snapshots_on_one_node", node_id, reason="no other node with CPUs or GPUs is there")

    def _tell_once(self, event: str, node_id: str, **facts: object) -> None:
        if f"{event} {node_id}" not in self._told:
            self._told.add(f"{event} {node_id}")
            log_event(event, node=node_id, **facts)

    def beats(self) -> list[Beat]:
        """Return where the training processes are; those of silent nodes are left out."""
        answers = _ask({node_id: keeper.beats.remote() for node_id, keeper in self._keepers.items()})
        return [beat for beats in answers.values() for beat in beats]

    def view(self, beats: Sequence[Beat]) -> dict[int, ProcessView]:
        """Return what processes are doing, by rank; those of silent nodes are left out."""
        asked = {
            beat.rank: self._keepers[beat.node_id].view.remote(beat.pid)
            for beat in beats
            if beat.node_id in self._keepers
        }
        return _ask(asked, VIEW_TIMEOUT_S)

    def kill(self, beat: Beat) -> bool:
        """Kill a process; tell whether it was there and is dead now."""
        keeper = self._keepers.get(beat.node_id)
        return keeper is not None and _ask({0: keeper.kill.remote(beat.pid, beat.started)}, KILL_TIMEOUT_S).get(
            0, False
        )

    def shutdown(self) -> None:
        """End the keepers, and with them what they keep."""
        for keeper in self._keepers.values():
            ray.kill(keeper)
        self._keepers.clear()


class Keepers:
    """A training process's way to the keepers of its run.

    Args:
        run_id: as the driver's `KeeperFleet` has it.
        rank: number of this process.
        nodes: Ray's id of each process's node, by rank.
        attempt: number of the worker group; greater than those of earlier groups of the run.
    """

    def __init__(self, run_id: str, *, rank: int, nodes: Sequence[str], attempt: int) -> None:
        self._run_id, self._rank, self._world_size, self._attempt = run_id, rank, len(nodes), attempt
        self._homes = _homes(nodes, rank)
        self._number = 0
        self._sent: Future[None] | None = None

    def put(self, part: Part) -> None:
        """Hand over this process's part; returns before it has arrived, after the last one has.

        A part that could not arrive is told in the log, and by `wait`: training goes on without it.
        """
        assert (part.rank, part.world_size) == (self._rank, self._world_size), "a part of this process"
        try:
            self.wait()
        except OSError as error:
            log_event("snapshot_lost", rank=self._rank, reason=str(error))
        self._number += 1
        self._sent = Future()
        threading.Thread(target=self._send, args=(part, self._number, self._sent), daemon=True).start()

    @property
    def is_sending(self) -> bool:
        """Whether a part is on its way now."""
        return self._sent is not None and not self._sent.done()

    def wait(self) -> None:
        """Wait until what was put last has arrived.

        Raises:
            OSError: it cannot arrive, for the memory that was to hold it is gone or full.
        """
        if self._sent is not None:
            self._sent.result()

    def newest_whole(self) -> int | None:
        """Return the newest step of which all parts are to be had."""
        newest = _newest_whole(_patient_inventories(find_keepers(self._run_id)).values())
        return newest[0].step if newest is not None else None

    def fetch(self, step: int) -> list[Part]:
        """Return all parts of a step, by rank. A tensor travels when it is first looked up, and stays.

        Raises:
            LookupError: they are no longer all there. Looking up a tensor may raise it later.
        """
        keepers = find_keepers(self._run_id)
        holders: dict[PartKey, list[Any]] = {}
        for node_id, keys in _patient_inventories(keepers).items():
            for key in keys:
                # This node's own keeper is asked first: nothing has to travel.
                place = 0 if node_id == self._homes[0] else len(keepers)
                holders.setdefault(key, []).insert(place, keepers[node_id])
        newest = _newest_whole([[key for key in holders if key.step == step]])
        if newest is None:
            raise LookupError(f"no whole snapshot of step {step} is left in the memory of the nodes")
        for keeper in keepers.values():
            keeper.drop_torn.remote(self._attempt, newest[0].whole)
        return [open_part(key, holders[key]) for key in newest]

    def _send(self, part: Part, number: int, sent: "Future[None]") -> None:
        """Send a part to the keepers of two nodes, and note in `sent` that it has arrived or why it did not."""
        try:
            key = PartKey(
                attempt=self._attempt, number=number, step=part.step, world_size=self._world_size, rank=self._rank
            )
            copies = send_part(part, key, self._takers(), copies=COPIES)
            needed = min(COPIES, len(self._homes))
            if copies < needed:
                raise OSError(f"{copies} of {needed} copies of step {part.step} found memory on a living node")
            sent.set_result(None)
        except BaseException as error:
            sent.set_exception(error if isinstance(error, OSError) else OSError(str(error)))

    def _takers(self) -> list[Any]:
        """Return the keepers that this process's parts go to, the first to take it first.

        They are its own node's, the next nodes' in the ring, and those of nodes without processes.
        """
        deadline = time.monotonic() + START_TIMEOUT_S
        keepers = find_keepers(self._run_id)
        while not keepers.keys() >= set(self._homes) and time.monotonic() < deadline:
            time.sleep(REFRESH_TIMEOUT_S)
            keepers = find_keepers(self._run_id)
        others = keepers.keys() - set(self._homes) - draining_nodes()
        return [keepers[node_id] for node_id in (*self._homes, *sorted(others)) if node_id in keepers]


def _homes(nodes: Sequence[str], rank: int) -> list[str]:
    """Return the nodes that have processes, each once, as a ring that begins at this process's own."""
    ring = list(dict.fromkeys(nodes))
    own = ring.index(nodes[rank])
    return ring[own:] + ring[:own]


def _needed(homes: Collection[str], limits: Mapping[str, int], kept: Collection[str]) -> set[str]:
    """Return the nodes that need a keeper: those of workers, and as many others as the copies lack.

    Args:
        homes: nodes of the workers.
        limits: what a keeper may hold on each living node.
        kept: nodes that have a keeper already, which stay.
    """
    needed = limits.keys() & set(homes)
    if not needed or len(needed) >= COPIES:
        return needed
    others = limits.keys() - needed - draining_nodes()
    best = sorted(others, key=lambda node_id: (node_id not in kept, -limits[node_id], node_id))
    return needed | set(best[: COPIES - len(needed)])


def _ask(questions: Mapping[K, Any], timeout_s: float = ASK_TIMEOUT_S) -> dict[K, Any]:
    """Return keepers' answers, named as the questions are; those that are gone or silent are left out."""
    answers: dict[K, Any] = {}
    if not questions:
        return answers
    ready, _ = ray.wait(list(questions.values()), num_returns=len(questions), timeout=timeout_s)
    for name, question in questions.items():
        if question in ready:
            try:
                answers[name] = ray.get(question)
            except RayError:  # its node died
                continue
    return answers


def _inventories(keepers: Mapping[str, Any], timeout_s: float = ASK_TIMEOUT_S) -> dict[str, list[PartKey]]:
    """Return the complete parts of each keeper that answers, by node."""
    return _ask({node_id: keeper.inventory.remote() for node_id, keeper in keepers.items()}, timeout_s)


def _patient_inventories(keepers: Mapping[str, Any]) -> dict[str, list[PartKey]]:
    """Return the complete parts of each keeper by node; what is left out is told in the log."""
    found = _inventories(keepers)
    if late := keepers.keys() - found.keys():
        living = which_answer(late)
        found |= _inventories({node_id: keepers[node_id] for node_id in living}, LATE_TIMEOUT_S)
        for node_id in late - found.keys():
            reason = "it is silent, its node is not" if node_id in living else "its node does not answer"
            log_event("keeper_left_out", node=node_id, reason=reason)
    return found


def _newest_whole(inventories: Iterable[Iterable[PartKey]]) -> list[PartKey] | None:
    """Return the parts of the newest snapshot of which all parts are there, by rank."""
    wholes: dict[tuple[int, int, int, int], set[PartKey]] = {}
    for keys in inventories:
        for key in keys:
            wholes.setdefault(key.whole, set()).add(key)
    found = [parts for parts in wholes.values() if len(parts) == next(iter(parts)).world_size]
    return sorted(max(found, key=min)) if found else None
