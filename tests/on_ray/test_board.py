import math

import pytest

from ray_ds.on_ray.board import Board
from ray_ds.train.host import Request


def running(workers: int = 2) -> Board:
    board = Board()
    begin(board, workers)
    return board


def begin(board: Board, workers: int = 2) -> None:
    board.begin(workers)
    for rank in range(workers):
        assert board.join(rank, workers, "node") == board.attempt


def lose(board: Board, step: int) -> int:
    """Come to a step, lose the group there and start the next."""
    board.beat(board.attempt, 0, f"step {step}")
    in_a_row = board.fail({})
    begin(board)
    return in_a_row


def test_a_group_is_safe_once_all_its_workers_are() -> None:
    board = running()
    board.safe(1, 0, 7, Request.PAUSE)
    assert not board.look().is_safe and board.look().any_safe
    board.safe(1, 1, 7, Request.PAUSE)
    assert board.look().is_safe


def test_a_group_is_safe_again_only_when_all_have_done_what_they_were_asked_last() -> None:
    board = running()
    board.ask(Request.PAUSE, "a node drains")
    for rank in (0, 1):
        board.safe(1, rank, 7, Request.PAUSE)
    board.ask(Request.LEAVE, "all nodes drain")
    assert not board.look().is_safe and board.look().any_safe
    board.safe(1, 0, 7, Request.LEAVE)
    assert not board.look().is_safe
    board.safe(1, 1, 7, Request.LEAVE)
    assert board.look().is_safe
    begin(board)
    assert board.beat(2, 0, "") is Request.NONE
    assert [event.kind for event in board.collect(0).events].count("leave_asked") == 1


def test_what_workers_of_an_older_group_say_is_ignored() -> None:
    board = running(1)
    begin(board, 1)
    board.safe(1, 0, 7, Request.PAUSE)
    board.beat(1, 0, "step 9")
    assert not board.look().any_safe
    assert board.fail({}) == 1 and board.furthest == 0


def test_a_new_group_is_not_asked_for_the_pause_that_made_it_but_must_still_stop() -> None:
    board = running()
    board.ask(Request.PAUSE, "grow")
    begin(board)
    assert board.beat(2, 0, "") is Request.NONE
    board.ask(Request.STOP, "told")
    board.ask(Request.PAUSE, "grow")
    board.withdraw("too late")
    begin(board)
    assert board.beat(3, 0, "") is Request.STOP


def test_losses_count_in_a_row_only_while_training_comes_no_further() -> None:
    board = running()
    assert [lose(board, step) for step in (5, 5, 4, 6, 6)] == [1, 2, 3, 1, 2]


def test_a_group_lost_between_steps_came_as_far_as_its_last_step() -> None:
    board = running()
    board.fail({})
    begin(board)
    for place in ("step 9 micro-batch 3", "keeping the state"):
        board.beat(board.attempt, 0, place)
    assert board.fail({}) == 1 and board.furthest == 9


def test_a_group_that_was_safe_lost_nothing() -> None:
    board = running(1)
    board.beat(1, 0, "step 3")
    board.safe(1, 0, 3, Request.PAUSE)
    assert board.fail({}) == 0


def test_the_driver_sees_each_event_and_each_record_once() -> None:
    board = running(1)
    board.report({"step": 1})
    for rank_says in (2, 2, 3):
        board.stepping(1, rank_says)
    first = board.collect(0)
    assert [event.kind for event in first.events] == ["workers_started", "stepping"]
    assert first.records == [{"step": 1}] and first.events[1].facts["step"] == 2
    board.ask(Request.STOP, "told")
    board.safe(1, 0, 2, Request.STOP)
    second = board.collect(len(first.events))
    assert [event.kind for event in second.events] == ["stop_asked", "safe"] and second.records == []


def test_groups_that_nobody_announces_are_told_apart_by_workers_that_come_again() -> None:
    board = Board()
    assert [board.join(rank, 2, "node") for rank in (1, 0)] == [1, 1]
    assert [board.join(rank, 3, "node") for rank in (0, 2, 1)] == [2, 2, 2]


def test_the_board_knows_for_how_long_no_worker_was_heard_of(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 100.0
    monkeypatch.setattr("ray_ds.on_ray.board.time.monotonic", lambda: now)
    board = Board()
    assert board.collect(0).silent_s == math.inf
    board.join(0, 1, "node")
    now = 107.0
    assert board.collect(0).silent_s == 7
    board.beat(board.attempt, 0, "step 1")
    now = 109.0
    assert board.collect(0).silent_s == 2
