"""Tasks of lm-evaluation-harness, an optional package, run on local files and nothing else."""

import contextlib
import importlib
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from pydantic import JsonValue

from ray_ds.config.lm_eval import LmEvalSettings
from ray_ds.errors import ConfigError, InputError
from ray_ds.evaluate.intervals import NUM_RESAMPLES
from ray_ds.evaluate.lm_eval_model import LmEvalAnswers, as_lm_eval_model, lm_eval_module

OFFLINE = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "DISABLE_MULTIPROC": "1"}
"""The environment of a process that runs the harness: no network, and no processes of its own."""


def check_tasks(settings: LmEvalSettings, field: str) -> None:
    """Load the tasks with their data once, for what is wrong with them to be known before a model is loaded.

    For a process of its own, as `run_harness`.

    Raises:
        ConfigError, InputError: as `run_harness`; or the package is not installed.
    """
    with _loaded_tasks(settings, field):
        pass


def run_harness(answers: LmEvalAnswers, settings: LmEvalSettings, field: str) -> dict[str, JsonValue]:
    """Return the harness's version, and what a report says of each task and group.

    For a process of its own, started with `OFFLINE`, whose working directory changes meanwhile.

    Args:
        field: the settings' name in errors.
    Raises:
        ConfigError: a task is unknown, or reads data from outside the folder.
        InputError: a task cannot be loaded, for instance because its data would have to be downloaded.
    """
    with _loaded_tasks(settings, field) as (manager, loaded):
        found = lm_eval_module("evaluator").simple_evaluate(
            model=as_lm_eval_model(answers),
            tasks=loaded,
            task_manager=manager,
            num_fewshot=settings.shots,
            limit=settings.max_items,
            bootstrap_iters=NUM_RESAMPLES,
            log_samples=False,
            apply_chat_template=settings.apply_chat_template,
            fewshot_as_multiturn=bool(settings.fewshot_as_multiturn),
            system_instruction=settings.system_instruction,
            random_seed=settings.seed,
            numpy_random_seed=settings.seed,
            torch_random_seed=settings.seed,
            fewshot_random_seed=settings.seed,
        )
    return {
        "version": found["lm_eval_version"],
        "cut": answers.num_cut,
        "chat": settings.apply_chat_template,
        "tasks": {name: _facts(name, found) for name in found["results"]},
    }


@contextlib.contextmanager
def _loaded_tasks(settings: LmEvalSettings, field: str) -> Iterator[tuple[Any, list[Any]]]:
    """Yield the harness's task manager, and the tasks and groups with their data, in the tasks' folder."""
    manager = lm_eval_module("tasks", field).TaskManager(include_path=settings.include_path, include_defaults=False)
    for name in settings.tasks:
        if name not in manager.all_tasks:
            allowed = f"must be a task, group or tag below {settings.include_path}: {', '.join(manager.all_tasks)}"
            raise ConfigError(f"{field}.tasks", name, allowed, "name one of these")
    with tempfile.TemporaryDirectory() as cache, contextlib.chdir(settings.include_path):
        yield manager, _load_tasks(manager, settings, field, Path(cache))


def _load_tasks(manager: Any, settings: LmEvalSettings, field: str, cache: Path) -> list[Any]:
    """Return the harness's tasks and groups with their data, of which `datasets` keeps nothing elsewhere."""
    datasets = importlib.import_module("datasets")  # comes with lm_eval
    datasets.config.HF_DATASETS_CACHE = cache
    try:
        loaded = manager.load(list(settings.tasks))
    except (OSError, ValueError, KeyError, datasets.exceptions.DatasetsError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        allowed = f"must load without the network, from {settings.include_path} alone ({reason})"
        action = "set dataset_path to json, csv, parquet or text, and data_files to files of that folder"
        raise InputError(f"{field}.tasks", ", ".join(settings.tasks), allowed, action) from error
    folder = Path(settings.include_path).resolve()
    for name, task in loaded["tasks"].items():
        for file in _data_files((task.config.dataset_kwargs or {}).get("data_files")):
            if not (folder / file).resolve().is_relative_to(folder):
                allowed = f"must be below {settings.include_path}, so that a change of it is noticed"
                raise ConfigError(f"{field}.tasks: data_files of {name}", file, allowed, "move it there")
    children = {task.task_name for group in loaded["groups"].values() for task in group.get_all_tasks()}
    alone = [task for name, task in loaded["tasks"].items() if name not in children]
    inner = {own.name for group in loaded["groups"].values() for own in group.get_all_groups()}
    return [*(group for name, group in loaded["groups"].items() if name not in inner), *alone]


def _data_files(value: object) -> Iterator[str]:
    """Yield the paths in a task's `data_files`: one, a list, or by split."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for own in value.values():
            yield from _data_files(own)
    elif isinstance(value, (list, tuple)):
        for own in value:
            yield from _data_files(own)


def _facts(name: str, found: Mapping[str, Any]) -> dict[str, JsonValue]:
    """Return what a report says of a task, or of a group, which has no items of its own."""
    own = found["results"][name]
    scores: dict[str, JsonValue] = {}
    for key, score in own.items():
        metric, comma, how = key.partition(",")
        if comma and not metric.endswith("_stderr"):
            stderr = own.get(f"{metric}_stderr,{how}")
            scores[metric if how == "none" else key] = {
                "score": float(score),
                "stderr": float(stderr) if isinstance(stderr, float) else None,
                "higher_is_better": found["higher_is_better"].get(name, {}).get(metric),
            }
    items = found["n-samples"].get(name, {}).get("effective")
    return {"items": items, "shots": found["n-shot"].get(name), "scores": scores}
