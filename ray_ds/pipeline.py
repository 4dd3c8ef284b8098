"""Running a recipe: its steps as Ray jobs in order, skipping what is finished."""

import time
from collections.abc import Sequence

from ray_ds.artifacts import Endpoint
from ray_ds.errors import RETRYABLE_EXIT_CODE, ClusterError, RayDsError
from ray_ds.logs import log_event
from ray_ds.recipe import Recipe, Step
from ray_ds.report import summary_lines, write_summary
from ray_ds.serve.client import is_taken_by_another
from ray_ds.steps import find_finished, prepare_run, step_digest
from ray_ds.submit import JobEnd, JobRequest, check_overrides, follow_job, job_client, submit_step

LOOPBACK = ("127.0.0.1", "localhost", "::1")


class StepFailed(RayDsError):
    """A step's job ended without its artefact."""


def run_recipe(recipe: Recipe, root: str, overrides: Sequence[str], *, retries: int = 0) -> int:
    """Submit every unfinished step in order, then print the summary and write it to the run directory.

    Args:
        retries: times that each step is submitted again when its job broke off.
    Returns:
        0, or the exit status of the first job that failed.
    """
    started = time.monotonic()
    check_ports(recipe)
    for step in recipe.steps:
        if (finished := find_finished(recipe, step)) is not None:
            log_event("skipped", step=step.name, reason="finished", uri=finished.uri)
            continue
        status = submit_and_follow(recipe, step, root, overrides, retries=retries)
        if status != 0:
            return status
    summary = write_summary(recipe)
    print("\n".join(summary_lines(recipe, summary)))
    log_event("done", recipe=recipe.name, seconds=time.monotonic() - started)
    return 0


def check_ports(recipe: Recipe) -> None:
    """Refuse, before hours of training, an endpoint's port that another program of this machine has.

    Raises:
        ClusterError: it has.
    """
    for step in recipe.steps:
        if step.stage.writes == Endpoint.kind and step.settings.host in LOOPBACK:
            host, port = step.settings.host, step.settings.port
            if is_taken_by_another(host, port):
                action = f"stop the program that listens there, or choose another with --{step.name}.port="
                raise ClusterError(f"{step.name}.port", port, f"must be free on {host}, or Ray Serve's", action)


def submit_and_follow(recipe: Recipe, step: Step, root: str, overrides: Sequence[str], *, retries: int = 0) -> int:
    """Submit one step as a job, follow its log to the end and return its exit status.

    Args:
        retries: times that it is submitted again when its job broke off; each goes on where the last one was.
    Raises:
        UserError: the recipe, its input or an earlier artefact is wrong; nothing was submitted.
        StepFailed: the job ended well, but its artefact is not there.
    """
    request = JobRequest(recipe_path=recipe.path, root=root, overrides=check_overrides(overrides))
    for retry in range(retries + 1):
        end, job_id = _submit_once(recipe, step, request)
        if end.exit_status != RETRYABLE_EXIT_CODE or end.is_stopped or retry == retries:
            break
        log_event("submitting_again", step=step.name, after=job_id, retries_left=retries - retry - 1)
    if end.exit_status != 0:
        event = "broken_off" if end.exit_status == RETRYABLE_EXIT_CODE else "failed"
        log_event(event, step=step.name, job=job_id, exit_status=end.exit_status)
        return end.exit_status
    if find_finished(recipe, step) is None:
        raise StepFailed(
            f"job {job_id} of step {step.name} ended, but its {step.stage.writes} cannot be reached from here"
        )
    return 0


def _submit_once(recipe: Recipe, step: Step, request: JobRequest) -> tuple[JobEnd, str]:
    """Submit a step, follow its log to the end, and return how its job ended, and its id."""
    prepare_run(recipe, step)
    client = job_client()
    job_id = submit_step(client, step, request)
    log_event("submitted", step=step.name, job=job_id, digest=step_digest(step))
    return follow_job(client, job_id), job_id
