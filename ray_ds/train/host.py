"""What training needs of the place it runs in, so that the loop knows no Ray."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import IntEnum
from typing import Protocol

import torch
from pydantic import JsonValue
from torch import Tensor


class Request(IntEnum):
    """What the place asks of training; of several requests the highest counts."""

    NONE = 0
    PAUSE = 1
    """Make the state safe, in memory at least, then wait: the processes will be replaced by more or fewer."""
    LEAVE = 2
    """Make the state safe on storage too, then wait: the nodes whose memory holds it may all go."""
    STOP = 3
    """Make the state safe on storage, then end: the job was told to stop."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Part:
    """One process's part of a state, packed: plain memory that needs no process to live."""

    step: int
    """Optimizer steps done."""
    rank: int
    world_size: int
    """Parts that make a whole."""
    index: JsonValue
    """What lies where in `tensors`, and what the state says beside them; `train.packing` writes and reads it."""
    tensors: Mapping[str, Tensor]
    """1-D, on the CPU, never changed after they were packed; to be read after `wait`."""
    copied: torch.cuda.Event | None = None
    """When the last element has come from the GPU; None where all are here."""

    def wait(self) -> None:
        """Wait until the tensors are filled: a GPU copies them while it goes on computing."""
        if self.copied is not None:
            self.copied.synchronize()


class SnapshotStore(Protocol):
    """Memory of other nodes that outlives this process and its node."""

    def put(self, part: Part) -> None:
        """Hand over this process's part; returns before it has arrived, after the last one has."""

    @property
    def is_sending(self) -> bool:
        """Whether a part is on its way now."""

    def wait(self) -> None:
        """Wait until what was put has arrived.

        Raises:
            OSError: it cannot arrive, for the memory that was to hold it is gone.
        """

    def newest_whole(self) -> int | None:
        """Return the newest step of which all parts are to be had."""

    def fetch(self, step: int) -> Sequence[Part]:
        """Return all parts of a step.

        Raises:
            LookupError: they are no longer all there.
        """


class Host(Protocol):
    """Where a training process runs. Its default process group is ready when training starts."""

    @property
    def rank(self) -> int:
        """Number of this process, from 0."""

    @property
    def world_size(self) -> int:
        """How many processes train together."""

    @property
    def device(self) -> torch.device:
        """What this process computes on."""

    @property
    def snapshots(self) -> SnapshotStore | None:
        """Where snapshots are kept; None where there is no such place."""

    def report(self, record: Mapping[str, float]) -> None:
        """Show a step's figures to who watches the run; every process calls it at the same steps."""

    def request(self) -> Request:
        """Return what this process was asked for, without waiting; the loop makes it one answer for all processes."""

    def beat(self, place: str) -> None:
        """Say that this process is alive and where it is, such as `step 12 micro-batch 3`; costs next to nothing."""

    def check_alone(self) -> None:
        """Make sure that no other job has taken over the run; call it right before what that job must not find changed.

        Raises:
            TakenOverError: one has.
            OSError: storage does not answer, so that nobody knows.
        """

    def decline(self, reason: str) -> None:
        """Say that a pause that was asked for cannot be: the state could be made safe nowhere, and training goes on."""

    def safe(self, step: int, met: Request) -> Request:
        """Say that the state after `step` is safe and this process will do no more; waits until it is ended.

        Args:
            met: the request that the state was made safe for.
        Returns:
            A request that asks for more than `met` did; `STOP` at once where that was it.
        """
