"""Warm processes that wait for the next group of workers."""

import os
import signal
from collections.abc import Iterator
from types import SimpleNamespace

import pytest
import ray
from ray.exceptions import GetTimeoutError
from ray.train.v2._internal.exceptions import WorkerGroupStartupFailedError

from ray_ds.on_ray import spares as spares_module
from ray_ds.on_ray.spares import START_TIMEOUT_S, SparedController, SparedWorkerGroup, Spares
from tests.on_ray.two_nodes import wait_for

pytestmark = pytest.mark.ray

MODULES = ("wave", "chunk")


@pytest.fixture(scope="module")
def node_id() -> Iterator[str]:
    """The one node of a cluster of this process."""
    os.environ["RAY_AUTH_MODE"] = "disabled"
    ray.init("local", num_cpus=1, object_store_memory=80_000_000, include_dashboard=False, log_to_driver=False)
    yield ray.get_runtime_context().get_node_id()
    ray.shutdown()


def loaded_modules(actor: object) -> set[str]:
    """Return which of the modules the process of a spare has imported."""

    def look() -> list[str]:
        import sys

        return [name for name in ("wave", "chunk") if name in sys.modules]

    return set(ray.get(actor.execute.remote(look)))  # type: ignore[attr-defined]


def test_spares_hold_no_resources_and_have_imported_what_a_worker_needs(node_id: str) -> None:
    spares = Spares({}, MODULES)
    spares.keep({node_id: 2})
    wait_for(lambda: spares.are_warm({node_id: 2}))
    assert ray.available_resources()["CPU"] == 1
    taken = [spares.take(node_id), spares.take(node_id)]
    assert all(loaded_modules(actor) == set(MODULES) for actor, _ in filter(None, taken))
    assert taken[0] is not None and taken[1] is not None and taken[0][1].node_id == node_id
    assert spares.take(node_id) is None, "a spare that was taken is none any more"
    for spare in filter(None, taken):
        ray.kill(spare[0])


def test_a_spare_that_died_is_passed_over_and_replaced(node_id: str) -> None:
    spares = Spares({}, MODULES)
    spares.keep({node_id: 2})
    wait_for(lambda: spares.are_warm({node_id: 2}))
    first, _ = spares._by_node[node_id][0]
    os.kill(ray.get(first.execute.remote(os.getpid)), signal.SIGKILL)
    found = spares.take(node_id)
    assert found is not None and found[0] is not first
    assert spares.take(node_id) is None
    spares.keep({node_id: 1})
    wait_for(lambda: spares.are_warm({node_id: 1}))
    spares.keep({})
    assert spares.take(node_id) is None, "spares on nodes where none are wanted are ended"
    ray.kill(found[0])


def test_without_modules_there_are_no_spares(node_id: str) -> None:
    spares = Spares({}, ())
    spares.keep({node_id: 1})
    assert spares.are_warm({node_id: 1}) and spares.take(node_id) is None


@pytest.mark.parametrize("is_held", [True, False])
def test_a_group_that_fails_late_in_its_start_gives_its_room_back(
    monkeypatch: pytest.MonkeyPatch, is_held: bool
) -> None:
    done: list[str] = []

    class Group:
        def _start(self) -> None:
            raise WorkerGroupStartupFailedError("a worker died while it started")

        def has_started(self) -> bool:
            return is_held

        def shutdown(self) -> None:
            done.append("shutdown")

    monkeypatch.setattr("ray_ds.on_ray.spares.SparedWorkerGroup", Group)
    with pytest.raises(WorkerGroupStartupFailedError):
        SparedController.create(SimpleNamespace(_spares=None))
    assert done == (["shutdown"] if is_held else [])


class Silent:
    """Ray as it is where a process neither answers nor dies; it notes what is killed."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.killed: list[object] = []
        monkeypatch.setattr(spares_module.ray, "get", self._get)
        monkeypatch.setattr(spares_module.ray, "kill", self.killed.append)
        monkeypatch.setattr(spares_module, "placement_group_table", lambda _: {"bundles_to_node_id": {0: "node"}})

    def _get(self, answer: object, timeout: float | None = None) -> None:
        assert timeout == START_TIMEOUT_S, "it would wait for ever"
        raise GetTimeoutError("no answer")


def silent_actor() -> SimpleNamespace:
    return SimpleNamespace(get_metadata=SimpleNamespace(remote=lambda: None))


def test_a_spare_that_does_not_answer_is_passed_over(monkeypatch: pytest.MonkeyPatch) -> None:
    ray_, actor, spares = Silent(monkeypatch), silent_actor(), Spares({}, MODULES)
    spares._by_node["node"].append((actor, None))
    assert spares.take("node") is None and ray_.killed == [actor]


def test_a_group_whose_worker_does_not_answer_has_not_started(monkeypatch: pytest.MonkeyPatch) -> None:
    ray_, actor = Silent(monkeypatch), silent_actor()
    group = object.__new__(SparedWorkerGroup)
    group.spares = Spares({}, ())
    monkeypatch.setattr(group, "_start_cold", lambda *_: actor)
    with pytest.raises(WorkerGroupStartupFailedError, match=r"^a worker did not start in 120 s$"):
        group._create_workers(1, None, {"CPU": 1})
    assert ray_.killed == [actor]
