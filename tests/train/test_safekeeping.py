"""Where training's state is kept and what a restart reads, with a folder in the place of other nodes' memory."""

import dataclasses
import json
import os
import shutil
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from ray_ds import storage
from ray_ds.artifacts import FileInfo
from ray_ds.errors import StorageUnavailable
from ray_ds.train.checkpoints import find_latest, rank_writing
from ray_ds.train.host import Part, Request
from ray_ds.train.task import TrainTask
from tests.train.processes import spawn
from tests.train.runs import PlainHost, make_settings, make_task, read_records, train_in_processes

pytestmark = pytest.mark.slow

SETTINGS = make_settings(
    steps=12, zero_stage=2, num_workers=[1, 3], model={"preset": "tiny", "n_routed_experts": 0}, snapshot_every=100
)
"""Checkpoints of steps 3, 6 and 9, snapshots where they are asked for."""
TENSOR_BYTES = 4096


@dataclasses.dataclass
class Folder:
    """A `SnapshotStore` in a folder; it counts what is read."""

    root: Path
    is_torn: bool = False
    is_gone: bool = False
    fetched: dict[str, int] = dataclasses.field(default_factory=dict)
    """Bytes of each tensor that was looked up."""
    is_sending: bool = False

    def put(self, part: Part) -> None:
        folder = self.root / f"{part.step}-{part.world_size}"
        folder.mkdir(parents=True, exist_ok=True)
        torch.save(part, folder / f"{part.rank}.pt")

    def wait(self) -> None:
        """What was put is there, but where the nodes that hold it are gone."""
        if self.is_gone:
            raise OSError("the nodes that hold it are gone")

    def newest_whole(self) -> int | None:
        folders = self.root.iterdir() if self.root.exists() else []
        found = [folder.name.split("-") for folder in folders]
        return max((int(step) for step, size in found if len(self._files(int(step))) == int(size)), default=None)

    def fetch(self, step: int) -> Sequence[Part]:
        parts = [torch.load(file, weights_only=False) for file in self._files(step)]
        return [dataclasses.replace(part, tensors=Travelling(self, part)) for part in parts]

    def _files(self, step: int) -> list[Path]:
        return sorted(self.root.glob(f"{step}-*/*.pt"))


class Travelling(Mapping[str, Tensor]):
    """A part's tensors, of which the one that is looked up is counted, or lost."""

    def __init__(self, store: Folder, part: Part) -> None:
        self._store, self._part = store, part

    def __getitem__(self, name: str) -> Tensor:
        if self._store.is_torn:
            raise LookupError(f"{name} is gone")
        tensor = self._part.tensors[name]
        self._store.fetched[f"{name} of {self._part.rank}"] = tensor.nbytes
        return tensor

    def __iter__(self) -> Iterator[str]:
        return iter(self._part.tensors)

    def __len__(self) -> int:
        return len(self._part.tensors)


class EndedHost(PlainHost):
    """A process that is ended once its state is safe, as a pause ends it."""

    def safe(self, step: int, met: Request) -> Request:
        self.safe_at = step
        if met is Request.STOP:
            return met
        sys.exit()


def run(
    task: TrainTask,
    memory: Path,
    *,
    world_size: int,
    requests: Mapping[int, Request] | None = None,
    torn_rank: int | None = None,
    is_ended: bool = True,
    is_gone: bool = False,
    fails_at: int | None = None,
) -> list[dict[str, Any]]:
    """Train in processes with a memory beside them; return what each of them read to go on.

    Args:
        requests: what the last process is asked for, by the number of the step.
        torn_rank: the process that finds its part of a snapshot gone.
        is_ended: whether processes end once they are safe, or are asked for what `requests` has next.
        is_gone: whether nothing that is sent to the memory arrives.
        fails_at: the step whose checkpoint storage does not take, at the first try; later ones come through.
    """
    notes = memory.with_name(f"notes-{os.urandom(4).hex()}")
    notes.mkdir(parents=True)
    spawn(
        _run_rank,
        (world_size, notes, task.to_dict(), memory, dict(requests or {}), torn_rank, is_ended, is_gone, fails_at),
        count=world_size,
    )
    return [json.loads((notes / f"{rank}.json").read_text()) for rank in range(world_size)]


def _run_rank(
    rank: int,
    world_size: int,
    notes: Path,
    raw: dict[str, Any],
    memory: Path,
    requests: Mapping[int, Request],
    torn_rank: int | None,
    is_ended: bool,
    is_gone: bool,
    fails_at: int | None,
) -> None:
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(world_size), "LOCAL_RANK": str(rank)}
    store = f"file://{notes}/store"
    torch.distributed.init_process_group("gloo", init_method=store, rank=rank, world_size=world_size)
    from ray_ds.train import packing
    from ray_ds.train.loop import train

    packing.TENSOR_BYTES = TENSOR_BYTES
    hashed: list[str] = []
    hash_file = storage.sha256_file
    storage.sha256_file = lambda uri: (hashed.append(uri), hash_file(uri))[1]
    if rank == world_size - 1 and fails_at is not None:
        fail_once(fails_at)
    snapshots = Folder(memory, is_torn=rank == torn_rank, is_gone=is_gone)
    kind = EndedHost if is_ended else PlainHost
    host = kind(rank, world_size, snapshots=snapshots, requests=requests if rank == world_size - 1 else {})
    try:
        train(TrainTask.from_dict(raw), host)
    finally:
        note = {"fetched": snapshots.fetched, "hashed": hashed, "safe_at": host.safe_at, "declined": host.declined}
        (notes / f"{rank}.json").write_text(json.dumps(note))


def fail_once(step: int) -> None:
    """Make this process's part of a step's checkpoint meet a store that does not answer, once."""
    write = rank_writing.write_tensors
    left = [StorageUnavailable("s3://bucket/run", "timed out", "submit again")]

    def write_or_fail(folder: str, path: str, tensors: Mapping[str, Tensor]) -> FileInfo:
        if folder.endswith(f"step-{step:08d}") and left:
            raise left.pop()
        return write(folder, path, tensors)

    rank_writing.write_tensors = write_or_fail


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """The records of a run that nothing interrupts."""
    task = make_task(tmp_path_factory.mktemp("whole"), SETTINGS)
    train_in_processes(task, world_size=2)
    return read_records(task)


@pytest.fixture(scope="module")
def paused(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run of two processes that were ended after step 7, which is only in memory; 6 is on storage."""
    folder = tmp_path_factory.mktemp("paused")
    for requests in ({6: Request.STOP}, {7: Request.PAUSE}):
        run(make_task(folder, SETTINGS), folder / "memory", world_size=2, requests=requests)
    return folder


@pytest.fixture
def folder(paused: Path, tmp_path: Path) -> Path:
    """A copy of it."""
    return Path(shutil.copytree(paused, tmp_path / "copy"))


def sizes(records: list[dict[str, Any]]) -> list[int]:
    return [record["world_size"] for record in records]


def assert_same_losses(found: list[dict[str, Any]], whole: list[dict[str, Any]]) -> None:
    losses = [[record["loss"] for record in records] for records in (found, whole)]
    torch.testing.assert_close(losses[0], losses[1], rtol=1e-5, atol=0)


def damage(task: TrainTask, step: int) -> None:
    """Flip a bit of a checkpoint's weights."""
    (file, *_) = sorted(Path(task.checkpoints).glob(f"step-{step:08d}/*/*.safetensors"))
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)


@pytest.mark.shows("A restarted process fetches from other nodes' memory the part of the state that it holds, not all")
def test_a_restart_fetches_what_each_process_holds_and_hashes_no_checkpoint(
    folder: Path, whole: list[dict[str, Any]]
) -> None:
    task = make_task(folder, SETTINGS)
    parts = [torch.load(file, weights_only=False) for file in (folder / "memory" / "7-2").iterdir()]
    size = sum(tensor.nbytes for part in parts for tensor in part.tensors.values())
    assert size > 100 * TENSOR_BYTES
    notes = run(task, folder / "memory", world_size=3)
    fetched = [sum(note["fetched"].values()) for note in notes]
    assert max(fetched) < size / 3 + 8 * TENSOR_BYTES, "a third, and a tensor where each kind begins and ends"
    assert sizes(read_records(task)) == [2] * 7 + [3] * 5
    assert_same_losses(read_records(task), whole)
    assert [note["hashed"] for note in notes] == [[], [], []]


def test_a_snapshot_that_one_process_cannot_have_is_used_by_none(folder: Path, whole: list[dict[str, Any]]) -> None:
    task = make_task(folder, SETTINGS)
    notes = run(task, folder / "memory", world_size=3, torn_rank=1)
    assert sizes(read_records(task)) == [2] * 6 + [3] * 6
    assert_same_losses(read_records(task), whole)
    assert notes[0]["hashed"] and all("step-00000006" in uri for uri in notes[0]["hashed"])


def test_a_damaged_checkpoint_is_found_out_once_it_is_needed(folder: Path, whole: list[dict[str, Any]]) -> None:
    task = make_task(folder, SETTINGS)
    damage(task, 6)
    run(task, folder / "memory", world_size=1, torn_rank=0)
    assert sizes(read_records(task)) == [2] * 3 + [1] * 9
    assert_same_losses(read_records(task), whole)


def test_a_snapshot_older_than_a_damaged_checkpoint_is_used(folder: Path, whole: list[dict[str, Any]]) -> None:
    task = make_task(folder, SETTINGS)
    run(task, folder / "memory", world_size=2, requests={9: Request.STOP})
    damage(task, 9)
    run(task, folder / "memory", world_size=1)
    assert sizes(read_records(task)) == [2] * 7 + [1] * 5
    assert_same_losses(read_records(task), whole)


@pytest.mark.parametrize("requests", [{5: Request.LEAVE}, {5: Request.PAUSE, 8: Request.LEAVE}], ids=str)
def test_who_leaves_has_the_state_in_memory_and_on_storage(tmp_path: Path, requests: dict[int, Request]) -> None:
    task = make_task(tmp_path, SETTINGS)
    notes = run(task, tmp_path / "memory", world_size=2, requests=requests, is_ended=False)
    commit = find_latest(task.checkpoints)
    assert commit is not None and commit.step == 5
    assert Folder(tmp_path / "memory").newest_whole() == 5
    assert [note["safe_at"] for note in notes] == [5, 5]


@pytest.mark.shows("A pause for which the state is safe nowhere is declined, and training goes on without a step lost")
def test_a_pause_that_is_safe_nowhere_is_declined(tmp_path: Path, whole: list[dict[str, Any]]) -> None:
    task = make_task(tmp_path, SETTINGS)
    requests = {5: Request.PAUSE, 6: Request.PAUSE}
    notes = run(task, tmp_path / "memory", world_size=2, requests=requests, is_gone=True, fails_at=5, is_ended=False)
    assert [(note["safe_at"], len(note["declined"])) for note in notes] == [(None, 1)] * 2, "it is declined once"
    assert_same_losses(read_records(task), whole)


def test_a_pause_comes_again_after_one_that_was_declined(tmp_path: Path) -> None:
    task = make_task(tmp_path, SETTINGS)
    requests = {5: Request.PAUSE, 7: Request.PAUSE}
    notes = run(task, tmp_path / "memory", world_size=2, requests=requests, is_gone=True, fails_at=5)
    assert [(note["safe_at"], len(note["declined"])) for note in notes] == [(7, 1)] * 2
    commit = find_latest(task.checkpoints)
    assert commit is not None and commit.step == 7


@pytest.mark.shows("Who leaves while the object store does not answer goes by the copies in other nodes' memory")
def test_who_leaves_goes_by_memory_where_storage_fails(tmp_path: Path) -> None:
    task = make_task(tmp_path, SETTINGS)
    notes = run(task, tmp_path / "memory", world_size=2, requests={5: Request.LEAVE}, fails_at=5)
    assert [(note["safe_at"], note["declined"]) for note in notes] == [(5, [])] * 2
    commit = find_latest(task.checkpoints)
    assert commit is not None and commit.step == 3 and Folder(tmp_path / "memory").newest_whole() == 5


def test_a_stop_after_that_tries_storage_again(tmp_path: Path) -> None:
    task = make_task(tmp_path, SETTINGS)
    run(task, tmp_path / "memory", world_size=2, requests={5: Request.LEAVE}, fails_at=5, is_ended=False)
    commit = find_latest(task.checkpoints)
    assert commit is not None and commit.step == 5
