"""What every job in `jobs/` calls: it runs steps in this process, which becomes Ray's driver, and exits."""

import os
import sys
from collections.abc import Callable
from dataclasses import replace
from typing import Any, NoReturn

from ray_ds.config.arguments import ArgumentParser
from ray_ds.errors import (
    RETRYABLE_EXIT_CODE,
    USER_ERROR_EXIT_CODE,
    ConfigError,
    RayDsError,
    RetryableError,
    UserError,
)
from ray_ds.logs import log_event, setup_logging
from ray_ds.on_ray import NO_AUTO_CONNECT
from ray_ds.recipe import Recipe, Step, load_recipe
from ray_ds.stage_table import find_stage, load_object
from ray_ds.steps import find_finished, prepare_run


def run_stage(stage: str) -> NoReturn:
    """Run the step of a stage and exit as `exit_status` says."""
    sys.exit(exit_status(lambda: _run_stage(stage)))


def run_all() -> NoReturn:
    """Run every unfinished step of a recipe in one job, in order, and exit as `exit_status` says."""
    sys.exit(exit_status(_run_all))


def run_verify() -> NoReturn:
    """Run the checks of `ray-ds verify` in this job and exit: 0 nothing is wrong, 1 something is, 2 bad arguments."""
    status = exit_status(lambda: int(load_object("ray_ds.verify.job:run")(sys.argv[1:])))
    load_object("ray_ds.verify.job:end")(status)
    raise AssertionError("unreachable")


def exit_status(action: Callable[[], int]) -> int:
    """Return an action's exit status, with the project's own errors printed in one line each.

    0 done, 1 failed, 2 a user's mistake, 75 broken off: submit again to go on.
    """
    setup_logging()
    os.environ.update(NO_AUTO_CONNECT)
    try:
        return action()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        return USER_ERROR_EXIT_CODE
    except RetryableError as error:
        print(f"broken off: {error}", file=sys.stderr, flush=True)
        return RETRYABLE_EXIT_CODE
    except RayDsError as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        return 1
    except KeyboardInterrupt:
        return 130


def _run_stage(stage: str) -> int:
    parser = _recipe_parser(find_stage(stage).job)
    parser.add_argument("--step")
    options, overrides = parser.parse_known_args()
    recipe = load_recipe(options.recipe, overrides=overrides, root=options.root)
    run_step(recipe, find_step(recipe, stage, options.step))
    return 0


def _run_all() -> int:
    options, overrides = _recipe_parser("run_recipe").parse_known_args()
    recipe = load_recipe(options.recipe, overrides=overrides, root=options.root)
    for step in recipe.steps:
        run_step(recipe, step)
    return 0


def _recipe_parser(job: str) -> ArgumentParser:
    parser = ArgumentParser(prog=f"python -m jobs.{job}")
    parser.add_argument("--recipe", required=True)
    parser.add_argument("--root", help="absolute folder that relative paths in the recipe are below")
    return parser


def find_step(recipe: Recipe, stage: str, name: str | None) -> Step:
    """Return the step of a stage; its name tells which, where several run the stage.

    Raises:
        ConfigError: there is none, or it runs another stage.
    """
    step = recipe.step(name) if name else recipe.step_of_stage(stage)
    if step.stage.name != stage:
        raise ConfigError("--step", step.name, f"must be a step of stage {stage}", "run the job of its own stage")
    return step


def run_step(recipe: Recipe, step: Step) -> None:
    """Run one step in this process, which becomes the driver; a finished one is left alone.

    Raises:
        ClusterError: another job is at work on this step.
    """
    if _is_finished(recipe, step):
        return
    run = prepare_run(recipe, step)
    stage: Callable[[Any, Any], Any] = load_object(step.stage.function)
    load_object("ray_ds.on_ray.session:connect")()
    load_object("ray_ds.on_ray.stopping:end_on_sigterm")()
    with load_object("ray_ds.on_ray.run_lock:lock_run")(run.uri) as lock:
        if _is_finished(recipe, step):  # by a job that had the folder until now
            return
        log_event("started", step=step.name, uri=run.uri)
        artifact = stage(step.settings, replace(run, check_alone=lock.check))
    log_event("finished", step=step.name, uri=artifact.uri, seconds=artifact.manifest.seconds)


def _is_finished(recipe: Recipe, step: Step) -> bool:
    """Tell whether a step's artefact is finished, and say so."""
    if (finished := find_finished(recipe, step)) is None:
        return False
    log_event("skipped", step=step.name, reason="finished", uri=finished.uri)
    return True
