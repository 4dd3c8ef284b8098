"""How one rank writes its share of one checkpoint, and how rank 0 makes it count. No collective: files tell."""

import contextlib
import json
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field

from torch import Tensor

from ray_ds import storage
from ray_ds.artifacts import FileInfo
from ray_ds.errors import RayDsError, RetryableError, TakenOverError
from ray_ds.logs import log_event
from ray_ds.train.checkpoints import folders
from ray_ds.train.checkpoints.commit import (
    COMMITTED,
    METRICS,
    DamageError,
    RankPart,
    assemble,
    checkpoint_uri,
    hash_bytes,
    rank_json,
    read_commit,
    read_part,
    seal,
)
from ray_ds.train.checkpoints.tensor_file import write_tensors
from ray_ds.train.host import Part

FILE_BYTES = 2 << 30
"""A file that has reached it gets no further tensor."""
FIRST_LOOK_S, LAST_LOOK_S = 0.01, 1.0
"""Time between looks for other ranks' files, which grows from the first to the last."""
PATIENCE_S = 30.0
"""How much longer than rank 0 the others wait, so that rank 0's word comes first."""
FAILED = ".failed"
FAILURES = (OSError, RayDsError)
"""What storage raises when it is full, refuses or does not answer."""


class GivenUpError(RayDsError):
    """A checkpoint will not be finished; the message says why.

    Args:
        is_lasting: as the function of this name says of what made another rank fail.
    """

    def __init__(self, reason: str, *, is_lasting: bool = False) -> None:
        super().__init__(reason)
        self.is_lasting = is_lasting


def is_lasting(error: BaseException) -> bool:
    """Tell whether somebody must mend what made a checkpoint fail, or another try may come through by itself."""
    return error.is_lasting if isinstance(error, GivenUpError) else not isinstance(error, RetryableError)


@dataclass(kw_only=True, slots=True)
class Writing:
    """One rank's work on one checkpoint."""

    root: str
    attempt: str
    part: Part
    metrics: str
    validation_loss: float | None
    keep: int
    keep_best: bool
    every: int
    check_alone: Callable[[], None]
    timeout_s: float
    abandoned: threading.Event = field(default_factory=threading.Event)
    reason_to_abandon: str = ""
    waits_for: str = "its own files"
    """What is missing, for who gets impatient."""
    _is_published: bool = False
    """Whether rank 0 may count on this rank's files."""
    _is_given_up: bool = False
    """Whether rank 0 said that it will not make the checkpoint count."""
    _is_doubtful: bool = False
    """Whether the checkpoint may count though writing its last file failed."""
    _paths: list[str] = field(default_factory=list)
    """Files written or begun, below the checkpoint's folder."""

    @property
    def uri(self) -> str:
        """The checkpoint's folder."""
        return checkpoint_uri(self.root, self.part.step)

    def run(self) -> None:
        """Write the rank's files; return when the checkpoint counts.

        Raises:
            OSError: storage failed.
            RayDsError: storage failed, or the checkpoint was given up.
            TakenOverError: another job has taken over the run. What was written stays, for that job may use it already.
        """
        started = time.monotonic()
        try:
            if self.part.rank == 0:
                self.check_alone()
                self._tidy()
            self._publish(self._write_files())
            if self.part.rank == 0:
                self._commit(started)
            else:
                self._await_commit(started)
        except TakenOverError:
            raise
        except FAILURES as error:
            self._clean_up(error)
            raise

    def _write_files(self) -> RankPart:
        """Write the rank's files and return what its JSON file says of them."""
        part = self.part
        part.wait()
        files: list[FileInfo] = []
        tensors: dict[str, str] = {}
        versions = {name: tensor._version for name, tensor in part.tensors.items()}
        for path, group in self._divide():
            self._paths.append(path)
            files.append(write_tensors(self.uri, path, group))
            tensors |= dict.fromkeys(group, path)
        if part.rank == 0:
            files.append(self._write_metrics())
        changed = [name for name, tensor in part.tensors.items() if tensor._version != versions[name]]
        assert not changed, f"{changed} of step {part.step} were overwritten while they were written"
        assert isinstance(part.index, dict), "train.packing makes it so"
        return RankPart(
            step=part.step,
            attempt=self.attempt,
            rank=part.rank,
            world_size=part.world_size,
            validation_loss=self.validation_loss,
            files=tuple(files),
            tensors=tensors,
            index=part.index,
        )

    def _divide(self) -> Iterator[tuple[str, Mapping[str, Tensor]]]:
        """Yield the rank's files and the tensors that go into each."""
        groups: list[dict[str, Tensor]] = []
        # Large elements first, so that all lie at multiples of their size.
        for name, tensor in sorted(self.part.tensors.items(), key=lambda item: -item[1].itemsize):
            if not groups or sum(other.nbytes for other in groups[-1].values()) + tensor.nbytes > FILE_BYTES:
                groups.append({})
            groups[-1][name] = tensor
        for number, group in enumerate(groups):
            end = "" if len(groups) == 1 else f"-{number:05d}"
            yield f"{self.attempt}/rank-{self.part.rank:05d}{end}.safetensors", group

    def _write_metrics(self) -> FileInfo:
        path = f"{self.attempt}/{METRICS}"
        self._paths.append(path)
        data = self.metrics.encode()
        storage.write_bytes(storage.join(self.uri, path), data)
        return FileInfo(path=path, bytes=len(data), sha256=hash_bytes(data))

    def _publish(self, said: RankPart) -> None:
        """Write the rank's JSON file; from then on rank 0 counts on its files."""
        if not storage.is_remote(self.root):
            folders.sync_new(storage.local_path(self.uri) / self.attempt)
        path = rank_json(self.attempt, self.part.rank)
        self._paths.append(path)
        uri = storage.join(self.uri, path)
        self._is_published = True
        try:
            storage.write_bytes(uri, seal(said))
        except FAILURES:
            # A write that seems to fail may have come through; unless storage denies it, rank 0 may count on it.
            self._is_published = storage.exists(uri)
            raise

    def _looks(self, started: float, timeout_s: float) -> Iterator[None]:
        """Yield until time is up, with growing pauses, and then give up."""
        pause = FIRST_LOOK_S
        while True:
            yield
            if self.abandoned.wait(pause):
                raise GivenUpError(self.reason_to_abandon)
            if time.monotonic() - started > timeout_s:
                raise GivenUpError(f"{self.waits_for} missing after {timeout_s:.5g} s")
            pause = min(pause * 1.5, LAST_LOOK_S)

    def _commit(self, started: float) -> None:
        """Wait for all ranks' parts, make the checkpoint count, delete old ones."""
        found: dict[int, tuple[RankPart, FileInfo]] = {}
        for _ in self._looks(started, self.timeout_s):
            # Storage that does not answer now may do so at the next look.
            with contextlib.suppress(OSError):
                self._look_for_parts(found)
            missing = [rank for rank in range(self.part.world_size) if rank not in found]
            self.waits_for = "the parts of ranks " + ", ".join(map(str, missing))
            if not missing:
                break
        self.waits_for = COMMITTED
        try:
            commit = assemble(list(found.values()))
        except DamageError as error:
            raise GivenUpError(str(error)) from error
        self.check_alone()
        self._write_commit(seal(commit))
        seconds = time.monotonic() - started
        log_event("checkpoint", step=commit.step, bytes=sum(info.bytes for info in commit.files), seconds=seconds)
        self._tidy()
        self._tidy_old()

    def _look_for_parts(self, found: dict[int, tuple[RankPart, FileInfo]]) -> None:
        """Add the ranks' parts that have come.

        Raises:
            GivenUpError: a rank has failed.
        """
        listed = {entry.path for entry in storage.list_files(storage.join(self.uri, self.attempt))}
        for rank in range(self.part.world_size):
            if _failed_file(rank) in listed:
                raise self._read_failure(rank, f"rank {rank}: ")
            path = rank_json(self.attempt, rank)
            if rank not in found and path.split("/")[1] in listed:
                try:
                    found[rank] = read_part(self.uri, path)
                except DamageError as error:
                    raise GivenUpError(str(error)) from error

    def _write_commit(self, data: bytes) -> None:
        try:
            storage.write_bytes(storage.join(self.uri, COMMITTED), data)
        except FAILURES:
            # The last file may be there all the same; then the checkpoint counts, and its files must stay.
            self._is_doubtful = True
            is_there = self._is_committed()
            self._is_doubtful = False
            if not is_there:
                raise

    def _is_committed(self) -> bool:
        try:
            commit = read_commit(self.root, self.part.step)
        except DamageError:
            return False
        return commit is not None and commit.attempt == self.attempt

    def _await_commit(self, started: float) -> None:
        """Wait until rank 0 has made the checkpoint count.

        Raises:
            GivenUpError: it will not.
        """
        self.waits_for = f"{COMMITTED} of rank 0"
        folder = storage.join(self.uri, self.attempt)
        for _ in self._looks(started, self.timeout_s + PATIENCE_S):
            with contextlib.suppress(OSError):
                if self._is_committed():
                    return
                is_failed = storage.exists(storage.join(folder, _failed_file(0)))
                if not is_failed and storage.exists(storage.join(self.uri, rank_json(self.attempt, self.part.rank))):
                    continue
                self._is_given_up = is_failed
                raise self._read_failure(0) if is_failed else GivenUpError("rank 0 gave it up")

    def _read_failure(self, rank: int, prefix: str = "") -> GivenUpError:
        said = json.loads(storage.read_bytes(storage.join(self.uri, self.attempt, _failed_file(rank))))
        return GivenUpError(prefix + said["reason"], is_lasting=said["is_lasting"])

    def _tidy(self) -> None:
        """Delete what earlier attempts left; that it cannot be deleted harms nothing but the space it takes."""
        try:
            folders.delete_torn(self.root, step=self.part.step, attempt=self.attempt)
        except FAILURES as error:
            log_event("checkpoint_left_over", root=self.root, reason=error)

    def _tidy_old(self) -> None:
        try:
            folders.delete_old(self.root, keep=self.keep, keep_best=self.keep_best, every=self.every)
        except FAILURES as error:
            log_event("checkpoint_left_over", root=self.root, reason=error)

    def _clean_up(self, error: BaseException) -> None:
        """Free the space of a checkpoint that will not be finished, and tell the other ranks."""
        if self._is_doubtful:
            return
        is_marked = self._is_given_up or self._mark(error)
        # Whoever has published must leave its files until rank 0 has given up: they may belong to a checkpoint.
        with contextlib.suppress(*FAILURES):
            if self.part.rank == 0:
                for entry in storage.list_files(storage.join(self.uri, self.attempt)):
                    if not entry.path.endswith(FAILED):
                        folders.delete_file(storage.join(self.uri, self.attempt, entry.path))
            elif self._is_given_up or not self._is_published:
                for path in self._paths:
                    folders.delete_file(storage.join(self.uri, path))
        if not is_marked:
            # On a full disk there is room now.
            self._mark(error)

    def _mark(self, error: BaseException) -> bool:
        """Tell the other ranks that the checkpoint failed, if storage lets it."""
        try:
            uri = storage.join(self.uri, self.attempt, _failed_file(self.part.rank))
            storage.write_bytes(uri, json.dumps({"reason": str(error), "is_lasting": is_lasting(error)}).encode())
        except FAILURES:
            return False
        return True


def _failed_file(rank: int) -> str:
    """Return the name of the file by which a rank says that a checkpoint failed, and why."""
    return f"rank-{rank:05d}{FAILED}"
