import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ray_ds.artifacts import Tokenizer, TokenShards
from ray_ds.chat.template import ROLE_TEMPLATE
from ray_ds.config.settings import decode_settings
from ray_ds.config.tokenize_chat import TokenizeChatSettings
from ray_ds.data.conversations import encode_record, find_sources, read_records
from ray_ds.data.shards import TokenSplit
from ray_ds.errors import ConfigError, InputError
from ray_ds.stages.tokenize_chat import tokenize_chat
from ray_ds.tokenizer import train_bpe
from tests.stages.small_artifacts import book_texts, stage_run

CHATS = [
    {"messages": [{"role": "user", "content": f"say {n}"}, {"role": "assistant", "content": f"God {n}"}]}
    for n in range(60)
]
PAIRS = [{"prompt": f"say {n}", "chosen": f"God {n}", "rejected": "void"} for n in range(60)]


def settings_for(folder: Path, records: list[Any], **changes: Any) -> TokenizeChatSettings:
    (folder / "raw").mkdir(exist_ok=True)
    (folder / "raw" / "a.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    files = {"glob": f"{folder}/raw/*.jsonl", "source": "test", "licence": "CC0-1.0"}
    return decode_settings(
        TokenizeChatSettings, {"inputs": [files], "validation_fraction": 0.2, **changes}, where="chat"
    )


def make_tokenizer(folder: Path) -> Tokenizer:
    run = stage_run(folder, "Tokenizer")
    Path(run.uri).mkdir(parents=True, exist_ok=True)
    tokenizer = train_bpe(book_texts(2, 2).values(), 400)
    Path(run.path("tokenizer.json")).write_text(tokenizer.to_json())
    Path(run.path("chat_template.jinja")).write_text(ROLE_TEMPLATE)
    artifact = run.commit({"vocab_size": tokenizer.vocab_size}, seconds=0.0)
    assert isinstance(artifact, Tokenizer)
    return artifact


@pytest.mark.ray
@pytest.mark.usefixtures("local_ray")
@pytest.mark.parametrize(("task", "records", "per_record"), [("chat", CHATS, 1), ("preference", PAIRS, 2)])
def test_conversations_become_shards_that_say_what_is_learnt(
    tmp_path: Path, task: str, records: list[Any], per_record: int
) -> None:
    run = stage_run(tmp_path, "TokenShards", make_tokenizer(tmp_path))
    shards = tokenize_chat(settings_for(tmp_path, records, task=task), run)
    assert isinstance(shards, TokenShards) and shards.fact("rows") == task
    documents = shards.fact("documents")
    assert sum(documents.values()) == 60 * per_record and documents["validation"] > 0
    assert shards.fact("tokenizer_digest") == run.inputs[0].digest
    assert [source.source for source in shards.manifest.sources] == ["test"]
    split = TokenSplit.open(shards.uri, "train")
    tokenizer = train_bpe(book_texts(2, 2).values(), 400)
    ids, mask = split.shard(0).tokens, split.shard(0).loss_mask
    learnt = tokenizer.decode(ids[mask == 1].tolist())
    assert learnt.startswith("God ") and "say" not in learnt and ("void" in learnt) == (task == "preference")
    role = tokenizer.special_ids["<|assistant|>"]
    assert np.count_nonzero(ids == role) == split.num_documents and not mask[ids == role].any()
    assert Path(shards.path("chat_template.jinja")).read_text() == ROLE_TEMPLATE


@pytest.mark.ray
@pytest.mark.usefixtures("local_ray")
def test_a_split_without_conversations_is_refused(tmp_path: Path) -> None:
    run = stage_run(tmp_path, "TokenShards", make_tokenizer(tmp_path))
    with pytest.raises(ConfigError, match="must leave conversations for validation; it has none"):
        tokenize_chat(settings_for(tmp_path, CHATS[:2], validation_fraction=0.01), run)


@pytest.mark.parametrize(
    ("record", "task", "message"),
    [
        ({"text": "x"}, "chat", r"here: messages \(missing\) must be a text or a list of {role, content}"),
        ({"messages": [{"role": "user"}]}, "chat", r"here: messages \(\[{\"role\": \"user\"}\]\) must be a text or"),
        ({"messages": "only a question"}, "chat", r"here \(no answer\) must have a message of role assistant"),
        ({"prompt": "x", "chosen": "y"}, "preference", r"here: rejected \(missing\) must be a text or a list"),
    ],
)
def test_damaged_records_are_named(record: Any, task: str, message: str) -> None:
    from ray_ds.chat.encoding import ChatEncoder
    from ray_ds.chat.template import DEFAULT_TEMPLATE, ChatTemplate

    encoder = ChatEncoder(ChatTemplate(DEFAULT_TEMPLATE), train_bpe(book_texts(2, 2).values(), 400))
    with pytest.raises(InputError, match=message):
        encode_record(record, "here", encoder, task)


def test_files_that_are_missing_or_damaged_are_named(tmp_path: Path) -> None:
    settings = settings_for(tmp_path, CHATS)
    (tmp_path / "raw" / "a.jsonl").write_text('{"messages": []}\n{"messages"\n')
    with pytest.raises(InputError, match=r"a.jsonl line 2 \(.*\) must be JSON; mend or remove the line"):
        list(read_records(f"{tmp_path}/raw/a.jsonl"))
    (tmp_path / "raw" / "a.jsonl").unlink()
    with pytest.raises(InputError, match=r"inputs.0.glob \(.*\) must match a file or more; it matches none"):
        find_sources(settings)
    (tmp_path / "raw" / "a.jsonl").write_text("")
    missing = settings_for(tmp_path, [], template=f"{tmp_path}/none.jinja")
    with pytest.raises(InputError, match=r"template \(.*none.jinja\) must be a file"):
        find_sources(missing)
