"""How often lost workers are replaced, whatever the loss was."""

import os
from types import SimpleNamespace
from typing import Any

os.environ["RAY_AUTH_MODE"] = "disabled"  # read when ray is imported

import pytest
from ray.exceptions import ActorDiedError, GetTimeoutError, NodeDiedError
from ray.train import ControllerError, PreemptionError, WorkerGroupError
from ray.train.v2._internal.exceptions import (
    WorkerGroupStartupFailedError,
    WorkerGroupStartupTimeoutError,
    WorkerHealthCheckFailedError,
    WorkerHealthCheckTimeoutError,
)
from ray.train.v2._internal.execution.failure_handling import FailureDecision
from ray.train.v2._internal.execution.failure_handling.default import RETRYABLE_CONTROLLER_ERRORS
from ray.train.v2._internal.execution.worker_group.poll import _is_preempted_actor
from ray.train.v2.api.preemption import PreemptionInfo

from ray_ds.on_ray import failures
from ray_ds.on_ray.board import Board
from ray_ds.on_ray.failures import NOT_STARTED, BoundedFailurePolicy, is_lost_group

MAX_FAILURES = 2


def preempted_worker() -> WorkerGroupError:
    died = ActorDiedError()
    died._preempted = True
    failure = WorkerHealthCheckFailedError("no answer", died)
    assert _is_preempted_actor(failure), "Ray Train takes it for a node that a cloud took back"
    return WorkerGroupError("a worker died", {1: failure})


LOSSES = {
    "died": WorkerGroupError("a worker died", {0: WorkerHealthCheckFailedError("no answer", NodeDiedError("gone"))}),
    "silent": WorkerGroupError("a worker is silent", {0: WorkerHealthCheckTimeoutError("no answer for long")}),
    "preempted": preempted_worker(),
    "preemption seen in time": PreemptionError(PreemptionInfo(None, {"node": [0]})),
    "start failed": ControllerError(WorkerGroupStartupFailedError("a worker died while it started")),
    "start timed out": ControllerError(WorkerGroupStartupTimeoutError(2)),
}


@pytest.fixture
def board(monkeypatch: pytest.MonkeyPatch) -> Board:
    monkeypatch.setattr(failures.ray, "get", lambda answer, timeout: answer)
    return Board()


def make_policy(board: Board) -> BoundedFailurePolicy:
    return BoundedFailurePolicy(MAX_FAILURES, SimpleNamespace(fail=SimpleNamespace(remote=board.fail)))


@pytest.mark.shows("Retries are bounded: a run in which no step gets done between losses ends, whatever was lost")
@pytest.mark.parametrize("loss", LOSSES.values(), ids=LOSSES)
def test_workers_that_get_no_further_are_replaced_so_many_times(loss: Any, board: Board) -> None:
    policy = make_policy(board)
    decisions = []
    for _ in range(MAX_FAILURES + 1):
        board.begin(2)
        decisions.append(policy.make_decision(loss))
    assert decisions == [FailureDecision.RETRY] * MAX_FAILURES + [FailureDecision.RAISE]
    lost = [event.facts for event in board.collect(0).events if event.kind == "workers_lost"]
    assert [facts["in_a_row"] for facts in lost] == [1, 2, 3]
    assert all(facts["errors"] for facts in lost)


def test_workers_that_get_further_are_replaced_as_often_as_they_are_lost(board: Board) -> None:
    policy = make_policy(board)
    for step in range(1, 20):
        board.begin(2)
        board.beat(board.attempt, 0, f"step {step}")
        assert policy.make_decision(LOSSES["died"]) is FailureDecision.RETRY


def test_what_another_try_would_meet_again_is_not_tried_again(board: Board) -> None:
    assert make_policy(board).make_decision(ControllerError(ValueError("wrong"))) is FailureDecision.RAISE
    assert not board.collect(0).events


def test_a_loss_that_the_board_does_not_hear_of_is_retried(monkeypatch: pytest.MonkeyPatch, board: Board) -> None:
    def silent(answer: Any, timeout: float) -> Any:
        raise GetTimeoutError("Get timed out")

    monkeypatch.setattr(failures.ray, "get", silent)
    assert make_policy(board).make_decision(LOSSES["died"]) is FailureDecision.RETRY


@pytest.mark.parametrize("loss", ["start failed", "start timed out", "silent"])
def test_a_group_that_did_not_start_or_fell_silent_is_lost(loss: str) -> None:
    assert is_lost_group(LOSSES[loss])
    assert not is_lost_group(WorkerGroupError("a worker failed", {0: ValueError("wrong")}))
    assert not is_lost_group(ControllerError(ValueError("wrong")))
    assert not is_lost_group(None)


def test_all_that_ray_train_tries_again_at_a_start_is_known() -> None:
    assert set(RETRYABLE_CONTROLLER_ERRORS) == set(NOT_STARTED)
