"""Checkpoints written beside training, with what is done when one fails."""

import re
import threading
import time
from collections.abc import Callable
from typing import Literal

from ray_ds.errors import ArtifactError, RetryableError, TakenOverError
from ray_ds.logs import log_event
from ray_ds.train.checkpoints import folders
from ray_ds.train.checkpoints.rank_writing import FAILURES, Writing, is_lasting
from ray_ds.train.host import Part

MAX_FAILED = 3
TIMEOUT_S = 1800.0
"""Enough for 600 GB of one rank at the 0.35 GB/s of a common disk."""

State = Literal["idle", "writing", "failed"]


class CheckpointWriter:
    """Writes one rank's share of each checkpoint in a thread, one checkpoint at a time.

    A checkpoint that fails is given up by all ranks: logged, its files deleted, and the next is tried when it is due.
    After `max_failed` in a row training must end, for it would only lose more work.
    """

    def __init__(
        self,
        root: str,
        *,
        rank: int,
        world_size: int,
        keep: int,
        keep_best: bool,
        every: int = 1,
        check_alone: Callable[[], None] = lambda: None,
        max_failed: int = MAX_FAILED,
        timeout_s: float = TIMEOUT_S,
    ) -> None:
        """Prepare to write; nothing is touched yet.

        Args:
            root: folder of all checkpoints.
            rank: of this process.
            world_size: processes that write together.
            keep: newest checkpoints that stay.
            keep_best: whether the one with the lowest validation loss stays too.
            every: steps between regular checkpoints, of which the newest stays, for a roll back to go to.
            check_alone: as `Host.check_alone`; rank 0 calls it before it deletes what others left, and before its
                checkpoint counts.
            max_failed: checkpoints in a row that may fail; this one raises.
            timeout_s: how long rank 0 waits for the others' parts before it gives a checkpoint up.
        """
        self._root, self._rank, self._world_size = root, rank, world_size
        self._keep, self._keep_best, self._every = keep, keep_best, every
        self._check_alone = check_alone
        self._max_failed, self._timeout_s = max_failed, timeout_s
        self._num_started = 0
        self._num_failed = 0
        self._error: BaseException | None = None
        self._writing: Writing | None = None
        self._thread: threading.Thread | None = None

    @property
    def state(self) -> State:
        """What the newest checkpoint has come to on this rank; a part is read as long as it is `writing`."""
        if self._thread is not None and self._thread.is_alive():
            return "writing"
        return "failed" if self._error is not None else "idle"

    def start(self, part: Part, *, attempt: str, metrics: str, validation_loss: float | None) -> None:
        """Begin to write a checkpoint and return at once; waits for the last one if that is not done.

        Every rank calls it at the same steps.

        Args:
            part: this rank's; its memory must not change while `state` is `writing`.
            attempt: the same on all ranks, and new each time that processes start, such as 8 hexadecimal digits.
            metrics: the records of all steps so far; only rank 0's are kept.
            validation_loss: of these weights, or None where it was not measured.
        Raises:
            ArtifactError, RetryableError: as `poll`.
        """
        assert re.fullmatch(r"[A-Za-z0-9_-]+", attempt), f"{attempt} is no name for a folder"
        assert (part.rank, part.world_size) == (self._rank, self._world_size), "the part is another rank's"
        self.join()
        self.poll()
        # The same step is written twice when training was rolled back: the number keeps the two apart.
        self._num_started += 1
        self._writing = Writing(
            root=self._root,
            attempt=f"{attempt}-{self._num_started:04d}",
            part=part,
            metrics=metrics,
            validation_loss=validation_loss,
            keep=self._keep,
            keep_best=self._keep_best,
            every=self._every,
            check_alone=self._check_alone,
            timeout_s=self._timeout_s,
        )
        self._error = None
        # A daemon, so that a process can end while storage hangs.
        self._thread = threading.Thread(target=self._run, args=(self._writing,), name="checkpoint", daemon=True)
        self._thread.start()

    def _run(self, writing: Writing) -> None:
        try:
            writing.run()
            self._num_failed = 0
        except TakenOverError as error:
            self._error = error
        except FAILURES as error:
            self._num_failed += 1
            self._error = error
            log_event(
                "checkpoint_failed",
                step=writing.part.step,
                rank=self._rank,
                reason=error,
                in_a_row=self._num_failed,
            )
        except BaseException as error:
            self._error = error

    def poll(self) -> None:
        """Raise if checkpoints have failed too often; returns at once.

        Raises:
            ArtifactError: the last `max_failed` failed, and somebody must mend the storage.
            RetryableError: they failed, and the storage may mend itself.
            TakenOverError: another job has taken over the run.
        """
        if self.state != "failed":
            return
        assert self._error is not None and self._writing is not None
        if isinstance(self._error, TakenOverError) or not isinstance(self._error, FAILURES):
            raise self._error
        if self._num_failed >= self._max_failed:
            value = f"{self._num_failed} checkpoints in a row failed, the last with: {self._error}"
            raise self._failure(self._root, value, "must take checkpoints") from self._error

    def _failure(self, uri: str, value: str, allowed: str) -> ArtifactError | RetryableError:
        """Return the error of a checkpoint that failed, by what made it fail."""
        assert self._error is not None
        if is_lasting(self._error):
            action = f"make room or mend the storage, then start again: {self._says_from()}"
            return ArtifactError(uri, value, allowed, action)
        return RetryableError(f"{uri} ({value}) {allowed}; submit again to go on from the newest whole checkpoint")

    def _says_from(self) -> str:
        """Say where training would go on from."""
        try:
            step = folders.latest_step(self._root)
        except FAILURES:
            return "training goes on from the newest whole checkpoint"
        return f"training goes on from step {step}" if step is not None else "training starts at step 0"

    def join(self) -> None:
        """Wait until nothing is being written, whatever it has come to."""
        if self._thread is not None:
            self._thread.join()

    def wait(self, timeout_s: float | None = None) -> None:
        """Wait until the newest checkpoint counts; without one, return at once.

        Raises:
            ArtifactError: it failed, and somebody must mend the storage; or it is not done after `timeout_s`, and which
                part is missing is told.
            RetryableError: it failed, and the storage may mend itself.
        """
        if self._thread is None or self._writing is None:
            return
        started = time.monotonic()
        self._thread.join(timeout_s)
        uri = self._writing.uri
        if self._thread.is_alive():
            value = f"{self._writing.waits_for} missing after {time.monotonic() - started:.5g} s"
            action = "look into that rank's log, and whether the storage answers"
            raise ArtifactError(uri, value, "must be written by all ranks", action)
        self.poll()
        if self._error is not None:
            raise self._failure(uri, str(self._error), "must be written") from self._error

    def abandon(self, reason: str) -> None:
        """Give up a checkpoint that waits for other ranks, when it is known that one of them has failed."""
        if self._writing is not None and self.state == "writing":
            self._writing.reason_to_abandon = reason
            self._writing.abandoned.set()
