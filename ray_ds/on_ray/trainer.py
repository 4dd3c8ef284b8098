"""Ray Train around the training loop: workers, their replacement when lost, and word of how far they are."""

import math
import os
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from typing import Any

import ray
import ray.train
from ray.exceptions import RayError
from ray.train import FailureConfig, RunConfig, ScalingConfig, UserCallback
from ray.train.torch import TorchConfig, TorchTrainer

from ray_ds import storage
from ray_ds.logs import log_event, setup_logging
from ray_ds.on_ray import NO_AUTO_CONNECT
from ray_ds.on_ray.board import Event, News, open_board
from ray_ds.on_ray.hang_watch import HangWatch
from ray_ds.on_ray.host import RayHost
from ray_ds.on_ray.keepers import KeeperFleet
from ray_ds.on_ray.outcome import LASTING, TrainingStopped, losses_are_retryable, read_outcome
from ray_ds.on_ray.sizing import Sizes
from ray_ds.train.host import Host, Request
from ray_ds.train.task import Stopped, TrainResult, TrainTask

__all__ = ["RAY_TRAIN", "TrainLoop", "TrainingStopped", "train_on_ray"]

POLL_S = 0.5
MIN_PAUSE_TIMEOUT_S = 600.0
"""A pause needs a whole step and a checkpoint on storage."""
SILENT_S = 20.0
"""Time without a word of any worker after which none runs; workers speak twice a second."""
RAY_TRAIN = "ray_train"
"""Folder of what Ray Train writes about the run; nothing reads it once the run is over."""
HANGS = "hangs"
"""Folder of the stack traces of workers that hung."""
MALLOC_ENV = {
    "MALLOC_ARENA_MAX": "1",
    "MALLOC_MMAP_THRESHOLD_": "4000000000",
    "MALLOC_TRIM_THRESHOLD_": "8000000000",
    "GLIBC_TUNABLES": "glibc.malloc.hugetlb=1",
}
"""Makes glibc keep the memory of freed activations instead of giving it back and faulting it in again every layer."""
COMPILE_ENV = {"TORCHINDUCTOR_AUTOGRAD_CACHE_ALLOW_CUSTOM_AUTOGRAD": "1"}
"""Lets torch take a compiled pass with our autograd functions from its cache as a whole; they are part of the key.
Halves what a restart takes to compile: 7.6 s to 3.9 s for 8 small layers on a CPU."""
Report = Callable[[Mapping[str, float]], None]
OnEvent = Callable[[Event], None]
TrainLoop = Callable[[TrainTask, Host], TrainResult | Stopped]


def log_board(event: Event) -> None:
    """Write an event of the run as a log line."""
    log_event(event.kind, **event.facts)


@losses_are_retryable()
def train_on_ray(
    task: TrainTask,
    *,
    work: str,
    on_report: Report,
    on_event: OnEvent = log_board,
    stop: threading.Event | None = None,
    check_alone: Callable[[], None] = lambda: None,
    loop: TrainLoop | None = None,
) -> TrainResult:
    """Run a training task on workers of the cluster and return what they say at the end.

    Workers that die are replaced as one group, at most `max_failures` times without a step done in between; each group
    goes on from the newest state. So does the next job, if this one dies. An error that another try would meet again
    ends the run. With a range of workers the group grows and shrinks with the cluster.

    Args:
        work: folder that gets `ray_train/`, and `hangs/` with the stack traces of workers that hung.
        on_report: called here with a step's figures, every `log_every` steps.
        on_event: called here with what happens to the workers.
        stop: once set, the workers make their state safe on storage and end.
        check_alone: as `StageRun.check_alone`; the workers call it.
        loop: what a worker runs, if not `ray_ds.train.loop.train`.
    Raises:
        TrainingStopped: `stop` was set, and training stopped before its last step.
        UserError: a worker found a mistake of the user.
        FloatingPointError: the loss is no number.
        RetryableError: workers were lost too often, or Ray's part of the run was; submitting it again goes on.
        TrainingFailedError: workers failed too often by an error of their own.
    """
    name = f"attempt-{os.urandom(6).hex()}"
    board = open_board(f"board-{name}")
    fleet = KeeperFleet(name)
    hang_watch = HangWatch(task.settings.hang_timeout_s, fleet, storage.join(work, HANGS))
    trainer = _make_trainer(task, work, name, board, loop, check_alone)
    outcome: Future[ray.train.Result] = Future()
    threading.Thread(target=_fit, args=(trainer, outcome), daemon=True).start()
    watch = _Watch(board, on_report, on_event)
    is_stock = task.settings.scaling == "stock"
    try:
        while not outcome.done():
            if stop is not None and stop.is_set():
                board.ask.remote(Request.STOP, "the job was told to stop")
            _look_after(fleet, watch.nodes, hang_watch)
            watch.pass_on()
            if stop is not None and stop.is_set() and is_stock and watch.silent_s > SILENT_S:
                raise TrainingStopped(None)  # our own policy says so itself; Ray Train's cannot be asked
            time.sleep(POLL_S)
        watch.pass_on()
    finally:
        ray.kill(board)
        fleet.shutdown()
    return read_outcome(outcome)


def _look_after(fleet: KeeperFleet, nodes: Sequence[str], hang_watch: HangWatch) -> None:
    """Keep a keeper on the workers' nodes and look for hung workers; Ray's head may be silent for a while."""
    try:
        fleet.refresh(nodes)
        hang_watch.look(time.monotonic())
    except RayError as error:
        log_event("keepers_unreachable", reason=str(error).splitlines()[0])


class _Watch:
    """Brings news from the board to whoever asked for it."""

    def __init__(self, board: Any, on_report: Report, on_event: OnEvent) -> None:
        self._board = board
        self._on_report = on_report
        self._on_event = on_event
        self._num_events = 0
        self.nodes: Sequence[str] = []
        """Where the workers are."""
        self.silent_s = math.inf
        """Time since a worker was heard of."""

    def pass_on(self) -> None:
        """Hand over what is new."""
        news: News = ray.get(self._board.collect.remote(self._num_events))
        self.nodes, self.silent_s = news.nodes, news.silent_s
        self._num_events += len(news.events)
        for record in news.records:
            self._on_report(record)
        for event in news.events:
            self._on_event(event)


def _make_trainer(
    task: TrainTask, work: str, name: str, board: Any, loop: TrainLoop | None, check_alone: Callable[[], None]
) -> TorchTrainer:
    """Return a trainer, by the settings ours or Ray's own; a fixed number of workers is a range of one to ours.

    Its run has a new name, so that it finds nothing of Ray's about an earlier attempt.

    Ray would take up its own list of checkpoints otherwise, which it does not write atomically (Ray 2.60,
    checkpoint_manager.py `save_state`); ours are in `task.checkpoints`.
    """
    settings = task.settings
    is_cuda = task.device == "cuda"
    backend = "nccl" if is_cuda else "gloo"
    system, path = storage.filesystem(storage.join(work, RAY_TRAIN))
    options = {
        "train_loop_config": {
            "task": task.to_dict(),
            "board": board,
            "loop": loop,
            "run_id": name,
            "check_alone": check_alone,
        },
        "scaling_config": ScalingConfig(
            num_workers=settings.num_workers,
            use_gpu=is_cuda,
            resources_per_worker={"CPU": settings.cpus_per_worker, **({"GPU": 1} if is_cuda else {})},
            placement_strategy="SPREAD",
        ),
        "run_config": RunConfig(
            name=name,
            storage_path=path,
            storage_filesystem=system,
            failure_config=FailureConfig(max_failures=settings.max_failures),
            worker_runtime_env={"env_vars": _worker_env(task)},
            callbacks=[_EndAtOnce()],
        ),
    }
    if settings.scaling == "stock":
        return TorchTrainer(_run_worker, torch_config=TorchConfig(backend=backend), **options)
    # Leans on private parts of Ray Train, which the branch above goes without.
    from ray_ds.on_ray.elastic import ElasticTorchTrainer, KeptGroupTorchConfig, Plan

    modules = ["ray_ds.on_ray.trainer", "ray.train.torch", *(["ray_ds.train.loop"] if loop is None else [])]
    plan = Plan(
        sizes=Sizes(min_workers=settings.min_workers, max_workers=settings.max_workers, allowed=settings.worker_sizes),
        grow_pause_s=settings.grow_pause_s or 0.0,
        pause_timeout_s=max(settings.hang_timeout_s, MIN_PAUSE_TIMEOUT_S),
        max_failures=settings.max_failures,
        spare_modules=tuple(modules) if settings.is_elastic and not is_cuda else (),
    )
    config = KeptGroupTorchConfig(backend=backend)
    return ElasticTorchTrainer(_run_worker, plan=plan, board=board, torch_config=config, **options)


def _worker_env(task: TrainTask) -> dict[str, str]:
    """Return the environment of the workers."""
    threads = str(task.settings.threads_per_worker)
    env = {"OMP_NUM_THREADS": threads, "DS_ACCELERATOR": task.device, "TOKENIZERS_PARALLELISM": "false"}
    env |= NO_AUTO_CONNECT
    if task.device != "cuda":
        env |= MALLOC_ENV
    if task.settings.compile:
        env |= COMPILE_ENV
    else:
        # DeepSpeed compiles Muon's arithmetic at first use, which takes a C++ compiler a minute and gains nothing here.
        env["TORCHDYNAMO_DISABLE"] = "1"
    return env


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


def _run_worker(config: dict[str, Any]) -> int | dict[str, Any]:
    """Train in this process; return the facts of the run, or the step after which it was stopped."""
    task = TrainTask.from_dict(config["task"])
    setup_logging()
    keeps_snapshots = task.settings.snapshot_every != 0
    device = ray.train.torch.get_device()
    host = RayHost(
        device,
        config["run_id"],
        config["board"],
        keeps_snapshots=keeps_snapshots,
        check_alone=config["check_alone"],
    )
    loop: TrainLoop | None = config["loop"]
    if loop is None:
        from ray_ds.train.loop import train  # brings DeepSpeed, which reads DS_ACCELERATOR when it is imported

        loop = train
    result = loop(task, host)
    host.close()
    return result.step if isinstance(result, Stopped) else vars(result)
