"""What a recipe's steps have made: digests, folders, finished artefacts, and what a stage is given to run."""

from collections.abc import Callable, Sequence
from typing import Any

from pydantic import JsonValue

from ray_ds import storage
from ray_ds.artifacts import (
    KINDS,
    Artifact,
    Endpoint,
    SourceFile,
    check_input,
    find_artifact,
    folder_digest,
    make_digest,
    open_artifact,
)
from ray_ds.config.settings import as_json, digest_settings
from ray_ds.errors import ArtifactError, ConfigError, InputError
from ray_ds.recipe import Recipe, Step
from ray_ds.stage_run import StageRun
from ray_ds.stage_table import load_object


def step_digest(step: Step) -> str:
    """Return the digest that a step's artefact has, without running anything.

    Raises:
        InputError: raw input is missing or empty.
    """
    inputs = [_source_digest(source) for source in step.inputs]
    content: dict[str, JsonValue] = {
        "stage": step.stage.name,
        "version": step.stage.version,
        "settings": digest_settings(step.settings),
        "inputs": list(inputs),
    }
    if step.named:
        content["named"] = {key: _source_digest(source) for key, source in step.named.items()}
    if step.stage.sources:
        find_sources: Callable[[Any], Sequence[SourceFile]] = load_object(step.stage.sources)
        try:
            sources = find_sources(step.settings)
        except (ConfigError, InputError) as error:
            raise type(error)(f"{step.name}.{error.field}", error.value, error.allowed, error.action) from error
        content["sources"] = [
            [source.uri.rsplit("/", 1)[-1], source.sha256, source.source, source.licence] for source in sources
        ]
    return make_digest(content)


def _source_digest(source: Step | str) -> str:
    """Return the digest of an input that a step makes, or that lies in a folder."""
    return step_digest(source) if isinstance(source, Step) else folder_digest(source)


def step_uri(recipe: Recipe, step: Step) -> str:
    """Return the folder of a step's artefact, `<run_dir>/<step>/<digest>`."""
    return storage.join(recipe.run_dir, step.name, step_digest(step))


def find_finished(recipe: Recipe, step: Step) -> Artifact | None:
    """Return a step's finished artefact, or None; an Endpoint is finished only while it answers with its digest.

    Raises:
        ArtifactError: it is damaged, or an input was made anew to other bytes since.
    """
    found = find_artifact(step_uri(recipe, step))
    if found is None:
        return None
    if isinstance(found, Endpoint) and not load_object("ray_ds.serve.client:is_endpoint_alive")(found.manifest.facts):
        return None
    for ref in found.manifest.inputs:
        if (present := find_artifact(ref.uri)) is not None:
            check_input(found.uri, ref, present)
    return found


def prepare_run(recipe: Recipe, step: Step) -> StageRun:
    """Return what a stage needs to run a step.

    Raises:
        ArtifactError: an input is unfinished or damaged.
    """
    inputs = [_open_input(recipe, *input) for input in zip(step.inputs, step.stage.reads, strict=True)]
    named = {key: _open_input(recipe, step.named[key], kinds) for key, kinds in step.stage.named if key in step.named}
    digest = step_digest(step)
    return StageRun(
        step=step.name,
        stage=step.stage.name,
        stage_version=step.stage.version,
        kind=step.stage.writes,
        run_dir=recipe.run_dir,
        uri=storage.join(recipe.run_dir, step.name, digest),
        digest=digest,
        settings=as_json(step.settings),
        inputs=tuple(inputs),
        named=named,
    )


def _open_input(recipe: Recipe, source: Step | str, group: Sequence[str]) -> Artifact:
    """Return a finished input of a step, of one of a group of kinds."""
    kinds = [KINDS[kind] for kind in group]
    try:
        return open_artifact(source if isinstance(source, str) else step_uri(recipe, source), kinds)
    except ArtifactError as error:
        if error.value == "no manifest" and isinstance(source, Step):
            raise _with_action(error, f"run step {source.name} first") from error
        raise


def _with_action(error: ArtifactError, action: str) -> ArtifactError:
    """Return the same error with another advice."""
    return ArtifactError(error.field, error.value, error.allowed, action)
