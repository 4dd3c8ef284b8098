"""What the train stage checks of a checkpoint that training starts from, and of shards for an objective."""

from pathlib import Path
from typing import Any

import pytest

from ray_ds.artifacts import Checkpoint, TokenShards
from ray_ds.config.settings import decode_settings
from ray_ds.config.train import TrainSettings
from ray_ds.errors import ArtifactError, ConfigError
from ray_ds.stage_run import StageRun
from ray_ds.stages import train as stage
from ray_ds.tokenizer import train_bpe
from tests.stages.small_artifacts import book_texts, stage_run
from tests.train.chats import new_checkpoint, write_chats
from tests.train.runs import SMALL, VOCAB_SIZE


def make_run(folder: Path, *, digest: str = "abc", kind: str = "chat", vocab_size: int = VOCAB_SIZE) -> StageRun:
    start, shards = stage_run(folder, "Checkpoint", name="start"), stage_run(folder, "TokenShards")
    new_checkpoint(Path(start.uri))
    write_chats(Path(shards.uri), kind)  # type: ignore[arg-type]
    tokenizer = train_bpe(book_texts(2, 2).values(), VOCAB_SIZE)
    (Path(shards.uri) / "tokenizer.json").write_text(tokenizer.to_json())
    facts: dict[str, Any] = {"vocab_size": vocab_size, "tokenizer_digest": "abc", "rows": kind}
    tokens = shards.commit(facts, seconds=0.0)
    checkpoint = start.commit({"tokenizer_digest": digest}, seconds=0.0)
    assert isinstance(tokens, TokenShards) and isinstance(checkpoint, Checkpoint)
    run = stage_run(folder, "Checkpoint", tokens, name="tuned")
    return StageRun(**{**vars(run), "named": {"init_from": checkpoint}})


def make_task(run: StageRun, monkeypatch: pytest.MonkeyPatch, **changes: Any) -> Any:
    monkeypatch.setattr(stage, "choose_device", lambda settings, step, had: "cpu")
    raw = {name: value for name, value in {**SMALL, **changes}.items() if name != "model"}
    settings = decode_settings(TrainSettings, raw, where="train")
    return stage.make_task(settings, run.input(TokenShards), run)


def test_the_model_is_the_checkpoints(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = make_run(tmp_path)
    task = make_task(run, monkeypatch, seq_len=8, batch_tokens=128, lora={"rank": 2})
    assert task.init_from == run.named["init_from"].uri and task.rows == "chat"
    assert (task.config.vocab_size, task.config.max_position_embeddings) == (VOCAB_SIZE, 16)
    assert task.settings.router_bias_speed == 0 and type(task).from_dict(task.to_dict()) == task


@pytest.mark.parametrize(
    ("options", "changes", "kind", "message"),
    [
        ({"digest": "other"}, {}, ArtifactError, r"\(tokenizer other\) must have the tokenizer of the shards, abc, or"),
        ({"vocab_size": 9999}, {}, ArtifactError, r"vocab_size \(300\) must be at least the 9999 tokens of the shards"),
        ({}, {"seq_len": 32}, ConfigError, r"checkpoint.seq_len \(32\) must be at most 16, what .* was made for"),
        ({}, {"objective": {"kind": "dpo"}}, ConfigError, r"objective.kind \(dpo\) must be dpo on preference shards, "),
        ({"kind": "preference"}, {}, ConfigError, r"objective.kind \(next_token\) must be dpo on preference shards"),
        ({}, {"document_mask": True}, ConfigError, r"document_mask \(True\) has no effect on conversations"),
    ],
)
def test_what_does_not_go_together_is_refused(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    options: dict[str, Any],
    changes: dict[str, Any],
    kind: type[Exception],
    message: str,
) -> None:
    with pytest.raises(kind, match=message):
        make_task(make_run(tmp_path, **options), monkeypatch, **changes)
