"""Schedules of nodes that die, join and drain, drawn by seed and played against training on real raylets.

Training is the train stage's own. What a schedule did to it is compared with a run that nobody disturbed: every step's
loss and the order of the steps. A step that is done again must give the same loss again.
"""

import math
import random
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import ray
from ray.cluster_utils import Cluster

from ray_ds.on_ray.trainer import TrainingStopped
from ray_ds.train.host import Host, Request
from ray_ds.train.loop import train
from ray_ds.train.task import Stopped, TrainResult, TrainTask
from tests.on_ray.elastic_runs import Run, bring_to, drain_node, kill_node, worker_node_ids
from tests.on_ray.two_nodes import add_node, wait_for
from tests.train.runs import make_settings, make_task, read_records, train_in_processes

Kind = Literal["kill", "join", "drain"]

MAX_NODES = 3
STEP_S = 0.1
CHECKPOINT_EVERY = 30
DRAIN_S = 60
PATIENCE_S = 180.0
"""With what is waited for; a busy machine takes its time."""
MAX_REPEATS_A_KILL = 2 * CHECKPOINT_EVERY
"""The checkpoint before last is the newest that counts when the kill strikes while the last is written, and with it
the nodes that hold the snapshot die."""
STEPS = 4000
"""More than any schedule lasts."""
SETTINGS: Mapping[str, Any] = {
    "batch_tokens": 192,
    "micro_batch": 4,
    "optimizer": {"kind": "adamw", "lr": 1e-4},
    "checkpoint_every": CHECKPOINT_EVERY,
    "max_failures": 5,
}
"""3 micro-batches a step, so that 2 workers share them unevenly."""
TOLERANCE = 1e-5
"""Relative, of a step's loss: sums in another order move it by 1e-7, another sample by 1e-2."""


@dataclass(frozen=True, kw_only=True)
class Event:
    """What happens to a node, and how long after what happened before."""

    kind: Kind
    wait_s: float


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """Nodes at the start, and what happens to them."""

    seed: int
    num_nodes: int
    events: tuple[Event, ...]


@dataclass(kw_only=True)
class Outcome:
    """What a schedule did to training."""

    schedule: Schedule
    seconds: float = 0.0
    steps: int = 0
    workers: list[int] = field(default_factory=list)
    """Numbers of workers that trained, one after the other."""
    repeats: int = 0
    """Steps that were done again."""
    largest_difference: float = math.nan
    """Relative, of any step's loss from the undisturbed run's."""
    faults: list[str] = field(default_factory=list)

    def as_json(self) -> dict[str, Any]:
        """Return it with an outcome in a word."""
        return {**asdict(self), "outcome": "failed" if self.faults else "same"}


def draw(seed: int, num_events: int) -> Schedule:
    """Return the schedule of a seed.

    One event in three comes before training has got over the one before. The last node may die too; then one joins.
    """
    rng = random.Random(f"nodes {seed}")
    num_nodes = alive = rng.randint(1, MAX_NODES - 1)
    events = []
    for _ in range(num_events):
        kinds: list[Kind] = ["join"] if alive == 0 else ["kill", "drain"] if alive == MAX_NODES else []
        kinds = kinds or (["kill", "join"] if alive == 1 else ["kill", "join", "drain"])
        kind = rng.choice(kinds)
        alive += 1 if kind == "join" else -1
        is_early = rng.random() < 1 / 3
        events.append(Event(kind=kind, wait_s=round(rng.uniform(0.2, 4.0) if is_early else rng.uniform(8.0, 14.0), 2)))
    if alive == 0:
        events.append(Event(kind="join", wait_s=2.0))
    return Schedule(seed=seed, num_nodes=num_nodes, events=tuple(events))


def undisturbed_losses(folder: Path, num_steps: int) -> list[float]:
    """Return the losses of the first steps of the run that nobody disturbs, made by one process without Ray."""
    task = make_task(folder, make_settings(**SETTINGS, steps=num_steps, num_workers=1, schedule=_schedule(num_steps)))
    train_in_processes(task, world_size=1)
    return [record["loss"] for record in read_records(task)]


def _schedule(num_steps: int) -> dict[str, Any]:
    """Return rates that do not depend on the number of steps after the warm-up."""
    return {"warmup_steps": min(20, num_steps - 1), "final_lr_fraction": 1.0}


def train_slowly(task: TrainTask, host: Host) -> TrainResult | Stopped:
    """Train with steps long enough for something to happen within them."""

    class SlowHost:
        def __getattr__(self, name: str) -> Any:
            return getattr(host, name)

        def request(self) -> Request:
            time.sleep(STEP_S)
            return host.request()

    return train(task, SlowHost())  # type: ignore[arg-type]


def play(schedule: Schedule, cluster: Cluster, folder: Path, losses: list[float]) -> Outcome:
    """Train while a schedule happens, until training has all nodes that are left; compare it with the quiet run."""
    started = time.monotonic()
    bring_to(cluster, schedule.num_nodes)
    settings = {**SETTINGS, "snapshot_every": "auto", "schedule": _schedule(STEPS), "steps": STEPS}
    run = Run(folder, loop=train_slowly, **settings, num_workers=[1, MAX_NODES])
    try:
        _wait(run, lambda: _num_workers(run) == schedule.num_nodes)
        for event in schedule.events:
            time.sleep(event.wait_s)
            _happen(event, cluster, run)
        _wait(run, lambda: _num_workers(run) == len(_staying_nodes()))
        count = len(run.records)
        _wait(run, lambda: len(run.records) > count + 5)
    finally:
        run.end()
    outcome = Outcome(schedule=schedule, seconds=round(time.monotonic() - started, 1))
    _compare(run, losses, outcome)
    return outcome


def _wait(run: Run, holds: Callable[[], bool]) -> None:
    """Wait until something holds, or the run has ended."""
    wait_for(lambda: holds() or not run.thread.is_alive(), timeout_s=PATIENCE_S)


def _num_workers(run: Run) -> int:
    return int(run.records[-1]["world_size"]) if run.records else 0


def _staying_nodes() -> list[str]:
    """Return the living nodes that do not drain."""
    draining = ray._private.state.state.get_draining_nodes()
    return [node_id for node_id in worker_node_ids() if node_id not in draining]


def _happen(event: Event, cluster: Cluster, run: Run) -> None:
    """Let an event happen; a node that drains is gone once training has left it."""
    nodes = _staying_nodes()
    if event.kind == "join":
        add_node(cluster, wait=False)
        _wait(run, lambda: len(_staying_nodes()) == len(nodes) + 1)
    elif event.kind == "kill":
        kill_node(cluster, nodes[-1])
        _wait(run, lambda: nodes[-1] not in worker_node_ids())
    else:
        drain_node(cluster, nodes[-1], DRAIN_S)
        _wait(run, lambda: _num_workers(run) < len(nodes))
        kill_node(cluster, nodes[-1])
        _wait(run, lambda: nodes[-1] not in worker_node_ids())


def _compare(run: Run, losses: list[float], outcome: Outcome) -> None:
    """Fill in what the run did and what is wrong with it."""
    if not isinstance(run.error, TrainingStopped):
        outcome.faults.append(f"the run ended: {run.error or run.result}")
    steps = [int(record["step"]) for record in run.records]
    outcome.steps = max(steps)
    for record in run.records:
        if not outcome.workers or outcome.workers[-1] != record["world_size"]:
            outcome.workers.append(int(record["world_size"]))
    if set(steps) != set(range(1, max(steps) + 1)):
        outcome.faults.append("a step is missing")
    outcome.repeats = len(steps) - len(set(steps))
    num_kills = sum(event.kind == "kill" for event in outcome.schedule.events)
    if outcome.repeats > num_kills * MAX_REPEATS_A_KILL:
        outcome.faults.append(f"{outcome.repeats} steps done again with {num_kills} kills")
    if outcome.steps > len(losses):
        outcome.faults.append(f"{outcome.steps} steps, and the quiet run has {len(losses)}")
        return
    pairs = [(record["loss"], losses[int(record["step"]) - 1]) for record in run.records]
    outcome.largest_difference = max(abs(loss - quiet) / quiet for loss, quiet in pairs)
    if outcome.largest_difference > TOLERANCE:
        outcome.faults.append(f"the losses differ by {outcome.largest_difference:.1e}")
