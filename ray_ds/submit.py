"""Submitting a recipe's steps as Ray jobs and following their logs."""

import asyncio
import logging
import os
import re
import secrets
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import aiohttp
from ray.exceptions import AuthenticationError
from ray.job_submission import JobStatus, JobSubmissionClient
from ray.util.state import get_node
from ray.util.state.exception import RayStateApiException
from tqdm import tqdm

from ray_ds.errors import RETRYABLE_EXIT_CODE, ClusterError, ConfigError, RetryableError
from ray_ds.logs import log_event, parse_progress
from ray_ds.on_ray import NO_AUTO_CONNECT
from ray_ds.recipe import Step

POLL_S = 0.5
RECONNECT_S = 2.0
PATIENCE_S = 180.0
"""Time in which a head that was lost may be started again."""
END_WAIT_S = 10.0
STOP_WAIT = "RAY_JOB_STOP_WAIT_TIME_S"
STOP_WAIT_S = "60"
"""Time that a job has after `ray job stop`, if the environment that it is submitted from does not name another; the
cluster files set the same for jobs that others submit. Ray's own 3 s are too short for a checkpoint."""
IN_BAR = {
    "loss": "loss {:.4g}",
    "validation_loss": "validation {:.4g}",
    "tokens_per_s": "{:,.0f} tokens/s",
    "mfu": "{:.0%} MFU",
    "goodput": "{:.0%} goodput",
    "world_size": "workers {:.0f}",
    "restarts": "restarts {:.0f}",
}
"""How a bar words the figures of training."""
LOG_ONLY = ("lr", "grad_norm", "max_violation", "loss_scale")
"""Figures for which a bar has no room."""


@dataclass(frozen=True, kw_only=True)
class JobRequest:
    """What identifies a step to its job."""

    recipe_path: str
    root: str
    overrides: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class JobEnd:
    """How a job ended."""

    exit_status: int
    """0 finished, 75 broken off: submitting again goes on; 2 a user's mistake, any other a failure."""
    is_stopped: bool
    """Whether somebody stopped it."""


def job_client() -> Any:
    """Return a client of the cluster's job server, whose address is in `RAY_API_SERVER_ADDRESS` or `RAY_ADDRESS`.

    Raises:
        ClusterError: there is no cluster, or it refuses the token.
    """
    address = os.environ.get("RAY_API_SERVER_ADDRESS") or os.environ.get("RAY_ADDRESS")
    try:
        return JobSubmissionClient(address)
    except AuthenticationError as error:
        token = os.environ.get("RAY_AUTH_TOKEN_PATH", "unset")
        action = "set RAY_AUTH_MODE=token, and RAY_AUTH_TOKEN_PATH or RAY_AUTH_TOKEN"
        raise ClusterError(
            "RAY_AUTH_TOKEN_PATH", token, f"must name the token of the cluster at {address}", action
        ) from error
    except (ConnectionError, RuntimeError) as error:
        reason = str(error).splitlines()[0]
        raise ClusterError(
            "RAY_API_SERVER_ADDRESS",
            address or "unset",
            f"must be a Ray dashboard ({reason})",
            "start a cluster with `make up`",
        ) from error


def job_command(step: Step, request: JobRequest) -> list[str]:
    """Return the command a step's job runs, `python -m jobs.clean_text --recipe ...`."""
    command = ["python", "-m", f"jobs.{step.stage.job}", "--recipe", request.recipe_path, "--root", request.root]
    return [*command, "--step", step.name, *request.overrides]


def submit_step(client: Any, step: Step, request: JobRequest) -> str:
    """Submit a step as a job whose working directory is this one, and return the job's id.

    Raises:
        ConfigError: the recipe is not below the working directory, or that holds no `jobs/`.
    """
    logging.getLogger("ray").setLevel(logging.ERROR)  # its notes on packaging are not for the user
    here = Path.cwd()
    if not (here / "jobs" / f"{step.stage.job}.py").is_file():
        raise ConfigError(
            "working directory", str(here), "must hold jobs/, which is shipped to the cluster", "cd there"
        )
    if not Path(request.recipe_path).resolve().is_relative_to(here / "jobs"):
        raise ConfigError(
            "recipe", request.recipe_path, "must lie below jobs/, which is shipped to the cluster", "move it"
        )
    recipe = Path(request.recipe_path).resolve().relative_to(here).as_posix()
    quoted = job_command(step, JobRequest(recipe_path=recipe, root=request.root, overrides=request.overrides))
    submission_id = f"{step.name}-{secrets.token_hex(4)}"
    job_id: str = client.submit_job(
        entrypoint=" ".join(_quote(part) for part in quoted),
        submission_id=submission_id,
        # `ray job stop` waits as long before it kills; training writes a checkpoint meanwhile.
        runtime_env={
            "working_dir": str(here),
            "env_vars": {STOP_WAIT: os.environ.get(STOP_WAIT, STOP_WAIT_S), **NO_AUTO_CONNECT},
        },
        metadata={"step": step.name, "stage": step.stage.name},
    )
    return job_id


def _quote(part: str) -> str:
    return part if all(c.isalnum() or c in "-_./=:," for c in part) else "'" + part.replace("'", "'\"'\"'") + "'"


def follow_job(client: Any, job_id: str) -> JobEnd:
    """Print a job's log until it ends, progress as a bar where this is a terminal; return how it ended.

    Raises:
        RetryableError: the cluster has not answered for `PATIENCE_S`.
    """
    try:
        return asyncio.run(_follow(client, job_id))
    except KeyboardInterrupt:
        print(f"\nstopped following; the job goes on: ray job logs -f {job_id}; ray job stop {job_id}")
        raise


async def _follow(client: Any, job_id: str) -> JobEnd:
    """Print the log, again from the start where the connection broke, until the job has its final state."""
    while True:
        printer = _LogPrinter(sys.stdout.isatty())
        try:
            async for text in client.tail_job_logs(job_id):
                printer.feed(text)
        except (ConnectionError, RuntimeError, OSError, aiohttp.ClientError) as error:
            log_event("connection_lost", job=job_id, reason=str(error).splitlines()[0] if str(error) else repr(error))
        printer.close()
        started = time.monotonic()
        while time.monotonic() < started + END_WAIT_S:  # the log ends a moment before the state says so
            info = await _ask_for_info(client, job_id)
            if info.status.is_terminal():
                return _job_end(info)
            await asyncio.sleep(POLL_S)
        if _is_lost_with_its_node(client, info):
            log_event("driver_lost", job=job_id, node=info.driver_node_id)
            return JobEnd(exit_status=RETRYABLE_EXIT_CODE, is_stopped=False)


def _is_lost_with_its_node(client: Any, info: Any) -> bool:
    """Tell whether a job that counts as running cannot be, for the node of its own process is gone.

    Where that was the head, which is started again, Ray notices only when another job is submitted: a job's state is
    looked after by the head's agent, and that begins with its first request (Ray 2.60, job_agent.py `get_job_manager`).
    """
    if info.driver_node_id is None:
        return False
    try:
        node = get_node(info.driver_node_id, address=client.get_address())
    except (RayStateApiException, ConnectionError, RuntimeError, OSError):
        return False
    return node is None or node.state == "DEAD"


async def _ask_for_info(client: Any, job_id: str) -> Any:
    """Return what the cluster says of a job; a head that is started again takes a while to answer."""
    deadline = time.monotonic() + PATIENCE_S
    while True:
        try:
            return client.get_job_info(job_id)
        except (ConnectionError, RuntimeError, OSError) as error:
            if time.monotonic() > deadline:
                reason = str(error).splitlines()[0]
                text = f"the cluster has not answered for {PATIENCE_S:.0f} s ({reason}); job {job_id} may go on"
                raise RetryableError(f"{text}: see `ray job status {job_id}`, or submit again") from error
            await asyncio.sleep(RECONNECT_S)


def _job_end(info: Any) -> JobEnd:
    """Return how a job ended; one that was stopped, killed or lost with its node may be submitted again."""
    if info.status == JobStatus.SUCCEEDED:
        return JobEnd(exit_status=0, is_stopped=False)
    code = info.driver_exit_code
    is_stopped = info.status == JobStatus.STOPPED
    is_killed = code is None or code < 0 or code > 128
    return JobEnd(exit_status=RETRYABLE_EXIT_CODE if is_stopped or is_killed else int(code), is_stopped=is_stopped)


class _LogPrinter:
    """Prints log text by lines; in a terminal, `progress` lines move a bar instead."""

    def __init__(self, is_terminal: bool) -> None:
        self._is_terminal = is_terminal
        self._rest = ""
        self._bar: Any = None

    def feed(self, text: str) -> None:
        *lines, self._rest = (self._rest + text).split("\n")
        for line in lines:
            self._print(line)

    def close(self) -> None:
        if self._rest:
            self._print(self._rest)
        if self._bar is not None:
            self._bar.close()

    def _print(self, line: str) -> None:
        progress = parse_progress(line) if self._is_terminal else None
        if progress is None:
            tqdm.write(line) if self._bar is not None else print(line, flush=True)
            return
        step, done, total, fields = progress
        if self._bar is None or self._bar.desc != step:
            if self._bar is not None:
                self._bar.close()
            # Every line moves the bar, and the rate is not that of the steps that were done before this job.
            self._bar = tqdm(total=total, desc=step, initial=done, mininterval=0, miniters=0, leave=True)
        elif done < self._bar.n:
            tqdm.write(f"{step} went back from {self._bar.n} to {done} of {total}")
            self._bar.n = self._bar.last_print_n = done
            self._bar.last_print_t = time.time()  # the rate is not that of the time without steps either
        self._bar.total = total
        self._bar.set_postfix_str(_words(fields), refresh=False)
        self._bar.update(done - self._bar.n)
        self._bar.refresh()


def _words(fields: str) -> str:
    """Return the fields of a progress line as a bar shows them."""
    words = []
    for field in re.split(r" (?=\w+=)", fields):
        name, _, value = field.partition("=")
        if name in IN_BAR:
            words.append(IN_BAR[name].format(float(value)))
        elif name not in LOG_ONLY:
            words.append(field)
    return ", ".join(words)


def check_overrides(arguments: Sequence[str]) -> tuple[str, ...]:
    """Return arguments that are overrides, `--step.field=value`.

    Raises:
        ConfigError: one is not.
    """
    for argument in arguments:
        if not argument.startswith("--") or "=" not in argument:
            raise ConfigError("argument", argument, "must be an override like --step.field=value", "correct it")
    return tuple(arguments)
