"""A worker of Ray Train, as the training loop sees it."""

from collections.abc import Callable, Mapping
from typing import Any

import ray
import ray.train
import torch
import torch.distributed as dist

from ray_ds.on_ray.board_line import BoardLine
from ray_ds.on_ray.hang_watch import SAFE, step_of
from ray_ds.on_ray.keepers import Keepers
from ray_ds.on_ray.pulse import Pulse
from ray_ds.train.host import Request, SnapshotStore


class RayHost:
    """The place of a process in Ray Train's worker group; the loop never waits for it.

    Args:
        run_id: names the run's keepers.
        board: the run's notice board.
        keeps_snapshots: whether the keepers take snapshots too.
        check_alone: as `StageRun.check_alone`.
    """

    def __init__(
        self,
        device: torch.device,
        run_id: str,
        board: Any,
        *,
        keeps_snapshots: bool,
        check_alone: Callable[[], None],
    ) -> None:
        context = ray.train.get_context()
        self.rank: int = context.get_world_rank()
        self.world_size: int = context.get_world_size()
        self.device = device
        self._board = board
        self._check_alone = check_alone
        node_id = ray.get_runtime_context().get_node_id()
        attempts, nodes = self._meet(ray.get(board.join.remote(self.rank, self.world_size, node_id)), node_id)
        attempt = max(attempts)
        self.snapshots: SnapshotStore | None = None
        if keeps_snapshots:
            self.snapshots = Keepers(run_id, rank=self.rank, nodes=nodes, attempt=attempt)
        self._pulse = Pulse(run_id, rank=self.rank, world_size=self.world_size, attempt=attempt)
        self._line = BoardLine(board, attempt=attempt, rank=self.rank, world_size=self.world_size)
        self._is_stepping = False

    def _meet(self, attempt: int, node_id: str) -> tuple[list[int], list[str]]:
        """Return each process's number of the group and its node, by rank."""
        words: list[tuple[int, str]] = [(0, "")] * self.world_size
        dist.all_gather_object(words, (attempt, node_id))
        return [word[0] for word in words], [word[1] for word in words]

    def report(self, record: Mapping[str, float]) -> None:
        """Send the record to the driver, from rank 0 and without waiting."""
        if self.rank == 0:
            self._board.report.remote(dict(record))

    def request(self) -> Request:
        """Return what this process was asked for, half a second ago at most."""
        return self._line.request

    def beat(self, place: str) -> None:
        """Say where this process is; the first step is told to the board at once."""
        self._line.place = place
        if not self._is_stepping and (step := step_of(place)):
            self._is_stepping = True
            self._line.tell_stepping(step)
        self._pulse.beat(place)

    def check_alone(self) -> None:
        """Make sure that no other job has taken over the run."""
        self._check_alone()

    def decline(self, reason: str) -> None:
        """Take what is asked off the board, without waiting; rank 0 speaks for all."""
        if self.rank == 0:
            self._board.withdraw.remote(reason)

    def safe(self, step: int, met: Request) -> Request:
        """Say that the state is safe and wait; return when more is asked for."""
        self._pulse.beat(SAFE)
        return self._line.await_more(step, met)

    def close(self) -> None:
        """Say that this process has ended well."""
        self._line.close()
        self._pulse.close()
