"""The nodes that training may use: alive, not about to leave, and answering."""

import socket
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor

import ray
from ray._private.state import state as ray_state
from ray.util.placement_group import PlacementGroup, placement_group_table

from ray_ds.on_ray.sizing import Node, workers_that_fit

PROBE_TIMEOUT_S = 2.0
"""Enough for one lost packet; a stopped process still accepts, and a dead one refuses at once."""


def usable_nodes(need: Mapping[str, float], held: Mapping[str, int], most: int, *, probe: bool = True) -> list[Node]:
    """Return the nodes that live, stay and, if asked, answer, with the workers they hold.

    Args:
        need: resources of a worker.
        held: workers of this run by node, whose resources count as free.
        most: workers that a node counts for where workers need nothing.
    """
    draining = draining_nodes()
    available = ray_state.available_resources_per_node()
    nodes = []
    for node in ray.nodes():
        node_id = node["NodeID"]
        if not node["Alive"] or node_id in draining:
            continue
        total = workers_that_fit(node["Resources"], need, most)
        free = min(total, workers_that_fit(available.get(node_id, {}), need, most) + held.get(node_id, 0))
        address = (node["NodeManagerAddress"], node["NodeManagerPort"])
        if total:
            nodes.append(Node(node_id=node_id, address=address, total=total, free=free))
    return answering(nodes) if probe else nodes


def reserved(group: PlacementGroup | None) -> Counter[str]:
    """Return the bundles that a placement group holds on each node; none where it is gone, or there is none.

    Ray moves those of a dead node to another one that has room.
    """
    if group is None:
        return Counter()
    table = placement_group_table(group)
    return Counter() if table["state"] == "REMOVED" else Counter(table["bundles_to_node_id"].values())


def draining_nodes() -> set[str]:
    """Return the nodes that were told to leave, by `ray drain-node`, the autoscaler or a spot notice."""
    return set(ray_state.get_draining_nodes())


def answering(nodes: Sequence[Node]) -> list[Node]:
    """Return the nodes whose raylet accepts a connection; Ray itself takes seconds to notice a death."""
    reached = _which_accept({node.node_id: node.address for node in nodes})
    return [node for node in nodes if node.node_id in reached]


def which_answer(node_ids: Collection[str]) -> set[str]:
    """Return those of the nodes whose raylet accepts a connection."""
    return _which_accept(
        {
            node["NodeID"]: (node["NodeManagerAddress"], node["NodeManagerPort"])
            for node in ray.nodes()
            if node["Alive"] and node["NodeID"] in node_ids
        }
    )


def _which_accept(addresses: Mapping[str, tuple[str, int]]) -> set[str]:
    """Return the nodes where something listens."""
    if not addresses:
        return set()
    with ThreadPoolExecutor(max_workers=min(64, len(addresses))) as pool:
        answers = pool.map(_accepts, addresses.values())
        return {node_id for node_id, is_up in zip(addresses, answers, strict=True) if is_up}


def _accepts(address: tuple[str, int]) -> bool:
    """Tell whether something listens at an address."""
    try:
        socket.create_connection(address, timeout=PROBE_TIMEOUT_S).close()
    except OSError:
        return False
    return True
