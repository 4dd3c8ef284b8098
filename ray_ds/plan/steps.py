"""From a recipe's train steps to what a plan is about."""

from ray_ds.artifacts import TokenShards, open_artifact
from ray_ds.config.train import TrainSettings
from ray_ds.errors import ConfigError
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
    """
    settings: TrainSettings = step.settings
    config = settings.model.resolve(vocab_size(step), settings.seq_len)
    return case_of(settings, config, world_size or settings.max_workers)


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
