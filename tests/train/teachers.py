"""Small artefacts of what a model said to rows, for tests; made without Ray."""

from functools import partial
from pathlib import Path
from typing import Any

from ray_ds.artifacts import Artifact, ReferenceLogProbs, TeacherLogits, TokenShards
from ray_ds.config.reference_log_probs import ReferenceLogProbsSettings
from ray_ds.config.settings import decode_settings
from ray_ds.config.teacher_logits import TeacherLogitsSettings
from ray_ds.data.rows import RowKind
from ray_ds.stage_run import StageRun
from ray_ds.stages.teacher_logits import logit_facts
from ray_ds.train.ask_rows import RowJob, plan_files, row_facts, store_range
from ray_ds.train.reference import ask_reference
from ray_ds.train.teacher import ask_teacher
from tests.stages.small_artifacts import stage_run
from tests.train.runs import VOCAB_SIZE

ROWS = {"seq_len": 16, "precision": "fp32", "unit_tokens": 160, "device": "cpu"}
"""Goes with `tests.train.runs.SMALL`; a few rows are a file."""


def logits_settings(**changes: Any) -> TeacherLogitsSettings:
    """Return settings of small files, with changes."""
    return decode_settings(TeacherLogitsSettings, {**ROWS, "top_k": 8, **changes}, where="logits")


def reference_settings(**changes: Any) -> ReferenceLogProbsSettings:
    """Return settings of small files, with changes."""
    return decode_settings(ReferenceLogProbsSettings, {**ROWS, **changes}, where="reference")


def finish_shards(folder: Path, kind: RowKind = "stream") -> TokenShards:
    """Return the token shards in a folder as an artefact."""
    run = stage_run(folder, "TokenShards")
    facts: dict[str, Any] = {"vocab_size": VOCAB_SIZE, "tokenizer_digest": "abc", "rows": kind}
    artifact = StageRun(**{**vars(run), "uri": str(folder), "digest": folder.name}).commit(facts, seconds=0.0)
    assert isinstance(artifact, TokenShards)
    return artifact


def store_logits(folder: Path, teacher: str, shards: TokenShards, **changes: Any) -> TeacherLogits:
    """Ask the model in a checkpoint's folder about all rows of shards; return what it said as an artefact."""
    settings = logits_settings(**changes)
    job = RowJob(
        settings=settings,
        ask=partial(ask_teacher, settings=settings, vocab_size=VOCAB_SIZE, bos_token_id=0),
        checkpoint=teacher,
        shards=shards.uri,
        rows=shards.fact("rows"),
        device="cpu",
    )
    artifact = _store(job, stage_run(folder, "TeacherLogits", shards), shards, logit_facts(settings, shards))
    assert isinstance(artifact, TeacherLogits)
    return artifact


def store_reference(folder: Path, start: str, shards: TokenShards, *inputs: Artifact) -> ReferenceLogProbs:
    """Ask the model in a checkpoint's folder about all pairs; return what it said as an artefact.

    Args:
        inputs: what the artefact was made from beside the shards.
    """
    settings = reference_settings()
    job = RowJob(
        settings=settings, ask=ask_reference, checkpoint=start, shards=shards.uri, rows="preference", device="cpu"
    )
    artifact = _store(job, stage_run(folder, "ReferenceLogProbs", *inputs, shards), shards, {})
    assert isinstance(artifact, ReferenceLogProbs)
    return artifact


def _store(job: RowJob, run: StageRun, shards: TokenShards, facts: dict[str, Any]) -> Artifact:
    """Return the artefact of a run of the stage in this process."""

    def publish(path: str, data: bytes) -> None:
        Path(run.path(path)).parent.mkdir(parents=True, exist_ok=True)
        Path(run.path(path)).write_bytes(data)

    ranges = plan_files(job)
    for part in ranges:
        store_range(part, publish, job)
    return run.commit({**row_facts(job, shards, ranges), **facts}, seconds=0.0)
