"""Small artefacts of stored logits for tests, made without Ray."""

from pathlib import Path
from typing import Any

from ray_ds.artifacts import TeacherLogits, TokenShards
from ray_ds.config.settings import decode_settings
from ray_ds.config.teacher_logits import TeacherLogitsSettings
from ray_ds.data.rows import RowKind
from ray_ds.stage_run import StageRun
from ray_ds.stages.teacher_logits import find_facts, plan_files
from ray_ds.train.teacher import TeacherJob, store_range
from tests.stages.small_artifacts import stage_run
from tests.train.runs import VOCAB_SIZE


def logits_settings(**changes: Any) -> TeacherLogitsSettings:
    """Return settings that go with `tests.train.runs.SMALL`, with changes; a few rows are a file."""
    raw = {"seq_len": 16, "top_k": 8, "precision": "fp32", "unit_tokens": 160, "device": "cpu", **changes}
    return decode_settings(TeacherLogitsSettings, raw, where="logits")


def finish_shards(folder: Path, kind: RowKind = "stream") -> TokenShards:
    """Return the token shards in a folder as an artefact."""
    run = stage_run(folder, "TokenShards")
    facts: dict[str, Any] = {"vocab_size": VOCAB_SIZE, "tokenizer_digest": "abc", "rows": kind}
    artifact = StageRun(**{**vars(run), "uri": str(folder), "digest": folder.name}).commit(facts, seconds=0.0)
    assert isinstance(artifact, TokenShards)
    return artifact


def store_logits(folder: Path, teacher: str, shards: TokenShards, **changes: Any) -> TeacherLogits:
    """Ask the model in a checkpoint's folder about all rows of shards; return what it said as an artefact."""
    kind: Any = shards.fact("rows")
    job = TeacherJob(
        settings=logits_settings(**changes),
        checkpoint=teacher,
        shards=shards.uri,
        rows=kind,
        vocab_size=VOCAB_SIZE,
        bos_token_id=0,
        device="cpu",
    )
    run = stage_run(folder, "TeacherLogits", shards)

    def publish(path: str, data: bytes) -> None:
        Path(run.path(path)).parent.mkdir(parents=True, exist_ok=True)
        Path(run.path(path)).write_bytes(data)

    ranges = plan_files(job)
    for part in ranges:
        store_range(part, publish, job)
    artifact = run.commit(find_facts(job, shards, ranges, []), seconds=0.0)
    assert isinstance(artifact, TeacherLogits)
    return artifact
