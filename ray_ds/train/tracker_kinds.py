"""The trackers there are: TensorBoard, Weights & Biases and MLflow, each behind `Tracker`."""

import json
import os
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from pydantic import JsonValue

from ray_ds import storage
from ray_ds.train.metrics import Record

PROJECT = "ray_ds"
"""Project or experiment, where the environment names none."""
UPLOAD_S = 30.0
"""Least time between two copies of TensorBoard's file to an object store."""
UPLOAD_SHARE = 20
"""How many times as long as a copy took the next one waits."""
MLFLOW_BATCH = 32
"""Records in a request; MLflow takes 1000 figures at once."""
NOT_FIGURES = ("step", "time")


@dataclass(frozen=True, kw_only=True, slots=True)
class TrackedRun:
    """What a tracker is told about a run."""

    output: str
    """The artefact's folder, `<run_dir>/<step>/<digest>`; the digest is the run's name wherever it is tracked."""
    settings: Mapping[str, JsonValue]
    steps_done: int
    """Later steps that a tracker may have seen will run again."""

    @property
    def digest(self) -> str:
        """The artefact's digest."""
        return self.output.rstrip("/").rsplit("/", 1)[-1]

    @property
    def name(self) -> str:
        """What people read: the recipe's step and the beginning of the digest."""
        return f"{self.output.rstrip('/').rsplit('/', 2)[-2]}-{self.digest[:8]}"


class Tracker(Protocol):
    """One place that keeps figures; made, used and closed in one thread."""

    def log(self, records: Sequence[Record]) -> None:
        """Keep the figures of steps, in order."""

    def close(self, *, is_finished: bool) -> None:
        """Write what is left; the run may go on later if it is not finished."""


def _figures(record: Record) -> Iterator[tuple[str, float]]:
    return ((name, float(value)) for name, value in record.items() if name not in NOT_FIGURES)


class _TensorBoard:
    """Event files in `tensorboard/` of the artefact; steps that run again take the place of the earlier ones."""

    def __init__(self, run: TrackedRun) -> None:
        self._folder = storage.join(run.output, "tensorboard")
        is_remote = storage.is_remote(self._folder)
        self._local = Path(tempfile.mkdtemp()) if is_remote else storage.local_path(self._folder)
        self._is_remote, self._next_upload = is_remote, 0.0
        self._last = run.steps_done
        self._open()
        if not run.steps_done:
            text = json.dumps(run.settings, indent=1, ensure_ascii=False)
            self._writer.add_text("settings", "\n".join(f"    {line}" for line in text.splitlines()), 0)

    def _open(self) -> None:
        from tensorboardX import SummaryWriter

        self._writer = SummaryWriter(str(self._local), purge_step=self._last + 1)

    def log(self, records: Sequence[Record]) -> None:
        for record in records:
            step = int(record["step"])
            if step <= self._last:  # training went back
                self._writer.close()
                self._last = step - 1
                self._open()
            self._last = step
            for name, value in _figures(record):
                self._writer.add_scalar(name, value, step, walltime=record.get("time"))
        self._writer.flush()
        self._upload()

    def close(self, *, is_finished: bool) -> None:
        self._writer.close()
        self._next_upload = 0.0
        self._upload()

    def _upload(self) -> None:
        """Copy the files to the object store, if there is one and it is time."""
        started = time.monotonic()
        if self._is_remote and started >= self._next_upload:
            for file in self._local.iterdir():
                storage.write_bytes(storage.join(self._folder, file.name), file.read_bytes())
            took = time.monotonic() - started
            self._next_upload = started + max(UPLOAD_S, UPLOAD_SHARE * took)


class _Wandb:
    """A W&B run whose id is the digest; what W&B once took it keeps, so steps that run again are there twice."""

    def __init__(self, run: TrackedRun) -> None:
        import wandb

        self._run = wandb.init(
            project=os.environ.get("WANDB_PROJECT", PROJECT),
            id=run.digest,
            name=run.name,
            resume="allow",
            config=dict(run.settings),
            allow_val_change=True,  # a new submission may have other settings where the output stays the same
            dir=os.environ.get("WANDB_DIR", tempfile.gettempdir()),
            settings=wandb.Settings(silent=True, console="off"),
        )
        self._run.define_metric("step", hidden=True)
        self._run.define_metric("*", step_metric="step")  # W&B's own step only counts calls and never goes back

    def log(self, records: Sequence[Record]) -> None:
        for record in records:
            self._run.log({"step": record["step"], **dict(_figures(record))})

    def close(self, *, is_finished: bool) -> None:
        if not is_finished:
            self._run.mark_preempting()
        self._run.finish(exit_code=0 if is_finished else 1)


class _Mlflow:
    """An MLflow run found by its tag; what MLflow once took it keeps, so steps that run again are there twice."""

    def __init__(self, run: TrackedRun) -> None:
        from mlflow import MlflowClient

        self._client = MlflowClient()
        experiment = self._experiment(os.environ.get("MLFLOW_EXPERIMENT_NAME", PROJECT))
        found = self._client.search_runs([experiment], f"tags.`{PROJECT}.digest` = '{run.digest}'", max_results=1)
        if found:
            self._id = found[0].info.run_id
            self._client.update_run(self._id, status="RUNNING")
        else:
            tags = {f"{PROJECT}.digest": run.digest, f"{PROJECT}.output": run.output}
            self._id = self._client.create_run(experiment, tags=tags, run_name=run.name).info.run_id
            for name, value in _flat(run.settings):
                self._client.log_param(self._id, name, value, synchronous=True)

    def _experiment(self, name: str) -> str:
        found = self._client.get_experiment_by_name(name)
        return str(found.experiment_id if found is not None else self._client.create_experiment(name))

    def log(self, records: Sequence[Record]) -> None:
        from mlflow.entities import Metric

        for start in range(0, len(records), MLFLOW_BATCH):
            batch = [
                Metric(name, value, int(record.get("time", time.time()) * 1000), int(record["step"]))
                for record in records[start : start + MLFLOW_BATCH]
                for name, value in _figures(record)
            ]
            self._client.log_batch(self._id, metrics=batch, synchronous=True)

    def close(self, *, is_finished: bool) -> None:
        self._client.set_terminated(self._id, status="FINISHED" if is_finished else "KILLED")


def _flat(settings: Mapping[str, JsonValue], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield settings with dotted names."""
    for name, value in settings.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


OPEN: Mapping[str, Callable[[TrackedRun], Tracker]] = {"tensorboard": _TensorBoard, "wandb": _Wandb, "mlflow": _Mlflow}
