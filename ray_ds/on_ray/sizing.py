"""How many workers train, as a function of what the cluster holds; no Ray here."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

ROUNDING = 1e-6
"""Ray counts resources in ten-thousandths; a sum of them may miss a whole number by less."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Sizes:
    """The numbers of workers that may train."""

    min_workers: int
    max_workers: int
    allowed: tuple[int, ...] | None = None
    """Absent = all from the least to the most."""

    def largest(self, room: int) -> int:
        """Return the largest size that fits where `room` workers do; 0 where none does."""
        sizes = self.allowed or range(self.min_workers, self.max_workers + 1)
        return max((size for size in sizes if self.min_workers <= size <= min(room, self.max_workers)), default=0)


@dataclass(frozen=True, kw_only=True, slots=True)
class Node:
    """A node that training may use, in workers."""

    node_id: str
    address: tuple[str, int]
    """Host and port of its raylet."""
    total: int
    """Workers that it would hold if nothing else ran there."""
    free: int
    """Workers that it holds now: those of this run and those for which it has resources left."""


def workers_that_fit(resources: Mapping[str, float], need: Mapping[str, float], most: int) -> int:
    """Return how many workers that each need `need` fit into `resources`, at most `most`."""
    counts = [int(resources.get(name, 0.0) / amount + ROUNDING) for name, amount in need.items() if amount > 0]
    return min([most, *counts])


def room(nodes: Iterable[Node]) -> int:
    """Return how many workers the nodes hold now."""
    return sum(node.free for node in nodes)


class Offer:
    """How long a larger size has been on offer, the same and without a break."""

    def __init__(self) -> None:
        self._size = 0
        self._since = 0.0

    def stands(self, size: int, now: float) -> float:
        """Note the size on offer, 0 for none that is larger; return for how long it has been the same, in seconds."""
        if size != self._size:
            self._size, self._since = size, now
        return now - self._since if size else 0.0


def joining(nodes: Iterable[Node], held: Mapping[str, int], size: int) -> dict[str, int]:
    """Return where workers will be added to come to `size`, by node, counting those held now."""
    left = size - sum(held.values())
    added: dict[str, int] = {}
    for node in nodes:
        count = min(left, node.free - held.get(node.node_id, 0))
        if count > 0:
            added[node.node_id] = count
            left -= count
    return added
