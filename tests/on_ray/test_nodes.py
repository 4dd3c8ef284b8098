"""Which nodes training may use, from what Ray says of them and from asking them."""

import socket
from collections.abc import Iterator
from typing import Any

import pytest

from ray_ds.on_ray import nodes
from ray_ds.on_ray.nodes import reserved, usable_nodes
from ray_ds.on_ray.sizing import Node

NEED = {"CPU": 2.0}


@pytest.fixture
def port() -> Iterator[int]:
    """A port that answers."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield server.getsockname()[1]


def ray_node(name: str, port: int, *, alive: bool = True, cpus: float = 4.0) -> dict[str, Any]:
    """Return what `ray.nodes()` says of a node."""
    return {
        "NodeID": name,
        "Alive": alive,
        "Resources": {"CPU": cpus},
        "NodeManagerAddress": "127.0.0.1",
        "NodeManagerPort": port,
    }


def show_cluster(
    monkeypatch: pytest.MonkeyPatch,
    rows: list[dict[str, Any]],
    *,
    free: dict[str, float],
    draining: tuple[str, ...] = (),
) -> None:
    """Let Ray say this of its nodes."""
    monkeypatch.setattr(nodes.ray, "nodes", lambda: rows)
    monkeypatch.setattr(nodes.ray_state, "get_draining_nodes", lambda: dict.fromkeys(draining, 0))
    available = {name: {"CPU": cpus} for name, cpus in free.items()}
    monkeypatch.setattr(nodes.ray_state, "available_resources_per_node", lambda: available)


def test_dead_and_draining_nodes_and_those_without_room_are_left_out(
    monkeypatch: pytest.MonkeyPatch, port: int
) -> None:
    rows = [
        ray_node("good", port),
        ray_node("dead", port, alive=False),
        ray_node("leaving", port),
        ray_node("small", port, cpus=1.0),
    ]
    free = {"good": 4.0, "dead": 4.0, "leaving": 4.0, "small": 1.0}
    show_cluster(monkeypatch, rows, free=free, draining=("leaving",))
    assert usable_nodes(NEED, {}, 8) == [Node(node_id="good", address=("127.0.0.1", port), total=2, free=2)]


def test_a_node_that_ray_still_believes_in_but_that_does_not_answer_is_left_out(
    monkeypatch: pytest.MonkeyPatch, port: int
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        silent = server.getsockname()[1]
    rows = [ray_node("good", port), ray_node("silent", silent)]
    show_cluster(monkeypatch, rows, free={"good": 4.0, "silent": 4.0})
    assert [node.node_id for node in usable_nodes(NEED, {}, 8)] == ["good"]
    assert [node.node_id for node in usable_nodes(NEED, {}, 8, probe=False)] == ["good", "silent"]


@pytest.mark.parametrize(
    ("free", "held", "fits"),
    [(4.0, 0, 2), (0.0, 0, 0), (0.0, 1, 1), (2.0, 1, 2), (4.0, 2, 2)],
    ids=["empty", "taken by others", "ours beside others", "half ours", "no more than the node holds"],
)
def test_what_our_own_workers_hold_counts_as_free(
    monkeypatch: pytest.MonkeyPatch, port: int, free: float, held: int, fits: int
) -> None:
    show_cluster(monkeypatch, [ray_node("good", port)], free={"good": free})
    (node,) = usable_nodes(NEED, {"good": held}, 8)
    assert (node.total, node.free) == (2, fits)


@pytest.mark.parametrize(("state", "held"), [("RESCHEDULING", {"a": 2, "b": 1}), ("REMOVED", {})])
def test_a_placement_group_holds_room_until_it_is_removed(
    monkeypatch: pytest.MonkeyPatch, state: str, held: dict[str, int]
) -> None:
    table = {"state": state, "bundles_to_node_id": {0: "a", 1: "b", 2: "a"}}
    monkeypatch.setattr(nodes, "placement_group_table", lambda group: table)
    assert reserved(object()) == held
    assert reserved(None) == {}
