"""Asking a model about all rows of token shards, on all nodes.

Some rows of a shard are a work unit (`on_ray/units.py`), whose task loads the model, asks it and writes a file.
"""

import time
from functools import partial
from typing import Literal

import ray
from pydantic import JsonValue

from ray_ds.artifacts import Artifact, Checkpoint, TokenShards, make_digest
from ray_ds.data.stored_rows import RowRange
from ray_ds.logs import log_event
from ray_ds.on_ray.preflight import check_cluster
from ray_ds.on_ray.units import WorkUnit, run_units
from ray_ds.stage_run import WORK, StageRun
from ray_ds.train.ask_rows import RowJob, plan_files, row_facts, store_range

UNITS_FOLDER = f"{WORK}/rows"


def choose_device(wanted: Literal["auto", "cpu", "cuda"]) -> Literal["cpu", "cuda"]:
    """Return what tasks compute on; auto = cuda where the cluster has a GPU."""
    if wanted == "auto":
        return "cuda" if ray.cluster_resources().get("GPU", 0) >= 1 else "cpu"
    return wanted


def store_rows(
    job: RowJob, run: StageRun, facts: dict[str, JsonValue], *, max_running: int | None, bytes_per_token: int
) -> Artifact:
    """Store what the model says to every row of both splits; files that are done are not done again.

    Args:
        facts: what the artefact is to say of itself, beside what all such have.
    Raises:
        ArtifactError: an input is damaged.
    """
    started = time.monotonic()
    model, shards = run.input(Checkpoint), run.input(TokenShards)
    gpus_per_unit = float(job.device == "cuda")
    check_cluster(
        run.run_dir,
        num_workers=1,
        cpus_per_worker=1.0,
        gpus_per_worker=gpus_per_unit,
        field=f"{run.step}.max_running_units",
    )
    for artifact in (model, shards):
        artifact.verify_files()
    ranges = plan_files(job)
    log_event(run.stage, files=len(ranges), bytes_per_token=bytes_per_token)
    commits = run_units(
        [_unit(part, model, shards) for part in ranges],
        partial(store_range, job=job),
        root=run.uri,
        folder=UNITS_FOLDER,
        step=run.step,
        max_running=max_running,
        gpus_per_unit=gpus_per_unit,
    )
    num_bytes = sum(info.bytes for commit in commits for info in commit.files)
    found = {**row_facts(job, shards, ranges), **facts, "bytes": num_bytes}
    return run.commit(found, seconds=time.monotonic() - started)


def _unit(part: RowRange, model: Checkpoint, shards: TokenShards) -> WorkUnit[RowRange]:
    name = f"{part.split}-{part.file.split('.')[0]}"
    input_hash = make_digest([model.content_sha256, shards.content_sha256, part.first, part.stop])
    return WorkUnit(name=name, input_hash=input_hash, payload=part)
