"""The reference_log_probs stage on Ray, and what a DPO step asks of its result."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest

from ray_ds.artifacts import Artifact, Checkpoint, ReferenceLogProbs, TokenShards
from ray_ds.config.settings import decode_settings
from ray_ds.config.train import TrainSettings
from ray_ds.errors import ArtifactError, ConfigError
from ray_ds.stage_run import StageRun
from ray_ds.stages import train as train_stage
from ray_ds.stages.reference_log_probs import make_job, store_reference_log_probs
from ray_ds.tokenizer import train_bpe
from ray_ds.train.task import TrainTask
from tests.stages.small_artifacts import book_texts, flip_byte, stage_run
from tests.train.chats import new_checkpoint, write_chats
from tests.train.runs import SMALL, VOCAB_SIZE
from tests.train.teachers import reference_settings, store_reference

DPO = {"kind": "dpo", "beta": 1.0}


def make_start(folder: Path, seed: int = 5) -> Checkpoint:
    """Return a model to start from."""
    run = stage_run(folder, "Checkpoint", name=f"start{seed}")
    new_checkpoint(Path(run.uri), seed)
    start = run.commit({"tokenizer_digest": "abc"}, seconds=0.0)
    assert isinstance(start, Checkpoint)
    return start


def make_pairs(folder: Path, *, name: str = "pairs", kind: str = "preference", template: str = "a") -> TokenShards:
    """Return shards of pairs, or of conversations, in a chat template."""
    run = stage_run(folder, "TokenShards", name=name)
    write_chats(Path(run.uri), kind)  # type: ignore[arg-type]
    (Path(run.uri) / "tokenizer.json").write_text(train_bpe(book_texts(2, 2).values(), VOCAB_SIZE).to_json())
    (Path(run.uri) / "chat_template.jinja").write_text(template)
    shards = run.commit({"vocab_size": VOCAB_SIZE, "tokenizer_digest": "abc", "rows": kind}, seconds=0.0)
    assert isinstance(shards, TokenShards)
    return shards


def dpo_run(folder: Path, start: Checkpoint, reference: Artifact, shards: TokenShards) -> StageRun:
    run = stage_run(folder, "Checkpoint", shards, name="tuned")
    return StageRun(**{**vars(run), "named": {"init_from": start, "reference": reference}})


def dpo_settings(**changes: Any) -> TrainSettings:
    raw = {**SMALL, "objective": DPO, **changes}
    del raw["model"]
    return decode_settings(TrainSettings, raw, where="train")


def make_task(
    folder: Path,
    start: Checkpoint,
    reference: Artifact,
    shards: TokenShards,
    monkeypatch: pytest.MonkeyPatch,
    **changes: Any,
) -> TrainTask:
    """Return what workers of a DPO step are told, all checks passed."""
    monkeypatch.setattr(train_stage, "choose_device", lambda settings, step, had: "cpu")
    monkeypatch.setattr(train_stage, "check_cluster", lambda *args, **kwargs: None)
    run = dpo_run(folder, start, reference, shards)
    task = train_stage.make_task(dpo_settings(**changes), shards, run)
    train_stage.check_task(task, run)
    return task


@pytest.mark.ray
@pytest.mark.shows("A reference's log-probabilities are stored by a step, and DPO trains by them")
def test_dpo_is_trained_by_what_the_stage_stored(tmp_path: Path, local_ray: None) -> None:
    start, shards = make_start(tmp_path), make_pairs(tmp_path)
    stored = store_reference_log_probs(
        reference_settings(), stage_run(tmp_path, "ReferenceLogProbs", start, shards, name="on Ray")
    )
    assert isinstance(stored, ReferenceLogProbs) and len(stored.fact("file_rows", "train")) >= 2
    assert stored.fact("bytes") == sum(info.bytes for info in stored.manifest.files)
    assert stored.content_sha256 == store_reference(tmp_path, start.uri, shards, start).content_sha256
    tuned = train_stage.train(
        dpo_settings(steps=12, num_workers=1, validate_every=6), dpo_run(tmp_path, start, stored, shards)
    )
    records = [json.loads(line) for line in Path(tuned.path("metrics.jsonl")).read_text().splitlines()]
    assert abs(records[0]["reward_margin"]) < 1e-4 and abs(records[0]["loss"] - 0.6931472) < 1e-4
    assert records[-1]["reward_accuracy"] > 0.9 and records[-1]["validation_loss"] < 0.6
    assert [ref.kind for ref in tuned.manifest.inputs] == ["TokenShards", "Checkpoint", "ReferenceLogProbs"]


@pytest.mark.parametrize(
    ("kind", "digest", "seq_len", "error", "message"),
    [
        ("preference", "other", 16, ArtifactError, r"\(tokenizer other\) must have the tokenizer of the shards, abc,"),
        ("chat", "abc", 16, ArtifactError, r"\(chat shards\) must be shards of pairs of answers, which DPO compares"),
        ("preference", "abc", 64, ConfigError, r"reference.seq_len \(64\) must be at most 16, what .* was made for"),
    ],
)
def test_what_does_not_go_together_is_refused(
    tmp_path: Path, kind: str, digest: str, seq_len: int, error: type[Exception], message: str
) -> None:
    start, shards = make_start(tmp_path), make_pairs(tmp_path, kind=kind)
    facts = {**start.manifest.facts, "tokenizer_digest": digest}
    start = dataclasses.replace(start, manifest=dataclasses.replace(start.manifest, facts=facts))
    with pytest.raises(error, match=message):
        make_job(reference_settings(seq_len=seq_len), start, shards, "reference")


def test_training_takes_the_log_probabilities_of_its_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    start, shards = make_start(tmp_path), make_pairs(tmp_path)
    stored = store_reference(tmp_path, start.uri, shards, start)
    task = make_task(tmp_path, start, stored, shards, monkeypatch)
    assert task.reference_log_probs == stored.uri and task.init_from == start.uri
    assert TrainTask.from_dict(task.to_dict()) == task
    message = r"checkpoint.seq_len \(8\) must be that of the log-probabilities, 16; correct one"
    with pytest.raises(ConfigError, match=message):
        make_task(tmp_path, start, stored, shards, monkeypatch, seq_len=8)
    flip_byte(stored)
    with pytest.raises(ArtifactError, match=r"sha256 .* must have sha256"):
        make_task(tmp_path, start, stored, shards, monkeypatch)


@pytest.mark.shows("Log-probabilities of another model, of other pairs or of another chat template are refused")
def test_log_probabilities_of_others_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    start, shards = make_start(tmp_path), make_pairs(tmp_path)
    stored = store_reference(tmp_path, start.uri, shards, start)
    with pytest.raises(
        ArtifactError, match=r"\(made from the checkpoint .*\) must be made from the checkpoint that tr"
    ):
        make_task(tmp_path, make_start(tmp_path, seed=6), stored, shards, monkeypatch)
    other_template = make_pairs(tmp_path, name="other template", template="b")
    with pytest.raises(
        ArtifactError, match=r"\(made from the shards .*\) must be made from the shards that are traine"
    ):
        make_task(tmp_path, start, stored, other_template, monkeypatch)
    far = dataclasses.replace(stored, uri="s3://bucket/reference/abc")
    with pytest.raises(ArtifactError, match=r"reference \(s3://bucket/reference/abc\) must lie on a disk where the sh"):
        make_task(tmp_path, start, far, shards, monkeypatch)
    facts = {**shards.manifest.facts, "tokenizer_digest": "other"}
    foreign = dataclasses.replace(shards, manifest=dataclasses.replace(shards.manifest, facts=facts))
    other_start = dataclasses.replace(start, manifest=dataclasses.replace(start.manifest, facts=facts))
    with pytest.raises(ArtifactError, match=r"\(tokenizer abc\) must have the tokenizer of the shards, other"):
        make_task(tmp_path, other_start, stored, foreign, monkeypatch)
