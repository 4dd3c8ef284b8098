"""Keeping the state of training safe and going back to it: on storage, and more often in the memory of other nodes."""

import secrets
import time
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from pydantic import JsonValue

from ray_ds import storage
from ray_ds.errors import ArtifactError
from ray_ds.logs import log_event
from ray_ds.train import checkpoints
from ray_ds.train.cadence import SnapshotCadence
from ray_ds.train.checkpoint_reader import CheckpointReader
from ray_ds.train.checkpoint_writer import CheckpointWriter
from ray_ds.train.host import Host, Part, Request
from ray_ds.train.metrics import Record, decode, encode
from ray_ds.train.packing import PackedState, pack
from ray_ds.train.task import TrainTask
from ray_ds.train.zero.engine import Engine

METRICS = checkpoints.METRICS


@dataclass(frozen=True, kw_only=True, slots=True)
class Progress:
    """How far training is: all that a restart needs beside the engine's state."""

    step: int
    """Optimizer steps done."""
    cursor: int
    """Number of the next batch: the state of the data. It runs ahead of `step` by what a roll back passed over."""
    records: Sequence[Record]
    """Of all steps done."""


class Safekeeping:
    """Decides when the state is kept where, and finds the newest that is whole."""

    def __init__(self, task: TrainTask, engine: Engine, host: Host) -> None:
        """Agree with the other processes on a name for this attempt, which marks what it writes."""
        settings = task.settings
        self._settings, self._engine, self._host = settings, engine, host
        self._root = task.checkpoints
        name = [secrets.token_hex(8)]
        dist.broadcast_object_list(name, src=0)
        self._writer = CheckpointWriter(
            task.checkpoints,
            attempt=name[0],
            rank=host.rank,
            world_size=host.world_size,
            keep=settings.keep_checkpoints,
            keep_best=settings.keep_best,
        )
        self._store = host.snapshots if settings.snapshot_every != 0 else None
        self._cadence = SnapshotCadence(settings.snapshot_every)
        self._packed: dict[str, Part] = {}
        self.checkpoint_s: float | None = None
        """Seconds that training stood still for the last checkpoint of this process."""
        self.snapshot_s = 0.0
        """The same for the last snapshot."""

    @property
    def has_failed(self) -> bool:
        """Whether this process could not write its part of the last checkpoint."""
        return self._writer.state == "failed"

    def restore(self) -> Progress | None:
        """Load the newest state that is whole; None where there is none. All processes call this together.

        Raises:
            ArtifactError: there are checkpoints, and all are damaged.
        """
        commit, snapshot_step = self._choose()
        if snapshot_step is not None:
            progress = self._restore_snapshot(snapshot_step, commit)
            if progress is not None:
                return progress
        if commit is None:
            return None
        return self._restore_checkpoint(commit)

    def _choose(self) -> tuple[checkpoints.Commit | None, int | None]:
        """Return the newest checkpoint, and the step of a snapshot that is newer; rank 0 looks, its word counts."""
        found: list[tuple[checkpoints.Commit | None, int | None]] = [(None, None)]
        if self._host.rank == 0:
            commit = checkpoints.find_latest(self._root)
            step = self._store.newest_whole() if self._store is not None else None
            is_newer = step is not None and (commit is None or step > commit.step)
            found[0] = (commit, step if is_newer else None)
            if commit is not None:
                checkpoints.delete_newer(self._root, commit.step)
        dist.broadcast_object_list(found, src=0)
        return found[0]

    def _restore_snapshot(self, step: int, commit: checkpoints.Commit | None) -> Progress | None:
        """Load a snapshot, or return None on every process where one of them cannot: its memory may just be gone."""
        assert self._store is not None
        try:
            state = PackedState(self._store.fetch(step))
            self._engine.load_state(state)
        except (LookupError, ArtifactError) as error:
            log_event("snapshot_unusable", step=step, rank=self._host.rank, reason=str(error))
            state = None
        if not _all_agree(state is not None, self._host.device) or state is None:
            return None
        records = self._records_of(commit)
        late = [record for record in _records(state.own(0)["records"]) if record["step"] > len(records)]
        if len(records) + len(late) != step:
            log_event("snapshot_unusable", step=step, reason="the records of the steps before it are gone")
            return None
        return self._progress(step, state.extra["cursor"], [*records, *late], source="memory")

    def _restore_checkpoint(self, commit: checkpoints.Commit) -> Progress:
        reader = CheckpointReader(self._root, commit)
        self._engine.load_state(reader)
        return self._progress(commit.step, commit.extra["cursor"], self._records_of(commit), source="storage")

    def _records_of(self, commit: checkpoints.Commit | None) -> list[Record]:
        if commit is None:
            return []
        uri = storage.join(checkpoints.checkpoint_uri(self._root, commit.step), METRICS)
        return decode(storage.read_bytes(uri).decode())

    def _progress(self, step: int, cursor: JsonValue, records: Sequence[Record], *, source: str) -> Progress:
        assert isinstance(cursor, int)
        if self._host.rank == 0:
            log_event("resumed", step=step, cursor=cursor, source=source, world_size=self._host.world_size)
        return Progress(step=step, cursor=cursor, records=records)

    def keep(self, progress: Progress, *, seconds: float, stall_s: float, is_last: bool, request: Request) -> bool:
        """Keep the state after a step where it is due or asked for; tell whether it is safe as the request wants it.

        Args:
            seconds: that the step took, on the slowest process.
            stall_s: that the last snapshot held up the slowest process.
        Raises:
            OSError: checkpoints could not be written several times in a row.
        """
        self._writer.poll()
        every = self._settings.checkpoint_every
        is_due = is_last or progress.step % every == 0
        takes_snapshot = self._cadence.is_due(progress.step, step_s=seconds, cost_s=stall_s)
        if request is Request.STOP or (request is Request.PAUSE and self._store is None):
            self.checkpoint(progress)
            self._writer.wait()
            return True
        if is_due:
            self.checkpoint(progress)
        if self._store is not None and (request is Request.PAUSE or takes_snapshot):
            self._snapshot(progress)
        if request is Request.PAUSE and self._store is not None:
            return self._wait_for_snapshot(progress)
        return False

    def _wait_for_snapshot(self, progress: Progress) -> bool:
        """Wait for a snapshot to arrive everywhere; where it cannot, write a checkpoint instead."""
        if not _all_agree(self._has_arrived(), self._host.device):
            self.checkpoint(progress)
            self._writer.wait()
        return True

    def _has_arrived(self) -> bool:
        """Wait for the last snapshot of this process and tell whether it arrived; without it training still goes on."""
        assert self._store is not None
        try:
            self._store.wait()
        except OSError as error:
            log_event("snapshot_lost", rank=self._host.rank, reason=str(error))
            return False
        return True

    def checkpoint(self, progress: Progress) -> None:
        """Start to write a checkpoint; waits for the one before it."""
        started = time.perf_counter()
        self._writer.wait_for_room()
        part = self._pack(progress, own={}, slot="checkpoint")
        looks = [
            record["validation_loss"]
            for record in progress.records
            if record["step"] == progress.step and "validation_loss" in record
        ]
        metrics = encode(progress.records) if self._host.rank == 0 else ""
        self._writer.start(part, metrics=metrics, validation_loss=looks[-1] if looks else None)
        self.checkpoint_s = time.perf_counter() - started

    def _snapshot(self, progress: Progress) -> None:
        """Start to send the state to the memory of other nodes; waits for the snapshot before it."""
        assert self._store is not None
        started = time.perf_counter()
        self._has_arrived()  # the memory that it was packed into is used again
        own: dict[str, JsonValue] = {}
        if self._host.rank == 0:
            since = self._writer.committed_step or 0
            own["records"] = [dict(record) for record in progress.records[since:]]
        part = self._pack(progress, own=own, slot="snapshot")
        self._store.put(part)
        self.snapshot_s = time.perf_counter() - started

    def _pack(self, progress: Progress, *, own: dict[str, JsonValue], slot: str) -> Part:
        part = pack(
            self._engine.state(),
            step=progress.step,
            rank=self._host.rank,
            world_size=self._host.world_size,
            extra={"cursor": progress.cursor, "seed": self._settings.seed},
            own=own,
            out=self._packed.get(slot),
        )
        self._packed[slot] = part
        return part

    def finish(self) -> None:
        """Wait for the checkpoint that is being written."""
        self._writer.wait()


def _records(raw: JsonValue) -> list[Record]:
    assert isinstance(raw, list)
    return raw  # type: ignore[return-value]


def _all_agree(is_so: bool, device: torch.device) -> bool:
    """Tell whether something is so on every process."""
    word = torch.tensor(float(is_so), device=device)
    dist.all_reduce(word, op=dist.ReduceOp.MIN)
    return bool(word.item())
