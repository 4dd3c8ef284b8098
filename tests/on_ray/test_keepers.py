import os
import signal
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

os.environ["RAY_AUTH_MODE"] = "disabled"  # read when ray is imported

import numpy as np
import pytest
import ray
import torch
import xxhash
from ray.cluster_utils import Cluster
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy
from torch import Tensor

from ray_ds.on_ray import keepers
from ray_ds.on_ray.keeper import (
    KeeperMemory,
    PartHeader,
    PartKey,
    SnapshotKeeper,
    TensorPlace,
    find_keepers,
    start_keeper,
)
from ray_ds.on_ray.keepers import KeeperFleet, Keepers
from ray_ds.on_ray.part_transfer import CHUNK_BYTES
from ray_ds.train.host import Part
from tests.on_ray.two_nodes import add_node, raylet_pid, start_cluster, wait_for


def make_part(step: int, rank: int, world_size: int, *, elements: int = 3_000_000) -> Part:
    """Return a part whose tensors follow from its arguments: one of several chunks, many small ones, one empty."""
    random = torch.Generator().manual_seed(1000 * step + rank)
    tensors = {f"small {i}": torch.randn(17 + i, generator=random).to(torch.bfloat16) for i in range(50)}
    tensors["large"] = torch.randn(elements, generator=random)
    tensors["empty"] = torch.zeros(0)
    tensors["count"] = torch.tensor([step], dtype=torch.int64)
    return Part(step=step, rank=rank, world_size=world_size, index={"of": [step, rank]}, tensors=tensors)


def is_same(found: Part, made: Part) -> bool:
    """Tell whether two parts are the same bit by bit."""
    assert (found.step, found.rank, found.world_size, found.index) == (
        made.step,
        made.rank,
        made.world_size,
        made.index,
    )
    assert list(found.tensors) == list(made.tensors)
    return all(is_same_tensor(found.tensors[name], tensor) for name, tensor in made.tensors.items())


def is_same_tensor(found: Tensor, made: Tensor) -> bool:
    return found.dtype == made.dtype and torch.equal(found.view(torch.uint8), made.view(torch.uint8))


def put_by_hand(
    keeper: SnapshotKeeper, *, number: int, rank: int = 0, attempt: int = 1, size: int = 10, damage: bool = False
) -> tuple[bool, PartKey]:
    """Put a part of one tensor; tell whether it counts."""
    data = np.full(size, number, np.uint8)
    key = PartKey(attempt=attempt, number=number, step=10 * number, world_size=2, rank=rank)
    place = TensorPlace(dtype="uint8", start=0, stop=size, xxh3=xxhash.xxh3_64_intdigest(data.data))
    if not keeper.begin(PartHeader(key=key, index=None, places={"x": place})):
        return False, key
    keeper.add(key, 0, [data + 1 if damage else data])
    return keeper.finish(key), key


def held(keeper: SnapshotKeeper) -> int:
    return keeper.memory().held_bytes


def test_keeper_holds_the_newest_two_parts_of_each_process() -> None:
    keeper = SnapshotKeeper(1000)
    keys = [put_by_hand(keeper, number=number, rank=rank)[1] for rank in (0, 1) for number in (1, 2, 3)]
    assert keeper.inventory() == sorted([*keys[1:3], *keys[4:6]])
    assert held(keeper) == 60, "the memory of the third is kept for the fourth"


def test_memory_of_a_dropped_part_is_used_for_the_next_one_of_its_process() -> None:
    keeper = SnapshotKeeper(1000)
    for number in range(1, 10):
        put_by_hand(keeper, number=number)
        put_by_hand(keeper, number=number, rank=1, size=30)
        assert held(keeper) <= 3 * (10 + 30)
    keeper.drop_before(1, 9)
    assert held(keeper) == 2 * (10 + 30)
    _, key = put_by_hand(keeper, number=10, size=20)
    assert held(keeper) == 10 + 20 + 2 * 30, "of another size it is given back"
    assert keeper.read(key, 5, 7).tolist() == [10, 10]
    put_by_hand(keeper, number=1, attempt=2)
    keeper.drop_before(2, 1)
    assert held(keeper) == 10 + 20, "and that of processes that are no more, too"


def test_part_of_a_later_worker_group_is_newer_though_its_step_is_lower() -> None:
    keeper = SnapshotKeeper(1000)
    for attempt, number in ((1, 5), (1, 6), (2, 1), (2, 2)):
        put_by_hand(keeper, number=number, attempt=attempt)
    assert [(key.attempt, key.step) for key in keeper.inventory()] == [(2, 10), (2, 20)]


def test_snapshot_that_training_goes_on_from_outlives_newer_torn_ones() -> None:
    keeper = SnapshotKeeper(1000)
    keys = [put_by_hand(keeper, number=number)[1] for number in (1, 2)]
    keeper.drop_torn(2, keys[0].whole)
    _, first = put_by_hand(keeper, number=1, attempt=2)
    assert keeper.inventory() == [keys[0], first]
    keeper.drop_torn(2, keys[0].whole)
    assert keeper.inventory() == [keys[0], first], "what the group itself made stays"


def test_torn_part_does_not_count_and_gives_its_memory_back() -> None:
    keeper = SnapshotKeeper(1000)
    _, whole = put_by_hand(keeper, number=1)
    place = TensorPlace(dtype="uint8", start=0, stop=500, xxh3=0)
    torn = PartKey(attempt=1, number=2, step=20, world_size=2, rank=0)
    assert keeper.begin(PartHeader(key=torn, index=None, places={"x": place}))
    assert (keeper.inventory(), held(keeper)) == ([whole], 510)
    counts, third = put_by_hand(keeper, number=3)
    assert counts
    assert (keeper.inventory(), held(keeper)) == ([whole, third], 20)
    keeper.add(torn, 0, [np.zeros(500, np.uint8)])
    assert not keeper.finish(torn)


def test_damaged_part_does_not_count() -> None:
    keeper = SnapshotKeeper(1000)
    assert put_by_hand(keeper, number=1, damage=True)[0] is False
    assert (keeper.inventory(), held(keeper)) == ([], 0)


def test_part_beyond_the_memory_is_refused() -> None:
    keeper = SnapshotKeeper(25)
    assert [put_by_hand(keeper, number=number)[0] for number in (1, 2, 3)] == [True, True, False]
    keeper.drop_before(1, 2)
    assert put_by_hand(keeper, number=4)[0]
    assert [key.number for key in keeper.inventory()] == [2, 4]


def test_keeper_knows_what_it_needs_before_it_has_to_refuse() -> None:
    keeper = SnapshotKeeper(50)
    assert all(put_by_hand(keeper, number=1, rank=rank)[0] for rank in (0, 1))
    assert keeper.memory() == KeeperMemory(held_bytes=20, needed_bytes=60, limit_bytes=50)
    put_by_hand(keeper, number=1, attempt=2)
    keeper.drop_before(2, 1)
    assert keeper.memory().needed_bytes == 30, "processes that are no more need nothing"


@pytest.mark.parametrize(
    ("homes", "kept", "needed"),
    [
        ([], ["a"], set()),
        (["a", "a", "b", "c"], [], {"a", "b", "c"}),
        (["a", "b"], ["c"], {"a", "b"}),
        (["a", "dead"], [], {"a", "large"}),
        (["a"], ["b"], {"a", "b"}),
        (["a"], ["leaving"], {"a", "large"}),
    ],
)
def test_keepers_are_where_workers_are_and_on_another_node_for_those_on_one(
    monkeypatch: pytest.MonkeyPatch, homes: list[str], kept: list[str], needed: set[str]
) -> None:
    monkeypatch.setattr(keepers, "draining_nodes", lambda: {"leaving"})
    limits = {"a": 10, "b": 10, "c": 10, "large": 20, "leaving": 30}
    assert keepers._needed(homes, limits, kept) == needed


@ray.remote(num_cpus=0)
class Process:
    """A training process that does nothing but put snapshots."""

    def join(self, run_id: str, rank: int, nodes: Sequence[str], attempt: int) -> None:
        self.rank, self.world_size = rank, len(nodes)
        self.keepers = Keepers(run_id, rank=rank, nodes=nodes, attempt=attempt)

    def put(self, step: int) -> None:
        self.keepers.put(make_part(step, self.rank, self.world_size))
        self.keepers.wait()

    def find(self) -> int | None:
        return self.keepers.newest_whole()

    def sees_same(self, step: int, world_size: int) -> bool:
        parts = self.keepers.fetch(step)
        assert len(parts) == world_size
        return all(is_same(part, make_part(step, rank, world_size)) for rank, part in enumerate(parts))


def join_run(processes: Sequence[Any], run_id: str, nodes: Sequence[str], attempt: int = 1) -> None:
    """Make the processes a worker group of a run."""
    ray.get([process.join.remote(run_id, rank, nodes, attempt) for rank, process in enumerate(processes)])


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    with start_cluster() as cluster:
        yield cluster


@pytest.fixture(scope="module")
def nodes(cluster: Cluster) -> list[str]:
    return [node.node_id for node in cluster.worker_nodes]


@pytest.fixture(scope="module")
def processes(nodes: list[str]) -> list[Any]:
    """Return one process on each node."""
    places = [NodeAffinitySchedulingStrategy(node, soft=False) for node in nodes]
    return [Process.options(scheduling_strategy=place).remote() for place in places]


def start_fleet(run_id: str, nodes: Sequence[str]) -> tuple[KeeperFleet, Mapping[str, Any]]:
    fleet = KeeperFleet(run_id)
    fleet.refresh(nodes)
    keepers = find_keepers(run_id)
    assert keepers.keys() == set(nodes)
    ray.get([keeper.inventory.remote() for keeper in keepers.values()], timeout=60)
    return fleet, keepers


def inventories(keepers: Mapping[str, Any]) -> list[list[PartKey]]:
    found: list[list[PartKey]] = ray.get([keeper.inventory.remote() for keeper in keepers.values()])
    return found


def held_bytes(keepers: Mapping[str, Any]) -> list[int]:
    return [memory.held_bytes for memory in ray.get([keeper.memory.remote() for keeper in keepers.values()])]


@pytest.mark.ray
def test_step_is_whole_once_all_parts_of_one_worker_group_have_arrived(nodes: list[str], processes: list[Any]) -> None:
    fleet, _ = start_fleet("whole", nodes)
    join_run(processes, "whole", nodes)
    first, second = processes
    assert ray.get(first.find.remote()) is None
    ray.get(first.put.remote(8))
    assert ray.get(first.find.remote()) is None
    ray.get(second.put.remote(8))
    assert ray.get(first.find.remote()) == 8
    ray.get(first.put.remote(9))
    assert ray.get(first.find.remote()) == 8
    assert ray.get(second.sees_same.remote(8, 2))
    join_run(processes, "whole", nodes, attempt=2)
    assert ray.get(first.sees_same.remote(8, 2))
    ray.get(first.put.remote(9))
    assert ray.get(first.find.remote()) == 8, "the next group's first part has put out what it goes on from"
    join_run([first], "whole", nodes[:1], attempt=3)
    ray.get(first.put.remote(5))
    assert ray.get(second.find.remote()) == 5
    assert ray.get(second.sees_same.remote(5, 1))
    fleet.shutdown()


@pytest.mark.ray
def test_newer_whole_makes_the_older_ones_give_their_memory_back(nodes: list[str], processes: list[Any]) -> None:
    fleet, keepers = start_fleet("trim", nodes)
    join_run(processes, "trim", nodes)
    for step in (1, 2):
        ray.get([process.put.remote(step) for process in processes])
    size = sum(tensor.nbytes for tensor in make_part(1, 0, 2).tensors.values())
    ray.get(processes[0].put.remote(3))
    assert held_bytes(keepers) == [5 * size] * 2
    fleet.refresh(nodes)
    wait_for(lambda: [len(keys) for keys in inventories(keepers)] == [3, 3])
    ray.get(processes[1].put.remote(3))
    fleet.refresh(nodes)
    wait_for(lambda: [len(keys) for keys in inventories(keepers)] == [2, 2])
    assert held_bytes(keepers) == [4 * size] * 2, "what holds a snapshot, and memory for the next"
    assert ray.get(processes[0].find.remote()) == 3
    fleet.shutdown()


@pytest.mark.ray
def test_damaged_bytes_are_never_returned(nodes: list[str], processes: list[Any]) -> None:
    fleet, keepers = start_fleet("damaged", nodes)
    process = processes[0]
    join_run([process], "damaged", nodes[:1])
    ray.get(process.put.remote(3))

    def damage(keeper: SnapshotKeeper) -> None:
        for _, data in keeper._complete.values():
            data[-1] ^= 1

    asker = Keepers("damaged", rank=0, nodes=nodes[:1], attempt=2)
    (part,), (again,) = asker.fetch(3), asker.fetch(3)
    ray.get(keepers[nodes[0]].__ray_call__.remote(damage))
    assert is_same(part, make_part(3, 0, 1)), "the other copy is whole"
    ray.get(keepers[nodes[1]].__ray_call__.remote(damage))
    with pytest.raises(LookupError, match="count of rank 0 at step 3 is no longer in the memory of the nodes"):
        again.tensors["count"]
    with pytest.raises(LookupError, match="no whole snapshot of step 4"):
        asker.fetch(4)
    fleet.shutdown()


@pytest.mark.ray
def test_part_that_finds_no_keeper_is_told_by_wait(nodes: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(keepers, "START_TIMEOUT_S", 0.5)
    sender = Keepers("nobody", rank=0, nodes=nodes, attempt=1)
    sender.put(make_part(1, 0, 2))
    with pytest.raises(OSError, match="0 of 2 copies of step 1 found memory on a living node"):
        sender.wait()
    assert sender.newest_whole() is None


@pytest.mark.ray
def test_part_waits_for_a_keeper_that_starts(nodes: list[str]) -> None:
    fleet = KeeperFleet("starting")
    sender = Keepers("starting", rank=0, nodes=nodes[:1], attempt=1)
    sender.put(make_part(1, 0, 1))
    time.sleep(0.5)
    fleet.refresh(nodes[:1])
    sender.wait()
    assert sender.newest_whole() == 1
    fleet.shutdown()


@pytest.mark.ray
@pytest.mark.shows("Where all workers are on one node, their snapshots are on another node too")
def test_workers_on_one_node_have_copies_on_another(nodes: list[str], processes: list[Any]) -> None:
    fleet = KeeperFleet("alone")
    fleet.refresh(nodes[:1])
    wait_for(lambda: find_keepers("alone").keys() == set(nodes))
    join_run(processes[:1], "alone", nodes[:1])
    ray.get(processes[0].put.remote(3))
    assert [len(keys) for keys in inventories(find_keepers("alone"))] == [1, 1]
    fleet.shutdown()


def pid_of(keeper: Any) -> int:
    pid: int = ray.get(keeper.__ray_call__.remote(lambda _: os.getpid()))
    return pid


@pytest.mark.ray
def test_keeper_that_is_late_is_waited_for_and_one_that_stays_silent_is_told(
    nodes: list[str], processes: list[Any], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    keeper = start_keeper("late", nodes[1], 10**9)
    pid = pid_of(keeper)
    join_run(processes[1:], "late", nodes[1:])
    ray.get(processes[1].put.remote(5))
    asker = Keepers("late", rank=0, nodes=nodes, attempt=2)
    os.kill(pid, signal.SIGSTOP)
    try:
        threading.Timer(2 * keepers.ASK_TIMEOUT_S, os.kill, (pid, signal.SIGCONT)).start()
        assert asker.newest_whole() == 5
        os.kill(pid, signal.SIGSTOP)
        monkeypatch.setattr(keepers, "LATE_TIMEOUT_S", 1.0)
        with caplog.at_level("INFO", logger="ray_ds"):
            assert asker.newest_whole() is None
        assert f"keeper_left_out node={nodes[1]}" in caplog.text
    finally:
        os.kill(pid, signal.SIGKILL)


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.shows("A node without workers stays idle beside a training run, so that an autoscaler may remove it")
def test_nodes_that_no_worker_is_on_any_more_are_left(cluster: Cluster, nodes: list[str], processes: list[Any]) -> None:
    add_node(cluster)
    (added,) = [node for node in cluster.worker_nodes if node.node_id not in nodes]
    third = added.node_id
    fleet, _ = start_fleet("left", nodes)
    join_run(processes, "left", nodes)
    ray.get([process.put.remote(1) for process in processes])
    fleet.refresh([nodes[0], third])
    wait_for(lambda: find_keepers("left").keys() == {*nodes, third})
    wait_for(lambda: fleet.refresh([nodes[0], third]) or len(fleet._keepers) == 3)
    join_run(processes[:1], "left", [nodes[0], third], attempt=2)
    newcomer = Keepers("left", rank=1, nodes=[nodes[0], third], attempt=2)
    newcomer.put(make_part(2, 1, 2))
    ray.get(processes[0].put.remote(2))
    newcomer.wait()
    wait_for(lambda: fleet.refresh([nodes[0], third]) or find_keepers("left").keys() == {nodes[0], third})
    assert newcomer.newest_whole() == 2
    fleet.shutdown()
    cluster.remove_node(added)


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.shows("A snapshot of training outlives the death of any one node, bit by bit, in the memory of the others")
def test_newest_whole_snapshot_outlives_a_killed_node(cluster: Cluster, nodes: list[str], processes: list[Any]) -> None:
    fleet, _ = start_fleet("killed", nodes)
    join_run(processes, "killed", nodes)
    for step in (4, 6):
        ray.get([process.put.remote(step) for process in processes])
    assert make_part(6, 0, 2).tensors["large"].nbytes > 2 * CHUNK_BYTES
    os.kill(raylet_pid(cluster, nodes[1]), signal.SIGKILL)
    started = time.monotonic()
    survivor = processes[0]
    join_run([survivor], "killed", nodes[:1], attempt=2)
    assert ray.get(survivor.find.remote(), timeout=60) == 6
    assert ray.get(survivor.sees_same.remote(6, 2), timeout=60)
    assert time.monotonic() - started < 20
    wait_for(lambda: find_keepers("killed").keys() == {nodes[0]})
    fleet.refresh(nodes[:1])
    ray.get(survivor.put.remote(7), timeout=60)
    assert ray.get(survivor.find.remote()) == 7
    fleet.shutdown()
