"""Small training runs for tests: shards to train on, settings, and processes that train without Ray."""

import dataclasses
import json
import os
import signal
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ray_ds.config.settings import decode_settings
from ray_ds.config.train import TrainSettings
from ray_ds.data.shard_file import write_shard
from ray_ds.train.host import Request, SnapshotStore
from ray_ds.train.task import TrainTask
from tests.train.processes import spawn

VOCAB_SIZE = 300
SMALL = {
    "model": {"preset": "tiny"},
    "seq_len": 16,
    "batch_tokens": 256,
    "micro_batch": 4,
    "steps": 8,
    "precision": "fp32",
    "optimizer": {"kind": "adamw", "lr": 1e-2},
    "schedule": {"warmup_steps": 2},
    "checkpoint_every": 3,
    "log_every": 1,
    "device": "cpu",
    "num_workers": 2,
}
"""16 rows of 16 tokens a step, 4 micro-batches, 8 steps, 2 processes."""


def make_settings(**changes: Any) -> TrainSettings:
    """Return the small settings with changes."""
    return decode_settings(TrainSettings, {**SMALL, **changes}, where="train")


def write_shards(folder: Path) -> None:
    """Write two shards a split, of documents that count upwards from a random start: easily learnt."""
    rng = np.random.default_rng(0)
    for split in ("train", "validation"):
        for shard in range(2):
            starts = rng.integers(3, VOCAB_SIZE, size=20)
            documents = [
                np.array([0, *(3 + (np.arange(40) + start) % (VOCAB_SIZE - 3))], np.uint16) for start in starts
            ]
            names = [f"{split}-{shard}-{number}" for number in range(len(documents))]
            (folder / split).mkdir(parents=True, exist_ok=True)
            write_shard(str(folder / split / f"{shard}.arrow"), documents, names, np.uint16)
    (folder / "tokenizer.json").write_text("{}")


def make_task(folder: Path, settings: TrainSettings, name: str = "run") -> TrainTask:
    """Return a run over the shards in `folder`, made if they are not there."""
    shards = folder / "shards"
    if not shards.exists():
        write_shards(shards)
    return TrainTask(
        settings=settings,
        config=settings.model.resolve(VOCAB_SIZE, settings.seq_len),
        shards=str(shards),
        checkpoints=str(folder / name / "work" / "checkpoints"),
        output=str(folder / name),
        bos_token_id=0,
        eos_token_id=1,
        device="cpu",
    )


def train_in_processes(
    task: TrainTask,
    *,
    world_size: int | None = None,
    die_at_step: int | None = None,
    requests: Mapping[int, Request] | None = None,
    runs_ahead: bool = False,
) -> None:
    """Run a task in as many processes as its settings have workers.

    Args:
        world_size: processes, if not the settings' most.
        die_at_step: the last process kills itself after this step.
        requests: what the last process is asked for, by the number of the step.
        runs_ahead: launch steps ahead as on a GPU.
    """
    store = Path(task.output) / f"store-{os.urandom(4).hex()}"
    store.parent.mkdir(parents=True, exist_ok=True)
    world_size = world_size or task.settings.max_workers
    arguments = (world_size, str(store), task.to_dict(), die_at_step, dict(requests or {}), runs_ahead)
    spawn(_run_rank, arguments, count=world_size)


def read_records(task: TrainTask) -> list[dict[str, Any]]:
    """Return the figures of a finished run."""
    return [json.loads(line) for line in (Path(task.output) / "metrics.jsonl").read_text().splitlines()]


def curve(records: list[dict[str, Any]]) -> list[tuple[Any, ...]]:
    """Return what must not depend on when a run was interrupted."""
    return [(r["step"], r["loss"], r["lr"], r["grad_norm"], r.get("max_violation")) for r in records]


@dataclasses.dataclass
class PlainHost:
    """A process that trains without Ray."""

    rank: int
    world_size: int
    die_at_step: int | None = None
    device: torch.device = dataclasses.field(default_factory=lambda: torch.device("cpu"))
    snapshots: SnapshotStore | None = None
    requests: Mapping[int, Request] = dataclasses.field(default_factory=dict)
    """What is asked for in a step, by its number."""
    place: str = ""
    safe_at: int | None = None
    declined: list[str] = dataclasses.field(default_factory=list)
    ran_ahead: bool = False

    def request(self) -> Request:
        return self.requests.get(int(self.place.split()[1]), Request.NONE)

    def beat(self, place: str) -> None:
        self.place = place

    def check_alone(self) -> None:
        """Nobody else is here."""

    def decline(self, reason: str) -> None:
        self.declined.append(reason)

    def safe(self, step: int, met: Request) -> Request:
        """Go on to the next of the requests to come, as if it had come while this process waited."""
        assert met is not Request.NONE
        self.safe_at = step
        return next((asked for asked in sorted(self.requests.values()) if asked > met), Request.STOP)

    def report(self, record: Any) -> None:
        self.ran_ahead |= self.place.startswith(f"step {record['step'] + 1} micro-batch")
        if self.rank == self.world_size - 1 and record["step"] == self.die_at_step:
            os.kill(os.getpid(), signal.SIGKILL)


def _run_rank(
    rank: int,
    world_size: int,
    store: str,
    raw: dict[str, Any],
    die_at_step: int | None,
    requests: Mapping[int, Request],
    runs_ahead: bool,
) -> None:
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(world_size), "LOCAL_RANK": str(rank)}
    torch.distributed.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=world_size)
    from ray_ds.train import stepper
    from ray_ds.train.loop import train

    if runs_ahead:
        may_run_ahead = stepper.may_run_ahead
        stepper.may_run_ahead = lambda settings, device: may_run_ahead(settings, torch.device("cuda"))
    is_last = rank == world_size - 1
    host = PlainHost(rank, world_size, die_at_step, requests=requests if is_last else {})
    train(TrainTask.from_dict(raw), host)
    assert host.ran_ahead == runs_ahead
