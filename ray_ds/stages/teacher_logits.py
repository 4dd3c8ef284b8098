"""The teacher_logits stage: Checkpoint + TokenShards -> TeacherLogits, on Ray Data.

Some rows of a shard are a work unit (`on_ray/units.py`), whose task asks the teacher and writes a file. A train step
that names the result as its `teacher` needs no second model beside its own.
"""

import time
from functools import partial
from typing import Literal

import ray
from pydantic import JsonValue

from ray_ds import storage
from ray_ds.artifacts import Artifact, Checkpoint, TokenShards, make_digest
from ray_ds.config.teacher_logits import TeacherLogitsSettings
from ray_ds.data.rows import ROW_KIND, RowKind, check_any_row, open_rows
from ray_ds.data.shard_file import token_dtype
from ray_ds.data.shards import SPLITS
from ray_ds.data.teacher_logits import FILE_ROWS, RowRange, plan_ranges
from ray_ds.errors import ArtifactError, ConfigError
from ray_ds.logs import log_event
from ray_ds.on_ray.preflight import check_cluster
from ray_ds.on_ray.units import Commit, Publish, WorkUnit, run_units
from ray_ds.stage_run import WORK, StageRun
from ray_ds.stages.train import read_model
from ray_ds.tokenizer import load_tokenizer
from ray_ds.train.batches import open_split
from ray_ds.train.teacher import TeacherJob, store_range

TEACHER_FOLDER = f"{WORK}/teacher_logits"


def store_teacher_logits(settings: TeacherLogitsSettings, run: StageRun) -> Artifact:
    """Store what the model says to every row of both splits; files that are done are not done again.

    Raises:
        ArtifactError: an input is damaged, or the model has another tokenizer than the shards.
        ConfigError: rows are longer than the model takes, or a setting does not go with the shards.
    """
    started = time.monotonic()
    teacher, shards = run.input(Checkpoint), run.input(TokenShards)
    job = make_job(settings, teacher, shards, run.step)
    check_cluster(
        run.run_dir,
        num_workers=1,
        cpus_per_worker=1.0,
        gpus_per_worker=float(job.device == "cuda"),
        field=f"{run.step}.max_running_units",
    )
    for artifact in (teacher, shards):
        artifact.verify_files()
    ranges = plan_files(job)
    log_event("teacher_logits", files=len(ranges), bytes_per_token=bytes_per_token(job), top_k=settings.top_k)
    commits = run_units(
        [_unit(part, teacher, shards) for part in ranges],
        partial(_store_unit, job=job),
        root=run.uri,
        folder=TEACHER_FOLDER,
        step=run.step,
        max_running=settings.max_running_units,
        gpus_per_unit=float(job.device == "cuda"),
    )
    return run.commit(find_facts(job, shards, ranges, commits), seconds=time.monotonic() - started)


def make_job(settings: TeacherLogitsSettings, teacher: Checkpoint, shards: TokenShards, step: str) -> TeacherJob:
    """Return what the tasks are told.

    Raises:
        ArtifactError: the model does not go with the shards.
        ConfigError: a setting does not.
    """
    read_model(teacher, shards, seq_len=settings.seq_len, step=step)
    vocab_size: int = shards.fact("vocab_size")
    if settings.top_k > vocab_size:
        allowed = f"must be at most {vocab_size}, the tokens of the shards"
        raise ConfigError(f"{step}.top_k", settings.top_k, allowed, "lower it")
    kind: RowKind = shards.manifest.facts.get(ROW_KIND, "stream")  # type: ignore[assignment]
    if kind == "preference":
        allowed = "must be shards of text or conversations: pairs of answers are no text to distil"
        raise ArtifactError(shards.uri, "preference shards", allowed, "name other shards in `from`")
    if settings.document_mask and kind != "stream":
        allowed = "has no effect on conversations, which never see each other"
        raise ConfigError(f"{step}.document_mask", True, allowed, "remove it")
    return TeacherJob(
        settings=settings,
        checkpoint=teacher.uri,
        shards=shards.uri,
        rows=kind,
        vocab_size=vocab_size,
        bos_token_id=load_tokenizer(shards.path("tokenizer.json")).bos_id,
        device=choose_device(settings.device),
    )


def choose_device(wanted: Literal["auto", "cpu", "cuda"]) -> Literal["cpu", "cuda"]:
    """Return what tasks compute on; auto = cuda where the cluster has a GPU."""
    if wanted == "auto":
        return "cuda" if ray.cluster_resources().get("GPU", 0) >= 1 else "cpu"
    return wanted


def plan_files(job: TeacherJob) -> list[RowRange]:
    """Return the files to make, all splits' one after the other.

    Raises:
        InputError: a split has no row.
    """
    seq_len = job.settings.seq_len
    ranges: list[RowRange] = []
    for split in SPLITS:
        rows = open_rows(open_split(job.shards, split, job.settings.shard_cache_bytes), job.rows, seq_len)
        check_any_row(rows, storage.join(job.shards, split), seq_len)
        ranges += plan_ranges(split, rows.shard_rows, max(1, job.settings.unit_tokens // seq_len))
    return ranges


def bytes_per_token(job: TeacherJob) -> int:
    """Return what a token's logits take: for each an fp16 number and an id, and the rest in fp32."""
    return job.settings.top_k * (2 + token_dtype(job.vocab_size)().itemsize) + 4


def find_facts(
    job: TeacherJob, shards: TokenShards, ranges: list[RowRange], commits: list[Commit]
) -> dict[str, JsonValue]:
    """Return what a train step has to know, and what there is."""
    file_rows: dict[str, JsonValue] = {
        split: {part.file: part.stop - part.first for part in ranges if part.split == split} for split in SPLITS
    }
    return {
        "vocab_size": job.vocab_size,
        "tokenizer_digest": shards.fact("tokenizer_digest"),
        "seq_len": job.settings.seq_len,
        "document_mask": job.settings.document_mask,
        "top_k": job.settings.top_k,
        "temperature": job.settings.temperature,
        "bytes": sum(info.bytes for commit in commits for info in commit.files),
        FILE_ROWS: file_rows,
    }


def _unit(part: RowRange, teacher: Checkpoint, shards: TokenShards) -> WorkUnit[RowRange]:
    name = f"{part.split}-{part.file.split('.')[0]}"
    input_hash = make_digest([teacher.content_sha256, shards.content_sha256, part.first, part.stop])
    return WorkUnit(name=name, input_hash=input_hash, payload=part)


def _store_unit(part: RowRange, publish: Publish, job: TeacherJob) -> dict[str, JsonValue]:
    return store_range(part, publish, job)
