"""Settings of the evaluate stage."""

import dataclasses
from typing import Annotated, Literal

import pydantic

from ray_ds.config.lm_eval import LmEvalSettings
from ray_ds.config.paths import absolute_path
from ray_ds.config.settings import OUTPUT_UNCHANGED, settings
from ray_ds.config.tasks import TaskSettings
from ray_ds.errors import ConfigError


@settings
class EvaluateSettings:
    """Settings of the evaluate stage."""

    seq_len: pydantic.PositiveInt
    """Tokens that the model sees at most before what it predicts; as in training."""
    precision: Literal["fp32", "bf16"] = "bf16"
    """Type of activations, and of the weights that are not INT8."""
    max_tokens: pydantic.PositiveInt | None = None
    """Tokens of the validation split to predict, in rows spread evenly over it; without it, all of them."""
    baseline_tokens: pydantic.NonNegativeInt = 20_000_000
    """Tokens of the training split, at most, that unigram, bigram and xz learn from; 0 = no baselines. Twenty million
    take xz some three minutes and 1 GB of memory for each of its two runs."""
    tasks: tuple[TaskSettings, ...] = ()
    """Questions with right answers that are put to the model."""
    lm_eval: LmEvalSettings | None = None
    """Tasks of lm-evaluation-harness that are put to it as well; needs the package, `pip install 'ray_ds[lm-eval]'`."""
    ratings: Annotated[str | None, OUTPUT_UNCHANGED] = None
    """Files with people's ratings of its answers beside another model's, as the endpoint's page gives them: an absolute
    path or an s3:// or gs:// URI; `*` and `?` stay within a folder."""
    micro_batch: Annotated[pydantic.PositiveInt, OUTPUT_UNCHANGED] = 8
    """Rows that a worker sends through the model at once."""
    device: Annotated[Literal["auto", "cpu", "cuda"], OUTPUT_UNCHANGED] = "auto"
    """What workers compute on; auto = cuda where the cluster has GPUs."""
    num_workers: Annotated[pydantic.PositiveInt, OUTPUT_UNCHANGED] = 1
    """Processes that share the rows; on cuda each has one GPU."""
    cpus_per_worker: Annotated[pydantic.PositiveFloat, OUTPUT_UNCHANGED] = 1.0
    """CPUs that Ray reserves for a worker."""
    threads_per_worker: Annotated[pydantic.PositiveInt, OUTPUT_UNCHANGED] = 1
    """Threads a worker computes with on the CPU."""

    def __post_init__(self) -> None:
        names = [task.name for task in self.tasks]
        for i, name in enumerate(names):
            if name in names[:i]:
                raise ConfigError(f"tasks.{i}.name", name, "must be the name of one task only", "choose another")

    def with_root(self, root: str | None, *, where: str) -> "EvaluateSettings":
        """Return the same settings with the relative files and folders below `root`.

        Raises:
            ConfigError: files are relative and there is no root.
        """
        tasks = tuple(_task_with_root(task, root, f"{where}.tasks.{i}") for i, task in enumerate(self.tasks))
        lm_eval = self.lm_eval
        if lm_eval is not None:
            folder = absolute_path(lm_eval.include_path, root, field=f"{where}.lm_eval.include_path")
            lm_eval = dataclasses.replace(lm_eval, include_path=folder)
        ratings = self.ratings
        if ratings is not None:
            ratings = absolute_path(ratings, root, field=f"{where}.ratings")
        return dataclasses.replace(self, tasks=tasks, lm_eval=lm_eval, ratings=ratings)


def _task_with_root(task: TaskSettings, root: str | None, where: str) -> TaskSettings:
    """Return a task with absolute files."""
    shot_files = task.shot_files
    if shot_files is not None:
        shot_files = absolute_path(shot_files, root, field=f"{where}.shot_files")
    files = absolute_path(task.files, root, field=f"{where}.files")
    return dataclasses.replace(task, files=files, shot_files=shot_files)
