"""A training process's line to the run's notice board: it says where the process is and hears what is asked of it."""

import threading
import time
from collections.abc import Callable
from typing import Any

import ray
from ray.exceptions import ActorDiedError, RayError

from ray_ds.logs import log_event
from ray_ds.train.host import Request

BEAT_S = 0.5
CLOSE_S = 5.0
"""Patience at the end with a call that the board does not answer."""
WORKERS_PER_BEAT_S = 500
"""Beats a second that the board takes in without a worry; with more workers each of them beats less often."""


class BoardLine:
    """Talks to the board from a thread of its own, so that training never waits.

    A call that fails is made again: the board may be out of reach for a while. Once it is dead the job is ending.

    Args:
        attempt: number of the worker group.
    """

    def __init__(self, board: Any, *, attempt: int, rank: int, world_size: int) -> None:
        self._board, self._attempt, self._rank = board, attempt, rank
        self._pause_s = max(BEAT_S, world_size / WORKERS_PER_BEAT_S)
        self.place = ""
        """Where the process is; to be set."""
        self.request = Request.NONE
        """What the process was asked for, a beat ago at most."""
        self._is_closed = threading.Event()
        self._thread = threading.Thread(target=self._talk, daemon=True, name="board")
        self._thread.start()

    def close(self) -> None:
        """End the thread: it must not call Ray once this process is no part of the cluster any more."""
        self._is_closed.set()
        self._thread.join(CLOSE_S)

    def tell_stepping(self, step: int) -> None:
        """Say which step is the group's first, without waiting."""
        self._board.stepping.remote(self._attempt, step)

    def await_more(self, step: int, met: Request) -> Request:
        """Say that the state after a step is as safe as a request asked for; return when more is asked for."""
        self._call_until_heard(lambda: self._board.safe.remote(self._attempt, self._rank, step, met))
        while self.request <= met and met is not Request.STOP:
            time.sleep(BEAT_S / 5)
        return max(self.request, met)

    def _talk(self) -> None:
        try:
            while not self._is_closed.is_set():
                self.request = self._call_until_heard(
                    lambda: self._board.beat.remote(self._attempt, self._rank, self.place)
                )
                self._is_closed.wait(self._pause_s)
        except RayError:
            return  # the board is dead, or the line closed

    def _call_until_heard(self, call: Callable[[], Any]) -> Any:
        """Return what the board answers; it may hear the same more than once.

        Raises:
            ActorDiedError: it is dead.
            RayError: it did not answer before the line was closed.
        """
        is_told = False
        while True:
            try:
                return ray.get(call())
            except ActorDiedError:
                raise
            except RayError as error:
                if not is_told:
                    log_event("board_unreachable", rank=self._rank, reason=str(error).splitlines()[0])
                is_told = True
                if self._is_closed.wait(self._pause_s):
                    raise
