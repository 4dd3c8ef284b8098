"""The import_hf stage: a folder of Hugging Face's -> Checkpoint, in the process that runs the job."""

import time

from ray_ds import storage
from ray_ds.artifacts import Artifact
from ray_ds.config.import_hf import ImportSettings
from ray_ds.errors import InputError
from ray_ds.exchange.import_folder import import_folder
from ray_ds.exchange.sources import fingerprint
from ray_ds.logs import log_event
from ray_ds.recipe import recipe_of_one
from ray_ds.stage_run import StageRun
from ray_ds.steps import find_finished, prepare_run


def import_hf(settings: ImportSettings, run: StageRun) -> Artifact:
    """Check a model's folder, write it as a checkpoint with its tokenizer, and note the hash of every file it had.

    Raises:
        ArtifactError: the folder is damaged, or the model does what this decoder does not.
        InputError: the folder changed meanwhile.
    """
    started = time.monotonic()
    sources = fingerprint(settings)
    storage.delete_folder(run.path("model"))
    facts = import_folder(settings.path, run.path("model"), max_shard_bytes=settings.max_shard_bytes)
    if fingerprint(settings) != sources:
        raise InputError(f"{run.step}.path", settings.path, "must not change while it is read", "import it again")
    log_event("imported", path=settings.path, **facts)
    return run.commit(facts, seconds=time.monotonic() - started, sources=sources)


def import_alone(path: str, output: str, **settings: object) -> Artifact:
    """Run the stage without a recipe or a cluster; a folder that is imported already is left alone.

    Args:
        path: absolute path or URI of the folder.
        output: absolute path or URI below which the artefact is made, as in a recipe's `run_dir`.
        settings: further ones of `ImportSettings`.
    """
    recipe = recipe_of_one("import_hf", {"path": path, **settings}, run_dir=output)
    step = recipe.steps[0]
    if (finished := find_finished(recipe, step)) is not None:
        return finished
    return import_hf(step.settings, prepare_run(recipe, step))
