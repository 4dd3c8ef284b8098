"""Keeping the state of training safe and going back to it: on storage, and more often in the memory of other nodes."""

import secrets
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch
import torch.distributed as dist
from pydantic import JsonValue

from ray_ds.errors import ArtifactError, RetryableError
from ray_ds.logs import log_event
from ray_ds.train.agreement import Word
from ray_ds.train.cadence import SnapshotCadence
from ray_ds.train.checkpoints import CheckpointReader, CheckpointWriter, Commit, Verify, delete_newer, find_latest
from ray_ds.train.host import Host, Part, Request
from ray_ds.train.metrics import Record, decode, encode
from ray_ds.train.packing import PackedState, pack
from ray_ds.train.task import TrainTask
from ray_ds.train.zero.engine import Engine

T = TypeVar("T")


@dataclass(frozen=True, kw_only=True, slots=True)
class Progress:
    """How far training is: all that a restart needs beside the engine's state."""

    step: int
    """Optimizer steps done."""
    cursor: int
    """Number of the next batch: the state of the data. It runs ahead of `step` by what a roll back passed over."""
    records: Sequence[Record]
    """Of all steps done."""
    bad_steps: int = 0
    """Bad steps so far, for they are bounded."""


class Safekeeping:
    """Decides when the state is kept where, and finds the newest that is whole."""

    def __init__(self, task: TrainTask, engine: Engine, host: Host) -> None:
        """Agree with the other processes on a name for this attempt, which marks what it writes."""
        settings = task.settings
        self._settings, self._engine, self._host = settings, engine, host
        self._root = task.checkpoints
        self._attempt = _broadcast(secrets.token_hex(4))
        self._writer = CheckpointWriter(
            task.checkpoints,
            rank=host.rank,
            world_size=host.world_size,
            keep=settings.keep_checkpoints,
            keep_best=settings.keep_best,
            every=settings.checkpoint_every,
            check_alone=host.check_alone,
        )
        self._store = host.snapshots if settings.snapshot_every != 0 else None
        self._cadence = SnapshotCadence(settings.snapshot_every, is_speaking=host.rank == 0)
        self._packed: dict[str, Part] = {}
        self._written, self._committed = 0, 0
        self._was_sending = False
        self._declined = Request.NONE
        """What could not be met, as long as it is still asked for."""
        self.checkpoint_s, self.snapshot_s = 0.0, 0.0
        """Seconds that training stood still for a checkpoint, or a snapshot, after the last step."""

    @property
    def has_failed(self) -> bool:
        """Whether this process could not write its part of the last checkpoint."""
        return self._writer.state == "failed"

    def was_sending(self) -> bool:
        """Tell whether a part of a snapshot was on its way since the last call."""
        before, self._was_sending = self._was_sending, self._store is not None and self._store.is_sending
        return before or self._was_sending

    def restore(self) -> Progress | None:
        """Load the newest state that is whole; None where there is none. All processes call this together.

        Raises:
            ArtifactError: there are checkpoints, and all are damaged.
            TakenOverError: another job has taken over the run.
        """
        commit, snapshot_step = self._choose()
        progress = None
        if snapshot_step is not None:
            progress = self._restore_snapshot(snapshot_step, commit)
            if progress is None:
                commit = _broadcast(self._find_checkpoint("sha256") if self._host.rank == 0 else None)
        self._committed = commit.step if commit is not None else 0
        return self._restore_checkpoint(commit) if progress is None and commit is not None else progress

    def go_back(self) -> Progress | None:
        """Load the newest regular checkpoint and drop all newer ones; None where there is none.

        Regular ones are multiples of `checkpoint_every`: where a roll back goes to must not depend on who came and
        went. Snapshots of the steps that are undone lead to the same bad step and back again, so they may stay.

        Raises:
            ArtifactError: there are such checkpoints, and all are damaged.
            TakenOverError: another job has taken over the run.
        """
        self._writer.join()
        dist.barrier()  # every process's part is written, or failed
        commit: Commit | None = None
        if self._host.rank == 0:
            self._host.check_alone()
            commit = find_latest(self._root, every=self._settings.checkpoint_every)
            if commit is not None:
                delete_newer(self._root, commit.step)
        commit = _broadcast(commit)
        if commit is None:
            return None
        self._committed = self._written = commit.step
        self._cadence.take_now()
        return self._restore_checkpoint(commit)

    def _restore_checkpoint(self, commit: Commit) -> Progress:
        with CheckpointReader(self._root, commit) as reader:
            self._engine.load_state(reader)
            progress = self._progress(commit.step, reader.extra, decode(reader.metrics()), source="storage")
        if commit.passed_over and self._host.rank == 0:
            log_event("went_back", step=commit.step, passed_over=list(commit.passed_over))
        return progress

    def _choose(self) -> tuple[Commit | None, int | None]:
        """Return the newest checkpoint, and the step of a snapshot if that is newer; rank 0 looks, its word counts.

        Of a checkpoint that no weights are read from the files' sizes will do: their hashes take a look at every byte.
        """
        if self._host.rank:
            nothing: tuple[Commit | None, int | None] = (None, None)
            return _broadcast(nothing)
        self._host.check_alone()
        step = self._store.newest_whole() if self._store is not None else None
        commit = self._find_checkpoint("sha256" if step is None else "sizes")
        if step is not None and commit is not None and step <= commit.step:
            commit = self._find_checkpoint("sha256")  # may be an older one, so that the snapshot is newer after all
        is_newer = step is not None and (commit is None or step > commit.step)
        return _broadcast((commit, step if is_newer else None))

    def _find_checkpoint(self, verify: Verify) -> Commit | None:
        """Return the newest whole checkpoint, and delete what there is of newer ones."""
        commit = find_latest(self._root, verify=verify)
        if commit is not None:
            delete_newer(self._root, commit.step)
        return commit

    def _restore_snapshot(self, step: int, commit: Commit | None) -> Progress | None:
        """Load a snapshot, or return None on every process where one of them cannot: its memory may just be gone."""
        assert self._store is not None
        try:
            parts = self._store.fetch(step)
            state = PackedState(parts)
            records = self._records_until(step, commit, state)
            state.bring(self._engine.needs())  # now: the engine's own collectives must not wait for one that fails
        except (LookupError, ArtifactError) as error:
            log_event("snapshot_unusable", step=step, rank=self._host.rank, reason=str(error))
            state = None
        if not _all_agree(state is not None, self._host.device) or state is None:
            return None
        self._engine.load_state(state)
        return self._progress(step, state.extra, records, source="memory")

    def _records_until(self, step: int, commit: Commit | None, state: PackedState) -> list[Record]:
        """Return the records of all steps before a snapshot: a checkpoint's, and those the snapshot has of later ones.

        Raises:
            LookupError: there is a gap between them.
        """
        records: list[Record] = []
        if commit is not None:
            with CheckpointReader(self._root, commit) as reader:
                records = decode(reader.metrics())
        late = decode(str(state.own(0)["records"]))
        records += [record for record in late if record["step"] > len(records)]
        if len(records) != step:
            raise LookupError(f"records of {len(records)} steps are to be had")
        return records

    def _progress(
        self, step: int, extra: Mapping[str, JsonValue], records: Sequence[Record], *, source: str
    ) -> Progress:
        cursor, bad_steps = extra["cursor"], extra["bad_steps"]
        assert isinstance(cursor, int) and isinstance(bad_steps, int)
        if self._host.rank == 0:
            log_event("resumed", step=step, cursor=cursor, source=source, world_size=self._host.world_size)
        return Progress(step=step, cursor=cursor, records=records, bad_steps=bad_steps)

    def keep(self, progress: Progress, word: Word, *, is_last: bool) -> Request:
        """Keep the state after a step where it is due or asked for; return what was asked for, which is done now.

        Where storage fails, who leaves goes by what is in memory, and a pause that is safe nowhere is declined.

        Raises:
            ArtifactError, RetryableError: checkpoints could not be written several times in a row, or not the last one
                before a stop.
            TakenOverError: another job has taken over the run.
        """
        self.checkpoint_s, self.snapshot_s = 0.0, 0.0
        if word.has_failed:
            self._writer.abandon("another rank's part failed")
        self._writer.poll()
        self._cadence.record(word.step_s, stall_s=word.stall_s, is_sending=word.is_sending, other_s=word.other_s)
        asked = Request.NONE if is_last else self._to_meet(word.request)
        to_memory = self._store is not None and asked in (Request.PAUSE, Request.LEAVE)
        to_storage = asked in (Request.LEAVE, Request.STOP)
        if is_last or progress.step % self._settings.checkpoint_every == 0 or to_storage:
            self._checkpoint(progress)
        if self._store is not None and (self._cadence.is_due() or to_memory):
            self._snapshot(progress)
        if asked is Request.NONE:
            return asked
        if asked is Request.STOP:
            self.store(progress)
            return asked
        is_in_memory = to_memory and _all_agree(self._has_arrived(), self._host.device)
        is_on_storage = (to_storage or not is_in_memory) and self._is_stored(progress)
        if is_in_memory or is_on_storage:
            return asked
        self._declined = asked
        self._host.decline("the state could be made safe neither in memory nor on storage")
        return Request.NONE

    def _to_meet(self, request: Request) -> Request:
        """Return what is asked for, but for what was declined and is asked for still."""
        self._declined = min(self._declined, request)
        return request if request > self._declined else Request.NONE

    def _is_stored(self, progress: Progress) -> bool:
        """Try to store the state; tell whether every process says that it is there."""
        try:
            self.store(progress)
            is_there = True
        except (ArtifactError, RetryableError) as error:
            log_event("state_not_stored", step=progress.step, rank=self._host.rank, reason=str(error))
            is_there = False
        is_there = _all_agree(is_there, self._host.device)
        if not is_there:
            self._written = 0  # a request for more tries again
        return is_there

    def store(self, progress: Progress) -> None:
        """Write a checkpoint of this step unless there is one, and wait for it.

        Raises:
            ArtifactError, RetryableError: it failed.
        """
        if self._written != progress.step:
            self._checkpoint(progress)
        self._writer.wait()

    def finish(self) -> None:
        """Wait for the checkpoint that is being written."""
        self._writer.wait()

    def _checkpoint(self, progress: Progress) -> None:
        """Start to write a checkpoint; waits for the one before it."""
        started = time.perf_counter()
        self._writer.join()  # the memory that the last one was packed into is used again
        part = self._pack(progress, own={}, slot="checkpoint")
        self._writer.start(
            part,
            attempt=self._attempt,
            metrics=encode(progress.records) if self._host.rank == 0 else "",
            validation_loss=progress.records[-1].get("validation_loss"),
        )
        self._written = progress.step
        self.checkpoint_s = time.perf_counter() - started

    def _snapshot(self, progress: Progress) -> None:
        """Start to send the state to the memory of other nodes; waits for the snapshot before it."""
        assert self._store is not None
        started = time.perf_counter()
        self._has_arrived()  # the memory that it was packed into is used again
        own: dict[str, JsonValue] = {}
        if self._host.rank == 0:
            if self._writer.state == "idle" and self._written:
                self._committed = self._written
            own["records"] = encode(progress.records[self._committed :])
        self._store.put(self._pack(progress, own=own, slot="snapshot"))
        self._was_sending = True
        self.snapshot_s = time.perf_counter() - started

    def _has_arrived(self) -> bool:
        """Wait for the last snapshot of this process and tell whether it arrived; without it training still goes on."""
        assert self._store is not None
        try:
            self._store.wait()
        except OSError as error:
            log_event("snapshot_lost", rank=self._host.rank, reason=str(error))
            return False
        return True

    def _pack(self, progress: Progress, *, own: dict[str, JsonValue], slot: str) -> Part:
        part = pack(
            self._engine.state(),
            step=progress.step,
            rank=self._host.rank,
            world_size=self._host.world_size,
            extra={"cursor": progress.cursor, "seed": self._settings.seed, "bad_steps": progress.bad_steps},
            own=own,
            out=self._packed.get(slot),
        )
        self._packed[slot] = part
        return part


def _broadcast(value: T) -> T:
    """Return rank 0's value on every process."""
    values = [value]
    dist.broadcast_object_list(values, src=0)
    return values[0]


def _all_agree(is_so: bool, device: torch.device) -> bool:
    """Tell whether something is so on every process."""
    word = torch.tensor(float(is_so), device=device)
    dist.all_reduce(word, op=dist.ReduceOp.MIN)
    return bool(word.item())
