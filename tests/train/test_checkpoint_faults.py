"""Faults while a checkpoint is written, by seed: kills, torn files, full disks, stores that refuse.

After each of them loading gives the newest state bit by bit, or an older one and says so, or an error that says why;
and the next checkpoint is written and read.
"""

import errno
import os
import random
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from ray_ds import storage
from ray_ds.errors import ArtifactError, RetryableError, StorageUnavailable
from ray_ds.train import checkpoints
from ray_ds.train.checkpoints import CheckpointWriter, rank_writing, tensor_file
from tests.small_disk import SmallDisk
from tests.train.object_store import ObjectStore, use_object_store
from tests.train.states import assert_readable, make_parts, make_writers, metrics_of, start, write

OLD, NEW, NEXT = 10, 20, 30
"""Steps of the checkpoint before the fault, of the one it strikes, and of the one after it."""


def assert_survives(root: str | Path, *, world_size: int, committed: int, written: int | None = None) -> int:
    """Load after a fault, then write and load the next checkpoint; return the step that was loaded.

    Args:
        root: folder of the checkpoints.
        world_size: of the next checkpoint.
        committed: the newest step that counted; it must be loaded, or named as passed over.
        written: a step that may be whole but for its last file.
    """
    found = checkpoints.find_latest(str(root))
    assert found is not None
    assert_readable(root, found)
    if found.step < committed:
        assert any(f"step-{committed:08d}: " in reason for reason in found.passed_over)
    assert found.step in {OLD, committed, written}
    checkpoints.delete_newer(str(root), found.step)
    write(make_writers(root, world_size), NEXT, attempt="after")
    following = checkpoints.find_latest(str(root))
    assert following is not None and (following.step, following.passed_over) == (NEXT, ())
    assert_readable(root, following)
    return found.step


# ---------------------------------------------------------------------------------------------------------------- kills


def run_rank(root: Path, world_size: int, rank: int, *, kill_at: int | None) -> None:
    """Write one rank's part and end the process; with `kill_at` it dies by SIGKILL at that file operation."""
    signal.alarm(60)
    try:
        if kill_at is not None:
            kill_at_operation(kill_at)
        part = make_parts(NEW, world_size)[rank]
        writer = CheckpointWriter(str(root), rank=rank, world_size=world_size, keep=1, keep_best=False, timeout_s=50)
        writer.start(part, attempt="struck", metrics=metrics_of(NEW), validation_loss=None)
        writer.wait(50)
    finally:
        os._exit(0)


def kill_at_operation(kill_at: int) -> None:
    """Count whatever touches files, and die at the `kill_at`-th: before it, or half through a write."""
    num_done = 0

    def strike() -> None:
        nonlocal num_done
        num_done += 1
        if num_done == kill_at:
            os.kill(os.getpid(), signal.SIGKILL)

    original_blocks = tensor_file._blocks

    def blocks(tensors: object) -> Iterator[memoryview]:
        for block in original_blocks(tensors):  # type: ignore[arg-type]
            strike()
            half = len(block) // 2
            yield block[:half]
            strike()
            yield block[half:]

    tensor_file._blocks = blocks  # type: ignore[assignment]
    tensor_file.BLOCK_BYTES = 256
    for owner, name in FILE_OPERATIONS:
        hook(owner, name, strike)


FILE_OPERATIONS = [
    (os, "fsync"),
    (os, "replace"),
    (storage, "write_bytes"),
    (storage, "read_bytes"),
    (storage, "list_files"),
    (storage, "delete_folder"),
    (storage, "exists"),
]


def hook(owner: object, name: str, before: Callable[[], None]) -> None:
    original = getattr(owner, name)

    def hooked(*arguments: object, **named: object) -> object:
        before()
        return original(*arguments, **named)

    setattr(owner, name, hooked)


def write_and_kill(root: Path, order: random.Random) -> int:
    """Write a checkpoint with a process for each rank, kill one or all of them; return how many ranks there were."""
    world_size = order.choice([2, 3])
    victim = order.randrange(world_size)
    is_counted = order.random() < 0.7
    processes = []
    for rank in range(world_size):
        kill_at = order.randint(1, 40) if is_counted and rank == victim else None
        process = os.fork()
        if not process:
            run_rank(root, world_size, rank, kill_at=kill_at)
        processes.append(process)
    if is_counted:
        # Whoever lost a peer is killed too, as it is when a job's processes are replaced.
        os.waitpid(processes[victim], 0)
        time.sleep(order.random() * 0.05)
    else:
        time.sleep(order.random() * 0.15)
    for process in processes:
        if not (is_counted and process == processes[victim]):
            os.kill(process, signal.SIGKILL)
    for process in processes:
        if not (is_counted and process == processes[victim]):
            os.waitpid(process, 0)
    return world_size


@pytest.mark.slow
@pytest.mark.shows("Killed at any point while it writes a checkpoint, training loses none that counted")
def test_killed_writers_leave_a_state_to_load(tmp_path: Path) -> None:
    loaded = []
    for seed in range(60):
        root, order = tmp_path / str(seed), random.Random(seed)
        write(make_writers(root, order.choice([1, 2, 3])), OLD)
        world_size = write_and_kill(root, order)
        committed = checkpoints.latest_step(str(root))
        assert committed in {OLD, NEW}
        loaded.append(assert_survives(root, world_size=world_size, committed=committed, written=NEW))
    # The kills struck before the checkpoint counted and after it.
    assert min(loaded.count(OLD), loaded.count(NEW)) >= 5, loaded


# ----------------------------------------------------------------------------------------------------------- torn files


def damage(root: Path, order: random.Random) -> str:
    """Truncate, flip a bit of, or delete a random file of the newest checkpoint; return its name."""
    folder = root / f"step-{NEW:08d}"
    file = order.choice(sorted(path for path in folder.rglob("*") if path.is_file()))
    data = bytearray(file.read_bytes())
    kind = order.choice(["cut", "flip", "delete"])
    if kind == "delete":
        file.unlink()
    elif kind == "cut":
        file.write_bytes(data[: order.randrange(len(data))])
    else:
        data[order.randrange(len(data))] ^= 1 << order.randrange(8)
        file.write_bytes(data)
    return file.name


@pytest.mark.parametrize("has_older", [True, False])
def test_torn_files_are_noticed_wherever_they_are_torn(tmp_path: Path, has_older: bool) -> None:
    for seed in range(40):
        root, order = tmp_path / str(seed), random.Random(seed)
        writers = make_writers(root, 2)
        if has_older:
            write(writers, OLD)
        write(writers, NEW)
        name = damage(root, order)
        if has_older or name == checkpoints.COMMITTED:
            step = assert_survives(root, world_size=3, committed=NEW)
            # What only the last file says can be told from the others.
            assert step == (NEW if name == checkpoints.COMMITTED else OLD), name
        else:
            with pytest.raises(ArtifactError, match=r"must be as its COMMITTED\.json says, and no older checkpoint is"):
                checkpoints.find_latest(str(root))


def test_files_torn_after_they_were_checked_are_noticed_by_the_reader(tmp_path: Path) -> None:
    for seed in range(20):
        root, order = tmp_path / str(seed), random.Random(seed)
        write(make_writers(root, 2), NEW)
        found = checkpoints.find_latest(str(root))
        assert found is not None
        path = root / f"step-{NEW:08d}" / order.choice([info.path for info in found.files])
        data = path.read_bytes()
        path.write_bytes(data[: order.randrange(len(data))])
        with pytest.raises(ArtifactError, match=path.name):
            assert_readable(root, found)


def test_a_listing_that_lags_hides_no_checkpoint(monkeypatch: pytest.MonkeyPatch) -> None:
    store = use_object_store(monkeypatch)
    for seed in range(15):
        root, order = f"s3://bucket/{seed}", random.Random(seed)
        writers = make_writers(root, 2)
        write(writers, OLD)
        write(writers, NEW)
        keys = sorted(key for key in store.objects if f"{seed}/step-{NEW:08d}/" in key)
        hidden = set(order.sample(keys, order.randint(1, len(keys) - 1)))
        store.hides = hidden.__contains__
        found = checkpoints.find_latest(root)
        assert found is not None and found.step == NEW
        assert_readable(root, found)
        write(writers, NEXT)
        store.hides = lambda key: False
        assert {key.split("/")[2] for key in store.objects if key.startswith(f"bucket/{seed}/")} == {
            f"step-{step:08d}" for step in (OLD, NEW, NEXT)
        }


# ------------------------------------------------------------------------------------------------------------ full disk


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[SmallDisk]:
    disk = SmallDisk(tmp_path / "disk")
    yield disk
    disk.close()


def try_to_write(writers: list[CheckpointWriter], step: int, *, timeout_s: float = 30) -> list[bool]:
    """Write a checkpoint and tell which ranks say that it counts."""
    for writer in writers:
        writer._timeout_s = timeout_s
    start(writers, step)
    said = []
    for writer in writers:
        try:
            writer.wait(30)
        except ArtifactError as error:
            assert "must be written; make room or mend the storage" in str(error), error
        except RetryableError as error:  # the store did not answer, or nobody could tell this rank why another failed
            assert "must be written; submit again to go on" in str(error) or "missing after" in str(error), error
        said.append(writer.state == "idle")
    return said


def newest(root: str | Path) -> int:
    step = checkpoints.latest_step(str(root))
    assert step is not None
    return step


@pytest.fixture
def little_patience(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let ranks whom nobody could tell of a failure give up soon."""
    monkeypatch.setattr(rank_writing, "PATIENCE_S", 0.5)


@pytest.mark.shows("A full disk fails a checkpoint, not the training, and the next one is tried with its space freed")
def test_a_full_disk_costs_one_checkpoint(small_disk: SmallDisk, little_patience: None) -> None:
    outcomes = []
    for seed in range(30):
        root = small_disk.folder / str(seed)
        writers = make_writers(root, 2)
        assert try_to_write(writers, OLD) == [True, True]
        small_disk.leave(4096 * seed)
        counts = try_to_write(writers, NEW, timeout_s=1)
        assert len(set(counts)) == 1, "all ranks say the same"
        outcomes.append(counts[0])
        assert newest(root) == (NEW if counts[0] else OLD)
        left = list((root / f"step-{NEW:08d}").rglob("*.safetensors"))
        assert counts[0] or not left, "the space of a failed checkpoint is free again"
        small_disk.leave(None)
        # The writers live on, as training does.
        assert try_to_write(writers, NEXT) == [True, True]
        found = checkpoints.find_latest(str(root))
        assert found is not None and (found.step, found.passed_over) == (NEXT, ())
        assert_readable(root, found)
    assert min(outcomes.count(True), outcomes.count(False)) >= 5, outcomes


# ----------------------------------------------------------------------------- storage that fails at the n-th operation


@pytest.mark.slow
def test_an_operation_that_fails_costs_one_checkpoint_at_most(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, little_patience: None
) -> None:
    fails_at: set[int] = set()
    num_done = 0

    def strike() -> None:
        nonlocal num_done
        num_done += 1
        if num_done in fails_at:
            raise OSError(errno.EIO, "Input/output error")

    outcomes = []
    for owner, name in FILE_OPERATIONS:
        monkeypatch.setattr(owner, name, getattr(owner, name))
        hook(owner, name, strike)
    for seed in range(40):
        root, order = tmp_path / str(seed), random.Random(seed)
        writers = make_writers(root, 2)
        assert try_to_write(writers, OLD) == [True, True]
        # A checkpoint of two ranks takes 37 operations; it counts at the 31st, and what follows may fail too.
        first, count = num_done + order.randint(1, 48), order.choice([1, 2, 5, 100])
        fails_at.update(range(first, first + count))
        counts = try_to_write(writers, NEW, timeout_s=1)
        fails_at.clear()
        committed = newest(root)
        assert committed == NEW or not any(counts)
        outcomes.append(committed)
        assert_survives(root, world_size=2, committed=committed, written=NEW)
    assert min(outcomes.count(OLD), outcomes.count(NEW)) >= 5, outcomes


@pytest.mark.slow
@pytest.mark.shows("An object store that refuses any request costs one training checkpoint at most")
def test_a_store_that_refuses_costs_one_checkpoint_at_most(
    monkeypatch: pytest.MonkeyPatch, little_patience: None
) -> None:
    store = use_object_store(monkeypatch)
    outcomes = []
    for seed in range(40):
        root, order = f"s3://bucket/{seed}", random.Random(seed)
        writers = make_writers(root, 2)
        assert try_to_write(writers, OLD) == [True, True]
        refuse(store, first=order.randint(1, 60), count=order.choice([1, 2, 5, 1000]))
        counts = try_to_write(writers, NEW, timeout_s=1)
        accept(store)
        committed = newest(root)
        assert committed == NEW or not any(counts)
        outcomes.append(committed)
        assert_survives(root, world_size=2, committed=committed, written=NEW)
    assert min(outcomes.count(OLD), outcomes.count(NEW)) >= 5, outcomes


def test_a_store_that_refuses_to_be_read_gives_the_state_or_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    store = use_object_store(monkeypatch)
    root = "s3://bucket/checkpoints"
    writers = make_writers(root, 2)
    write(writers, OLD)
    write(writers, NEW)
    num_refused = 0
    for first in range(1, 40):
        refuse(store, first=first, count=1)
        try:
            found = checkpoints.find_latest(root)
            assert found is not None and (found.step, found.passed_over) == (NEW, ())
            assert_readable(root, found)
        except (ArtifactError, StorageUnavailable) as error:
            assert "503 SlowDown" in str(error)
            num_refused += 1
        accept(store)
    assert num_refused > 10


def refuse(store: ObjectStore, *, first: int, count: int) -> None:
    """Refuse so many requests from the `first`-th on, counted from now."""
    begin = store.num_requests + first
    store.refuses = lambda number, verb, key: begin <= number < begin + count


def accept(store: ObjectStore) -> None:
    store.refuses = lambda number, verb, key: False


@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize(
    ("failure", "kind", "advice"),
    [
        (StorageUnavailable("s3://bucket/run", "timed out", "submit again"), RetryableError, "submit again to go on"),
        (OSError(errno.ENOSPC, "No space left on device"), ArtifactError, "make room or mend the storage"),
    ],
    ids=["no answer", "full"],
)
def test_every_rank_says_whether_storage_must_be_mended(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, rank: int, failure: Exception, kind: type[Exception], advice: str
) -> None:
    write_tensors = rank_writing.write_tensors

    def fail(folder: str, path: str, *args: object) -> object:
        if f"rank-{rank:05d}" in path:
            raise failure
        return write_tensors(folder, path, *args)  # type: ignore[arg-type]

    monkeypatch.setattr(rank_writing, "write_tensors", fail)
    writers = make_writers(tmp_path, 2)
    start(writers, NEW)
    for writer in writers:
        with pytest.raises(kind, match=advice):
            writer.wait(30)


def test_a_store_that_breaks_off_in_the_middle_of_a_file_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    class Stream:
        def __enter__(self) -> "Stream":
            return self

        def __exit__(self, *_: object) -> None:
            """As pyarrow's."""

        def write(self, _: object) -> None:
            raise OSError("When uploading part: AWS Error NETWORK_CONNECTION: curlCode: 56")

    class System:
        def open_output_stream(self, *_: object, **__: object) -> Stream:
            return Stream()

    monkeypatch.setattr(tensor_file.storage, "filesystem", lambda uri: (System(), uri))
    with pytest.raises(StorageUnavailable, match=r"^s3://bucket/run/a.safetensors \(no answer: .*NETWORK_CONNECTION"):
        tensor_file.write_tensors("s3://bucket/run", "a.safetensors", {})
