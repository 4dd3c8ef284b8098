"""The teacher_logits stage: Checkpoint + TokenShards -> TeacherLogits, on Ray Data.

A train step that names the result as its `teacher` needs no second model beside its own.
"""

from functools import partial

from pydantic import JsonValue

from ray_ds.artifacts import Artifact, Checkpoint, TokenShards
from ray_ds.config.teacher_logits import TeacherLogitsSettings
from ray_ds.data.shard_file import token_dtype
from ray_ds.errors import ArtifactError, ConfigError
from ray_ds.on_ray.row_files import choose_device, store_rows
from ray_ds.stage_run import StageRun
from ray_ds.tokenizer import load_tokenizer
from ray_ds.train.ask_rows import RowJob
from ray_ds.train.inputs import check_document_mask, read_model, row_kind
from ray_ds.train.teacher import ask_teacher


def store_teacher_logits(settings: TeacherLogitsSettings, run: StageRun) -> Artifact:
    """Store the largest logits that the model has for every row of both splits.

    Raises:
        ArtifactError: an input is damaged, or the model has another tokenizer than the shards.
        ConfigError: rows are longer than the model takes, or a setting does not go with the shards.
    """
    teacher, shards = run.input(Checkpoint), run.input(TokenShards)
    job = make_job(settings, teacher, shards, run.step)
    return store_rows(
        job,
        run,
        logit_facts(settings, shards),
        max_running=settings.max_running_units,
        bytes_per_token=settings.top_k * (2 + token_dtype(shards.fact("vocab_size"))().itemsize) + 4,
    )


def make_job(settings: TeacherLogitsSettings, teacher: Checkpoint, shards: TokenShards, step: str) -> RowJob:
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
    kind = row_kind(shards)
    if kind == "preference":
        allowed = "must be shards of text or conversations: pairs of answers are no text to distil"
        raise ArtifactError(shards.uri, "preference shards", allowed, "name other shards in `from`")
    check_document_mask(settings.document_mask, kind, step)
    bos_token_id = load_tokenizer(shards.path("tokenizer.json")).bos_id
    return RowJob(
        settings=settings,
        ask=partial(ask_teacher, settings=settings, vocab_size=vocab_size, bos_token_id=bos_token_id),
        checkpoint=teacher.uri,
        shards=shards.uri,
        rows=kind,
        device=choose_device(settings.device),
    )


def logit_facts(settings: TeacherLogitsSettings, shards: TokenShards) -> dict[str, JsonValue]:
    """Return what a train step has to know of the logits."""
    return {
        "vocab_size": shards.fact("vocab_size"),
        "document_mask": settings.document_mask,
        "top_k": settings.top_k,
        "temperature": settings.temperature,
    }
