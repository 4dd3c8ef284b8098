"""Which ends of a run may be submitted again, without a cluster; `test_trainer.py` kills what is lost here."""

import errno
import os
import signal
import subprocess
import sys
from concurrent.futures import Future
from pathlib import Path
from typing import Any

os.environ["RAY_AUTH_MODE"] = "disabled"  # read when ray is imported

import pytest
import torch.distributed as dist
from ray.exceptions import ActorDiedError, NodeDiedError, RayTaskError
from ray.train import ControllerError, PreemptionError, Result, WorkerGroupError
from ray.train.v2._internal.exceptions import WorkerHealthCheckFailedError
from ray.train.v2.api.preemption import PreemptionInfo

from ray_ds.errors import ArtifactError, RetryableError, StorageRefused, StorageUnavailable
from ray_ds.on_ray.outcome import (
    LostTooOften,
    StoppedWithoutWorkers,
    TrainingStopped,
    is_cut_off,
    losses_are_retryable,
    read_outcome,
)


def end_with(error: BaseException) -> Exception:
    """Return what `train_on_ray` raises where Ray Train raises this."""
    outcome: Future[Result] = Future()
    outcome.set_exception(error)
    with pytest.raises(Exception) as raised, losses_are_retryable():
        read_outcome(outcome)
    return raised.value


def in_a_task(cause: Exception) -> Exception:
    """Return an exception as `ray.get` raises it, when a task or an actor raised it."""
    raised: Exception = RayTaskError("run", "Traceback", cause).as_instanceof_cause()
    return raised


def in_workers(*failures: Exception) -> WorkerGroupError:
    return WorkerGroupError("workers failed", dict(enumerate(failures)))


COLLATERAL = RuntimeError(
    "[/pytorch/third_party/gloo/gloo/transport/tcp/pair.cc:537] Read error [127.0.0.1]:12214: Connection reset by peer"
)
MISTAKE = ArtifactError("shards/0.arrow", "torn", "must be whole", "tokenize again")


@pytest.mark.shows("What is lost of Ray, its controller or its head included, ends a job as one that may be retried")
@pytest.mark.parametrize(
    "error",
    [
        ActorDiedError(),
        NodeDiedError("the node is gone"),
        in_a_task(ActorDiedError()),
        ControllerError(ActorDiedError()),
        ControllerError(in_a_task(ActorDiedError())),
        PreemptionError(PreemptionInfo(None, {"node": [0]})),
        in_workers(WorkerHealthCheckFailedError("no answer", ActorDiedError())),
        in_workers(COLLATERAL, WorkerHealthCheckFailedError("no answer", ActorDiedError())),
        in_workers(OSError(errno.EHOSTUNREACH, "No route to host")),
        in_workers(COLLATERAL),
        in_workers(COLLATERAL, dist.DistNetworkError("The client socket has timed out")),
        in_workers(dist.DistBackendError("NCCL communicator was aborted on rank 1")),
        in_workers(StorageUnavailable("s3://bucket/run", "timed out", "look whether it is up")),
        in_workers(RetryableError("a checkpoint could not be written")),
    ],
    ids=str,
)
def test_a_loss_may_be_submitted_again(error: Exception) -> None:
    assert isinstance(end_with(error), RetryableError)


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("no room on the disk"),
        ControllerError(ValueError("a fault of the controller")),
        in_a_task(ValueError("a fault of an actor")),
        in_workers(COLLATERAL, ValueError("a fault of one worker, which the other one followed")),
        in_workers(RuntimeError("mat1 and mat2 shapes cannot be multiplied")),
        in_workers(OSError(errno.ENOSPC, "No space left on device")),
        in_workers(StorageRefused("/data", "full", "must have room", "make room", errno.ENOSPC)),
        in_workers(WorkerHealthCheckFailedError("no answer", in_a_task(TypeError("cannot be pickled")))),
    ],
    ids=str,
)
def test_a_fault_is_raised_as_it_is(error: Exception) -> None:
    assert end_with(error) is error


@pytest.mark.parametrize("lasting", [MISTAKE, FloatingPointError("step 3 is bad")], ids=["mistake", "no number"])
def test_what_another_try_would_meet_again_reaches_the_user_as_it_is(lasting: Exception) -> None:
    assert end_with(ControllerError(lasting)) is lasting


def test_a_run_that_was_told_to_stop_says_after_which_step() -> None:
    stopped = end_with(ControllerError(StoppedWithoutWorkers()))
    assert isinstance(stopped, TrainingStopped) and stopped.step is None
    outcome: Future[Any] = Future()
    outcome.set_result(type("Result", (), {"return_value": 7}))
    with pytest.raises(TrainingStopped, match="after step 7, which is safe") as raised:
        read_outcome(outcome)
    assert raised.value.step == 7


def test_the_message_says_what_was_lost_in_one_line() -> None:
    message = str(end_with(in_workers(WorkerHealthCheckFailedError("no answer", NodeDiedError("node 10.0.0.7 died")))))
    assert message.startswith("workers were lost too often without a step done in between; submit it again to go on: ")
    assert "\n" not in message and isinstance(LostTooOften(ValueError()), RetryableError)


PEER = """
import datetime, os, sys, time, torch, torch.distributed as dist
rank, file = int(sys.argv[1]), sys.argv[2]
dist.init_process_group("gloo", init_method=f"file://{file}", rank=rank, world_size=2)
dist.barrier()
print("ready", flush=True)
if rank == 1:
    time.sleep(60)
try:
    dist.all_reduce(torch.ones(4))
except RuntimeError as error:
    print(type(error).__name__, error, flush=True)
"""


def test_gloo_says_what_is_known_as_a_loss_where_a_process_is_gone(tmp_path: Path) -> None:
    peers = [
        subprocess.Popen([sys.executable, "-c", PEER, str(rank), str(tmp_path / "store")], stdout=subprocess.PIPE)
        for rank in (0, 1)
    ]
    try:
        for peer in peers:
            assert peer.stdout is not None and peer.stdout.readline() == b"ready\n"
        peers[1].send_signal(signal.SIGKILL)
        found = peers[0].communicate(timeout=30)[0].decode()
    finally:
        for peer in peers:
            peer.kill()
            peer.wait()
    assert found.startswith("RuntimeError") and is_cut_off(RuntimeError(found)), found
