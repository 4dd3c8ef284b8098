"""Ray Train around the training loop: workers, their replacement when lost, and word of how far they are."""

import os
import threading
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from queue import Empty
from typing import Any

import ray
import ray.train
import torch
from ray.train import FailureConfig, RunConfig, ScalingConfig, UserCallback
from ray.train.torch import TorchConfig, TorchTrainer
from ray.train.v2.api.exceptions import ControllerError
from ray.util.queue import Queue

from ray_ds import storage
from ray_ds.errors import UserError
from ray_ds.logs import setup_logging
from ray_ds.train.task import TrainResult, TrainTask

POLL_S = 0.5
MALLOC_ENV = {
    "MALLOC_ARENA_MAX": "1",
    "MALLOC_MMAP_THRESHOLD_": "4000000000",
    "MALLOC_TRIM_THRESHOLD_": "8000000000",
    "GLIBC_TUNABLES": "glibc.malloc.hugetlb=1",
}
"""Makes glibc keep the memory of freed activations instead of giving it back and faulting it in again every layer."""
LASTING = (UserError, FloatingPointError)
"""What another try would meet again: a mistake of the user, or a loss that is no number."""
Report = Callable[[Mapping[str, float]], None]


def train_on_ray(task: TrainTask, *, work: str, on_report: Report) -> TrainResult:
    """Run a training task on workers of the cluster and return what they say at the end.

    Workers that die are replaced as one group, at most `max_failures` times; each group goes on from the newest
    checkpoint. So does the next job, if this one dies. An error that another try would meet again ends the run.

    Args:
        work: folder for what Ray Train writes about the run.
        on_report: called here with a step's figures, every `log_every` steps.
    Raises:
        UserError: a worker found a mistake of the user.
        FloatingPointError: the loss is no number.
        TrainingFailedError: workers died too often.
    """
    reports = Queue(actor_options={"num_cpus": 0})
    trainer = _make_trainer(task, work, reports)
    outcome: Future[ray.train.Result] = Future()
    threading.Thread(target=_fit, args=(trainer, outcome), daemon=True).start()
    while not outcome.done():
        _pass_on(reports, on_report, timeout_s=POLL_S)
    _pass_on(reports, on_report, timeout_s=0.0)
    reports.shutdown()
    try:
        return TrainResult(**outcome.result().return_value)
    except ControllerError as error:
        if isinstance(error.controller_failure, LASTING):
            raise error.controller_failure from error
        raise


def _make_trainer(task: TrainTask, work: str, reports: Queue) -> TorchTrainer:
    """Return a trainer whose run has a new name, so that it finds nothing of Ray's about an earlier attempt.

    Ray would take up its own list of checkpoints otherwise, which it does not write atomically (Ray 2.60,
    checkpoint_manager.py `save_state`); ours are in `task.checkpoints`.
    """
    settings = task.settings
    is_cuda = task.device == "cuda"
    system, path = storage.filesystem(work)
    threads = str(settings.threads_per_worker)
    env = {"OMP_NUM_THREADS": threads, "DS_ACCELERATOR": task.device, "TOKENIZERS_PARALLELISM": "false"}
    if not is_cuda:
        env |= MALLOC_ENV
    if not settings.compile:
        # DeepSpeed compiles Muon's arithmetic at first use, which takes a C++ compiler a minute and gains nothing here.
        env["TORCHDYNAMO_DISABLE"] = "1"
    return TorchTrainer(
        _run_worker,
        train_loop_config={"task": task.to_dict(), "reports": reports},
        scaling_config=ScalingConfig(
            num_workers=settings.num_workers,
            use_gpu=is_cuda,
            resources_per_worker={"CPU": settings.cpus_per_worker, **({"GPU": 1} if is_cuda else {})},
            placement_strategy="SPREAD",
        ),
        torch_config=TorchConfig(backend="nccl" if is_cuda else "gloo"),
        run_config=RunConfig(
            name=f"attempt-{os.urandom(6).hex()}",
            storage_path=path,
            storage_filesystem=system,
            failure_config=FailureConfig(max_failures=settings.max_failures),
            worker_runtime_env={"env_vars": env},
            callbacks=[_EndAtOnce()],
        ),
    )


class _EndAtOnce(UserCallback):  # type: ignore[misc, unused-ignore]
    """Ends a run whose workers met a lasting error, on which Ray Train would use up `max_failures`.

    What a callback raises becomes a `ControllerError`, which is not tried again (Ray 2.60, failure_handling/default.py
    `_is_retryable_error`). It also ends the other workers, which may wait for the one that failed.
    """

    def after_exception(self, run_context: Any, worker_exceptions: Mapping[int, BaseException]) -> None:
        """Raise the lasting error of a worker, if there is one."""
        for failure in worker_exceptions.values():
            cause = getattr(failure, "_base_exc", failure)  # Ray wraps what a worker raised
            if isinstance(cause, LASTING):
                raise cause


def _fit(trainer: TorchTrainer, outcome: "Future[ray.train.Result]") -> None:
    """Run the trainer and keep its result, or whatever it raised, for the main thread."""
    try:
        outcome.set_result(trainer.fit())
    except BaseException as error:
        outcome.set_exception(error)


def _pass_on(reports: Queue, on_report: Report, timeout_s: float) -> None:
    """Hand over the reports that have arrived, waiting for the first at most `timeout_s`."""
    try:
        on_report(reports.get(timeout=timeout_s) if timeout_s else reports.get(block=False))
        while True:
            on_report(reports.get(block=False))
    except Empty:
        return


class _RayHost:
    """A worker of Ray Train, as the loop sees it."""

    def __init__(self, device: torch.device, reports: Queue) -> None:
        context = ray.train.get_context()
        self.rank: int = context.get_world_rank()
        self.world_size: int = context.get_world_size()
        self.device = device
        self._reports = reports

    def report(self, record: Mapping[str, float]) -> None:
        """Send the record to the driver, from rank 0 and without waiting."""
        if self.rank == 0:
            self._reports.actor.put_nowait.remote(dict(record))


def _run_worker(config: dict[str, Any]) -> dict[str, Any]:
    task = TrainTask.from_dict(config["task"])
    setup_logging()
    from ray_ds.train.loop import train  # brings DeepSpeed, which reads DS_ACCELERATOR when it is imported

    return vars(train(task, _RayHost(ray.train.torch.get_device(), config["reports"])))
