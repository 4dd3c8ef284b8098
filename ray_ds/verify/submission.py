"""Submitting the verification as a Ray job, and following its log."""

import argparse
import logging
import os
import secrets
import shlex
from dataclasses import replace
from pathlib import Path

from ray_ds.config.paths import absolute_path
from ray_ds.errors import ConfigError
from ray_ds.submit import follow_job, job_client
from ray_ds.verify.options import VerifyOptions, read_options

JOB = "verify_cluster"


def submit(given: argparse.Namespace) -> int:
    """Submit the job and return its exit status.

    Raises:
        ConfigError: an argument is wrong, or the working directory holds no `jobs/`.
        ClusterError: there is no cluster.
    """
    options = read_options(given)
    options = replace(options, run_dir=absolute_path(options.run_dir, os.getcwd(), field="--run_dir"))
    here = Path.cwd()
    if not (here / "jobs" / f"{JOB}.py").is_file():
        allowed = "must hold jobs/, which is shipped to the cluster"
        raise ConfigError("working directory", str(here), allowed, "cd there")
    logging.getLogger("ray").setLevel(logging.ERROR)  # its notes on packaging are not for the user
    client = job_client()
    job_id: str = client.submit_job(
        entrypoint=job_command(options),
        submission_id=f"verify-{secrets.token_hex(4)}",
        runtime_env={"working_dir": str(here)},
        metadata={"step": "verify", "stage": "verify"},
    )
    return follow_job(client, job_id).exit_status


def job_command(options: VerifyOptions) -> str:
    """Return the command that the job runs."""
    return shlex.join(["python", "-m", f"jobs.{JOB}", *options.arguments()])
