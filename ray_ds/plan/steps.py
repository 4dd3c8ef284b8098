"""From a recipe's train steps to what a plan is about."""

import json

from ray_ds import storage
from ray_ds.artifacts import TokenShards, open_artifact
from ray_ds.config.import_hf import ImportSettings
from ray_ds.config.model import ModelConfig
from ray_ds.config.train import TrainSettings
from ray_ds.errors import ArtifactError, ConfigError
from ray_ds.plan.case import Case, case_of
from ray_ds.recipe import Recipe, Step


def train_steps(recipe: Recipe, name: str | None) -> list[Step]:
    """Return the named train step, or all of them.

    Raises:
        ConfigError: there is none, or the named one trains nothing.
    """
    steps = [recipe.step(name)] if name else [step for step in recipe.steps if _trains(step)]
    if not steps:
        raise ConfigError(f"{recipe.path}: steps that train", "none", "must be one or more", "add one")
    if not _trains(steps[0]):
        raise ConfigError("--step", steps[0].name, "must be a step that trains", "name another, or none for all")
    return steps


def step_case(step: Step, world_size: int | None) -> Case:
    """Return the case of a train step.

    Args:
        world_size: workers, if not the most that the settings allow.
    Raises:
        ConfigError: a setting does not go with the model of the checkpoint that the step starts from.
    """
    settings: TrainSettings = step.settings
    config = step_model(step)
    if settings.model is None:
        settings = settings.for_model(config)
    return case_of(settings, config, world_size or settings.max_workers)


def step_model(step: Step) -> ModelConfig:
    """Return the model that a train step trains: its own, or that of the checkpoint it starts from.

    Raises:
        ArtifactError: the checkpoint's `config.json` is missing or damaged.
    """
    settings: TrainSettings = step.settings
    if settings.model is not None:
        return settings.new_model(vocab_size(step))
    start = step.named["init_from"]
    if isinstance(start, Step) and _trains(start):
        return step_model(start)
    if isinstance(start, Step):
        assert isinstance(start.settings, ImportSettings), "only training and imports make checkpoints"
        return _read_model(start.settings.path)
    return _read_model(storage.join(start, "model"))


def _read_model(folder: str) -> ModelConfig:
    """Return the model that a folder's `config.json` describes."""
    from ray_ds.model.hugging_face import from_hf_config  # its package brings torch, which no other plan needs

    uri = storage.join(folder, "config.json")
    try:
        return from_hf_config(json.loads(storage.read_bytes(uri)))
    except FileNotFoundError as error:
        raise ArtifactError(uri, "missing", "must be there", "copy or make it again") from error
    except ValueError as error:
        raise ArtifactError(uri, str(error), "must be JSON", "copy or make it again") from error


def vocab_size(step: Step) -> int:
    """Return the vocabulary of the tokens that a step reads: of finished shards, or as the tokenizer step asks for.

    Raises:
        ConfigError: neither says it.
    """
    for source in step.inputs:
        if isinstance(source, str):
            artifact = open_artifact(source, [TokenShards])
            return int(artifact.fact("vocab_size"))
        found = _asked_vocab_size(source)
        if found is not None:
            return found
    raise ConfigError(f"{step.name}.from", "a step", "must lead to a tokenizer's vocab_size", "name the token shards")


def _asked_vocab_size(step: Step) -> int | None:
    """Return the `vocab_size` of the nearest step that one is made from and that has it."""
    size = getattr(step.settings, "vocab_size", None)
    if isinstance(size, int):
        return size
    sources = [source for source in step.inputs if isinstance(source, Step)]
    return next((found for source in sources if (found := _asked_vocab_size(source)) is not None), None)


def _trains(step: Step) -> bool:
    return isinstance(step.settings, TrainSettings)
