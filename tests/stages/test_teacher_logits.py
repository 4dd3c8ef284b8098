"""The teacher_logits stage on Ray, and what a train step asks of its result."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from ray_ds.artifacts import Artifact, Checkpoint, TeacherLogits, TokenShards
from ray_ds.config.settings import decode_settings
from ray_ds.config.train import TrainSettings
from ray_ds.data.rows import open_rows
from ray_ds.data.shards import TokenSplit
from ray_ds.data.teacher_logits import open_logits
from ray_ds.errors import ArtifactError, ConfigError
from ray_ds.model.checkpoint_folder import load_checkpoint_folder
from ray_ds.stage_run import StageRun
from ray_ds.stages import train as train_stage
from ray_ds.stages.teacher_logits import make_job, store_teacher_logits
from ray_ds.tokenizer import train_bpe
from tests.stages.small_artifacts import book_texts, stage_run
from tests.train.chats import new_checkpoint, write_chats
from tests.train.runs import SMALL, VOCAB_SIZE, write_shards
from tests.train.teachers import logits_settings, store_logits


def make_inputs(folder: Path, kind: str = "stream", *, digest: str = "abc") -> tuple[Checkpoint, TokenShards]:
    """Return a teacher and shards of text, conversations or pairs."""
    start, run = stage_run(folder, "Checkpoint", name="teacher"), stage_run(folder, "TokenShards", name=kind)
    new_checkpoint(Path(start.uri))
    if kind == "stream":
        write_shards(Path(run.uri))
    else:
        write_chats(Path(run.uri), kind)  # type: ignore[arg-type]
    (Path(run.uri) / "tokenizer.json").write_text(train_bpe(book_texts(2, 2).values(), VOCAB_SIZE).to_json())
    facts: dict[str, Any] = {"vocab_size": VOCAB_SIZE, "tokenizer_digest": "abc", "rows": kind}
    teacher, shards = start.commit({"tokenizer_digest": digest}, seconds=0.0), run.commit(facts, seconds=0.0)
    assert isinstance(teacher, Checkpoint) and isinstance(shards, TokenShards)
    return teacher, shards


@pytest.mark.ray
@pytest.mark.shows("A teacher's largest logits are stored once, in files that a killed job does not make again")
@pytest.mark.parametrize(("kind", "document_mask"), [("stream", True), ("chat", False)])
def test_logits_are_the_teachers(tmp_path: Path, local_ray: None, kind: str, document_mask: bool) -> None:
    teacher, shards = make_inputs(tmp_path, kind)
    run = stage_run(tmp_path, "TeacherLogits", teacher, shards)
    logits = store_teacher_logits(logits_settings(document_mask=document_mask, temperature=2.0), run)
    assert isinstance(logits, TeacherLogits) and len(logits.fact("file_rows", "train")) >= 4
    assert logits.fact("bytes") == sum(info.bytes for info in logits.manifest.files)
    model = load_checkpoint_folder(Path(teacher.path("model")), dtype=torch.float32, device="cpu")
    rows = open_rows(TokenSplit.open(shards.uri, "validation"), kind, 16)  # type: ignore[arg-type]
    stored = open_logits(logits, "validation", rows)
    for index in range(0, sum(rows.shard_rows), 7):
        row = rows.row(index)
        documents = row.segments if row.segments is not None else np.cumsum(row.tokens == 0)
        documents = documents - documents[0]
        whole = model(torch.from_numpy(row.tokens)[None], segments=torch.from_numpy(documents)[None])[0].detach()
        ids, top, log_rest = (torch.from_numpy(values.copy()) for values in stored.row(index, row))
        differences = whole - whole.amax(dim=1, keepdim=True)
        expected = differences.sort(dim=1, descending=True).values[:, :8]
        torch.testing.assert_close(top.float(), expected, rtol=2**-11, atol=1e-5)
        torch.testing.assert_close(differences.gather(1, ids.long()), expected, rtol=1e-5, atol=1e-5)
        rest = (differences / 2.0).scatter(1, ids.long(), -torch.inf).exp().sum(dim=1).log()
        torch.testing.assert_close(log_rest, rest, rtol=1e-5, atol=1e-5)


@pytest.mark.ray
def test_a_broken_off_job_goes_on_where_it_was(tmp_path: Path, local_ray: None) -> None:
    teacher, shards = make_inputs(tmp_path)
    run = stage_run(tmp_path, "TeacherLogits", teacher, shards)
    first = store_teacher_logits(logits_settings(), run)
    attempts = Path(run.work_path("rows", "attempts"))
    tried = len(list(attempts.iterdir()))
    Path(run.path("manifest.json")).unlink()
    Path(run.path("train", "00001-00001.arrow")).unlink()
    again = store_teacher_logits(logits_settings(), run)
    assert again.content_sha256 == first.content_sha256 and len(list(attempts.iterdir())) == tried + 1


@pytest.mark.ray
@pytest.mark.slow
def test_a_student_is_trained_from_what_the_stage_stored(tmp_path: Path, local_ray: None) -> None:
    teacher, shards = make_inputs(tmp_path)
    logits = store_teacher_logits(logits_settings(), stage_run(tmp_path, "TeacherLogits", teacher, shards))
    raw = {**SMALL, "steps": 6, "num_workers": 1, "validate_every": 3, "objective": {"kind": "distill"}}
    run = stage_run(tmp_path, "Checkpoint", shards, name="student")
    run = StageRun(**{**vars(run), "named": {"teacher": logits}})
    student = train_stage.train(decode_settings(TrainSettings, raw, where="train"), run)
    records = [json.loads(line) for line in Path(student.path("metrics.jsonl")).read_text().splitlines()]
    assert len(records) == 6 and all(record["kl"] > 0 for record in records)
    assert records[-1]["loss"] < records[0]["loss"] and "validation_loss" in records[-1]
    assert [ref.kind for ref in student.manifest.inputs] == ["TokenShards", "TeacherLogits"]


@pytest.mark.parametrize(
    ("kind", "digest", "changes", "error", "message"),
    [
        ("stream", "other", {}, ArtifactError, r"\(tokenizer other\) must have the tokenizer of the shards, abc, or"),
        ("preference", "abc", {}, ArtifactError, r"\(preference shards\) must be shards of text or conversations"),
        ("stream", "abc", {"top_k": 301}, ConfigError, r"logits.top_k \(301\) must be at most 300, the tokens"),
        ("stream", "abc", {"seq_len": 64}, ConfigError, r"logits.seq_len \(64\) must be at most 16, what .* was made"),
        ("chat", "abc", {"document_mask": True}, ConfigError, r"document_mask \(True\) has no effect on conversations"),
    ],
)  # fmt: skip
def test_what_does_not_go_together_is_refused(
    tmp_path: Path, kind: str, digest: str, changes: dict[str, Any], error: type[Exception], message: str
) -> None:
    teacher, shards = make_inputs(tmp_path, kind, digest=digest)
    with pytest.raises(error, match=message):
        make_job(logits_settings(**changes), teacher, shards, "logits")


def make_task(
    folder: Path, logits: Artifact, shards: TokenShards, monkeypatch: pytest.MonkeyPatch, **changes: Any
) -> Any:
    monkeypatch.setattr(train_stage, "choose_device", lambda settings, step, had: "cpu")
    settings = decode_settings(TrainSettings, {**SMALL, "objective": {"kind": "distill"}, **changes}, where="train")
    run = stage_run(folder, "Checkpoint", shards, name="student")
    run = StageRun(**{**vars(run), "named": {"teacher": logits}})
    task = train_stage.make_task(settings, shards, run)
    train_stage.check_task(task, run)
    return task


def test_training_takes_the_logits_of_its_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(train_stage, "check_cluster", lambda *args, **kwargs: None)
    teacher, shards = make_inputs(tmp_path)
    logits = store_logits(tmp_path, teacher.uri, shards)
    task = make_task(tmp_path, logits, shards, monkeypatch)
    assert task.teacher_logits == logits.uri and task.teacher is None
    assert type(task).from_dict(task.to_dict()) == task
    for changes, message in (
        ({"seq_len": 8}, r"checkpoint.seq_len \(8\) must be that of the logits, 16; correct one"),
        ({"document_mask": True}, r"document_mask \(True\) must be that of the logits, False"),
        ({"objective": {"kind": "distill", "temperature": 3.0}}, r"objective.temperature \(3.0\) must be that of the "),
    ):
        with pytest.raises(ConfigError, match=message):
            make_task(tmp_path, logits, shards, monkeypatch, **changes)
    path = Path(logits.path(logits.manifest.files[0].path))
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    with pytest.raises(ArtifactError, match=r"sha256 .* must have sha256"):
        make_task(tmp_path, logits, shards, monkeypatch)


def test_logits_of_other_shards_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    teacher, shards = make_inputs(tmp_path)
    logits = store_logits(tmp_path, teacher.uri, shards)
    _, others = make_inputs(tmp_path, "chat")
    with pytest.raises(
        ArtifactError, match=r"\(made from the shards .*\) must be made from the shards that are trained"
    ):
        make_task(tmp_path, logits, others, monkeypatch)
    far = dataclasses.replace(logits, uri="s3://bucket/logits/abc")
    with pytest.raises(
        ArtifactError, match=r"teacher \(s3://bucket/logits/abc\) must lie on a disk where the shards do"
    ):
        make_task(tmp_path, far, shards, monkeypatch)
    foreign = dataclasses.replace(shards, manifest=dataclasses.replace(shards.manifest, facts={
        **shards.manifest.facts, "tokenizer_digest": "other"}))  # fmt: skip
    with pytest.raises(ArtifactError, match=r"\(tokenizer abc\) must have the tokenizer of the shards, other"):
        make_task(tmp_path, logits, foreign, monkeypatch)
