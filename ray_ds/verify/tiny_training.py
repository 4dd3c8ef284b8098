"""The tiny training that checks run on the cluster as the train stage does, and comparing its loss curves."""

import math
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from ray_ds import storage
from ray_ds.config.settings import decode_settings
from ray_ds.config.train import TrainSettings
from ray_ds.on_ray.board import Event
from ray_ds.on_ray.nodes import usable_nodes
from ray_ds.on_ray.sizing import room
from ray_ds.on_ray.trainer import TrainingStopped, TrainLoop, train_on_ray
from ray_ds.stage_run import StageRun
from ray_ds.train.checkpoints import METRICS
from ray_ds.train.metrics import Record, decode
from ray_ds.train.task import TrainTask
from ray_ds.verify.context import Context
from ray_ds.verify.finding import Problem
from ray_ds.verify.made_up import make_run, write_shards

STEPS = 40
MOST_WORKERS = 4
TOLERANCE = 1e-5
"""Relative difference of two losses that only rounding may make; dense fp32 steps stay far below it."""
ROOM_WAIT_S = 10.0
SETTINGS: Mapping[str, object] = {
    "model": {"preset": "tiny", "n_routed_experts": 0},
    "seq_len": 128,
    "batch_tokens": 1024,
    "micro_batch": 1,
    "steps": STEPS,
    "precision": "fp32",
    "optimizer": {"kind": "adamw", "lr": 3e-3},
    "schedule": {"warmup_steps": 4},
    "checkpoint_every": 5,
    "log_every": 1,
}
"""Eight micro-batches a step, which one to four workers share out evenly or not."""


@dataclass(frozen=True, kw_only=True)
class Trained:
    """A run that is over."""

    run: StageRun
    settings: TrainSettings
    records: Sequence[Record]
    """A record a step; without those after a stop."""
    events: Sequence[Event]
    stopped_at: int | None
    """The step that it was stopped after."""
    seconds: float


def worker_need(context: Context) -> dict[str, float]:
    """Return the resources of a worker."""
    return {"CPU": 1.0, **({"GPU": 1.0} if context.gpus else {})}


def wait_for_room(context: Context, most: int) -> int:
    """Return how many workers fit now, up to `most`, after what ran before has let go of its resources."""
    need = worker_need(context)
    deadline = time.monotonic() + ROOM_WAIT_S
    while True:
        nodes = usable_nodes(need, {}, most)
        free, total = min(most, room(nodes)), min(most, sum(node.total for node in nodes))
        if free == total or time.monotonic() > deadline:
            return free
        time.sleep(0.2)


def train_tiny(
    context: Context,
    name: str,
    *,
    num_workers: int | tuple[int, int],
    loop: TrainLoop | None = None,
    on_record: Callable[[Record], None] = lambda record: None,
    stop: threading.Event | None = None,
) -> Trained:
    """Train, or go on with the run of this name, and return what became of it.

    Args:
        on_record: called with each step's record, about half a second late.
    """
    folder = context.work("training")
    shards = storage.join(folder, "shards")
    vocab_size = write_shards(shards)
    device = "cuda" if context.gpus else "cpu"
    workers = list(num_workers) if isinstance(num_workers, tuple) else num_workers
    elastic = {"grow_pause_s": 1.0} if isinstance(num_workers, tuple) else {}
    raw = {**SETTINGS, "device": device, "num_workers": workers, **elastic}
    settings = decode_settings(TrainSettings, raw, where="verify")
    run = make_run(storage.join(folder, name), "train", settings, run_dir=context.run_dir)
    task = TrainTask(
        settings=settings,
        config=settings.new_model(vocab_size),
        shards=shards,
        checkpoints=run.work_path("checkpoints"),
        output=run.uri,
        bos_token_id=0,
        eos_token_id=1,
        device=device,
        job_started=time.time(),
    )
    return _train(context, task, run, loop, on_record, stop or threading.Event())


def _train(
    context: Context,
    task: TrainTask,
    run: StageRun,
    loop: TrainLoop | None,
    on_record: Callable[[Record], None],
    stop: threading.Event,
) -> Trained:
    context.clean_up.add(stop.set)
    started = time.monotonic()
    shown: list[Record] = []
    events: list[Event] = []
    stopped_at: int | None = None

    def show(record: Record) -> None:
        shown.append(record)
        on_record(record)

    try:
        train_on_ray(task, work=run.work_path(), on_report=show, on_event=events.append, stop=stop, loop=loop)
        records = decode(storage.read_bytes(run.path(METRICS)).decode())
    except TrainingStopped as error:
        stopped_at, records = error.step or 0, shown
    seconds = time.monotonic() - started
    return Trained(
        run=run, settings=task.settings, records=records, events=events, stopped_at=stopped_at, seconds=seconds
    )


def largest_difference(first: Sequence[Record], second: Sequence[Record]) -> float:
    """Return the largest relative difference of two runs' losses.

    It is infinite where their steps are not the same, and no number where a loss is none, which `max` would pass over.
    """
    if not first or [record["step"] for record in first] != [record["step"] for record in second]:
        return float("inf")
    differences = [abs(b["loss"] / a["loss"] - 1) for a, b in zip(first, second, strict=True)]
    return float("nan") if any(math.isnan(difference) for difference in differences) else max(differences)


def judge_losses(differences: Mapping[str, float], against: str) -> list[Problem]:
    """Return the runs whose losses are not those of the run named `against`."""
    action = (
        "see that versions, CPUs and GPUs are the same on all nodes and that collectives add up right; the world size"
        " must change nothing but rounding"
    )
    return [
        Problem(
            wrong=f"the losses {name} differ from those {against}: {_words(difference)}, more than {TOLERANCE:g}",
            action=action,
        )
        for name, difference in differences.items()
        if not difference <= TOLERANCE
    ]


def _words(difference: float) -> str:
    return "steps are missing" if difference == float("inf") else f"by {difference:.2g} of their value"
