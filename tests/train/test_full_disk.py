"""Training on a disk that fills up: what it costs, and how it ends."""

import errno
import os
import re
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import SafetensorError

from ray_ds.model import tensor_writer
from ray_ds.model.tensor_writer import write_shards
from ray_ds.train.metrics import MetricsLog, decode
from ray_ds.train.task import TrainTask
from tests.small_disk import SmallDisk
from tests.train.processes import spawn
from tests.train.runs import PlainHost, make_settings, make_task, read_records

SETTINGS: dict[str, Any] = {
    "num_workers": 1,
    "validate_every": 3,
    "snapshot_every": 0,
    "model": {"preset": "tiny", "n_routed_experts": 0},
}
AT_EXPORT = -1
"""In the place of a step: when all but the model is written."""


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[SmallDisk]:
    disk = SmallDisk(tmp_path / "disk")
    yield disk
    disk.close()


class FillingHost(PlainHost):
    """A process whose disk is full after a step, or at the export, and has room again after a later step."""

    def __init__(self, disk: SmallDisk, full_after: int | None, free_after: int | None) -> None:
        super().__init__(rank=0, world_size=1)
        self._disk, self._full_after, self._free_after = disk, full_after, free_after

    def report(self, record: Any) -> None:
        super().report(record)
        if record["step"] == self._full_after:
            self._disk.leave(0)
        if record["step"] == self._free_after:
            self._disk.leave(None)

    def check_alone(self) -> None:
        is_last = self.place == "writing the model" and threading.current_thread() is threading.main_thread()
        if is_last and self._full_after == AT_EXPORT:
            self._disk.leave(0)


def run(task: TrainTask, disk: SmallDisk, *, full_after: int | None = None, free_after: int | None = None) -> str:
    """Train in one process; return the error that ended it, by its type and text."""
    spawn(_run_rank, (task.to_dict(), disk, full_after, free_after), count=1)
    return (disk.folder / "error").read_text()


def _run_rank(rank: int, raw: dict[str, Any], disk: SmallDisk, full_after: int | None, free_after: int | None) -> None:
    os.environ |= {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0"}
    store = f"file://{disk.folder.parent}/store-{os.urandom(4).hex()}"
    torch.distributed.init_process_group("gloo", init_method=store, rank=rank, world_size=1)
    from ray_ds.train.loop import train

    disk.ignore_signal()
    error = ""
    try:
        train(TrainTask.from_dict(raw), FillingHost(disk, full_after, free_after))
    except Exception as raised:
        error = f"{type(raised).__name__}: {raised}"
    disk.leave(None)
    (disk.folder / "error").write_text(error)


@pytest.mark.slow
@pytest.mark.shows("A disk that is full for some steps costs a checkpoint and the live figures, not the run")
def test_a_disk_that_is_full_for_a_while_ends_nothing(small_disk: SmallDisk) -> None:
    task = make_task(small_disk.folder, make_settings(**SETTINGS))
    assert run(task, small_disk, full_after=2, free_after=5) == ""
    assert [record["step"] for record in read_records(task)] == list(range(1, 9))


@pytest.mark.slow
@pytest.mark.shows("A disk that is full when training ends is named with what to do; submitting again goes on")
@pytest.mark.parametrize(
    ("full_after", "keep_best", "message"),
    [
        (5, False, "ArtifactError: .* must be written; make room or mend the storage, .* goes on from step 3"),
        (AT_EXPORT, False, "StorageRefused: .* must be on a disk with room for it; free space at"),
        (AT_EXPORT, True, "StorageRefused: .* must be on a disk with room for it; free space at"),
    ],
)
def test_a_disk_that_is_full_at_the_end_is_named(
    small_disk: SmallDisk, full_after: int, keep_best: bool, message: str
) -> None:
    task = make_task(small_disk.folder, make_settings(**SETTINGS, keep_best=keep_best))
    error = run(task, small_disk, full_after=full_after)
    assert re.match(message, error), error
    assert run(task, small_disk) == ""
    assert [record["step"] for record in read_records(task)] == list(range(1, 9))


def test_live_figures_stop_where_their_file_cannot_be_written(small_disk: SmallDisk) -> None:
    file = small_disk.folder / "metrics.jsonl"
    log = MetricsLog([], file)
    log.append({"step": 1})
    small_disk.leave(0)
    for step in range(2, 2000):
        log.append({"step": step, "loss": 1.0})
    assert len(log.records) == 1999
    log.close()
    small_disk.leave(None)
    assert decode(file.read_text().splitlines()[0]) == [{"step": 1}]


@pytest.mark.parametrize(
    ("text", "kind"),
    [
        ("Error while serializing: I/O error: No space left on device (os error 28)", OSError),
        ("Error while serializing: two tensors share their memory", SafetensorError),
    ],
)
def test_what_safetensors_says_of_a_full_disk_has_its_number(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str, kind: type[Exception]
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise SafetensorError(text)

    monkeypatch.setattr(tensor_writer, "save_file", fail)
    with pytest.raises(kind) as raised:
        list(write_shards(tmp_path, {"a": 4}, lambda _: torch.ones(1), max_shard_bytes=100))
    assert getattr(raised.value, "errno", None) in (errno.ENOSPC, None)
