"""A process's line to a board that cannot be reached for a while, or is dead."""

import threading
import time
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
from ray.exceptions import ActorDiedError, ActorUnavailableError

from ray_ds.on_ray import board_line
from ray_ds.on_ray.board import Board
from ray_ds.on_ray.board_line import BoardLine
from ray_ds.train.host import Request
from tests.on_ray.two_nodes import wait_for


class Outage:
    """A board's handle whose calls fail while `error` says how."""

    def __init__(self, board: Board) -> None:
        self._board = board
        self.error: Exception | None = None
        self.num_failed = 0

    def __getattr__(self, name: str) -> Any:
        return SimpleNamespace(remote=lambda *args: lambda: self._call(name, *args))

    def _call(self, name: str, *args: Any) -> Any:
        if self.error is not None:
            self.num_failed += 1
            raise self.error
        return getattr(self._board, name)(*args)


@pytest.fixture
def board(monkeypatch: pytest.MonkeyPatch) -> Iterator[Board]:
    before = set(threading.enumerate())
    monkeypatch.setattr(board_line.ray, "get", lambda call: call())
    monkeypatch.setattr(board_line, "BEAT_S", 0.01)
    board = Board()
    board.begin(1)
    board.join(0, 1, "node")
    yield board
    wait_for(lambda: set(threading.enumerate()) <= before)  # before the threads' `ray.get` becomes Ray's own again


def unavailable() -> ActorUnavailableError:
    return ActorUnavailableError("the connection is lost", actor_id=None)


def test_a_process_hears_what_is_asked_once_the_board_is_in_reach_again(
    board: Board, caplog: pytest.LogCaptureFixture
) -> None:
    handle = Outage(board)
    handle.error = unavailable()
    with caplog.at_level("INFO", logger="ray_ds"):
        line = BoardLine(handle, attempt=1, rank=0, world_size=1)
        line.place = "step 3"
        board.ask(Request.STOP, "told")
        wait_for(lambda: handle.num_failed > 3)
        assert line.request is Request.NONE
        handle.error = None
        wait_for(lambda: line.request is Request.STOP)
    assert caplog.text.count("board_unreachable") == 1
    handle.error = ActorDiedError()


def test_a_safe_process_waits_for_more_and_tells_it_though_the_board_was_out_of_reach(board: Board) -> None:
    handle = Outage(board)
    line = BoardLine(handle, attempt=1, rank=0, world_size=1)
    heard: list[Request] = []
    board.ask(Request.PAUSE, "grow")
    handle.error = unavailable()
    waiting = threading.Thread(target=lambda: heard.append(line.await_more(7, Request.PAUSE)), daemon=True)
    waiting.start()
    wait_for(lambda: handle.num_failed > 3)
    assert not board.look().any_safe
    handle.error = None
    wait_for(lambda: board.look().is_safe)
    time.sleep(0.1)
    assert heard == []
    board.ask(Request.LEAVE, "all nodes drain")
    wait_for(lambda: heard == [Request.LEAVE])
    assert line.await_more(7, Request.STOP) is Request.STOP
    handle.error = ActorDiedError()


def test_the_line_ends_with_the_board(board: Board) -> None:
    handle = Outage(board)
    handle.error = ActorDiedError()
    before = set(threading.enumerate())
    BoardLine(handle, attempt=1, rank=0, world_size=1)
    wait_for(lambda: set(threading.enumerate()) <= before)
    assert handle.num_failed == 1


@pytest.mark.parametrize("is_reached", [True, False])
def test_a_closed_line_calls_ray_no_more(board: Board, is_reached: bool) -> None:
    handle = Outage(board)
    handle.error = None if is_reached else unavailable()
    before = set(threading.enumerate())
    line = BoardLine(handle, attempt=1, rank=0, world_size=1)
    line.close()
    assert set(threading.enumerate()) <= before
