"""The job of a verification: it runs the checks on the cluster that it is a job of."""

import logging
import os
import secrets
import time
from collections.abc import Sequence
from typing import NoReturn

import ray

from ray_ds import storage
from ray_ds.config.arguments import ArgumentParser
from ray_ds.config.paths import absolute_path
from ray_ds.errors import ClusterError
from ray_ds.on_ray.session import connect
from ray_ds.on_ray.stopping import end_on_sigterm
from ray_ds.verify.checks import choose_checks
from ray_ds.verify.context import Context, living_nodes
from ray_ds.verify.finding import Finding
from ray_ds.verify.options import VerifyOptions, add_options, read_options
from ray_ds.verify.report import finding_lines, verdict, write_report
from ray_ds.verify.runner import run_checks

RESERVE_S = 30.0
"""Of the time, what is left for cleaning up and the report."""


def run(arguments: Sequence[str]) -> int:
    """Run the job with its arguments; return 0 where nothing is wrong, else 1.

    Raises:
        ConfigError: an argument is wrong.
        ClusterError: there is no cluster, or not as many GPUs as were asked for.
    """
    parser = ArgumentParser(prog="python -m jobs.verify_cluster")
    add_options(parser)
    options = read_options(parser.parse_args(arguments))
    checks = choose_checks(options.only, options.skip)
    run_dir = absolute_path(options.run_dir, None, field="--run_dir")
    started = time.monotonic()
    connect()
    end_on_sigterm()
    for name in ("ray", "ray.serve", "ray.train", "ray.data"):
        logging.getLogger(name).setLevel(logging.ERROR)  # the report is for the user, Ray's own notes are not
    context = make_context(run_dir, options, started)
    print(f"verifying {len(context.nodes)} nodes; the report comes into {context.folder}", flush=True)
    try:
        findings = run_checks(checks, context, print_finding)
        facts = {"seconds": round(time.monotonic() - started, 1), "time": time.time(), "gpus": context.gpus}
        page = write_report_somewhere(context, findings, facts)
    finally:
        _delete_work(context)
    print(f"{verdict(findings)}; {page}", flush=True)
    return int(any(finding.outcome == "failed" for finding in findings))


def make_context(run_dir: str, options: VerifyOptions, started: float) -> Context:
    """Return what the checks are given.

    Raises:
        ClusterError: the cluster has fewer GPUs than were asked for.
    """
    nodes = living_nodes()
    present = int(ray.cluster_resources().get("GPU", 0))
    if options.gpus is not None and options.gpus > present:
        allowed = f"must be at most {present}, the GPUs of the cluster"
        raise ClusterError("--gpus", options.gpus, allowed, "lower it, or say auto")
    stamp = f"{time.strftime('%Y%m%dT%H%M%SZ', time.gmtime())}-{secrets.token_hex(2)}"
    return Context(
        run_dir=run_dir,
        folder=storage.join(run_dir, "verify", stamp),
        nodes=nodes,
        gpus=present if options.gpus is None else options.gpus,
        ends_at=started + options.timeout_s - RESERVE_S,
    )


def print_finding(finding: Finding) -> None:
    """Print a finding as its check ends."""
    print("\n".join(finding_lines(finding)), flush=True)


def write_report_somewhere(context: Context, findings: Sequence[Finding], facts: dict[str, float | int]) -> str:
    """Write the report; where the run directory takes none, that is said, and the log has the findings."""
    try:
        return write_report(context, findings, facts)
    except OSError as error:
        return f"no report was written, for the run directory refuses it ({error})"


def _delete_work(context: Context) -> None:
    """Delete what the checks wrote; a run directory that refuses holds nothing of ours."""
    try:
        storage.delete_folder(context.work())
    except OSError as error:
        print(f"could not delete {context.work()}: {error}", flush=True)


def end(status: int) -> NoReturn:
    """End the process at once: a check that hung may have left threads that would keep it."""
    os._exit(status)
