"""Shards of an object store: one fetch a node, checked, ahead of use, within a budget, whoever is killed."""

import errno
import hashlib
import multiprocessing
import os
import signal
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from ray_ds import storage
from ray_ds.data.shard_cache import ShardCache
from ray_ds.data.shard_folder import ShardFile
from ray_ds.errors import ArtifactError, ClusterError
from tests.data.fake_store import BUCKET, FakeStore, installed_store, open_all, read

SIZE = 1 << 18
SPAWN = multiprocessing.get_context("spawn")


@pytest.fixture
def store(tmp_path: Path) -> Iterator[FakeStore]:
    with installed_store(tmp_path) as store:
        yield store


def put(store: FakeStore, count: int, size: int = SIZE) -> list[ShardFile]:
    shards = []
    for number in range(count):
        data = hashlib.shake_128(str(number).encode()).digest(size)
        (store.root / f"{number}.arrow").write_bytes(data)
        uri = f"{BUCKET}/{number}.arrow"
        shards.append(ShardFile(uri=uri, bytes=size, sha256=hashlib.sha256(data).hexdigest()))
    return shards


def held(cache: ShardCache, shards: list[ShardFile]) -> list[int]:
    return [number for number, shard in enumerate(shards) if (cache._folder.path / f"{shard.sha256}.arrow").exists()]


def wait_for(is_true: Callable[[], bool], timeout_s: float = 20.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not is_true():
        assert time.monotonic() < deadline
        time.sleep(0.005)


@pytest.mark.shows("Shards on an object store are fetched once a node, whatever the number of processes, and checked")
def test_processes_that_start_together_fetch_once(tmp_path: Path, store: FakeStore) -> None:
    shards = put(store, 4)
    slow = FakeStore(store.root, store.log, block_s=0.02)
    barrier = SPAWN.Barrier(3)
    workers = [SPAWN.Process(target=open_all, args=(slow, tmp_path / "cache", shards, barrier)) for _ in range(3)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(60)
    assert [worker.exitcode for worker in workers] == [0] * 3
    assert Counter(store.fetched()) == {shard.uri: 1 for shard in shards}
    assert not list((tmp_path / "cache").glob("*.partial"))


def test_threads_of_a_process_fetch_once(tmp_path: Path, store: FakeStore) -> None:
    (shard,) = put(store, 1)
    FakeStore(store.root, store.log, block_s=0.02).install()
    cache = ShardCache(tmp_path / "cache")
    threads = [threading.Thread(target=read, args=(cache, shard)) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert store.fetched() == [shard.uri]


@pytest.mark.parametrize("is_waiting", [False, True])
def test_a_killed_fetch_is_taken_over(tmp_path: Path, store: FakeStore, is_waiting: bool) -> None:
    """Whether another process comes after the kill or waits for the shard already, it goes on at once."""
    (shard,) = put(store, 1)
    stuck = FakeStore(store.root, store.log, block_s=60.0)
    folder = tmp_path / "cache"
    barrier = SPAWN.Barrier(1)
    worker = SPAWN.Process(target=open_all, args=(stuck, folder, [shard], barrier))
    worker.start()
    wait_for(lambda: store.fetched() == [shard.uri])
    waiter = threading.Thread(target=read, args=(ShardCache(folder), shard))
    if is_waiting:
        waiter.start()
        time.sleep(0.1)
        assert waiter.is_alive() and list(folder.glob("*.partial"))
    assert worker.pid is not None
    os.kill(worker.pid, signal.SIGKILL)
    worker.join()
    if not is_waiting:
        assert list(folder.glob("*.partial"))
        waiter.start()
    waiter.join(10)
    assert not waiter.is_alive() and len(store.fetched()) == 2
    assert [path.suffix for path in folder.glob("*.*") if path.suffix != ".lock"] == [".arrow"]


@pytest.mark.parametrize("damage", ["flip", "cut"])
def test_a_damaged_copy_is_found_at_first_use_and_fetched_anew(tmp_path: Path, store: FakeStore, damage: str) -> None:
    (shard,) = put(store, 1)
    read(ShardCache(tmp_path / "cache"), shard)
    (copy,) = (tmp_path / "cache").glob("*.arrow")
    data = bytearray(copy.read_bytes())
    data[1000] ^= 4
    copy.write_bytes(data if damage == "flip" else data[:-1])
    second = ShardCache(tmp_path / "cache")
    read(second, shard)
    assert len(store.fetched()) == 2
    read(second, shard), read(ShardCache(tmp_path / "cache"), shard)
    assert len(store.fetched()) == 2


@pytest.mark.parametrize("damage", ["flip", "cut", "longer"])
def test_a_damaged_original_is_refused(tmp_path: Path, store: FakeStore, damage: str) -> None:
    (shard,) = put(store, 1)
    data = bytearray((store.root / "0.arrow").read_bytes())
    data[1000] ^= damage == "flip"
    data = {"flip": data, "cut": data[:-1], "longer": data + b"x"}[damage]
    (store.root / "0.arrow").write_bytes(data)
    with pytest.raises(ArtifactError) as caught:
        ShardCache(tmp_path / "cache").open(shard)
    assert str(caught.value) == (
        f"{shard.uri} (sha256 {hashlib.sha256(data).hexdigest()[:12]}) must have sha256 {shard.sha256[:12]}, as its "
        "manifest says; restore it, or delete its artefact's folder to make the step anew."
    )
    assert not [path for path in (tmp_path / "cache").iterdir() if path.suffix != ".lock"]


def test_an_absent_original_is_an_error_of_the_store(tmp_path: Path, store: FakeStore) -> None:
    (shard,) = put(store, 1)
    (store.root / "0.arrow").unlink()
    with pytest.raises(FileNotFoundError):
        ShardCache(tmp_path / "cache").open(shard)


def test_what_is_furthest_from_use_goes_first_and_never_what_is_in_use(tmp_path: Path, store: FakeStore) -> None:
    shards = put(store, 6)
    cache = ShardCache(tmp_path / "cache", 4 * SIZE)
    cache.read_ahead([shards[number] for number in (5, 0, 3, 1, 2)], 0)  # 4 is not needed again
    for number in (1, 2, 4):
        read(cache, shards[number])
    in_use = ShardCache(cache._folder.path).open(shards[2])  # by another process
    for number, expected in ((3, [1, 2, 3, 4]), (0, [0, 1, 2, 3]), (5, [0, 2, 3, 5])):
        read(cache, shards[number])
        assert held(cache, shards) == expected
    in_use.close()
    cache.read_ahead([shards[number] for number in (4, 0, 3, 5, 2)], 0)
    read(cache, shards[4])
    assert held(cache, shards) == [0, 3, 4, 5]


def test_what_is_needed_now_may_exceed_the_budget_but_nothing_read_ahead(tmp_path: Path, store: FakeStore) -> None:
    shards = put(store, 4)
    cache = ShardCache(tmp_path / "cache", 2 * SIZE)
    files = [cache.open(shard) for shard in shards[:3]]
    assert held(cache, shards) == [0, 1, 2]
    cache.read_ahead(shards, 4)
    time.sleep(0.5)
    assert held(cache, shards) == [0, 1, 2] and len(store.fetched()) == 3
    for file in files:
        file.close()
    cache.read_ahead([shards[3], shards[0]], 2)
    wait_for(lambda: held(cache, shards) == [0, 3])  # back within the budget
    cache.stop_reading()


def test_reading_ahead_goes_in_order_and_as_far_as_the_budget_holds(tmp_path: Path, store: FakeStore) -> None:
    shards = put(store, 8)
    cache = ShardCache(tmp_path / "cache", 3 * SIZE)
    for start in (0, 1, 2, 6, 3):  # from 6 back to 3, as after a roll back
        order = shards[start:] + shards[:start]
        cache.read_ahead(order, 5)
        wait_for(lambda order=order: set(held(cache, order)) == {0, 1, 2})
        wait_for(lambda: not list(cache._folder.path.glob("*.partial")))
    assert store.fetched()[:3] == [shard.uri for shard in shards[:3]]
    cache.stop_reading()


def test_what_was_read_ahead_is_there_and_checked(
    tmp_path: Path, store: FakeStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    shards = put(store, 2)
    read(ShardCache(tmp_path / "cache"), shards[1])  # by an earlier run
    cache = ShardCache(tmp_path / "cache")
    cache.read_ahead(shards, 2)
    wait_for(lambda: len(cache._folder._checked) == 2)
    monkeypatch.setattr(hashlib, "file_digest", lambda *_: pytest.fail("checked twice"))
    monkeypatch.setattr(storage, "read_blocks", lambda _: pytest.fail("fetched twice"))
    for shard in shards:
        cache.open(shard).close()
    cache.stop_reading()


def test_a_failure_while_reading_ahead_is_met_where_the_shard_is_used(tmp_path: Path, store: FakeStore) -> None:
    shards = put(store, 3)
    (store.root / "0.arrow").write_bytes(b"x" * SIZE)
    (store.root / "1.arrow").unlink()
    cache = ShardCache(tmp_path / "cache")
    cache.read_ahead(shards, 3)
    wait_for(lambda: held(cache, shards) == [2])
    with pytest.raises(ArtifactError, match="as its manifest says"):
        cache.open(shards[0])
    with pytest.raises(FileNotFoundError):
        cache.open(shards[1])
    cache.stop_reading()


def test_a_full_disk_takes_the_place_of_the_budget(
    tmp_path: Path, store: FakeStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As if the disk held three shards."""
    shards = put(store, 6)
    cache = ShardCache(tmp_path / "cache", 100 * SIZE)
    fallocate = os.posix_fallocate

    def allocate(handle: int, start: int, size: int) -> None:
        if sum(path.stat().st_size for path in cache._folder.path.iterdir()) + size > 3 * SIZE:
            raise OSError(errno.ENOSPC, "No space left on device")
        fallocate(handle, start, size)

    monkeypatch.setattr(os, "posix_fallocate", allocate)
    cache.read_ahead(shards, 6)
    wait_for(lambda: held(cache, shards) == [0, 1, 2])
    time.sleep(0.5)
    assert held(cache, shards) == [0, 1, 2]
    cache.stop_reading()
    files = [cache.open(shards[number]) for number in (0, 1, 5)]
    assert held(cache, shards) == [0, 1, 5]
    with pytest.raises(ClusterError) as caught:
        cache.open(shards[4])
    assert caught.value.field.endswith(f":{cache._folder.path}") and caught.value.value.endswith(" bytes free")
    assert caught.value.allowed == f"must have room for the shards in use, now for {SIZE} bytes of {shards[4].uri}"
    assert caught.value.action == "free space on that node's disk, or lower window_shards"
    assert held(cache, shards) == [0, 1, 5] and not list(cache._folder.path.glob("*.partial"))
    for file in files:
        file.close()


def test_what_a_killed_fetch_left_counts_and_goes_first(tmp_path: Path, store: FakeStore) -> None:
    shards = put(store, 3)
    cache = ShardCache(tmp_path / "cache", 2 * SIZE)
    left = cache._folder.path / f"{shards[2].sha256}.partial"
    left.write_bytes(b"x" * SIZE)
    read(cache, shards[0])
    assert left.exists()
    read(cache, shards[1])
    assert not left.exists() and held(cache, shards) == [0, 1]


def test_runs_share_what_they_have_in_common(tmp_path: Path, store: FakeStore) -> None:
    (shard,) = put(store, 1)
    (store.root / "copy.arrow").write_bytes((store.root / "0.arrow").read_bytes())
    read(ShardCache(tmp_path / "cache"), shard)
    other = ShardFile(uri=f"{BUCKET}/copy.arrow", bytes=SIZE, sha256=shard.sha256)
    read(ShardCache(tmp_path / "cache"), other)
    assert store.fetched() == [shard.uri]
